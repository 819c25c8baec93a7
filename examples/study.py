"""
The paper's comparison, re-run: what each way of fine-tuning makes of every exit, what it costs full depth, and what it
costs to train.

```shell
python examples/study.py                          # the built-in facts
python examples/study.py --data FOLDER            # and GSM8K (gsm8k_train.jsonl), instructions (dolly_15k.jsonl)
python examples/study.py --report                 # only the tables and the plot, of the runs so far
```

Arms: `SFT`; `SFT+ICT` (on SFT's weights, separate norms and heads of the exits are trained, the backbone is frozen);
`SoFT` (the paper's sum); `lenses` (exits train only what they own; or `frozen`, on SFT's weights); `alone 10`, the
sub-model of ten layers extracted and fine-tuned by itself. `layers` give each exit a decoder layer: `frozen` on SFT's
weights, or `detached` beside SFT; `distilled` from full depth, too; or begun as `the last layer`, as in Balcony
(arXiv 2503.05005), not as the next one. Their learning rate is searched with `--exit_learning_rate`, into `--results`
and an `--output_dir` of its own.

Another arm is an entry in `ARMS`. A run is an arm on a task with a seed, in a process of its own; data, steps, seed
and learning rate (but that of what exits own) are the same for all arms. Its result is a line of the results file, and
what is there is not run again, so that the whole may take several sittings; an interrupted run goes on from its last
checkpoint.
"""

import argparse
import itertools
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from exit_results import default_exits
from facts import build_facts
from smollm2 import SMOLLM2, fetch_model
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from sorted_llama import SortedLlamaForCausalLM, SortedSFTConfig, SortedSFTTrainer
from sorted_llama.hub_card.checkpoint import load_answering_tokenizer, load_config, load_model
from sorted_llama.hub_card.measure import answers, teacher_forced
from sorted_llama.hub_card.tasks import as_text, exact_match, final_answer, normalize_answer, token_f1
from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import check_exit_layers
from sorted_llama.trainer.escaping import one_line
from sorted_llama.trainer.sorted_sft_config import read_exit_layers


@dataclass(frozen=True)
class Arm:
    """A way to train: SoFT, but for what is said here."""

    options: dict[str, Any] = field(default_factory=dict)  # of the trainer
    starts_from: str | None = None  # the arm on whose weights it goes on
    full_depth_only: bool = False
    sub_model: int | None = None  # layers of the model that is extracted first
    begun_as: int | None = None  # the layer that the exits' own are copies of, where it is not the next
    layer_dropout: float = 0.0  # of the last layer


LENSES = {"exit_heads": "lens", "detach_exits": True, "exit_loss_weights": "budget:0.03", "exit_learning_rate": 2e-3}
LAYERS = {"exit_heads": "layer", "exit_learning_rate": 8e-3}
FROZEN = {**LAYERS, "trainable": "exits"}
DETACHED = {**LAYERS, "detach_exits": True, "exit_loss_weights": "budget:0.03"}
DISTILLED = {"self_distillation_weight": 1.0}
# Beside them there are the sub-models, `alone K`
ARMS = {
    "SFT": Arm(full_depth_only=True),
    "SFT+ICT": Arm({"trainable": "exits", "exit_heads": "separate"}, starts_from="SFT"),
    "SoFT": Arm(),
    "SoFT, layer dropout": Arm(layer_dropout=0.1),
    "lenses": Arm(LENSES),
    "lenses, frozen": Arm({"exit_heads": "lens", "exit_learning_rate": 2e-3, "trainable": "exits"}, starts_from="SFT"),
    "layers, frozen": Arm(FROZEN, starts_from="SFT"),
    "layers, frozen, distilled": Arm({**FROZEN, **DISTILLED}, starts_from="SFT"),
    "layers, frozen, the last layer": Arm(FROZEN, starts_from="SFT", begun_as=-1),
    "layers, frozen, distilled, the last layer": Arm({**FROZEN, **DISTILLED}, starts_from="SFT", begun_as=-1),
    "layers, detached": Arm(DETACHED),
}
# How a generated text is scored, from 0 to 1, by the right answer
SCORES: dict[str, Callable[[str, str], float]] = {
    "exact match": lambda text, answer: exact_match(text, [answer])["exact_match"],
    "final answer": lambda text, answer: final_answer(text, [answer])["final_answer"],
    "token F1": lambda text, answer: token_f1(normalize_answer(text), normalize_answer(answer)),
}

