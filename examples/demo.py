"""
One checkpoint, many models: SoFT on a real Llama, every exit before and after, and a reload without this project.

```shell
make demo                                                # SmolLM2-135M-Instruct on built-in facts
make demo MODEL=TinyLlama/TinyLlama_v1.1 DATA=qa.jsonl   # any Llama, any prompt/completion file
```
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from exit_results import ExitResult, default_exits, evaluate_exits, format_table, plot_before_and_after
from facts import build_facts
from huggingface_hub.utils import enable_progress_bars
from plan import BATCH_SIZE, FIXED, MAX_LENGTH, Plan, freeze_head, make_plan
from smollm2 import SMOLLM2, fetch_model
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from sorted_llama import SortedLlamaForCausalLM, SortedSFTConfig, SortedSFTTrainer
from sorted_llama.hub_card.card import write_card
from sorted_llama.hub_card.certificate import certificate_line
from sorted_llama.hub_card.certify import certify
from sorted_llama.hub_card.checkpoint import load_answering_tokenizer, load_config, load_model
from sorted_llama.hub_card.measure import answers
from sorted_llama.hub_card.record import write_json
from sorted_llama.hub_card.tasks import as_text, first_line, load_rows
from sorted_llama.trainer.escaping import one_line


MAX_TEST_ROWS = 400

# Runs where neither this project's packages nor its folder can be imported
RELOAD = """
import sys
sys.modules["sorted_llama"] = None  # importing it now raises ImportError
from transformers import AutoModelForCausalLM, AutoTokenizer
path, prompt, exit_layer = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
inputs = tokenizer(prompt, return_tensors="pt")
tokens = model.generate(**inputs, exit_layer=int(exit_layer), max_new_tokens=12, do_sample=False)
print(tokenizer.decode(tokens[0, inputs.input_ids.shape[1]:], skip_special_tokens=True))
"""
NEXT_STEPS = """\
  checkpoint  {final}
  plot        {folder}/quality_speed.png
  numbers     {folder}/demo.json
  questions   {folder}/held_out.jsonl

Next:
  .venv/bin/sorted-llama evaluate {final} --data completions={folder}/held_out.jsonl
  .venv/bin/sorted-llama certify {final} --data completions={folder}/held_out.jsonl
  .venv/bin/sorted-llama card {final}
  .venv/bin/python examples/train.py --model_name_or_path {final} --dataset_name my.jsonl  # data of yours
  .venv/bin/python -c "from transformers import pipeline; \
print(pipeline('text-generation', '{final}', trust_remote_code=True, exit_layer={exit_layer})\
('The capital of Peru is Lima. Question: What is the capital of Peru? Answer:'))"
"""


class ExitProgressCallback(ProgressCallback):
    """The progress bar, with the loss of every exit in place of the whole log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        losses = {k: v for k, v in (logs or {}).items() if k.startswith("exit_") and k.endswith("_loss")}
        if losses and self.training_bar is not None:
            row = "  ".join(f"exit {key.split('_')[1]}: {value:.2f}" for key, value in losses.items())
            self.training_bar.write(f"step {state.global_step:4d}/{state.max_steps}   loss at {row}")


@dataclass
class Task:
    """What a run is about, once nothing is wrong with it."""

    model: str  # folder or id
    exits: list[int]
    tokenizer: PreTrainedTokenizerBase
    train_rows: list[dict]
    test_rows: list[dict]


