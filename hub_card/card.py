"""The page of a checkpoint: what an evaluation found, in the blocks of the template that training left there."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from sorted_llama.modeling_sorted_llama import SortedLlamaConfig
from sorted_llama.trainer.escaping import code_span, markdown, one_line
from sorted_llama.trainer.model_card import get_block, new_page, open_page, set_block, use_block

from .checkpoint import load_config
from .plot import plot_quality_speed
from .record import FILE_NAME, load_evaluation, write_json


PAGE_NAME = "README.md"
PLOT_NAME = "quality_speed.png"
TAGS = ["sorted-llama", "soft", "early-exit", "self-speculation"]
ARGUMENTS = {"exit": "exit_layer", "threshold": "exit_threshold", "draft": "assistant_early_exit"}
GOOD_ENOUGH = 0.95  # of full depth's score: the depth that the page suggests


def write_card(
    path: str | Path,
    evaluation: str | Path | None = None,
    name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    peers: Sequence[tuple[str, str | Path]] = (),
) -> ModelCard:
    """
    Write the page of a checkpoint, `README.md` in its folder, and the plot beside it. What the evaluation does not
    hold is said not to be evaluated. Of a page that is there already, only our blocks and our metadata are replaced.

    Args:
        path (`str` or `Path`):
            Folder of the checkpoint.
        evaluation (`str` or `Path`, *optional*):
            JSON file of [`evaluate`], which becomes the folder's `evaluation.json`. Defaults to what is there.
        name (`str`, *optional*):
            Id on the Hub, for the calls to paste. Defaults to the one that the page's calls name, then to the folder.
        base_model (`str`, *optional*):
            Id of the model that it was made from. Defaults to what the page says.
        license (`str`, *optional*):
            Licence, as the Hub names it. Defaults to what the page says.
        peers (`Sequence[tuple[str, str | Path]]`, *optional*):
            Names and evaluations (folder or JSON file) of other models to show beside this one, at their full depth:
            of the same rows, on the same machine. They are kept in `evaluation.json`, and shown again later on.

    Returns:
        [`~huggingface_hub.ModelCard`]

    Raises:
        ValueError: If `path` is no folder of a sorted Llama, if its page or an evaluation cannot be read, if the
            evaluation is of another depth, or if a peer was not measured as the checkpoint was.
    """
    with TemporaryDirectory() as made:
        card = render_card(path, made, evaluation, name, base_model, license, peers)
        install(made, path)
    return card


def install(made: str | Path, folder: str | Path) -> None:
    """
    Put what [`render_card`] made into a folder, each file whole.

    Args:
        made (`str` or `Path`):
            Where it is.
        folder (`str` or `Path`):
            Where it shall be.
    """
    for file in (PLOT_NAME, FILE_NAME, PAGE_NAME):
        if (Path(made) / file).is_file():
            temporary = Path(folder) / f"{file}.tmp"
            shutil.copyfile(Path(made) / file, temporary)
            temporary.replace(Path(folder) / file)


def render_card(
    path: str | Path,
    target: str | Path,
    evaluation: str | Path | None = None,
    name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    peers: Sequence[tuple[str, str | Path]] = (),
) -> ModelCard:
    """
    Make the page of a checkpoint, its plot and, where it changes, its `evaluation.json`; nothing in the checkpoint's
    folder is touched.

    Args:
        path (`str` or `Path`):
            Folder of the checkpoint.
        target (`str` or `Path`):
            Folder to write to.
        evaluation, name, base_model, license, peers (*optional*):
            See [`write_card`], as for what is returned and raised.
    """
    folder, target = Path(path), Path(target)
    if not (folder / "config.json").is_file():
        raise ValueError(f"`path` must be the folder of a checkpoint, with a config.json, got {str(path)!r}.")
    config = load_config(folder)
    exits = config.exit_layers or [config.num_hidden_layers]
    record = _evaluation_of(folder, config, evaluation, peers)
    if record is not None and (peers or evaluation is not None):
        write_json(target / FILE_NAME, record)
    model_name = folder.resolve().name
    try:
        content = _open_page(folder / PAGE_NAME, model_name, base_model).content
    except (OSError, ValueError, TypeError, YAMLError) as error:
        raise ValueError(f"The page {str(folder / PAGE_NAME)!r} could not be read: {one_line(error)}") from error
    if name is not None or get_block(content, "use") == "":
        content = set_block(content, "use", use_block(name or str(folder), exits, chat=_has_chat_template(folder)))
    if get_block(content, "training") == "Not recorded.":
        content = set_block(content, "training", _training_from_config(config))
    if record is not None:
        compared = record.get("peers", {})
        pictured = plot_quality_speed(record, target / PLOT_NAME, compared)
        content = set_block(content, "exits", exits_block(record, exits, pictured, compared))
    card = ModelCard(content)
    data: Any = card.data
    _set_metadata(data, base_model, license)
    if record is not None:
        data.model_name = getattr(data, "model_name", None) or model_name
        data.eval_results = eval_results(record) or None
    card.save(target / PAGE_NAME)
    return card


def _evaluation_of(
    folder: Path, config: SortedLlamaConfig, evaluation: str | Path | None, peers: Sequence[tuple[str, str | Path]]
) -> dict[str, Any] | None:
    """The evaluation to show, its peers in it."""
    record = None
    if evaluation is not None or (folder / FILE_NAME).is_file():
        record = load_evaluation(evaluation if evaluation is not None else folder)
        if record["request"]["exit_layers"][-1] != config.num_hidden_layers:
            raise ValueError(
                f"`evaluation` is of a model of {record['request']['exit_layers'][-1]} layers, the checkpoint in "
                f"{str(folder)!r} has {config.num_hidden_layers}."
            )
    compared = {peer: load_evaluation(file) for peer, file in peers} or (record or {}).get("peers", {})
    for peer, other in compared.items():
        _check_peer(record, peer, other)
    return record and {**record, **({"peers": compared} if compared else {})}


def _set_metadata(data: Any, base_model: str | None, license: str | None) -> None:
    data.tags = list(dict.fromkeys([*(data.tags or []), *TAGS]))
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    data.base_model = base_model or data.base_model
    data.license = license or data.license
    if getattr(data, "licence", None) == "license":  # TRL's place holder
        del data.licence


def _has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in a folder has one, in a file of its own or as older versions of transformers save it."""
    file = folder / "tokenizer_config.json"
    try:
        inside = file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("chat_template") is not None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} could not be read: {one_line(error)}") from error
    return inside or (folder / "chat_template.jinja").is_file()