INTRODUCTION = """\
# What each way of training makes of the exits

Made by `examples/study.py`; every run is a line of `study.jsonl`. Same data, steps, seeds and learning rate for all
arms of a task, but for what exits own: lenses have 2e-3, layers 8e-3. Losses are of 200 rows held out (± standard
deviation over the seeds), greedy answers of all of them (facts) or half. Costs stand in the row of full depth: time of
the training, the CPU's beside it because several runs shared one machine, neither for a run that was interrupted; peak
memory; parameters.

"SFT, below the layers" is SFT again: the weights that frozen layers stand on, trained with them on another machine.

![Held-out loss of every exit](study.png)
"""
HEAD = """\
| arm | exit | loss | score | agreement | minutes | CPU minutes | peak MB | trained, M | stored, M |
|---|---|---|---|---|---|---|---|---|---|"""


@dataclass
class Task:
    """Rows to train on and rows held out, and how a generated answer is scored."""

    train: list[dict]  # of `prompt` and `completion`
    held_out: list[dict]
    metric: str  # one of `SCORES`
    max_new_tokens: int
    num_generated: int  # answers to generate and score, at most; losses are of all rows held out
    steps: int
    learning_rate: float  # peak of the cosine schedule


def load_tasks(data: Path | None, num_held_out: int) -> dict[str, Task]:
    """The tasks that there is data for, each with a seeded split."""
    train, held_out = build_facts()
    random.Random(0).shuffle(held_out)
    tasks = {"facts": Task(train, held_out[:num_held_out], "exact match", 12, 200, 200, 5e-4)}
    if data is None:
        return tasks
    problems = [
        {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
        for row in read_lines(data / "gsm8k_train.jsonl", "question", "answer")
        if len(row["question"]) + len(row["answer"]) < 400
    ]
    instructions = [
        {"prompt": f"Instruction: {row['instruction']}\nResponse:", "completion": f" {row['response']}"}
        for row in read_lines(data / "dolly_15k.jsonl", "instruction", "context", "response")
        if not row["context"] and len(row["response"]) < 400
    ]
    for name, rows, metric, max_new_tokens in (
        ("gsm8k", problems, "final answer", 128),
        ("instructions", instructions, "token F1", 96),
    ):
        if rows:
            random.Random(0).shuffle(rows)
            tasks[name] = Task(rows[num_held_out:], rows[:num_held_out], metric, max_new_tokens, 100, 80, 2e-4)
    return tasks


def read_lines(path: Path, *fields: str) -> list[dict]:
    """The rows of a file of JSON lines, each with these fields; none where there is no file."""
    rows: list[dict] = []
    if not path.exists():
        return rows
    with path.open(encoding="utf-8") as file:  # `str.splitlines` would also split inside of strings
        for number, line in enumerate(file, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}.") from error
            if not isinstance(rows[-1], dict) or not rows[-1].keys() >= set(fields):
                raise ValueError(f"{path}, line {number}: there must be {', '.join(fields)}.")
    return rows


def read_exits(given: list[str] | None, depth: int) -> list[int]:
    """The exits that a flag names."""
    return default_exits(depth) if given is None else check_exit_layers(read_exit_layers(given), depth)


def all_arms(exits: list[int]) -> dict[str, Arm]:
    return {**ARMS, **{f"alone {k}": Arm(sub_model=k) for k in exits[:-1]}}


def run(args: argparse.Namespace, task_name: str, arm_name: str, seed: int) -> dict:
    """Train one arm on one task with one seed, and evaluate every exit that it has."""
    task = load_tasks(args.data, args.num_held_out)[task_name]
    folder = args.output_dir / task_name / f"{arm_name} {seed}"
    start = fetch_model(args.model)
    tokenizer = load_answering_tokenizer(start)
    exits = read_exits(args.exit_layers, load_config(start).num_hidden_layers)
    arm = all_arms(exits)[arm_name]
    weights = folder.with_name(f"{arm.starts_from} {seed}") / "final" if arm.starts_from else start
    model = load_model(weights, "float32")
    if arm.sub_model:
        exits = [arm.sub_model]
        model = SortedLlamaForCausalLM.from_llama(model.extract_submodel(arm.sub_model))
    options = {"exit_layers": exits[-1:] if arm.full_depth_only else exits, **arm.options}
    if args.exit_learning_rate and "exit_learning_rate" in options:
        options["exit_learning_rate"] = args.exit_learning_rate
    trainer = make_trainer(args, task, model, tokenizer, folder, seed, options)
    if arm.begun_as is not None:
        for own in trainer.model.model.exit_decoders.values():
            own.load_state_dict(trainer.model.model.layers[arm.begun_as].state_dict())
    drop_layers(trainer.model.model.layers, arm.layer_dropout)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)

    began, cpu_began = time.monotonic(), time.process_time()
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    times = time.monotonic() - began, time.process_time() - cpu_began
    seconds, cpu_seconds = (None, None) if checkpoint else times  # unknown for a run that was interrupted
    memory = peak_memory()
    model = trainer.model.to(torch.float32 if args.small else torch.bfloat16).eval()
    if any(other.starts_from == arm_name for other in ARMS.values()):
        model.save_pretrained(folder / "final")
    return {
        "task": task_name,
        "arm": arm_name,
        "seed": seed,
        "metric": task.metric,
        "steps": trainer.state.global_step,
        "exits": evaluate_exits(task, model, tokenizer, exits),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_memory_mb": memory,
        "trained_parameters": trained,
        "stored_parameters": sum(p.numel() for p in model.parameters()),
    }