def main() -> None:
    args, started = read_flags(), time.monotonic()
    hide_what_others_print()

    # 1. The model and the data
    try:
        task = check(args)
    except (ValueError, OSError) as error:
        sys.exit(one_line(error))
    exits, tokenizer, device = task.exits, task.tokenizer, "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{len(task.train_rows)} rows to train on, {len(task.test_rows)} held out; exits {exits}; {device}")

    # 2. Where an interrupted run goes on
    output_dir = Path(args.output_dir)
    final, state_file = output_dir / "final", output_dir / "demo.json"
    state, checkpoint = open_state(output_dir, {**vars(args), "exits": exits, "device": device})

    # 3. What fits into the time, measured on this machine
    if "plan" not in state:
        print("Measuring this machine ...")
        load, deadline = partial(load_model, task.model), started + 60 * args.minutes
        data = tokenizer, task.train_rows, task.test_rows
        state["plan"] = asdict(make_plan(load, *data, exits, args.max_steps, deadline))
        write_json(state_file, state)
    plan = Plan(**state["plan"])
    print_plan(plan, args)
    task = replace(task, test_rows=task.test_rows[: plan.num_questions])
    held_out = "".join(json.dumps(row) + "\n" for row in task.test_rows)
    (output_dir / "held_out.jsonl").write_text(held_out, encoding="utf-8")

    # 4. Every exit before
    if "before" not in state:
        print("\nBefore: what the exits of the untouched model are worth ...")
        models = load_model(task.model, plan.answer_dtype), load_model(task.model, plan.decode_dtype)
        state["before"] = [asdict(r) for r in evaluate_exits(*models, tokenizer, task.test_rows, exits)]
        write_json(state_file, state)
        del models
    before = [ExitResult(**r) for r in state["before"]]
    print(f"\nBefore SoFT\n{format_table(before)}\n")

    # 5. Sorted Fine-Tuning
    train(task, plan, final, checkpoint, use_cpu=device == "cpu")

    # 6. Every exit after: what is measured is what was saved, which `.to` and its rounded rotary frequencies are not
    print("\nAfter: the same questions ...")
    model = load_model(final, plan.decode_dtype)
    after = evaluate_exits(load_model(final, plan.answer_dtype), model, tokenizer, task.test_rows, exits)
    dtypes = f"one row, {plan.decode_dtype}, {device}; answers: {plan.answer_dtype}"
    print(f"\nAfter SoFT, one checkpoint (speed: {dtypes})\n{format_table(after)}\n")
    print_answers(model, task)
    plot_before_and_after(before, after, output_dir / "quality_speed.png")

    # 7. The checkpoint, and a process that has only transformers
    compare_with_reloaded(model, task, final)

    # 8. A depth whose answers are as good as promised, on the page
    certify_depth(final, output_dir / "held_out.jsonl", exits)
    finish(output_dir, {**state, "after": [asdict(r) for r in after]})
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")
    print(NEXT_STEPS.format(folder=output_dir, final=final, exit_layer=exits[1]), end="")


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="model id or path of a Llama")
    parser.add_argument("--data", help="prompt/completion file (TRL's formats); default: the built-in facts")
    parser.add_argument("--output_dir", default="out/demo")
    parser.add_argument("--max_steps", type=int, default=400, help="of training, at most")
    parser.add_argument("--minutes", type=float, default=12, help="for all of it: what is done is made to fit")
    return parser.parse_args()


