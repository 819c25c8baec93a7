"""
One checkpoint, many models: SoFT on a real Llama, every exit before and after, and a reload without this project.

```shell
make demo                                                # SmolLM2-135M-Instruct on built-in facts
make demo MODEL=TinyLlama/TinyLlama_v1.1 DATA=qa.jsonl   # any Llama, any prompt/completion file
```
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset
from exit_results import ExitResult, default_exits, evaluate_exits, format_table
from facts import build_facts
from plot import plot_quality_speed
from smollm2 import SMOLLM2, fetch_model
from transformers import AutoTokenizer, PrinterCallback, ProgressCallback, set_seed
from transformers.utils import logging

from hub_card.evaluation import write_json
from hub_card.measure import answers
from hub_card.tasks import as_text, first_line, load_rows
from modeling_sorted_llama import SortedLlamaForCausalLM
from trainer import SortedSFTConfig, SortedSFTTrainer


MAX_TEST_ROWS = 400

# Runs where neither this project's packages nor its folder can be imported
RELOAD = """
import sys
for name in ("modeling_sorted_llama", "trainer", "hub_card"):
    sys.modules[name] = None  # `import name` now raises ImportError
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
    parser.add_argument("--max_steps", type=int, default=400)
    args = parser.parse_args()
    started = time.monotonic()
    logging.set_verbosity_error()

    # 1. The model and the data
    model_path = fetch_model(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = faster_dtype(device)
    model = SortedLlamaForCausalLM.from_pretrained(model_path, dtype=dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    depth = model.config.num_hidden_layers
    exits = default_exits(depth)
    train_rows, test_rows = build_facts() if args.data is None else hold_out(load_rows(args.data))
    test_rows = test_rows[:MAX_TEST_ROWS]
    print(f"{len(train_rows)} rows to train on, {len(test_rows)} held out; exits {exits}; {device}, {dtype}")

    # 2. Where an interrupted run goes on
    output_dir = Path(args.output_dir)
    final = output_dir / "final"
    state_file = output_dir / "demo.json"
    settings = {
        "model": args.model,
        "data": args.data,
        "max_steps": args.max_steps,
        "exits": exits,
        "dtype": str(dtype),
    }
    state = json.loads(state_file.read_text()) if state_file.is_file() else {}
    checkpoint = last_checkpoint(output_dir)
    if state.get("settings") == settings and "after" not in state:
        print(f"Going on with the interrupted run from {checkpoint or 'its start'}.")
    else:
        if state:
            print(f"{output_dir} holds a finished run or one with other settings: starting over.")
        state, checkpoint = {"settings": settings}, None
        remove(output_dir)

    # 3. Every exit before
    if "before" not in state:
        print("\nBefore: what the exits of the untouched model are worth (a minute or so) ...")
        state["before"] = [asdict(r) for r in evaluate_exits(model, tokenizer, test_rows, exits)]
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(state_file, state)
    before = [ExitResult(**r) for r in state["before"]]
    print(f"\nBefore SoFT\n{format_table(before)}\n")
    del model

    # 4. Sorted Fine-Tuning
    set_seed(0)
    trainer = SortedSFTTrainer(
        model=model_path,
        args=SortedSFTConfig(
            output_dir=str(output_dir),
            exit_layers=exits,
            max_steps=args.max_steps,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            adam_beta2=0.98,
            max_length=256,
            train_sampling_strategy="group_by_length",
            gradient_checkpointing=False,
            bf16=dtype == torch.bfloat16,
            use_cpu=device == "cpu",
            logging_steps=10,
            save_steps=70,
            save_total_limit=1,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{k: row[k] for k in ("prompt", "completion")} for row in train_rows]),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ExitProgressCallback())
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.model.to(dtype).save_pretrained(final)
    tokenizer.save_pretrained(final)
    # What is measured is what was saved: `.to` rounds the rotary frequencies too, and loading does not
    model = SortedLlamaForCausalLM.from_pretrained(final, dtype=dtype).to(device).eval()

    # 5. Every exit after
    print("\nAfter: the same questions ...")
    after = evaluate_exits(model, tokenizer, test_rows, exits)
    print(f"\nAfter SoFT, one checkpoint (speed: one row, {dtype}, {device})\n{format_table(after)}\n")
    for question in pick_questions(test_rows):
        row = as_text([question], tokenizer)[0]
        print(f"{row['prompt']}   [{row['task']}; right: {row['answer']}]")
        for exit_layer in exits:
            answer = answers(model, tokenizer, [row["prompt"]], exit_layer=exit_layer)[0]
            print(f"    exit {exit_layer:2d}: {first_line(answer)}")
    plot_path = output_dir / "quality_speed.png"
    plot_quality_speed(before, after, plot_path)

    # 6. The checkpoint, and a process that has only transformers
    row = as_text(test_rows[:1], tokenizer)[0]
    here = first_line(answers(model, tokenizer, [row["prompt"]], exit_layer=exits[0])[0])
    there = reload_elsewhere(final, row["prompt"], exits[0])
    if there != here:
        raise RuntimeError(f"The reloaded checkpoint answers {there!r} at exit {exits[0]}, this process {here!r}.")
    write_json(state_file, {**state, "after": [asdict(r) for r in after]})  # finished
    print(
        f"\nReloaded in a process without this project, `AutoModelForCausalLM.from_pretrained('{final}', "
        f"trust_remote_code=True)`, `generate(exit_layer={exits[0]})` answers the same: {there!r}"
    )
    print(
        f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.\n"
        f"  checkpoint  {final}\n  plot        {plot_path}\n  numbers     {state_file}\n\nNext:\n"
        f"  .venv/bin/python -m hub_card evaluate {final} --data completions=my_held_out.jsonl\n"
        f"  .venv/bin/python -m hub_card card {final}\n"
        f"  .venv/bin/python examples/train.py --model_name_or_path {final} --dataset_name my.jsonl\n"
        f'  .venv/bin/python -c "from transformers import pipeline; '
        f"print(pipeline('text-generation', '{final}', trust_remote_code=True, exit_layer={exits[1]})"
        "('The capital of Peru is Lima. Question: What is the capital of Peru? Answer:'))\""
    )


def faster_dtype(device: str) -> torch.dtype:
    """bfloat16 where this device multiplies it faster than float32: CPUs without the instructions emulate it."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a, b)
            seconds[dtype] = min(seconds.get(dtype, 1.0), time.perf_counter() - start)
    return min(seconds, key=seconds.__getitem__)


def hold_out(rows: list[dict], share: float = 0.1) -> tuple[list[dict], list[dict]]:
    """A seeded split into rows to train on and rows held out."""
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


def last_checkpoint(output_dir: Path) -> str | None:
    """The newest checkpoint that was written to its end: `trainer_state.json` comes last."""
    complete = [state.parent for state in output_dir.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def remove(output_dir: Path) -> None:
    """Remove what an earlier run left in `output_dir`, and nothing else."""
    for path in (output_dir / "final", output_dir / "demo.json", *output_dir.glob("checkpoint-*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