def make_trainer(
    args: argparse.Namespace, task: Task, model, tokenizer, folder: Path, seed: int, options: dict[str, Any]
) -> SortedSFTTrainer:
    rows = random.Random(seed).sample(task.train, min(len(task.train), 8 * task.steps))
    return SortedSFTTrainer(
        model=model,
        args=SortedSFTConfig(
            output_dir=str(folder),
            seed=seed,
            max_steps=min(task.steps, args.max_steps),
            per_device_train_batch_size=8,
            learning_rate=task.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            gradient_checkpointing=False,
            bf16=not args.small,
            use_cpu=not torch.cuda.is_available(),
            save_steps=40,
            save_total_limit=1,
            **options,
        ),
        train_dataset=Dataset.from_list(rows).select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
    )


def drop_layers(layers: torch.nn.ModuleList, rate: float) -> None:
    """
    LayerSkip's layer dropout (arXiv 2404.16710): while training, rows go past a layer, the deeper the more often, the
    last one at this rate.
    """
    for place, layer in enumerate(layers):
        of_layer = rate * (2 ** (place / (len(layers) - 1)) - 1)
        if of_layer > 0:
            layer.register_forward_hook(partial(pass_rows_by, of_layer))


def pass_rows_by(rate: float, layer: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    if not layer.training:
        return output
    passed_by = torch.rand(len(output), 1, 1, device=output.device) < rate
    return torch.where(passed_by, inputs[0], output)


def evaluate_exits(task: Task, model, tokenizer, exits: list[int]) -> dict[int, dict[str, float]]:
    """Of each exit the loss, the score of its answers, and the agreement with full depth."""
    rows = as_text(task.held_out, tokenizer)
    read = teacher_forced(model, tokenizer, rows, exits)
    prompts = [row["prompt"] for row in rows[: task.num_generated]]
    found = {}
    for k, losses, agrees in zip(exits, read.losses, read.agrees, strict=True):
        texts = answers(model, tokenizer, prompts, task.max_new_tokens, exit_layer=k)
        scores = [SCORES[task.metric](text, row["answer"]) for text, row in zip(texts, rows, strict=False)]
        agreement = agrees.float().mean().item()
        found[k] = {"loss": losses.mean().item(), "score": statistics.mean(scores), "agreement": agreement}
    return found


def peak_memory() -> float:
    """MB of the GPU, or of the process, which runs one arm alone: training takes the most."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def report(results: list[dict]) -> str:
    """Markdown: a table a task, of means over the seeds, and their spread (standard deviation) behind "±"."""
    order = {arm: place for place, arm in enumerate(ARMS)}
    results = sorted(results, key=lambda r: order.get(r["arm"], len(order)))
    lines = [INTRODUCTION]
    for task in dict.fromkeys(r["task"] for r in results):
        of_task = [r for r in results if r["task"] == task]
        seeds = ", ".join(map(str, sorted({r["seed"] for r in of_task})))
        metric = of_task[0]["metric"]
        lines += [f"### {task}: held-out loss, {metric}, agreement with full depth (seeds: {seeds})\n", HEAD]
        for arm in dict.fromkeys(r["arm"] for r in of_task):
            lines += arm_rows(arm, [r for r in of_task if r["arm"] == arm])
        lines.append("")
    return "\n".join(lines)


def arm_rows(arm: str, runs: list[dict]) -> list[str]:
    """An arm's rows of the table, one an exit; its costs stand in the last."""
    costs = [
        cell([r["seconds"] / 60 for r in runs if r["seconds"]], ".1f"),
        cell([r["cpu_seconds"] / 60 for r in runs if r["cpu_seconds"]], ".1f"),
        cell([r["peak_memory_mb"] for r in runs], ".0f"),
        f"{runs[0]['trained_parameters'] / 1e6:.1f}",
        f"{runs[0]['stored_parameters'] / 1e6:.1f}",
    ]
    exits = sorted({k for r in runs for k in r["exits"]}, key=int)
    rows = []
    for k in exits:
        found = [r["exits"][k] for r in runs if k in r["exits"]]
        cells = [cell([values[name] for values in found], ".3f") for name in ("loss", "score", "agreement")]
        rows.append(f"| {' | '.join([arm, k, *cells, *(costs if k == exits[-1] else [''] * len(costs))])} |")
    return rows


def cell(values: list[float], form: str) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def plot(results: list[dict], path: Path) -> None:
    """Held-out loss of every exit, a panel a task, a line an arm; the sub-models alone are one line."""
    from matplotlib import colormaps  # only the picture needs it
    from matplotlib.figure import Figure

    losses: dict[str, dict[str, dict[int, list[float]]]] = {}  # of an arm, a task, an exit
    for result in results:
        arm = "alone" if result["arm"].startswith("alone ") else result["arm"]
        of_task = losses.setdefault(arm, {}).setdefault(result["task"], defaultdict(list))
        for k, values in result["exits"].items():
            of_task[int(k)].append(values["loss"])
    tasks = list(dict.fromkeys(result["task"] for result in results))
    figure = Figure(figsize=(4.5 * len(tasks), 4.4), dpi=150)
    panels = dict(zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True))
    for number, (arm, by_task) in enumerate(losses.items()):
        for task, by_exit in by_task.items():
            exits = sorted(by_exit)
            means = [statistics.mean(by_exit[k]) for k in exits]
            label = arm if task == next(iter(by_task)) else None  # once
            panels[task].plot(exits, means, marker="o", color=colormaps["tab20"](number % 20), label=label)
    for task, panel in panels.items():
        panel.set(title=task, xlabel="exit layer", ylabel="held-out loss", yscale="log")
        panel.grid(alpha=0.3)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.legend(loc="lower center", ncols=4, fontsize=8)
    figure.savefig(path)


