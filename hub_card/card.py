"""The page of a checkpoint: what an evaluation found, in the blocks of the template that training left there."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from sorted_llama.trainer.escaping import code_span, markdown, one_line
from sorted_llama.trainer.model_card import get_block, new_page, open_page, set_block, use_block

from .certificate import certificates_block
from .checkpoint import load_config
from .plot import plot_quality_speed
from .record import FILE_NAME, Measured, exit_scores, full_depth, harness_scores, load_evaluation, measured, write_json


PAGE_NAME = "README.md"
PLOT_NAME = "quality_speed.png"
TAGS = ["sorted-llama", "soft", "early-exit", "self-speculation"]
GOOD_ENOUGH = 0.95  # of full depth's score: the depth that the page suggests


def write_card(
    path: str | Path,
    evaluation: str | Path | None = None,
    name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    peers: Sequence[tuple[str, str | Path]] = (),
    target: str | Path | None = None,
) -> ModelCard:
    """
    Write the page of a checkpoint, `README.md` in its folder, and the plot beside it. What the evaluation does not
    hold is said not to be evaluated. Of a page that is there already, only our blocks and our metadata are replaced.

    Args:
        path (`str` or `Path`): Folder of the checkpoint.
        evaluation (`str` or `Path`, *optional*):
            JSON file of [`evaluate`], which becomes the folder's `evaluation.json`. Defaults to what is there.
        name (`str`, *optional*):
            Id on the Hub, for the calls to paste. Defaults to the one that the page's calls name, then to the folder.
        base_model (`str`, *optional*): Id of the model that it was made from. Defaults to what the page says.
        license (`str`, *optional*): Licence, as the Hub names it. Defaults to what the page says.
        peers (`Sequence[tuple[str, str | Path]]`, *optional*):
            Names and evaluations (folder or JSON file) of other models to show beside this one, at their full depth:
            of the same rows, on the same machine. They are kept in `evaluation.json`, and shown again later on.
        target (`str` or `Path`, *optional*): Folder for what is made. Defaults to that of the checkpoint.

    Raises:
        ValueError: If `path` is no folder of a sorted Llama, if its page or an evaluation cannot be read, if the
            evaluation is of another depth, or if a peer was not measured as the checkpoint was.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"`path` must be the folder of a checkpoint, with a config.json, got {str(path)!r}.")
    config = load_config(folder)
    exits = config.exit_layers or [config.num_hidden_layers]
    record = _evaluation_of(folder, config.num_hidden_layers, evaluation, peers)
    model_name = folder.resolve().name
    data = ModelCardData(model_name=model_name, base_model=base_model, tags=TAGS)
    try:
        content = open_page(folder / PAGE_NAME, new_page(data, model_name)).content
    except (OSError, ValueError, TypeError, YAMLError) as error:
        raise ValueError(f"The page {str(folder / PAGE_NAME)!r} could not be read: {one_line(error)}") from error
    if name is not None or get_block(content, "use") == "":
        content = set_block(content, "use", use_block(name or str(folder), exits, chat=_has_chat_template(folder)))
    if get_block(content, "training") == "Not recorded.":
        weights = ", ".join(f"{weight:g}" for weight in config.exit_loss_weights or [1.0] * len(exits))
        training = f"Exits {', '.join(map(str, exits))} with weights {weights}; exit heads: {config.exit_heads}."
        content = set_block(content, "training", f"{training} Data and steps are not recorded.")
    with TemporaryDirectory() as made:
        if record is not None:
            if peers or evaluation is not None:
                write_json(Path(made, FILE_NAME), record)
            pictured = plot_quality_speed(record, Path(made, PLOT_NAME))
            blocks = [exits_block(record, exits, pictured)]
            if record.get("certificates"):
                blocks.append(certificates_block(record["certificates"], folder))
            content = set_block(content, "exits", "\n\n".join(blocks))
        card = ModelCard(content)
        _set_metadata(card.data, record, model_name, base_model, license)
        card.save(Path(made, PAGE_NAME))
        install(made, folder if target is None else target)
    return card


def install(made: str | Path, folder: str | Path) -> None:
    """Put what [`write_card`] made into a folder, each file whole."""
    for file in (PLOT_NAME, FILE_NAME, PAGE_NAME):
        if Path(made, file).is_file():
            temporary = Path(folder, f"{file}.tmp")
            shutil.copyfile(Path(made, file), temporary)
            temporary.replace(Path(folder, file))


