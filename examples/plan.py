"""What of `demo.py` fits into its time: a dtype for each part, steps, questions, all of it measured on the model."""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from exit_results import NUM_TIMED_TOKENS, answer_length
from transformers import BatchEncoding, PreTrainedTokenizerBase

from hub_card.measure import answers, decoding_speeds
from hub_card.tasks import as_text
from modeling_sorted_llama import SortedLlamaForCausalLM


DTYPES = ("float32", "bfloat16")
FIXED = 45  # seconds to load, to tokenize, to save and to reload
ANSWERS = 0.3  # of the time, at most, for the questions; the rest is for training
MIN_QUESTIONS = 100


@dataclass
class Plan:
    """
    What fits, and how long it takes. Dtypes are `"float32"` or `"bfloat16"`, each the faster one for its part.

    Args:
        train_dtype (`str`):
            Of the products in training; the weights are float32.
        answer_dtype (`str`):
            Of the model that answers many questions at once.
        decode_dtype (`str`):
            Of the model that decodes one row: the one whose speed is shown, and the checkpoint.
        steps (`int`):
            Steps of training.
        num_questions (`int`):
            Held-out questions, before and after.
        step_seconds (`float`):
            Of one step.
        answer_seconds (`float`):
            Of all questions at all exits, once, and of measuring the speed.
    """

    train_dtype: str
    answer_dtype: str
    decode_dtype: str
    steps: int
    num_questions: int
    step_seconds: float
    answer_seconds: float

    @property
    def seconds(self) -> float:
        """Of all that the plan names: training, and the questions before and after."""
        return self.steps * self.step_seconds + 2 * self.answer_seconds


def fit(
    seconds: float, max_steps: int, max_questions: int, step: float, question: float, speed: float
) -> tuple[int, int]:
    """
    Steps and questions that fit: all of both, or else questions for a share of the time and steps for what remains.

    Args:
        seconds (`float`):
            What there is.
        max_steps, max_questions (`int`):
            At most.
        step, question, speed (`float`):
            Seconds of a step, of a question at all exits, and of measuring the speed.

    Returns:
        `tuple[int, int]`: Steps, at least a tenth of `max_steps`, and questions, at least [`MIN_QUESTIONS`]: less
        shows nothing.
    """
    num_questions = max_questions
    if max_steps * step + 2 * (speed + max_questions * question) > seconds:
        affordable = int((ANSWERS * seconds / 2 - speed) / question)
        num_questions = min(max_questions, max(MIN_QUESTIONS, affordable))
    steps = int((seconds - 2 * (speed + num_questions * question)) / step)
    return min(max_steps, max(steps, max_steps // 10, 1)), num_questions


def make_plan(
    load: Callable[[str], SortedLlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[dict],
    test_rows: Sequence[dict],
    exits: list[int],
    batch_size: int,
    max_steps: int,
    deadline: float,
) -> Plan:
    """
    Measure the model on this machine, and plan.

    Args:
        load (`Callable[[str], SortedLlamaForCausalLM]`):
            Loads the model in a dtype.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        train_rows, test_rows (`Sequence[dict]`):
            Rows with `prompt` and `completion`.
        exits (`list[int]`):
            Exits, ascending, ending in full depth.
        batch_size (`int`):
            Rows a step.
        max_steps (`int`):
            Steps, at most.
        deadline (`float`):
            When all should be done, as `time.monotonic` counts.

    Returns:
        [`Plan`]
    """
    models = {dtype: load(dtype) for dtype in DTYPES}
    passes = sum(exits) / exits[-1]  # of the whole depth, for one at each exit
    prompts = [row["prompt"] for row in as_text(test_rows[:32], tokenizer)]

    # One row: memory moves, and few products are made
    decode = {
        dtype: decoding_speeds(model, tokenizer, prompts[:1], {"": {}}, 8, runs=2, ends=False)[""].best
        for dtype, model in models.items()
    }
    # Many rows: products. The first layer tells, where a machine that only emulates a dtype takes minutes for all
    answer_dtype = fastest(lambda dtype: answers(models[dtype], tokenizer, prompts[:16], 2, exit_layer=1))
    question = seconds_of(
        lambda: answers(models[answer_dtype], tokenizer, prompts, answer_length(test_rows, tokenizer))
    )

    model = models["float32"].train()
    batch = typical_batch(tokenizer, train_rows, batch_size).to(model.device)
    train_dtype = fastest(lambda dtype: backward(model, batch, dtype, exit_layer=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> None:
        backward(model, batch, train_dtype, exit_layers=exits)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.lm_head.weight.sum().item()  # the GPU is done

    costs = {
        "step": 1.1 * min(seconds_of(step) for _ in range(3)),  # and what the trainer does beside it
        "question": (passes + 1) * question / len(prompts),  # generated at each exit, and read once at all
        "speed": 4 * passes * NUM_TIMED_TOKENS / max(decode.values()),
    }
    steps, num_questions = fit(deadline - time.monotonic() - FIXED, max_steps, len(test_rows), **costs)
    return Plan(
        train_dtype=train_dtype,
        answer_dtype=answer_dtype,
        decode_dtype=max(decode, key=decode.__getitem__),
        steps=steps,
        num_questions=num_questions,
        step_seconds=costs["step"],
        answer_seconds=costs["speed"] + num_questions * costs["question"],
    )


def seconds_of(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def fastest(run: Callable[[str], object], patience: float = 2.0) -> str:
    """The dtype that `run` takes least time in, of three runs each, fewer once they took `patience` seconds."""
    best = {}
    for dtype in DTYPES:
        taken: list[float] = []
        while len(taken) < 3 and sum(taken) < patience:
            taken.append(seconds_of(partial(run, dtype)))
        best[dtype] = min(taken)
    return min(best, key=best.__getitem__)


def backward(model: SortedLlamaForCausalLM, batch: BatchEncoding, dtype: str, **exits) -> None:
    """Loss and gradients, the products in `dtype`."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(**batch, **exits).loss
    loss.backward()
    loss.item()  # the GPU is done


def typical_batch(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], size: int) -> BatchEncoding:
    """Rows of about the mean length, as alike in length as those that the trainer puts together."""
    texts = as_text(rows, tokenizer)
    whole = tokenizer([row["prompt"] + row["completion"] for row in texts])["input_ids"]
    order = sorted(range(len(whole)), key=lambda i: len(whole[i]))
    mean = sum(map(len, whole)) / len(whole)
    middle = bisect_left(order, mean, key=lambda i: len(whole[i]))
    start = max(0, min(middle - size // 2, len(order) - size))
    chosen = order[start : start + size]
    batch = tokenizer.pad({"input_ids": [whole[i] for i in chosen]}, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for label, i in zip(labels, chosen, strict=True):
        label[: len(tokenizer(texts[i]["prompt"])["input_ids"])] = -100
    batch["labels"] = labels
    return batch
