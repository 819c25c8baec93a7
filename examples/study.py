"""
The paper's comparison, re-run: what each way of fine-tuning makes of every exit, what it costs full depth, and what it
costs to train.

```shell
python examples/study.py                          # the built-in facts
python examples/study.py --data FOLDER            # and GSM8K (gsm8k_train.jsonl), instructions (dolly_15k.jsonl)
python examples/study.py --report                 # only the tables and the plot, of the runs so far
```

Arms: `SFT`; `SFT+ICT` (on SFT's weights, separate norms and heads of the exits are trained, the backbone is frozen);
`SoFT` (the paper's sum); recipes, which are SoFT with other options: `lenses`, with which exits train only what they
own; `alone 10`, the sub-model of ten layers extracted and fine-tuned by itself. A run is an arm
on a task with a seed, in a process of its own; data, steps, learning rate and seed are the same for all arms. Its
result is a line of the results file, and what is there is not run again, so that the whole may take several sittings;
an interrupted run goes on from its last checkpoint.
"""

import argparse
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from exit_results import default_exits
from facts import build_facts
from smollm2 import SMOLLM2, fetch_model
from transformers import AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card.checkpoint import load_config
from sorted_llama.hub_card.measure import answers, teacher_forced
from sorted_llama.hub_card.tasks import as_text, exact_match, final_answer, normalize_answer, token_f1
from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import check_exit_layers
from sorted_llama.trainer import SortedSFTConfig, SortedSFTTrainer
from sorted_llama.trainer.escaping import one_line
from sorted_llama.trainer.sorted_sft_config import read_exit_layers


RECIPES: dict[str, dict[str, Any]] = {
    "SoFT": {},
    "lenses": {
        "exit_heads": "lens",
        "detach_exits": True,
        "exit_loss_weights": "budget:0.03",
        "exit_learning_rate": 2e-3,
    },
}


ARMS = ["SFT", "SFT+ICT", *RECIPES]  # and the sub-models alone

INTRODUCTION = """\
# What each way of training makes of the exits

Made by `examples/study.py`; every run is a line of `study.jsonl`. Same data, steps, seeds and learning rate for all
arms of a task. Losses are of rows held out, answers are generated greedily. Costs stand in the row of full depth: time
of the training, the CPU's beside it because several runs shared one machine; peak memory; parameters.

![Held-out loss of every exit](study.png)
"""


@dataclass
class Task:
    """
    Rows to train on and rows held out, and how a generated answer is scored.

    Args:
        train, held_out (`list[dict]`): Rows of `prompt` and `completion`.
        score (`Callable[[str, str], float]`): From generated text and right answer to a number from 0 to 1.
        metric (`str`): What the score is called.
        max_new_tokens (`int`): Length of a generated answer.
        num_generated (`int`): Answers to generate and score, at most; losses are of all rows held out.
        steps (`int`): Optimization steps.
        learning_rate (`float`): Peak of the cosine schedule.
    """

    train: list[dict]
    held_out: list[dict]
    score: Callable[[str, str], float]
    metric: str
    max_new_tokens: int
    num_generated: int
    steps: int
    learning_rate: float


def score_fact(text: str, answer: str) -> float:
    return exact_match(text, [answer])["exact_match"]


def score_problem(text: str, answer: str) -> float:
    return final_answer(text, [answer])["final_answer"]


def score_response(text: str, answer: str) -> float:
    return token_f1(normalize_answer(text), normalize_answer(answer))


def load_tasks(data: Path | None, num_held_out: int) -> dict[str, Task]:
    """The tasks that there is data for, each with a seeded split."""

    def split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
        random.Random(0).shuffle(rows)
        return rows[num_held_out:], rows[:num_held_out]

    def read(name: str, *fields: str) -> list[dict]:
        return [] if data is None or not (data / name).exists() else read_lines(data / name, *fields)

    train, held_out = build_facts()
    random.Random(0).shuffle(held_out)
    tasks = {"facts": Task(train, held_out[:num_held_out], score_fact, "exact match", 12, 200, 200, 5e-4)}
    problems = [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
        for row in read("gsm8k_train.jsonl", "question", "answer")
        if len(row["question"]) + len(row["answer"]) < 400
    ]
    instructions = [
        {"prompt": f"Instruction: {row['instruction']}\nResponse:", "completion": f" {row['response']}"}
        for row in read("dolly_15k.jsonl", "instruction", "context", "response")
        if not row["context"] and len(row["response"]) < 400
    ]
    if problems:
        tasks["gsm8k"] = Task(*split(problems), score_problem, "final answer", 128, 100, 80, 2e-4)
    if instructions:
        tasks["instructions"] = Task(*split(instructions), score_response, "token F1", 96, 100, 80, 2e-4)
    return tasks


def read_lines(path: Path, *fields: str) -> list[dict]:
    """The rows of a file of JSON lines, each with these fields."""
    rows = []
    with path.open(encoding="utf-8") as file:  # `str.splitlines` would also split inside of strings
        for number, line in enumerate(file, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}.") from error
            if not isinstance(rows[-1], dict) or not rows[-1].keys() >= set(fields):
                raise ValueError(f"{path}, line {number}: there must be {', '.join(fields) or 'fields'}.")
    return rows