def _evaluation_of(
    folder: Path, depth: int, evaluation: str | Path | None, peers: Sequence[tuple[str, str | Path]]
) -> dict[str, Any] | None:
    """The evaluation to show, its peers in it."""
    record: dict[str, Any] | None = None
    if evaluation is not None or (folder / FILE_NAME).is_file():
        record = load_evaluation(folder if evaluation is None else evaluation)
        evaluated = full_depth(record).value
        if evaluated != depth:
            raise ValueError(f"`evaluation` is of a model of {evaluated} layers, {str(folder)!r} has {depth}.")
    compared = {peer: load_evaluation(file) for peer, file in peers} or (record or {}).get("peers", {})
    for peer, other in compared.items():
        _check_peer(record, peer, other)
    return {**record, "peers": compared} if record and compared else record


def _set_metadata(
    data: Any, record: dict[str, Any] | None, model_name: str, base_model: str | None, license: str | None
) -> None:
    data.tags = list(dict.fromkeys([*(data.tags or []), *TAGS]))
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    data.base_model = base_model or data.base_model
    data.license = license or data.license
    if getattr(data, "licence", None) == "license":  # TRL's place holder
        del data.licence
    if record is not None:
        data.model_name = getattr(data, "model_name", None) or model_name
        data.eval_results = eval_results(record) or None


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
        rows = {task: what.get("sha256") for task, what in request["tasks"].items()}
        # The tokens of a prompt are by the tokenizer
        timed = {key: value for key, value in request.get("timed", {}).items() if key != "prompt_tokens"}
        same = {"dtype": request["dtype"], "chat": request.get("chat"), "machine": of["made_by"]["machine"]}
        return {"rows": rows, "timed": timed, **same}

    ours, theirs = conditions(record), conditions(peer)
    different = [f"{key} ({theirs[key]}, not {value})" for key, value in ours.items() if theirs[key] != value]
    if different:
        raise ValueError(f"`peers`: {name!r} was measured with other {'; '.join(different)}.")
    full = str(full_depth(peer))
    for task, results in record["tasks"].items():
        scores = peer["tasks"].get(task, {"settings": {}})["settings"].get(full, {})
        if results["metric"] not in scores or full not in peer["speed"]:
            raise ValueError(f"`peers`: the evaluation of {name!r} lacks {results['metric']!r} of {task!r} at {full}.")