def _check_peer(record: dict[str, Any] | None, name: str, peer: dict[str, Any]) -> None:
    """Other rows, lengths or machines are no comparison."""
    if record is None:
        raise ValueError("`peers` are shown beside an evaluation, and the checkpoint has none.")
    if "speed" not in peer:
        raise ValueError(f"`peers`: the evaluation of {name!r} is not finished.")

    def conditions(of: dict[str, Any]) -> dict[str, Any]:
        request = of["request"]
        timed = {key: value for key, value in request.get("timed", {}).items() if key != "prompt_tokens"}
        rows = {task: what.get("sha256") for task, what in request["tasks"].items()}
        conditions = {"dtype": request["dtype"], "chat": request.get("chat"), "machine": of["made_by"]["machine"]}
        return {"rows": rows, "timed": timed, **conditions}  # the tokens of a prompt are by the tokenizer

    ours, theirs = conditions(record), conditions(peer)
    different = [f"{key} ({theirs[key]}, not {value})" for key, value in ours.items() if theirs[key] != value]
    if different:
        raise ValueError(f"`peers`: {name!r} was measured with other {'; '.join(different)}.")
    full = f"exit {peer['request']['exit_layers'][-1]}"
    for task, results in record["tasks"].items():
        scores = peer["tasks"].get(task, {"settings": {}})["settings"].get(full, {})
        if results["metric"] not in scores or full not in peer["speed"]:
            raise ValueError(f"`peers`: the evaluation of {name!r} lacks {results['metric']!r} of {task!r} at {full}.")


def _open_page(page_file: Path, model_name: str, base_model: str | None) -> ModelCard:
    """The page that is there, with our blocks; or a new one."""
    data = ModelCardData(model_name=model_name, base_model=base_model, tags=TAGS)
    return open_page(page_file, new_page(data, model_name))


def _training_from_config(config: SortedLlamaConfig) -> str:
    exits = config.exit_layers or [config.num_hidden_layers]
    weights = config.exit_loss_weights or [1.0] * len(exits)
    return (
        f"Exits {', '.join(map(str, exits))} with weights {', '.join(f'{w:g}' for w in weights)}; exit heads: "
        f"{config.exit_heads}. Data and steps are not recorded."
    )


