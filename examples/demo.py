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
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from exit_results import ExitResult, default_exits, evaluate_exits, format_table
from facts import build_facts
from huggingface_hub.utils import enable_progress_bars
from plan import FIXED, MAX_LENGTH, Plan, freeze_head, make_plan
from plot import plot_quality_speed
from smollm2 import SMOLLM2, fetch_model
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card.checkpoint import load_config
from sorted_llama.hub_card.measure import answers
from sorted_llama.hub_card.record import write_json
from sorted_llama.hub_card.tasks import as_text, first_line, load_rows
from sorted_llama.trainer import SortedSFTConfig, SortedSFTTrainer
from sorted_llama.trainer.escaping import one_line


BATCH_SIZE = 16
MAX_TEST_ROWS = 400

# Runs where neither this project's packages nor its folder can be imported
RELOAD = """
import sys
sys.modules["sorted_llama"] = None  # importing it now raises ImportError
from transformers import AutoModelForCausalLM, AutoTokenizer
path, prompt, exit_layer = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
inputs = tokenizer(prompt, return_tensors="pt")
tokens = model.generate(**inputs, exit_layer=exit_layer, max_new_tokens=12, do_sample=False)
answer = tokenizer.decode(tokens[0, inputs.input_ids.shape[1]:], skip_special_tokens=True).strip().splitlines()
print((answer or [""])[0])
"""


class ExitProgressCallback(ProgressCallback):
    """The progress bar, with the loss of every exit in place of the whole log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        losses = {key.removesuffix("_loss"): f"{v:.2f}" for key, v in (logs or {}).items() if key.startswith("exit_")}
        losses = {key: value for key, value in losses.items() if not key.endswith("accuracy")}
        if losses and self.training_bar is not None:
            row = "  ".join(f"{key.replace('_', ' ')}: {value}" for key, value in losses.items())
            self.training_bar.write(f"step {state.global_step:4d}/{state.max_steps}   loss at {row}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="model id or path of a Llama")
    parser.add_argument("--data", help="prompt/completion file (TRL's formats); default: the built-in facts")
    parser.add_argument("--output_dir", default="out/demo")
    parser.add_argument("--max_steps", type=int, default=400, help="of training, at most")
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="for all of it: steps and questions are made to fit"
    )
    args = parser.parse_args()
    started = time.monotonic()
    hide_what_others_print()

    # 1. The model and the data
    output_dir = Path(args.output_dir)
    try:
        model_path, exits, tokenizer, train_rows, test_rows = check(args)
    except (ValueError, OSError) as error:
        sys.exit(one_line(error))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{len(train_rows)} rows to train on, {len(test_rows)} held out; exits {exits}; {device}")

    def load(dtype: str, path: str | Path = model_path) -> SortedLlamaForCausalLM:
        return SortedLlamaForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()

    # 2. Where an interrupted run goes on
    final = output_dir / "final"
    held_out = output_dir / "held_out.jsonl"
    state_file = output_dir / "demo.json"
    settings = {**vars(args), "exits": exits, "device": device}
    state = json.loads(state_file.read_text()) if state_file.is_file() else {}
    checkpoint = get_last_checkpoint(final) if final.is_dir() else None
    if state.get("settings") == settings and "plan" in state and "after" not in state:
        print(f"Going on with the interrupted run from {checkpoint or 'its start'}.")
    else:
        if state:
            print(f"{output_dir} holds a finished run or one with other settings: starting over.")
        state, checkpoint = {"settings": settings}, None
        remove(output_dir)

    # 3. What fits into the time, measured on this machine
    if "plan" not in state:
        print("Measuring this machine ...")
        deadline = started + 60 * args.minutes
        plan = make_plan(load, tokenizer, train_rows, test_rows, exits, BATCH_SIZE, args.max_steps, deadline)
        state["plan"] = asdict(plan)
        write_json(state_file, state)
    plan = Plan(**state["plan"])
    test_rows = test_rows[: plan.num_questions]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in test_rows), encoding="utf-8")
    print(
        f"Plan: {plan.steps} steps of {plan.step_seconds:.2f} s, {plan.num_questions} questions before and after; "
        f"about {(plan.seconds + FIXED) / 60:.1f} minutes from here.\n"
        f"Faster here: {plan.train_dtype} to train, {plan.answer_dtype} to answer many questions at once, "
        f"{plan.decode_dtype} to decode one row."
    )
    if missing := args.max_steps - plan.steps:
        print(
            f"All {args.max_steps} steps, which make better exits, take longer than {args.minutes:g} minutes here: "
            f"python examples/demo.py --minutes {(plan.seconds + FIXED + missing * plan.step_seconds) / 60 + 2:.0f}"
        )

    # 4. Every exit before
    if "before" not in state:
        print("\nBefore: what the exits of the untouched model are worth ...")
        models = load(plan.answer_dtype), load(plan.decode_dtype)
        state["before"] = [asdict(r) for r in evaluate_exits(*models, tokenizer, test_rows, exits)]
        write_json(state_file, state)
        del models
    before = [ExitResult(**r) for r in state["before"]]
    print(f"\nBefore SoFT\n{format_table(before)}\n")

    # 5. Sorted Fine-Tuning
    model = freeze_head(load("float32"))
    trainer = make_trainer(model, tokenizer, exits, plan, final, train_rows, use_cpu=device == "cpu")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.model.to(getattr(torch, plan.decode_dtype))
    trainer.save_model()
    trainer.create_model_card()
    del trainer, model
    # What is measured is what was saved: `.to` rounds the rotary frequencies too, and loading does not
    model = load(plan.decode_dtype, final)

    # 6. Every exit after
    print("\nAfter: the same questions ...")
    after = evaluate_exits(load(plan.answer_dtype, final), model, tokenizer, test_rows, exits)
    dtypes = f"one row, {plan.decode_dtype}, {device}; answers: {plan.answer_dtype}"
    print(f"\nAfter SoFT, one checkpoint (speed: {dtypes})\n{format_table(after)}\n")
    for question in pick_questions(test_rows):
        row = as_text([question], tokenizer)[0]
        print(f"{row['prompt']}   [{row['task']}; right: {row['answer']}]")
        for exit_layer in exits:
            answer = answers(model, tokenizer, [row["prompt"]], exit_layer=exit_layer)[0]
            print(f"    exit {exit_layer:2d}: {first_line(answer)}")
    plot_path = output_dir / "quality_speed.png"
    plot_quality_speed(before, after, plot_path)

    # 7. The checkpoint, and a process that has only transformers
    row = as_text(test_rows[:1], tokenizer)[0]
    here = first_line(answers(model, tokenizer, [row["prompt"]], exit_layer=exits[0])[0])
    there = reload_elsewhere(final, row["prompt"], exits[0])
    if there != here:
        raise RuntimeError(f"The reloaded checkpoint answers {there!r} at exit {exits[0]}, this process {here!r}.")
    write_json(state_file, {**state, "after": [asdict(r) for r in after]})  # finished
    for trained in final.glob("checkpoint-*"):
        shutil.rmtree(trained)
    print(
        f"\nReloaded in a process without this project, `AutoModelForCausalLM.from_pretrained('{final}', "
        f"trust_remote_code=True)`, `generate(exit_layer={exits[0]})` answers the same: {there!r}"
    )
    print(
        f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.\n"
        f"  checkpoint  {final}\n  plot        {plot_path}\n  numbers     {state_file}\n  questions   {held_out}\n\n"
        "Next:\n"
        f"  .venv/bin/sorted-llama evaluate {final} --data completions={held_out}\n"
        f"  .venv/bin/sorted-llama card {final}\n"
        f"  .venv/bin/python examples/train.py --model_name_or_path {final} --dataset_name my.jsonl  # data of yours\n"
        f'  .venv/bin/python -c "from transformers import pipeline; '
        f"print(pipeline('text-generation', '{final}', trust_remote_code=True, exit_layer={exits[1]})"
        "('The capital of Peru is Lima. Question: What is the capital of Peru? Answer:'))\""
    )


def hide_what_others_print() -> None:
    """Bars of loaders, notices of libraries about each other; a model's download keeps its bar."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    enable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


