"""What a certificate says on the page, and whether it is about the checkpoint that is there."""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sorted_llama.trainer.escaping import markdown

from .answering import conditions, decoding_options
from .checkpoint import load_model, load_tokenizer
from .settings import Setting


DIFFERS = "differs"  # the loss of an answer whose text is not full depth's


def find_faults(certificates: Sequence[dict[str, Any]], path: str | Path) -> list[str]:
    """In what the checkpoint in a folder, as it loads by itself, differs from each certificate's; a warning if so."""
    try:
        model, tokenizer = load_model(path, "auto", "cpu"), load_tokenizer(path)
    except ValueError:
        model = tokenizer = None
    conditions_as = functools.cache(lambda dtype: conditions(model, tokenizer, getattr(torch, dtype)))
    found = []
    for certificate in certificates:
        different = ["weights or tokenizer, which cannot be read"]
        if model is not None:
            here = {**conditions_as(certificate["dtype"]), "dtype": str(model.dtype).removeprefix("torch.")}
            different = [name.replace("_", " ") for name in here if here[name] != certificate.get(name)]
            longest = certificate["decoding"]["max_new_tokens"]
            certified = {name: value for name, value in certificate["decoding"].items() if name != "batch_size"}
            if certified != decoding_options(model, longest):
                different.append("generation config")
        found.append(", ".join(different))
        if different:
            name = certificate["data"]["name"]
            warnings.warn(f"The checkpoint differs from what {name!r} has certified in {found[-1]}.", stacklevel=2)
    return found


def certificates_block(certificates: Sequence[dict[str, Any]], path: str | Path) -> str:
    """The certificates in Markdown; those of another checkpoint than that in the folder are void."""
    lines = ["Certified depth (Learn then Test, arXiv 2110.01052; data and tests are in `evaluation.json`):", ""]
    for certificate, fault in zip(certificates, find_faults(certificates, path), strict=True):
        void = f" **Void: the checkpoint differs from what was certified in {fault}.**" if fault else ""
        lines.append(f"- {certificate_line(certificate)}{void}")
    return "\n".join(lines)


def certificate_line(certificate: dict[str, Any]) -> str:
    """What is promised, and what is not, in Markdown."""
    share, certainty = f"{100 * certificate['risk']:.3g} %", f"{100 * (1 - certificate['delta']):.4g} % certainty"
    prompts = f"prompts like those of {markdown(certificate['data']['name'])} (n = {certificate['tested_on']})"
    if certificate["loss"] == DIFFERS:
        promise = f"at most {share} of the answers to {prompts} differ from full depth's"
    else:
        metric = markdown(certificate["loss"].replace("_", " "))
        points = f"{100 * certificate['risk']:.3g} points of 100"
        promise = f"the {metric} of the answers to {prompts} is at most {points} below full depth's, gains not counted"
    if "setting" not in certificate:
        return f"Of no setting cheaper than full depth it could be shown with {certainty} that {promise}."
    call, speed_up = Setting.read(certificate["setting"]).call, certificate["speed_up"]
    longest = certificate["decoding"]["max_new_tokens"]
    return (
        f"With {certainty}, {promise}, at `{call}`, at {speed_up:.2f}x its speed. Not promised: other prompts, other "
        f"weights, another precision than {markdown(certificate['dtype'])}, another chat template, answers of more "
        f"than {longest} tokens, sampling."
    )
