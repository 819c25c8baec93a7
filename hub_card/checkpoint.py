"""A checkpoint from its folder or the Hub; what is wrong with it is told in a line, the cheap parts first."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer

from sorted_llama.modeling_sorted_llama import SortedLlamaConfig, SortedLlamaForCausalLM
from sorted_llama.modeling_sorted_llama.modes_sorted_llama import make_plain
from sorted_llama.trainer.escaping import one_line


def load_config(path: str | Path, revision: str | None = None, **fields: Any) -> SortedLlamaConfig:
    """The configuration of a checkpoint, changed by `fields`; `ValueError` if it is none of a Llama, or not there."""
    folder = Path(path)
    if folder.exists() and not (folder / "config.json").is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        merge = "`PeftModel.from_pretrained(base, path).merge_and_unload().save_pretrained(FOLDER)`"
        hint = f", which holds an adapter: merge it into its base first, {merge}" if is_adapter else ""
        raise ValueError(f"`path` must be the folder of a checkpoint, with a config.json, got {str(path)!r}{hint}.")
    try:
        return SortedLlamaConfig.from_pretrained(path, revision=revision, **fields)
    except ValueError as error:
        raise ValueError(f"`path={str(path)!r}`: {one_line(error)}") from error
    except OSError as error:
        what = "" if folder.exists() else "is no folder here, and the Hub gives no such model: "
        raise ValueError(f"`path={str(path)!r}` {what}{one_line(error)}") from error
    except (StrictDataclassError, AttributeError, TypeError) as error:  # of what is in the file
        raise ValueError(f"`path={str(path)!r}`: its config.json is none of a Llama: {one_line(error)}") from error


def load_tokenizer(path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint; `ValueError` if there is none, or if its files are broken."""
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library has no narrower one
        raise ValueError(f"The tokenizer of {str(path)!r} could not be loaded: {one_line(error)}") from error


def load_answering_tokenizer(path: str | Path) -> Any:
    """A tokenizer to ask questions with: it must have a token that ends answers, and gets one to pad with."""
    tokenizer = load_tokenizer(path)
    if tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer of {str(path)!r} has no end-of-text token (`eos_token`), which ends answers.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(path: str | Path, dtype: str, device: str | None = None, exit_layers: list[int] | None = None) -> Any:
    """
    A model to evaluate, on a GPU where there is one; `exit_layers` go before the exits and the depth of its config.
    `ValueError` if there are no weights, if their files are broken, or if some are missing.
    """
    exits: Any = {"exit_layers": exit_layers, "exit_loss_weights": None, "exit_layer": None}
    fields = {} if exit_layers is None else exits
    try:
        model, info = SortedLlamaForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, **fields)
    except (OSError, RuntimeError, SafetensorError) as error:  # also of other shapes than the config says
        raise ValueError(f"The weights of {str(path)!r} could not be loaded: {one_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:  # would be random
        raise ValueError(f"The weights of {str(path)!r} lack {len(missing)} tensors, {missing[0]} for example.")
    make_plain(model.generation_config)  # every call here names its depth, which no other may bound
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def check_device(device: str | None) -> None:
    """Check that torch finds a device here, by its name; the default, `None`, always is there."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = one_line(error)[:200]
        raise ValueError(f"`device` must be one that torch finds here, got {device!r}: {reason}") from error