def exits_block(
    record: dict[str, Any], exits: list[int], pictured: bool, peers: dict[str, dict[str, Any]] | None = None
) -> str:
    """
    Tables of the calls and of the exits, the plot, and which exit to take.

    Args:
        record (`dict`):
            An evaluation.
        exits (`list[int]`):
            The checkpoint's exits; those that the evaluation lacks are said not to be evaluated.
        pictured (`bool`):
            Whether there is a plot.
        peers (`dict[str, dict]`, *optional*):
            Evaluations of other models, by the names to show.

    Returns:
        `str`: Markdown.
    """
    request, made, full = record["request"], record["made_by"], exits[-1]
    blocks = [_table_of_calls(record, exits, peers or {})]
    notes = f"Scores: greedy answers{_rows(request)}."
    if "speed" in record:
        timed, task = request["timed"], next(iter(record["tasks"]))
        notes += (
            f" Speed: {markdown(made['machine'])}, {markdown(request['dtype'])}, torch "
            f"{markdown(made['versions']['torch'])}; one row, answers of at most {timed['max_new_tokens']} tokens to "
            f"{timed['prompts']} prompts of {markdown(task)}, "
            f"{timed['prompt_tokens'] / timed['prompts']:.0f} tokens each on average; {timed['runs']} runs in turns, "
            "median (best)."
        )
    blocks.append(notes)
    if pictured:
        blocks.append(f"![Score of every exit and mode against its speed-up over full depth]({PLOT_NAME})")
    choices = _choices(record, [k for k in exits if str(k) in record["exits"]])
    if choices:
        blocks.append("\n".join(choices))
    blocks += [
        "More of each exit; agreement: how often its greedy token is full depth's; calibration error: how far its "
        "confidence is from that, on average:",
        _table_of_exits(record, exits, full),
        f"Measured {markdown(made['date'][:10])} by {code_span(made['command'])}; all numbers are in `{FILE_NAME}`.",
    ]
    return "\n\n".join(blocks)


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Of cells that are Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---:"] * len(header), *rows))


def _table_of_calls(record: dict[str, Any], exits: list[int], peers: dict[str, dict[str, Any]]) -> str:
    """What each way to call the model scores, and how fast it is; below, what other models do at full depth."""
    tasks, harness, speed = record["tasks"], harness_results(record), record.get("speed", {})
    full = f"exit {exits[-1]}"
    header = ["`generate(...)`"]
    header += [markdown(f"{task}: {results['metric'].replace('_', ' ')}") for task, results in tasks.items()]
    header += [markdown(f"{task}: {_first_metric(results)}") for task, results in harness.items()]
    header += ["tokens/s (best)", "speed-up"] if speed else []
    rows = []
    for name in dict.fromkeys([*(f"exit {k}" for k in exits), *record["request"]["settings"]]):
        kind, value = name.split(" ")
        if kind == "exit" and value not in record["exits"]:
            rows.append([f"`exit_layer={value}`", "not evaluated", *[""] * (len(header) - 2)])
            continue
        row = [f"`{ARGUMENTS[kind]}={value}`" + (" (full)" if name == full else "")]
        for results in tasks.values():
            scored = results["settings"].get(full if kind == "draft" else name)
            row.append(f"{100 * scored[results['metric']]:.1f} %" if scored else "not evaluated")
        for results in harness.values():
            of_exit = {} if kind == "threshold" else results.get(str(exits[-1]) if kind == "draft" else value, {})
            score = of_exit.get(_first_metric(results))
            row.append("" if score is None else f"{score:.4g}")
        if speed:
            row += _speed_cells(speed[name], speed[full])
        rows.append(row)
    for peer, other in peers.items():
        theirs = f"exit {other['request']['exit_layers'][-1]}"
        row = [markdown(peer)]
        for task, results in tasks.items():
            row.append(f"{100 * other['tasks'][task]['settings'][theirs][results['metric']]:.1f} %")
        row += [""] * len(harness)
        if speed:
            row += _speed_cells(other["speed"][theirs], speed[full])
        rows.append(row)
    return _table(header, rows)


def _speed_cells(speed: dict[str, float], full: dict[str, float]) -> list[str]:
    return [f"{speed['median']:.1f} ({speed['best']:.1f})", f"{speed['median'] / full['median']:.2f}x"]


