"""What the demo shows of every exit: loss, exact match and speed, as a table and as a plot."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card.cost import cost_of_exit
from sorted_llama.hub_card.measure import answers, decoding_speeds, teacher_forced
from sorted_llama.hub_card.tasks import as_text, first_line


NUM_TIMED_TOKENS = 24
# Okabe-Ito: told apart by colour-blind readers, on white and on dark
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


@dataclass
class ExitResult:
    """One row of the table."""

    exit_layer: int
    parameters: int  # that run: embeddings, layers, final norm, LM head (a tied head counts once)
    loss: float  # mean over the completions' tokens, the end-of-text token included
    exact_match: dict[str, float]  # by task: share of the questions whose greedy answer is the completion
    tokens_per_second: float  # of greedy decoding of one row, median of the runs


def default_exits(depth: int) -> list[int]:
    """A third, a half, two thirds and all of the layers: of 30, the exits 10 15 20 30."""
    return sorted({max(1, depth // 3), max(1, depth // 2), max(1, 2 * depth // 3), depth})


def answer_length(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the longest of the right answers needs, 128 at most."""
    return min(max(len(tokenizer(row["answer"])["input_ids"]) for row in as_text(rows, tokenizer)) + 1, 128)


def evaluate_exits(
    model: SortedLlamaForCausalLM, timed: SortedLlamaForCausalLM, tokenizer, rows: Sequence[dict], exits: list[int]
) -> list[ExitResult]:
    """
    What each of `exits` is worth on rows of `prompt` and `completion`, text or chats, and optionally `task`. `model`
    answers the questions, `timed` is the same in the dtype that its speed at one row is measured in.
    """
    longest, rows = answer_length(rows, tokenizer), as_text(rows, tokenizer)
    prompts = [row["prompt"] for row in rows]
    settings = {str(k): {"exit_layer": k} for k in exits}
    speeds = decoding_speeds(timed, tokenizer, prompts[:1], settings, NUM_TIMED_TOKENS, ends=False, progress=True)
    losses = teacher_forced(model, tokenizer, rows, exits, progress=True).losses.mean(1).tolist()
    results = []
    for k, loss in zip(exits, losses, strict=True):
        found = answers(model, tokenizer, prompts, longest, progress=f"exit {k}", exit_layer=k)
        hits: dict[str, list[bool]] = defaultdict(list)
        for row, answer in zip(rows, found, strict=True):
            hits[row["task"]].append(first_line(answer) == row["answer"])
        matches = {task: sum(h) / len(h) for task, h in hits.items()}
        results.append(ExitResult(k, cost_of_exit(model, k).parameters, loss, matches, speeds[str(k)].median))
    return results


def format_table(results: Sequence[ExitResult]) -> str:
    """The results as a Markdown table; the last row is the one that speed-up is measured against."""
    full = results[-1]
    tasks = list(full.exact_match)
    names = ["exit", "layers run", "parameters run", "held-out loss"]
    table = [[*names, *(f"exact match, {task}" for task in tasks), "tokens/s", "speed-up"]]
    for result in results:
        row = [f"{result.exit_layer}" + (" (full)" if result is full else ""), f"{result.exit_layer}"]
        row += [f"{result.parameters / 1e6:.1f} M", f"{result.loss:.3f}"]
        row += [f"{100 * result.exact_match[task]:.1f} %" for task in tasks]
        speed_up = result.tokens_per_second / full.tokens_per_second
        table.append([*row, f"{result.tokens_per_second:.1f}", f"{speed_up:.2f}x"])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [" | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    rule = "|".join("-" * (width + 1) + ":" for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def plot_before_and_after(before: Sequence[ExitResult], after: Sequence[ExitResult], path: Path) -> None:
    """Draw exact match against speed-up over full depth, one line a task: solid after SoFT, dashed before."""
    from matplotlib.figure import Figure  # only the picture needs it

    figure = Figure(figsize=(7, 4.2), dpi=150)
    axes = figure.subplots()
    for color, task in zip(COLORS, after[-1].exact_match, strict=False):
        for results, style, fill, name in ((after, "o-", color, "after SoFT"), (before, "o--", "white", "before")):
            speed_ups = [r.tokens_per_second / results[-1].tokens_per_second for r in results]
            quality = [100 * r.exact_match[task] for r in results]
            axes.plot(speed_ups, quality, style, color=color, markerfacecolor=fill, label=f"{task}, {name}")
            if results is after:
                place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 8}
                for result, at in zip(results, zip(speed_ups, quality, strict=True), strict=True):
                    axes.annotate(f"{result.exit_layer} layers", at, **place)
    axes.set(xlabel="speed-up over full depth (tokens/s, measured)", ylabel="exact match on held-out questions (%)")
    axes.set(ylim=(-4, 108), title="One checkpoint, every exit a model")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
