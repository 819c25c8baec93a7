"""What of `demo.py` fits into its time: a dtype for each part, steps, questions, all of it measured on the model."""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from exit_results import NUM_TIMED_TOKENS, answer_length
from transformers import BatchEncoding, PreTrainedTokenizerBase

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card.measure import answers, decoding_speeds
from sorted_llama.hub_card.tasks import as_text


DTYPES = ("float32", "bfloat16")
FIXED = 45  # seconds to load, to tokenize, to save and to reload
ANSWERS = 0.3  # of the time, at most, for the questions; the rest is for training
ROUNDS = 4.5  # of the questions: before, after, and what a certificate takes
MIN_QUESTIONS = 120  # a certificate needs 117
BATCH_SIZE = 16
MAX_LENGTH = 256  # tokens of a row in training


@dataclass
class Plan:
    """What fits, and how long it takes. Dtypes are `"float32"` or `"bfloat16"`, each the faster one for its part."""

    train_dtype: str  # of the products in training; the weights are float32
    answer_dtype: str  # of the model that answers many questions at once
    decode_dtype: str  # of the model that decodes one row: the one whose speed is shown, and the checkpoint
    steps: int
    num_questions: int  # held out, asked before and after, and to certify
    step_seconds: float
    answer_seconds: float  # of all questions at all exits, once, and of measuring the speed

    @property
    def seconds(self) -> float:
        """Of all that the plan names: training, and the questions."""
        return self.steps * self.step_seconds + ROUNDS * self.answer_seconds


def fit(
    seconds: float, max_steps: int, max_questions: int, step: float, question: float, speed: float
) -> tuple[int, int]:
    """
    Steps and questions that fit: all of both, or else questions for a share of the time and steps for what remains;
    at least a tenth of the steps and [`MIN_QUESTIONS`], as less shows nothing. `step`, `question` and `speed` are the
    seconds of a step, of a question at all exits, and of measuring the speed.
    """
    num_questions = max_questions
    if max_steps * step + ROUNDS * (speed + max_questions * question) > seconds:
        affordable = int((ANSWERS * seconds / ROUNDS - speed) / question)
        num_questions = min(max_questions, max(MIN_QUESTIONS, affordable))
    steps = int((seconds - ROUNDS * (speed + num_questions * question)) / step)
    return min(max_steps, max(steps, max_steps // 10, 1)), num_questions


def make_plan(
    load: Callable[[str], SortedLlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[dict],
    test_rows: Sequence[dict],
    exits: list[int],
    max_steps: int,
    deadline: float,
) -> Plan:
    """Measure the model, which `load` gives in a dtype, and fit what is to do until `time.monotonic` is `deadline`."""
    models = {dtype: load(dtype) for dtype in DTYPES}
    prompts = [row["prompt"] for row in as_text(test_rows[:32], tokenizer)]
    timed = {"settings": {"": {}}, "max_new_tokens": 8, "runs": 2, "ends": False}
    one_row = {d: decoding_speeds(model, tokenizer, prompts[:1], **timed)[""].best for d, model in models.items()}
    # What multiplies large matrices takes minutes where a dtype is only emulated: it is not even tried there
    dtypes = [dtype for dtype in DTYPES if not is_emulated(dtype, models[dtype].device)]
    length = answer_length(test_rows, tokenizer)
    many_rows = {d: seconds_of(lambda m: answers(m, tokenizer, prompts, length), models[d]) for d in dtypes}

    model = freeze_head(models["float32"]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    batch = typical_batch(tokenizer, train_rows, BATCH_SIZE).to(model.device)
    steps = {dtype: seconds_of(partial(train_step, model, optimizer, batch, exits), dtype) for dtype in dtypes}

    passes = sum(exits) / exits[-1]  # of the whole depth, for one at each exit
    step = 1.35 * min(steps.values())  # rows are of all lengths, and once a minute a checkpoint is written
    question = (passes + 1) * min(many_rows.values()) / len(prompts)  # generated at each exit, read once at all
    speed = 4 * passes * NUM_TIMED_TOKENS / max(one_row.values())
    left = deadline - time.monotonic() - FIXED
    num_steps, num_questions = fit(left, max_steps, len(test_rows), step, question, speed)
    return Plan(
        train_dtype=min(steps, key=steps.__getitem__),
        answer_dtype=min(many_rows, key=many_rows.__getitem__),
        decode_dtype=max(one_row, key=one_row.__getitem__),
        steps=num_steps,
        num_questions=num_questions,
        step_seconds=step,
        answer_seconds=speed + num_questions * question,
    )


def freeze_head(model: SortedLlamaForCausalLM) -> SortedLlamaForCausalLM:
    """Embeddings and LM head, which is a fifth of a small model, stay as they are: a step takes a quarter less."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.requires_grad_(False)
    return model


def seconds_of(run: Callable[[Any], Any], argument: Any) -> float:
    """The time that `run` takes once it is warm: the least of two, as other work may disturb one."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run(argument)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def is_emulated(dtype: str, device: torch.device) -> bool:
    """Whether products take far longer than in float32, in the units of this device that there are for it."""

    def multiply(dtype: str) -> None:
        matrix = torch.ones(512, 512, dtype=getattr(torch, dtype), device=device)
        (matrix @ matrix).sum().item()

    seconds = {name: min(seconds_of(multiply, name) for _ in range(3)) for name in (dtype, "float32")}
    return seconds[dtype] > 4 * seconds["float32"]


def train_step(model: SortedLlamaForCausalLM, optimizer, batch: BatchEncoding, exits: list[int], dtype: str) -> None:
    """A step of SoFT, its products in `dtype`."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(**batch, exit_layers=exits).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()  # the GPU is done


def typical_batch(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], size: int) -> BatchEncoding:
    """Rows of about the mean length, as alike in length as those that the trainer puts together."""
    texts = as_text(rows, tokenizer)
    whole = [row["prompt"] + row["completion"] for row in texts]
    whole = tokenizer(whole, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    order = sorted(range(len(whole)), key=lambda i: len(whole[i]))
    middle = bisect_left(order, sum(map(len, whole)) / len(whole), key=lambda i: len(whole[i]))
    start = max(0, min(middle - size // 2, len(order) - size))
    chosen = order[start : start + size]
    batch = tokenizer.pad({"input_ids": [whole[i] for i in chosen]}, padding_side="right", return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for labels, i in zip(batch["labels"], chosen, strict=True):
        labels[: len(tokenizer(texts[i]["prompt"])["input_ids"])] = -100
    return batch
