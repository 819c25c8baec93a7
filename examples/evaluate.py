"""
What every exit of a sorted Llama is worth on prompt/completion data: loss, exact match, speed.

```shell
python examples/evaluate.py out/demo/final                      # the built-in facts
python examples/evaluate.py user/sorted-llama --data qa.jsonl   # rows of prompt, completion and, if any, task
```
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from facts import build_facts
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.data_utils import maybe_apply_chat_template

from modeling_sorted_llama import SortedLlamaForCausalLM


@dataclass
class ExitResult:
    """
    One row of the table.

    Args:
        exit_layer (`int`):
            Number of decoder layers that ran.
        parameters (`int`):
            Number of parameters that ran: embeddings, layers, final norm, LM head (a tied head counts once).
        loss (`float`):
            Mean loss of the completions' tokens, the end-of-text token included.
        exact_match (`dict[str, float]`):
            Share of the questions of each task whose greedy answer is the completion, from 0 to 1.
        tokens_per_second (`float`):
            Speed of greedy decoding of one row, median of the runs.
    """

    exit_layer: int
    parameters: int
    loss: float
    exact_match: dict[str, float]
    tokens_per_second: float


def default_exits(depth: int) -> list[int]:
    """A third, a half, two thirds and all of the layers: of 30, the exits 10 15 20 30."""
    return sorted({max(1, depth // 3), max(1, depth // 2), max(1, 2 * depth // 3), depth})


def as_text(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """
    Rows as TRL trains them: `prompt` and `completion` as text, chat messages through the template, plain text with the
    end-of-text token behind it; beside them the `answer` without special tokens, and a `task`.
    """
    texts = []
    for row in rows:
        text = maybe_apply_chat_template({"prompt": row["prompt"], "completion": row["completion"]}, tokenizer)
        if isinstance(row["completion"], str):
            text["completion"] += tokenizer.eos_token
        elif tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
            text["prompt"] = text["prompt"].removeprefix(tokenizer.bos_token)  # the tokenizer adds it itself
        answer = tokenizer(text["completion"], add_special_tokens=False)["input_ids"]
        answer = tokenizer.decode(answer, skip_special_tokens=True).strip()
        texts.append({**text, "answer": answer, "task": row.get("task", "all")})
    return texts


@torch.inference_mode()
def completions(
    model: SortedLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 12,
    batch_size: int = 64,
    **decoding: Any,
) -> list[str]:
    """Greedy completion of each prompt; `decoding` is `exit_layer=k` or another mode."""
    found = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths: little padding
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer([prompts[i] for i in batch], return_tensors="pt", padding=True, padding_side="left").to(
            model.device
        )
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **decoding,
        )
        texts = tokenizer.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(batch, texts, strict=True):
            found[i] = text
    return found


def answers(*args: Any, **kwargs: Any) -> list[str]:
    """The first line of each of `completions`, stripped."""
    return [(text.strip().splitlines() or [""])[0].strip() for text in completions(*args, **kwargs)]


@torch.inference_mode()
def teacher_forced(
    model: SortedLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    exits: list[int],
    batch_size: int = 32,
) -> tuple[list[float], list[float]]:
    """Of the completions' tokens at every exit, mean loss and agreement with the last exit, from one backbone pass."""
    total, agreeing, labelled = torch.zeros(len(exits)), torch.zeros(len(exits)), 0
    rows = sorted(rows, key=lambda row: len(row["prompt"]))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        prompts = [tokenizer(row["prompt"])["input_ids"] for row in batch]
        whole = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in batch]
        padded = tokenizer.pad({"input_ids": whole}, padding_side="right", return_tensors="pt")
        labels = padded["input_ids"].clone()
        for row, (prompt, tokens) in enumerate(zip(prompts, whole, strict=True)):
            labels[row, : len(prompt)] = -100
            labels[row, len(tokens) :] = -100
        num_labels = int((labels[:, 1:] != -100).sum())
        outputs = model(
            **padded.to(model.device),
            labels=labels.to(model.device),
            exit_layers=exits,
            num_items_in_batch=1,
            skip_logits=True,
            use_cache=False,
        )
        total += outputs.exit_losses.cpu()
        agreeing += outputs.exit_agreements.cpu() * num_labels
        labelled += num_labels
    return (total / max(labelled, 1)).tolist(), (agreeing / max(labelled, 1)).tolist()


