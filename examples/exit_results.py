"""What the demo shows of every exit: loss, exact match, speed, as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card.cost import cost_of_exit
from sorted_llama.hub_card.measure import answers, decoding_speeds, teacher_forced
from sorted_llama.hub_card.tasks import as_text, first_line


NUM_TIMED_TOKENS = 24


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


def answer_length(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the longest of the right answers needs, 128 at most."""
    return min(max(len(tokenizer(row["answer"])["input_ids"]) for row in as_text(rows, tokenizer)) + 1, 128)


def evaluate_exits(
    model: SortedLlamaForCausalLM,
    timed: SortedLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict],
    exits: list[int],
) -> list[ExitResult]:
    """
    Evaluate every exit.

    Args:
        model ([`SortedLlamaForCausalLM`]):
            The model, in the dtype that answers many questions fastest.
        timed ([`SortedLlamaForCausalLM`]):
            The same, in the dtype that its speed at one row is measured in.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        rows (`Sequence[dict]`):
            Held-out rows with `prompt` and `completion`, text or chat messages, and optionally `task`.
        exits (`list[int]`):
            Exits to evaluate, ascending, ending in the full depth.

    Returns:
        `list[ExitResult]`: One for each of `exits`.
    """
    longest = answer_length(rows, tokenizer)
    rows = as_text(rows, tokenizer)
    prompts, wanted = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    settings = {str(k): {"exit_layer": k} for k in exits}
    speeds = decoding_speeds(timed, tokenizer, prompts[:1], settings, NUM_TIMED_TOKENS, ends=False, progress=True)
    losses = teacher_forced(model, tokenizer, rows, exits, progress=True).losses.mean(1).tolist()
    results = []
    for exit_layer, loss in zip(exits, losses, strict=True):
        found = answers(model, tokenizer, prompts, longest, progress=f"exit {exit_layer}", exit_layer=exit_layer)
        hits: dict[str, list[bool]] = {}
        for row, answer, right in zip(rows, found, wanted, strict=True):
            hits.setdefault(row["task"], []).append(first_line(answer) == right)
        results.append(
            ExitResult(
                exit_layer=exit_layer,
                parameters=cost_of_exit(model, exit_layer).parameters,
                loss=loss,
                exact_match={task: sum(h) / len(h) for task, h in hits.items()},
                tokens_per_second=speeds[str(exit_layer)].median,
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