def _table_of_exits(record: dict[str, Any], exits: list[int], full: int) -> str:
    header = ["exit", "parameters run", "GFLOP a token", "KV bytes a token"]
    for task in record["tasks"]:
        header += [markdown(f"{task}: loss"), "agreement", "calibration error"]
    rows = []
    for k in exits:
        cost = record["exits"].get(str(k))
        if cost is None:
            continue
        row = [str(k), f"{cost['parameters'] / 1e6:,.1f} M", f"{cost['flops'] / 1e9:.3g}", f"{cost['kv_bytes']:,}"]
        for results in record["tasks"].values():
            read = results["exits"][str(k)]
            row += [f"{read['loss']:.3f}", f"{100 * read['agreement']:.1f} %"]
            row.append(f"{read['reliability']['expected_calibration_error']:.3f}" if k != full else "")
        rows.append(row)
    return _table(header, rows)


def _rows(request: dict) -> str:
    return "".join(f", {task['rows']} rows of {markdown(name)}" for name, task in request["tasks"].items())


def _choices(record: dict[str, Any], exits: list[int]) -> list[str]:
    """Which exit or mode to take for what, from the numbers alone."""
    lines = []
    speed = record.get("speed", {})
    full = f"exit {exits[-1]}"
    for task, results in ((markdown(task), results) for task, results in record["tasks"].items()):
        of_full = results["settings"].get(full, {}).get(results["metric"])
        if not of_full:
            continue
        scores = {k: results["settings"].get(f"exit {k}", {}).get(results["metric"], 0.0) for k in exits}
        enough = next(k for k in exits if scores[k] >= GOOD_ENOUGH * of_full)
        share = f"at least {GOOD_ENOUGH:.0%} of full depth's score"
        lines.append(
            f"- {task}: `exit_layer={enough}` is the shallowest exit with {share}."
            if enough != exits[-1]
            else f"- {task}: no shallower exit has {share}."
        )
        suggestions = {s["wanted_agreement"]: s for s in results.get("suggested_thresholds", [])}
        shown = [
            f"{s['exit_threshold']:g} for {wanted:.0%} ({s['mean_layers']:.1f} layers a token)"
            for wanted, s in suggestions.items()
            if s["exit_threshold"] <= 1
        ]
        if shown and len(exits) > 1:
            lines.append(f"- {task}: `exit_threshold` by the agreement with full depth to keep: {', '.join(shown)}.")
    drafts = {name: s["median"] / speed[full]["median"] for name, s in speed.items() if name.startswith("draft ")}
    if drafts:
        best = max(drafts, key=lambda name: drafts[name])
        k = best.removeprefix("draft ")
        lines.append(
            f"- Full depth's answers: `assistant_early_exit={k}` was {drafts[best]:.2f}x as fast as plain decoding"
            + ("." if drafts[best] > 1.02 else ": drafting does not pay there.")
        )
    return lines


def harness_results(record: dict[str, Any]) -> dict[str, dict[str, dict]]:
    """Of each task of the harness that was asked for, the metrics by exit; of a group its members' if it has none."""
    found = {}
    for asked, results in record["harness"].items():
        measured = {name: by_exit for name, by_exit in results.items() if _first_metric(by_exit) is not None}
        found.update({asked: measured[asked]} if asked in measured else measured)
    return found


def _first_metric(results: dict[str, dict]) -> str | None:
    """The first metric of a task of the harness that is no standard error."""
    return next((name for metrics in results.values() for name in metrics if "stderr" not in name), None)


def eval_results(record: dict[str, Any]) -> list[EvalResult]:
    """
    The scores as the Hub's metadata has them.

    Args:
        record (`dict`):
            An evaluation.

    Returns:
        `list[EvalResult]`: One for each exit, task and metric.
    """
    found = []
    depth = record["request"]["exit_layers"][-1]
    for task, results in record["tasks"].items():
        for setting, scores in results["settings"].items():
            if setting.startswith("exit "):
                found += [_eval_result(task, setting, depth, name, value) for name, value in scores.items()]
    for task, by_exit in harness_results(record).items():
        for k, metrics in by_exit.items():
            for name, value in metrics.items():
                if "stderr" not in name:
                    found.append(_eval_result(task, f"exit {k}", depth, name.split(",")[0], value))
    return found


def _eval_result(task: str, setting: str, depth: int, metric: str, value: float) -> EvalResult:
    task, metric = one_line(task), one_line(metric)
    name = f"{metric.replace('_', ' ')}, {setting.removeprefix('exit ')} of {depth} layers"
    return EvalResult(
        task_type="text-generation",
        dataset_type=task,
        dataset_name=task,
        metric_type=metric,
        metric_value=round(value, 6),
        metric_name=name,
    )


__all__ = ["eval_results", "exits_block", "write_card"]