@torch.inference_mode()
def decoding_speed(
    model: SortedLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    exits: list[int],
    new_tokens: int = 24,
    runs: int = 3,
) -> list[float]:
    """Tokens per second of every exit, one row, greedy; the exits take turns so that a drifting machine is fair."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    seconds: dict[int, list[float]] = {exit_layer: [] for exit_layer in exits}
    for run in range(runs + 1):
        for exit_layer in exits:
            start = time.perf_counter()
            model.generate(
                **inputs,
                exit_layer=exit_layer,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            ).cpu()
            if run > 0:  # the first is a warm-up
                seconds[exit_layer].append(time.perf_counter() - start)
    return [new_tokens / statistics.median(seconds[exit_layer]) for exit_layer in exits]


def evaluate_exits(
    model: SortedLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    exits: list[int],
) -> list[ExitResult]:
    """
    Evaluate every exit.

    Args:
        model ([`SortedLlamaForCausalLM`]):
            The model, in the dtype and on the device that its speed is measured in.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        rows (`Sequence[dict]`):
            Held-out rows with `prompt` and `completion`, text or chat messages, and optionally `task`.
        exits (`list[int]`):
            Exits to evaluate, ascending, ending in the full depth.

    Returns:
        `list[ExitResult]`: One for each of `exits`.
    """
    model.eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = as_text(rows, tokenizer)
    prompts, wanted = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    longest = max(len(tokenizer(text)["input_ids"]) for text in wanted) + 1
    losses, _ = teacher_forced(model, tokenizer, rows, exits)
    speeds = decoding_speed(model, tokenizer, prompts[0], exits)
    results = []
    for exit_layer, loss, speed in zip(exits, losses, speeds, strict=True):
        found = answers(model, tokenizer, prompts, min(longest, 128), exit_layer=exit_layer)
        hits: dict[str, list[bool]] = {}
        for row, answer, right in zip(rows, found, wanted, strict=True):
            hits.setdefault(row["task"], []).append(answer == right)
        results.append(
            ExitResult(
                exit_layer=exit_layer,
                parameters=sum(p.numel() for p in model.extract_submodel(exit_layer).parameters()),
                loss=loss,
                exact_match={task: sum(h) / len(h) for task, h in hits.items()},
                tokens_per_second=speed,
            )
        )
    return results


def format_table(results: Sequence[ExitResult]) -> str:
    """The results as a Markdown table; the last row is the one that speed-up is measured against."""
    tasks = list(results[-1].exact_match)
    header = ["exit", "layers run", "parameters run", "held-out loss", *(f"exact match, {task}" for task in tasks)]
    table = [[*header, "tokens/s", "speed-up"]]
    for result in results:
        full = result is results[-1]
        table.append(
            [
                f"{result.exit_layer}" + (" (full)" if full else ""),
                str(result.exit_layer),
                f"{result.parameters / 1e6:.1f} M",
                f"{result.loss:.3f}",
                *(f"{100 * result.exact_match[task]:.1f} %" for task in tasks),
                f"{result.tokens_per_second:.1f}",
                f"{result.tokens_per_second / results[-1].tokens_per_second:.2f}x",
            ]
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def load_rows(data: str) -> list[dict]:
    """Rows of a local .json, .jsonl, .csv or .parquet file, or of a dataset of the Hub (its `train` split)."""
    if Path(data).is_file():
        suffix = Path(data).suffix.lstrip(".").replace("jsonl", "json")
        return list(load_dataset(suffix, data_files=data, split="train"))
    return list(load_dataset(data, split="train"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model id or path")
    parser.add_argument("--data", help="prompt/completion file or dataset; default: the held-out built-in facts")
    parser.add_argument("--exit_layers", type=int, nargs="+", help="default: the checkpoint's `exit_layers`")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--json", help="file to write the results to")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SortedLlamaForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    exits = args.exit_layers or model.config.exit_layers or [model.config.num_hidden_layers]
    results = evaluate_exits(model, tokenizer, load_rows(args.data) if args.data else build_facts()[1], exits)
    print(format_table(results))
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(result) for result in results], indent=2))


if __name__ == "__main__":
    main()