def check(args: argparse.Namespace) -> tuple[str, list[int], PreTrainedTokenizerBase, list[dict], list[dict]]:
    """Path of the model, exits, tokenizer, rows to train on and rows held out, once nothing is wrong with them."""
    if args.max_steps < 1 or args.minutes <= 0:
        raise ValueError("`--max_steps` and `--minutes` must be greater than 0.")
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    train_rows, test_rows = build_facts() if args.data is None else hold_out(load_rows(args.data))
    model_path = fetch_model(args.model)
    exits = default_exits(load_config(model_path).num_hidden_layers)
    if len(exits) < 2:
        raise ValueError(f"A demo of exits needs a model of two layers or more, which {args.model} has not.")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    as_text([*train_rows, *test_rows], tokenizer)  # a chat needs a template
    return model_path, exits, tokenizer, train_rows, test_rows[:MAX_TEST_ROWS]


def make_trainer(
    model: SortedLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    exits: list[int],
    plan: Plan,
    output_dir: Path,
    rows: list[dict],
    use_cpu: bool,
) -> SortedSFTTrainer:
    """The trainer of the planned steps, with our progress bar in place of its own."""
    set_seed(0)
    trainer = SortedSFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SortedSFTConfig(
            output_dir=str(output_dir),  # its page, with how it was trained, lies there, too
            exit_layers=exits,
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
            logging_steps=10,
            save_steps=math.ceil(60 / plan.step_seconds),  # once a minute
            save_total_limit=1,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{k: row[k] for k in ("prompt", "completion")} for row in rows]),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ExitProgressCallback())
    return trainer


def hold_out(rows: list[dict], share: float = 0.1) -> tuple[list[dict], list[dict]]:
    """A seeded split into rows to train on and rows held out."""
    for number, row in enumerate(rows):
        for field in ("prompt", "completion"):
            if not row.get(field):
                raise ValueError(f"Row {number} of `--data` lacks a {field}: {str(row)[:100]}.")
    if len(rows) < 2:
        raise ValueError(f"`--data` must have at least 2 rows, to train on and to hold out, got {len(rows)}.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    num_test = max(1, int(len(rows) * share))
    return [rows[i] for i in order[num_test:]], [rows[i] for i in order[:num_test]]


def pick_questions(rows: list[dict], count: int = 3) -> list[dict]:
    """The first questions of each task in turn."""
    by_task: dict[str, list[dict]] = {}
    for row in rows:
        by_task.setdefault(row.get("task", "all"), []).append(row)
    turns = [row for group in zip(*(task[:count] for task in by_task.values()), strict=False) for row in group]
    return turns[:count]


def reload_elsewhere(path: Path, prompt: str, exit_layer: int) -> str:
    """Generate in a fresh process that cannot import this project; returns what it answers."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-P", "-W", "ignore", "-c", RELOAD, str(path.resolve()), prompt, str(exit_layer)]
    process = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"The checkpoint did not load without this project:\n{process.stderr}")
    return process.stdout.strip()


def remove(output_dir: Path) -> None:
    """Remove what an earlier run left in `output_dir`, and nothing else."""
    shutil.rmtree(output_dir / "final", ignore_errors=True)
    for name in ("demo.json", "held_out.jsonl", "quality_speed.png"):
        (output_dir / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
