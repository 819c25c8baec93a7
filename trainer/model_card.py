"""The page of a checkpoint, as training knows it: a template of named blocks, which the evaluation fills up later."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import logging
from yaml import YAMLError

from .escaping import hub_links, markdown, one_line, python_literal, without_marks


logger = logging.get_logger(__name__)

QUESTION = "What is the capital of France?"
START = "The capital of France is"


def new_page(data: Any, model_name: str, dataset_name: str | None = None) -> str:
    """
    The template, filled in.

    Args:
        data ([`~huggingface_hub.CardData`]):
            Metadata.
        model_name (`str`):
            Title.
        dataset_name (`str`, *optional*):
            Dataset that it was trained on.

    Returns:
        `str`: The page, metadata included.
    """
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_suffix(".md")),
        model_name=markdown(model_name),
        base_links=hub_links(data.get("base_model") or []),
        dataset_links=hub_links(dataset_name or [], "datasets/"),
    )
    return card.content


def open_page(file: Path, new: str) -> ModelCard:
    """
    The page that is there, with our blocks.

    Args:
        file (`Path`):
            The page.
        new (`str`):
            A page with our blocks, metadata included: for where none is, or above somebody else's, whose metadata
            stay.

    Returns:
        [`~huggingface_hub.ModelCard`]

    Raises:
        ValueError, TypeError, YAMLError: If the file is no text in UTF-8, or its metadata cannot be read.
    """
    card = ModelCard(new)
    if not file.is_file():
        return card
    old = ModelCard(file.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True)
    if has_blocks(old.text):
        return old
    if old.text.strip().startswith(ModelCard.from_template(ModelCardData()).text.strip()):
        return card  # the Hub's form, which PEFT leaves with every adapter, and nobody has filled in
    for name, value in old.data.to_dict().items():
        card.data[name] = value
    card.text = f"{card.text.rstrip()}\n\n{old.text.strip()}\n"
    return card


def update_page(file: Path, new: str) -> None:
    """
    Write what a training knows into the page that is there: its blocks and its metadata, and nothing else. A page that
    cannot be read stays as it is, with a warning.

    Args:
        file (`Path`):
            The page.
        new (`str`):
            The page that the training would write if there was none.
    """
    try:
        card = open_page(file, new)
    except (ValueError, TypeError, YAMLError) as error:
        logger.warning(f"The page {str(file)!r} could not be read, and stays as it is: {one_line(error)}")
        return
    known: Any = card.data
    for name in ("about", "use", "training"):
        card.text = set_block(card.text, name, get_block(new, name) or "")
    data: Any = ModelCard(new).data
    data.tags = list(dict.fromkeys([*(known.tags or []), *(data.tags or [])]))
    for name, value in vars(data).items():
        if value is not None:
            known[name] = value
    temporary = file.with_name(f"_{file.name}.{os.getpid()}")  # nothing that begins with `_` is pushed
    card.save(temporary)
    temporary.replace(file)


def get_block(page: str, name: str) -> str | None:
    """
    What stands between the marks of a block.

    Args:
        page (`str`):
            Markdown.
        name (`str`):
            Of the block.

    Returns:
        `str`, or `None` where the page has no such block.
    """
    block = _block(name).search(page)
    return block and block[2].strip()


def set_block(page: str, name: str, content: str) -> str:
    """
    Replace what stands between the marks of a block, each on a line of its own. Text outside of blocks, and a block
    whose marks the owner of the page took away, stay as they are.

    Args:
        page (`str`):
            Markdown.
        name (`str`):
            Of the block.
        content (`str`):
            New content. What reads like a mark in it is shown as text, and is none.

    Returns:
        `str`: The page.
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
    The calls to paste, with the exits of this model: each prints its answer, on any machine.

    Args:
        name (`str`):
            Model id or path.
        exits (`list[int]`):
            Its exits, full depth last.
        base (`str`, *optional*):
            Of an adapter, the model that it is for.
        exit_heads (`str`, *optional*, defaults to `"shared"`):
            Of an adapter, what its exits own.
        chat (`bool`, *optional*, defaults to `False`):
            Whether the tokenizer has a chat template, through which the model is asked.

    Returns:
        `str`: Markdown.
    """
    if base == "":
        return "The adapter's base has no id or folder that a call could name."
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"name = {python_literal(name)}",
        "tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)",
    ]
    if base is not None:  # an adapter's folder holds no code, and PEFT drops weights that the base has no place for
        own = "" if exit_heads == "shared" else f", exit_heads={python_literal(exit_heads)}"
        lines = [
            "```python",
            "from sorted_llama.modeling_sorted_llama import SortedLlamaForCausalLM",
            "from peft import PeftModel",
            "from transformers import AutoTokenizer",
            "",
            f"name = {python_literal(name)}",
            "tokenizer = AutoTokenizer.from_pretrained(name)",
            f"base = SortedLlamaForCausalLM.from_pretrained({python_literal(base)}, exit_layers={exits}{own})",
            "model = PeftModel.from_pretrained(base, name)",
        ]
    if chat:
        lines += [
            f'messages = [{{"role": "user", "content": "{QUESTION}"}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
        ]
    else:
        lines += [f'inputs = tokenizer("{START}", return_tensors="pt").to(model.device)']
    low = exits[0]
    calls = {
        f"exit_layer={low}, ": f"  # {low} of {exits[-1]} layers run, and no more",
        "exit_threshold=0.9, ": "  # each token at the exit that is sure",
        f"assistant_early_exit={low}, ": "  # full depth's answer, drafted",
    }
    for call, what in calls.items() if len(exits) > 1 else [("", "")]:
        lines += ["", f"tokens = model.generate(**inputs, {call}max_new_tokens=32){what}"]
        lines += ["print(tokenizer.decode(tokens[0], skip_special_tokens=True))"]
    lines += ["```"]
    if base is None:
        lines += [
            "",
            "`trust_remote_code=True` runs the Python files of this repository. Read them, then pin what you have "
            'read, `code_revision="<commit>"`, so that a later change does not run unseen on your machine.',
        ]
    return "\n".join(lines)


def training_block(trainer: Any) -> str:
    """
    What the trainer did, from its own arguments and state.

    Args:
        trainer ([`SortedSFTTrainer`]):
            The trainer.

    Returns:
        `str`: Markdown.
    """
    args, state, config = trainer.args, trainer.state, trainer.model.config
    weights = trainer.exit_loss_weights or [1.0] * len(trainer.exit_layers)
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    facts = {
        "exits": ", ".join(map(str, trainer.exit_layers)),
        "weights of their losses": ", ".join(f"{w:g}" for w in weights) + f"; {args.exit_loss_reduction}",
        "exits a step": args.exit_schedule
        + (f", {args.exits_per_step} beside full depth" if args.exit_schedule == "random" else ""),
        "exit heads": config.exit_heads + (", detached" if args.detach_exits else ""),
        "trained": f"{args.trainable}, {trained / 1e6:,.1f} M parameters",
        "self-distillation": f"{args.self_distillation_weight:g}",
        "optimization": f"{state.global_step} steps of {batch} rows, {args.optim.value}, learning rate "
        f"{args.learning_rate:g} ({args.lr_scheduler_type.value}), seed {args.seed}",
    }
    if not args.self_distillation_weight:
        del facts["self-distillation"]
    lines = ["| | |", "|---|---|", *(f"| {name} | {markdown(value)} |" for name, value in facts.items())]
    evaluations = [entry for entry in state.log_history if f"eval_exit_{trainer.exit_layers[0]}_agreement" in entry]
    if evaluations:
        last = evaluations[-1]
        lines += ["", f"Evaluation during training, after {last['step']} steps:", ""]
        lines += ["| exit | loss | token accuracy | agreement with full depth |", "|---:|---:|---:|---:|"]
        for k in trainer.exit_layers:
            values = [last[f"eval_exit_{k}_{name}"] for name in ("loss", "mean_token_accuracy", "agreement")]
            lines.append(f"| {k} | {values[0]:.3f} | {100 * values[1]:.1f} % | {100 * values[2]:.1f} % |")
    return "\n".join(lines)