def exits_block(record: dict[str, Any], exits: list[int], pictured: bool) -> str:
    """
    Tables of the calls and of the exits, the plot, and which exit to take, in Markdown. Of the checkpoint's exits,
    those that the evaluation lacks are said not to be evaluated; `pictured` says whether there is a plot.
    """
    request, made = record["request"], record["made_by"]
    rows = "".join(f", {task['rows']} rows of {markdown(name)}" for name, task in request["tasks"].items())
    notes = f"Scores: greedy answers{rows}."
    if "speed" in record:
        timed, task = request["timed"], next(iter(record["tasks"]))
        notes += (
            f" Speed: {markdown(made['machine'])}, {markdown(request['dtype'])}, torch "
            f"{markdown(made['versions']['torch'])}; one row, answers of at most {timed['max_new_tokens']} tokens to "
            f"{timed['prompts']} prompts of {markdown(task)}, {timed['prompt_tokens'] / timed['prompts']:.0f} tokens "
            f"each on average; {timed['runs']} runs in turns, median (best)."
        )
    blocks = [_table_of_calls(record, exits)]
    if rows:  # a certificate alone has none
        blocks.append(notes)
    if pictured:
        blocks.append(f"![Score of every exit and mode against its speed-up over full depth]({PLOT_NAME})")
    choices = [*_choices_of_depth(record, [k for k in exits if str(k) in record["exits"]]), *_choice_of_draft(record)]
    if choices:
        blocks.append("\n".join(choices))
    blocks += [
        "More of each exit; agreement: how often its greedy token is full depth's; calibration error: how far its "
        "confidence is from that, on average:",
        _table_of_exits(record, exits),
        f"Measured {markdown(made['date'][:10])} by {code_span(made['command'])}; all numbers are in `{FILE_NAME}`.",
    ]
    return "\n\n".join(blocks)


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Of cells that are Markdown; a row may end early."""
    filled = [row + [""] * (len(header) - len(row)) for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---:"] * len(header), *filled))


def _table_of_calls(record: dict[str, Any], exits: list[int]) -> str:
    """What each way to call the model scores, and how fast it is; below, what other models do at full depth."""
    header = ["`generate(...)`"]
    header += [markdown(f"{name}: {task['metric'].replace('_', ' ')}") for name, task in record["tasks"].items()]
    header += [markdown(f"{name}: {_first_metric(task)}") for name, task in harness_scores(record).items()]
    header += ["tokens/s (best)", "speed-up"] if "speed" in record else []
    names = dict.fromkeys([*(f"exit {k}" for k in exits), *record["request"]["settings"]])
    return _table(header, [_row_of_call(record, way) for way in measured(record, names)])


def _first_metric(by_exit: dict[str, dict]) -> str:
    return next(metric for metrics in by_exit.values() for metric in metrics)


def _row_of_call(record: dict[str, Any], way: Measured) -> list[str]:
    setting, full = way.setting, full_depth(record)
    row, scored = [markdown(way.name)], None
    if setting is not None:
        row = [f"`{setting.call}`" + (" (full)" if setting == full else "")]
        scored = full if setting.mode.lossless else setting
        if setting.kind == "exit" and str(setting.value) not in record["exits"]:
            return [*row, "not evaluated"]
    row += ["not evaluated" if score is None else f"{100 * score:.1f} %" for score in way.scores.values()]
    for task in harness_scores(record).values():  # which is run at exits alone
        at_exit = task.get(str(scored.value), {}) if scored is not None and scored.kind == "exit" else {}
        score = at_exit.get(_first_metric(task))
        row.append("" if score is None else f"{score:.4g}")
    if way.speed is not None:
        row += [f"{way.speed['median']:.1f} ({way.speed['best']:.1f})", f"{way.speed_up:.2f}x"]
    return row


def _table_of_exits(record: dict[str, Any], exits: list[int]) -> str:
    header = ["exit", "parameters run", "GFLOP a token", "KV bytes a token"]
    for task in record["tasks"]:
        header += [markdown(f"{task}: loss"), "agreement", "calibration error"]
    rows = []
    for k in [k for k in exits if str(k) in record["exits"]]:
        cost = record["exits"][str(k)]
        row = [str(k), f"{cost['parameters'] / 1e6:,.1f} M", f"{cost['flops'] / 1e9:.3g}", f"{cost['kv_bytes']:,}"]
        for results in record["tasks"].values():
            read = results["exits"][str(k)]
            row += [f"{read['loss']:.3f}", f"{100 * read['agreement']:.1f} %"]
            row.append(f"{read['reliability']['expected_calibration_error']:.3f}" if k != exits[-1] else "")
        rows.append(row)
    return _table(header, rows)


def _choices_of_depth(record: dict[str, Any], exits: list[int]) -> list[str]:
    """Which exit or threshold to take for what, from the numbers alone."""
    lines = []
    for name, results in record["tasks"].items():
        task, metric = markdown(name), results["metric"]
        scores = {k: results["settings"].get(f"exit {k}", {}).get(metric, 0.0) for k in exits}
        if not scores[exits[-1]]:
            continue
        enough = next(k for k in exits if scores[k] >= GOOD_ENOUGH * scores[exits[-1]])
        which = f"`exit_layer={enough}` is the shallowest exit with" if enough < exits[-1] else "no shallower exit has"
        lines.append(f"- {task}: {which} at least {GOOD_ENOUGH:.0%} of full depth's score.")
        shown = [
            f"{s['exit_threshold']:g} for {s['wanted_agreement']:.0%} ({s['mean_layers']:.1f} layers a token)"
            for s in results.get("suggested_thresholds", [])
            if s["exit_threshold"] <= 1
        ]
        if shown and len(exits) > 1:
            lines.append(f"- {task}: `exit_threshold` by the agreement with full depth to keep: {', '.join(shown)}.")
    return lines


def _choice_of_draft(record: dict[str, Any]) -> list[str]:
    """How fast the best of the settings with full depth's answers is."""
    lossless = {
        way.setting.call: way.speed_up
        for way in measured(record, record["request"]["settings"])
        if way.setting is not None and way.setting.mode.lossless and way.speed_up is not None
    }
    if not lossless:
        return []
    best, speed_up = max(lossless.items(), key=lambda way: way[1])
    pays = "." if speed_up > 1.02 else ": drafting does not pay there."
    return [f"- Full depth's answers: `{best}` was {speed_up:.2f}x as fast as plain decoding{pays}"]


def eval_results(record: dict[str, Any]) -> list[EvalResult]:
    """The scores as the Hub's metadata has them, one for each exit, task and metric."""
    depth = full_depth(record).value
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=one_line(score.task),
            dataset_name=one_line(score.task),
            metric_type=one_line(score.metric),
            metric_value=round(score.value, 6),
            metric_name=f"{one_line(score.metric).replace('_', ' ')}, {score.exit_layer} of {depth} layers",
        )
        for score in exit_scores(record)
    ]