def run(args: argparse.Namespace, task_name: str, arm: str, seed: int) -> dict:
    """Train one arm on one task with one seed, and evaluate every exit that it has."""
    task = load_tasks(args.data, args.num_held_out)[task_name]
    folder = args.output_dir / task_name / f"{arm} {seed}"
    tokenizer = AutoTokenizer.from_pretrained(fetch_model(args.model))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"

    start = folder.with_name(f"SFT {seed}") / "final" if arm == "SFT+ICT" else fetch_model(args.model)
    model = SortedLlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    depth = model.config.num_hidden_layers
    exits = read_exits(args.exit_layers, depth)
    evaluated = exits
    options: dict[str, Any] = RECIPES.get(arm, {}) | {"exit_layers": exits}
    if arm == "SFT":
        options = {"exit_layers": [depth]}
    elif arm == "SFT+ICT":
        options = {"exit_layers": exits, "trainable": "exits", "exit_heads": "separate"}
    elif arm.startswith("alone "):
        depth = int(arm.removeprefix("alone "))
        model = SortedLlamaForCausalLM.from_llama(model.extract_submodel(depth))
        options, evaluated = {"exit_layers": [depth]}, [depth]

    rows = random.Random(seed).sample(task.train, min(len(task.train), 8 * task.steps))
    trainer = SortedSFTTrainer(
        model=model,
        args=SortedSFTConfig(
            output_dir=str(folder),
            seed=seed,
            max_steps=min(task.steps, args.max_steps),
            per_device_train_batch_size=8,
            learning_rate=task.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            max_length=512,
            gradient_checkpointing=False,
            bf16=not args.small,
            use_cpu=device == "cpu",
            logging_steps=10,
            save_steps=40,
            save_total_limit=1,
            report_to="none",
            **options,
        ),
        train_dataset=Dataset.from_list([{k: row[k] for k in ("prompt", "completion")} for row in rows]),
        processing_class=tokenizer,
    )
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    reset_peak_memory()
    began = time.monotonic(), time.process_time()
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds, cpu_seconds = time.monotonic() - began[0], time.process_time() - began[1]
    memory = peak_memory()
    model = trainer.model.to(torch.float32 if args.small else torch.bfloat16).eval()
    if arm == "SFT":  # ICT starts from it
        model.save_pretrained(folder / "final")

    held_out = as_text(task.held_out, tokenizer)
    read = teacher_forced(model, tokenizer, held_out, evaluated)
    losses, agreements = read.losses.mean(1).tolist(), read.agrees.float().mean(1).tolist()
    generated = held_out[: task.num_generated]
    prompts, wanted = [row["prompt"] for row in generated], [row["answer"] for row in generated]
    scores = []
    for exit_layer in evaluated:
        texts = answers(model, tokenizer, prompts, task.max_new_tokens, exit_layer=exit_layer)
        scores.append(statistics.mean(task.score(text, answer) for text, answer in zip(texts, wanted, strict=True)))
    return {
        "task": task_name,
        "arm": arm,
        "seed": seed,
        "metric": task.metric,
        "steps": trainer.state.global_step,
        "exits": {
            exit_layer: {"loss": loss, "score": score, "agreement": agreement}
            for exit_layer, loss, score, agreement in zip(evaluated, losses, scores, agreements, strict=True)
        },
        "seconds": None if checkpoint else seconds,  # unknown for a run that was interrupted
        "cpu_seconds": None if checkpoint else cpu_seconds,
        "peak_memory_mb": memory,
        "trained_parameters": trained,
        "stored_parameters": sum(p.numel() for p in model.parameters()),
    }


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """MB since the reset, where the system can tell; else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def report(results: list[dict]) -> str:
    """Markdown: tables, one a task, of means over the seeds, and their spread (standard deviation) behind "±"."""

    def cell(values: list[float], form: str) -> str:
        if not values:
            return ""
        spread = f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else ""
        return format(statistics.mean(values), form) + spread

    results = sorted(results, key=lambda r: ARMS.index(r["arm"]) if r["arm"] in ARMS else len(ARMS))
    lines = [INTRODUCTION]
    for task in dict.fromkeys(r["task"] for r in results):
        of_task = [r for r in results if r["task"] == task]
        exits = sorted({int(k) for r in of_task for k in r["exits"]})
        lines += [
            f"### {task}: held-out loss, {of_task[0]['metric']}, agreement with full depth (seeds: "
            f"{', '.join(str(s) for s in sorted({r['seed'] for r in of_task}))})\n",
            "| arm | exit | loss | score | agreement | minutes | CPU minutes | peak MB | trained, M | stored, M |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for arm in dict.fromkeys(r["arm"] for r in of_task):
            runs = [r for r in of_task if r["arm"] == arm]
            for k in exits:
                found = [r["exits"][str(k)] for r in runs if str(k) in r["exits"]]
                if not found:
                    continue
                costs = [""] * 5
                if k == max(int(e) for e in runs[0]["exits"]):
                    costs = [
                        cell([r["seconds"] / 60 for r in runs if r["seconds"]], ".1f"),
                        cell([r["cpu_seconds"] / 60 for r in runs if r["cpu_seconds"]], ".1f"),
                        cell([r["peak_memory_mb"] for r in runs], ".0f"),
                        f"{runs[0]['trained_parameters'] / 1e6:.1f}",
                        f"{runs[0]['stored_parameters'] / 1e6:.1f}",
                    ]
                values = [cell([f[name] for f in found], ".3f") for name in ("loss", "score", "agreement")]
                lines.append(f"| {arm} | {k} | {' | '.join(values)} | {' | '.join(costs)} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    """Held-out loss of every exit, a panel a task, a line an arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(r["task"] for r in results))
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 3.6), dpi=150, squeeze=False)
    for panel, task in zip(panels[0], tasks, strict=True):
        arms = dict.fromkeys(r["arm"] for r in results if r["task"] == task)
        means: dict[str, dict[int, float]] = {}
        for arm in arms:
            runs = [r["exits"] for r in results if r["task"] == task and r["arm"] == arm]
            name = "alone" if arm.startswith("alone ") else arm
            for k in runs[0]:
                means.setdefault(name, {})[int(k)] = statistics.mean(exits[k]["loss"] for exits in runs)
        for name, losses in means.items():
            panel.plot(*zip(*sorted(losses.items()), strict=True), marker="o", label=name)
        panel.set(title=task, xlabel="exit layer", ylabel="held-out loss", yscale="log")
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="model id or path of a Llama")
    parser.add_argument("--data", type=Path, help="folder of gsm8k_train.jsonl and dolly_15k.jsonl")
    parser.add_argument("--tasks", nargs="+", help="default: all that there is data for")
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--exit_layers", nargs="+", help="or every:N; default: a third, a half, two thirds and all")
    parser.add_argument("--num_held_out", type=int, default=200)
    parser.add_argument("--max_steps", type=int, default=10**9, help="at most; the tasks have their own")
    parser.add_argument("--output_dir", type=Path, default=Path("out/study"), help="of the checkpoints")
    parser.add_argument("--results", type=Path, default=Path("docs/study.jsonl"))
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--small", action="store_true", help="float32, for a tiny model")
    parser.add_argument("--run", nargs=3, metavar=("TASK", "ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    if args.run:
        task, arm, seed = args.run
        print(json.dumps(run(args, task, arm, int(seed))))
        return

    try:
        results = read_lines(args.results, "task", "arm", "seed", "exits") if args.results.exists() else []
        todo = [] if args.report else plan(args, {(r["task"], r["arm"], r["seed"]) for r in results})
        if not results and not todo:
            raise ValueError(f"There is nothing to report: {args.results} holds no runs.")
    except (ValueError, OSError) as error:
        sys.exit(one_line(error))
    for task, arm, seed in todo:
        print(f"{task}, {arm}, seed {seed} ...", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--run", task, arm, str(seed)]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if process.returncode:
            sys.exit(f"{task}, {arm}, seed {seed} ended with status {process.returncode}; the same command goes on.")
        line = process.stdout.strip().splitlines()[-1]
        results.append(json.loads(line))
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a") as file:
            file.write(line + "\n")
    print(report(results))
    args.results.with_suffix(".md").write_text(report(results))
    plot(results, args.results.with_suffix(".png"))


def read_exits(given: list[str] | None, depth: int) -> list[int]:
    """The exits that a flag names."""
    return default_exits(depth) if given is None else check_exit_layers(read_exit_layers(given), depth)


def plan(args: argparse.Namespace, done: set[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Task, arm and seed of the runs that are missing, once nothing is wrong with what was asked for."""
    if args.data is not None and not args.data.is_dir():
        raise ValueError(f"--data must be a folder, got {args.data}.")
    tasks = load_tasks(args.data, args.num_held_out)
    config = load_config(fetch_model(args.model))
    alone = [f"alone {k}" for k in read_exits(args.exit_layers, config.num_hidden_layers)[:-1]]
    for flag, given, known in (("--tasks", args.tasks, [*tasks]), ("--arms", args.arms, [*ARMS, *alone])):
        for name in given or []:
            if name not in known:
                raise ValueError(f"{flag} must be of {', '.join(known)}, got {name}.")
    runs = [(t, a, s) for s in args.seeds for t in args.tasks or tasks for a in args.arms or [*ARMS, *alone]]
    todo = [run for run in runs if run not in done]
    for task, arm, seed in todo:
        before = [(t, s) for t, a, s in todo[: todo.index((task, arm, seed))] if a == "SFT"]
        if arm == "SFT+ICT" and (task, seed) not in before and not (args.output_dir / task / f"SFT {seed}").exists():
            raise ValueError(f"SFT+ICT goes on from SFT, which {task} with seed {seed} lacks: --arms SFT SFT+ICT.")
    return todo


if __name__ == "__main__":
    main()
