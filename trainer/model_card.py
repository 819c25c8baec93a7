"""The page of a checkpoint, as training knows it: a template of named blocks, which the evaluation fills up later."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import logging
from yaml import YAMLError

from sorted_llama.modeling_sorted_llama.heads_sorted_llama import EXIT_HEADS

from .escaping import hub_links, markdown, one_line, python_literal, without_marks


logger = logging.get_logger(__name__)

QUESTION = "What is the capital of France?"
START = "The capital of France is"

_LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)"""
# An adapter's folder holds no code, and PEFT drops weights that the base has no place for
_LOAD_ADAPTER = """\
from peft import PeftModel
from sorted_llama import SortedLlamaForCausalLM
from transformers import AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
base = SortedLlamaForCausalLM.from_pretrained({base}, exit_layers={exits}{own})
model = PeftModel.from_pretrained(base, name)"""
_ASK_CHAT = f"""\
messages = [{{"role": "user", "content": "{QUESTION}"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)"""
_ASK = f'inputs = tokenizer("{START}", return_tensors="pt").to(model.device)'
_CALLS = {
    "exit_layer={low}, ": "  # the first {low} of {full_depth} layers",
    "exit_threshold=0.9, ": "  # each token at the exit that is sure",
    "assistant_early_exit={low}, ": "  # full depth's answer, drafted",
}
_TRUST = """
No other package than `transformers` is needed. `trust_remote_code=True` runs the Python files of this repository. \
Read them, then pin what you have read, `code_revision="<commit>"`, so that a later change does not run unseen on \
your machine."""


def new_page(data: Any, model_name: str, dataset_name: str | None = None) -> str:
    """The template, filled in, with its metadata: a `CardData`."""
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_suffix(".md")),
        model_name=markdown(model_name),
        base_links=hub_links(data.get("base_model") or []),
        dataset_links=hub_links(dataset_name or [], "datasets/"),
    ).content


def open_page(file: Path, new: str) -> ModelCard:
    """
    The page that is there, with our blocks; where there is none, `new`, which also comes above somebody else's page,
    whose metadata stay. A file that is no UTF-8, or whose metadata cannot be read, is a ValueError, TypeError or
    YAMLError.
    """
    card = ModelCard(new)
    if not file.is_file():
        return card
    old = ModelCard(file.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True)
    if has_blocks(old.text):
        return old
    if old.text.strip().startswith(ModelCard.from_template(ModelCardData()).text.strip()):
        return card  # the Hub's form, which PEFT leaves with every adapter, and nobody has filled in
    vars(card.data).update(old.data.to_dict())
    card.text = f"{card.text.rstrip()}\n\n{old.text.strip()}\n"
    return card


def update_page(file: Path, new: str) -> None:
    """
    Write what a training knows, the page `new`, into the page that is there: blocks and metadata, and nothing else. A
    page that cannot be read stays as it is, with a warning.
    """
    try:
        card = open_page(file, new)
    except (ValueError, TypeError, YAMLError) as error:
        logger.warning(f"The page {str(file)!r} could not be read, and stays as it is: {one_line(error)}")
        return
    for name in ("about", "use", "training"):
        card.text = set_block(card.text, name, get_block(new, name) or "")
    data: Any = ModelCard(new).data
    data.tags = list(dict.fromkeys([*(card.data.get("tags") or []), *(data.tags or [])]))
    vars(card.data).update({name: value for name, value in vars(data).items() if value is not None})
    temporary = file.with_name(f"_{file.name}.{os.getpid()}")  # nothing that begins with `_` is pushed
    card.save(temporary)
    temporary.replace(file)


def get_block(page: str, name: str) -> str | None:
    """What stands between the marks of a block; `None` where the page has no such block."""
    block = _block(name).search(page)
    return block and block[2].strip()


def set_block(page: str, name: str, content: str) -> str:
    """
    The page with other content between the marks of a block, where it has that block. What reads like a mark in the
    content is shown as text.
    """
    content = without_marks(content.strip())
    return _block(name).sub(lambda block: f"{block[1]}{content}\n{block[3]}", page, count=1)


def _block(name: str) -> re.Pattern:
    """A block: the mark at its begin, its content, the mark at its end."""
    begin, end = f"<!-- sorted-llama: {name} -->", f"<!-- /sorted-llama: {name} -->"
    return re.compile(f"^({re.escape(begin)}\n)(.*?)^({re.escape(end)})$", re.DOTALL | re.MULTILINE)


def has_blocks(page: str) -> bool:
    """Whether any block of ours is in the page."""
    return re.search(r"^<!-- sorted-llama: \w+ -->$", page, re.MULTILINE) is not None


def use_block(
    name: str, exits: list[int], base: str | None = None, exit_heads: str = "shared", chat: bool = False
) -> str:
    """
    The calls to paste, with the exits of the model `name`: each prints its answer, on any machine; of an adapter for
    the model `base`, with what its exits own; with `chat` through the tokenizer's chat template.
    """
    if base == "":
        return "The adapter's base has no id or folder that a call could name."
    if base is None:
        load = _LOAD.format(name=python_literal(name))
    else:
        own = f", exit_heads={python_literal(exit_heads)}" if EXIT_HEADS[exit_heads].owned else ""
        load = _LOAD_ADAPTER.format(name=python_literal(name), base=python_literal(base), exits=exits, own=own)
    lines = ["```python", load, _ASK_CHAT if chat else _ASK]
    for call, comment in _CALLS.items() if len(exits) > 1 else [("", "")]:
        line = f"tokens = model.generate(**inputs, {call}max_new_tokens=32){comment}"
        lines += ["", line.format(low=exits[0], full_depth=exits[-1])]
        lines += ["print(tokenizer.decode(tokens[0], skip_special_tokens=True))"]
    return "\n".join([*lines, "```", *([_TRUST] if base is None else [])])


def training_block(trainer: Any) -> str:
    """What a [`SortedSFTTrainer`] did, from its own arguments and state, as Markdown."""
    args, state, exits = trainer.args, trainer.state, trainer.exit_layers
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    weights = ", ".join(f"{w:g}" for w in trainer.exit_loss_weights or [1.0] * len(exits))
    some = f", {args.exits_per_step} beside full depth" if args.exit_schedule == "random" else ""
    facts = {
        "exits": ", ".join(map(str, exits)),
        "weights of their losses": f"{weights}; {args.exit_loss_reduction}",
        "exits a step": f"{args.exit_schedule}{some}",
        "exit heads": trainer.model.config.exit_heads + (", detached" if args.detach_exits else ""),
        "trained": f"{args.trainable}, {trainer.get_num_trainable_parameters() / 1e6:,.1f} M parameters",
        "self-distillation": args.self_distillation_weight and f"{args.self_distillation_weight:g}",
        "optimization": f"{state.global_step} steps of {batch} rows, {args.optim.value}, learning rate "
        f"{args.learning_rate:g} ({args.lr_scheduler_type.value}), seed {args.seed}",
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {markdown(value)} |" for name, value in facts.items() if value)]
    last = next((entry for entry in reversed(state.log_history) if f"eval_exit_{exits[0]}_agreement" in entry), None)
    if last:
        lines += ["", f"Evaluation during training, after {last['step']} steps:", ""]
        lines += ["| exit | loss | token accuracy | agreement with full depth |", "|---:|---:|---:|---:|"]
        for k in exits:
            loss, *shares = [last[f"eval_exit_{k}_{name}"] for name in ("loss", "mean_token_accuracy", "agreement")]
            lines.append(f"| {k} | {loss:.3f} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |")
    return "\n".join(lines)