def plan(args: argparse.Namespace, done: set[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Task, arm and seed of the runs that are missing, once nothing is wrong with what was asked for."""
    if args.data is not None and not args.data.is_dir():
        raise ValueError(f"--data must be a folder, got {args.data}.")
    tasks = [*load_tasks(args.data, args.num_held_out)]
    depth = load_config(fetch_model(args.model)).num_hidden_layers
    arms = all_arms(read_exits(args.exit_layers, depth))
    for flag, given, known in (("--tasks", args.tasks, tasks), ("--arms", args.arms, arms)):
        for name in given or []:
            if name not in known:
                raise ValueError(f"{flag} must be of {', '.join(known)}, got {name}.")
    todo: list[tuple[str, str, int]] = []
    for seed, task, arm in itertools.product(args.seeds, args.tasks or tasks, args.arms or arms):
        if (task, arm, seed) in done:
            continue
        base = arms[arm].starts_from
        if base and (task, base, seed) not in todo and not (args.output_dir / task / f"{base} {seed}").exists():
            raise ValueError(f"{arm} goes on from {base}, which {task} with seed {seed} lacks: --arms {base} {arm}.")
        todo.append((task, arm, seed))
    return todo


def run_all(todo: list[tuple[str, str, int]], file: Path) -> list[dict]:
    """The results of the runs, each in a process of its own, and each written as soon as it is there."""
    results = []
    for task, arm, seed in todo:
        print(f"{task}, {arm}, seed {seed} ...", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--run", task, arm, str(seed)]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if process.returncode:
            sys.exit(f"{task}, {arm}, seed {seed} ended with status {process.returncode}; the same command goes on.")
        line = process.stdout.strip().splitlines()[-1]
        results.append(json.loads(line))
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            lines.write(line + "\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="model id or path of a Llama")
    parser.add_argument("--data", type=Path, help="folder of gsm8k_train.jsonl and dolly_15k.jsonl")
    parser.add_argument("--tasks", nargs="+", help="default: all that there is data for")
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--exit_layers", nargs="+", help="or every:N; default: a third, a half, two thirds and all")
    parser.add_argument("--num_held_out", type=int, default=200)
    parser.add_argument("--exit_learning_rate", type=float, help="in place of the arms' own, to search it")
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
        results = read_lines(args.results, "task", "arm", "seed", "exits")
        todo = [] if args.report else plan(args, {(r["task"], r["arm"], r["seed"]) for r in results})
        if not results and not todo:
            raise ValueError(f"There is nothing to report: {args.results} holds no runs.")
    except (ValueError, OSError) as error:
        sys.exit(one_line(error))
    results += run_all(todo, args.results)
    print(report(results))
    args.results.with_suffix(".md").write_text(report(results))
    plot(results, args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