def hide_what_others_print() -> None:
    """Bars of loaders, notices of libraries about each other; a model's download keeps its bar."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    enable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


def check(args: argparse.Namespace) -> Task:
    """What was asked for, read as far as is possible without weights; what is wrong is a `ValueError` or `OSError`."""
    if args.max_steps < 1 or args.minutes <= 0:
        raise ValueError("`--max_steps` and `--minutes` must be greater than 0.")
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    train_rows, test_rows = build_facts() if args.data is None else hold_out(load_rows(args.data))
    model = fetch_model(args.model)
    exits = default_exits(load_config(model).num_hidden_layers)
    if len(exits) < 2:
        raise ValueError(f"A demo of exits needs a model of two layers or more, which {args.model} has not.")
    tokenizer = load_answering_tokenizer(model)
    as_text([*train_rows, *test_rows], tokenizer)  # a chat needs a template
    return Task(model, exits, tokenizer, train_rows, test_rows[:MAX_TEST_ROWS])


def hold_out(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """A seeded split into rows to train on and a tenth held out."""
    for number, row in enumerate(rows):
        if not row.get("prompt") or not row.get("completion"):
            raise ValueError(f"Row {number} of `--data` lacks a prompt or a completion: {str(row)[:100]}.")
    if len(rows) < 2:
        raise ValueError(f"`--data` must have at least 2 rows, to train on and to hold out, got {len(rows)}.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    num_test = max(1, len(rows) // 10)
    return [rows[i] for i in order[num_test:]], [rows[i] for i in order[:num_test]]


def open_state(output_dir: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """What an interrupted run with these settings has left, and its last checkpoint; any other run is removed."""
    file, final = output_dir / "demo.json", output_dir / "final"
    state = json.loads(file.read_text()) if file.is_file() else {}
    if state.get("settings") == settings and "plan" in state and "after" not in state:
        checkpoint = get_last_checkpoint(final) if final.is_dir() else None
        print(f"Going on with the interrupted run from {checkpoint or 'its start'}.")
        return state, checkpoint
    if state:
        print(f"{output_dir} holds a finished run or one with other settings: starting over.")
    shutil.rmtree(final, ignore_errors=True)
    for name in ("demo.json", "held_out.jsonl", "quality_speed.png"):
        (output_dir / name).unlink(missing_ok=True)
    return {"settings": settings}, None


def print_plan(plan: Plan, args: argparse.Namespace) -> None:
    seconds = plan.seconds + FIXED
    print(
        f"Plan: {plan.steps} steps of {plan.step_seconds:.2f} s, {plan.num_questions} questions before and after; "
        f"about {seconds / 60:.1f} minutes from here.\n"
        f"Faster here: {plan.train_dtype} to train, {plan.answer_dtype} to answer many questions at once, "
        f"{plan.decode_dtype} to decode one row."
    )
    if missing := args.max_steps - plan.steps:
        print(
            f"All {args.max_steps} steps, which make better exits, take longer than {args.minutes:g} minutes here: "
            f"python examples/demo.py --minutes {(seconds + missing * plan.step_seconds) / 60 + 2:.0f}"
        )


def train(task: Task, plan: Plan, output_dir: Path, checkpoint: str | None, use_cpu: bool) -> None:
    """Train the planned steps, and save the model with its page, which tells how it was trained."""
    set_seed(0)
    trainer = SortedSFTTrainer(
        model=freeze_head(load_model(task.model, "float32")),
        processing_class=task.tokenizer,
        args=SortedSFTConfig(
            output_dir=str(output_dir),
            exit_layers=task.exits,
            max_steps=plan.steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            adam_beta2=0.98,
            max_length=MAX_LENGTH,
            train_sampling_strategy="group_by_length",
            gradient_checkpointing=False,
            bf16=plan.train_dtype == "bfloat16",
            use_cpu=use_cpu,
            save_steps=math.ceil(60 / plan.step_seconds),  # once a minute
            save_total_limit=1,
        ),
        train_dataset=Dataset.from_list(task.train_rows).select_columns(["prompt", "completion"]),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ExitProgressCallback())
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.model.to(getattr(torch, plan.decode_dtype))
    trainer.save_model()
    trainer.create_model_card()


def print_answers(model: SortedLlamaForCausalLM, task: Task) -> None:
    """What each exit answers to some questions."""
    for row in as_text(task.test_rows[:4], task.tokenizer):
        print(f"{row['prompt']}   [{row['task']}; right: {row['answer']}]")
        for k in task.exits:
            answer = answers(model, task.tokenizer, [row["prompt"]], exit_layer=k)[0]
            print(f"    exit {k:2d}: {first_line(answer)}")


def certify_depth(path: Path, held_out: Path, exits: list[int]) -> None:
    """Certify one of some settings of `exit_threshold` on the page, or tell why not."""
    print("\nCertifying a depth: the same questions, answered freely ...")
    closed: list[float] = [2] * (len(exits) - 1)  # where no token leaves
    thresholds = [[0.9, *closed[1:]], [0.7, *closed[1:]], [*closed[1:], 0.9]]  # the first exit, or the last below all
    try:
        certificate = certify(str(path), ("completions", str(held_out)), thresholds=thresholds, num_timed=4)
    except ValueError as error:  # too few questions
        print(f"No certificate: {one_line(error)}")
        return
    write_card(path)
    print(certificate_line(certificate))


def finish(output_dir: Path, state: dict[str, Any]) -> None:
    """Write the numbers, with which the run is over, and remove what it would have gone on from."""
    write_json(output_dir / "demo.json", state)
    for trained in (output_dir / "final").glob("checkpoint-*"):
        shutil.rmtree(trained)


def compare_with_reloaded(model: SortedLlamaForCausalLM, task: Task, path: Path) -> None:
    """A `RuntimeError` unless a process that cannot import this project answers the same with the checkpoint."""
    prompt, exit_layer = as_text(task.test_rows[:1], task.tokenizer)[0]["prompt"], task.exits[0]
    here = first_line(answers(model, task.tokenizer, [prompt], exit_layer=exit_layer)[0])
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", RELOAD, str(path.resolve()), prompt, str(exit_layer)]
    process = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"The checkpoint did not load without this project:\n{process.stderr}")
    there = first_line(process.stdout)
    if there != here:
        raise RuntimeError(f"The reloaded checkpoint answers {there!r} at exit {exit_layer}, this process {here!r}.")
    print(
        f"\nReloaded in a process without this project, `AutoModelForCausalLM.from_pretrained('{path}', "
        f"trust_remote_code=True)`, `generate(exit_layer={exit_layer})` answers the same: {there!r}"
    )


if __name__ == "__main__":
    main()
