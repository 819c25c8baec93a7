"""The evaluation's file and the page that is made of it, on a tiny model."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import sorted_llama.hub_card.record as record_module
from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card import evaluate, evaluation, load_evaluation
from sorted_llama.hub_card.card import write_card
from sorted_llama.hub_card.commands import main
from sorted_llama.hub_card.cost import cost_of_exit
from sorted_llama.hub_card.measure import answers, teacher_forced
from sorted_llama.hub_card.tasks import load_task
from tests.tiny import save_tiny, tiny_llama, tiny_sorted, tiny_tokenizer


EXITS = [1, 2, 4]
QUICK = {"exit_thresholds": [0.5], "num_timed": 1, "max_new_tokens": 2, "runs": 1, "dtype": "float32", "device": "cpu"}


@pytest.fixture
def folder(tmp_path):
    save_tiny(tmp_path / "model", tiny_sorted(initializer_range=0.2, exit_layers=EXITS))
    rows = [{"question": f"what is {i}?", "answers": [f"{i}", "none"]} for i in range(5)]
    (tmp_path / "trivia.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"prompt": f"say {i}:", "completion": f" {i}"} for i in range(4)]
    (tmp_path / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def data(folder):
    return [("qa", str(folder / "trivia.jsonl")), ("completions", str(folder / "held_out.jsonl"))]


def test_every_exit_and_mode(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/hub_card/__main__.py", "evaluate", "a model"])
    record = evaluate(str(folder / "model"), data(folder), **QUICK)
    assert record == load_evaluation(folder / "model") == load_evaluation(folder / "model" / "evaluation.json")
    model, tokenizer = tiny_sorted(initializer_range=0.2, exit_layers=EXITS), tiny_tokenizer()
    assert list(record["tasks"]) == ["trivia", "held_out"]
    for (kind, source), results in zip(data(folder), record["tasks"].values(), strict=True):
        task = load_task(kind, source, tokenizer)
        prompts = [row["prompt"] for row in task.rows]
        modes = {f"exit {k}": {"exit_layer": k} for k in EXITS} | {"threshold 0.5": {"exit_threshold": 0.5}}
        assert list(results["settings"]) == list(modes)
        for name, mode in modes.items():
            assert results["settings"][name] == task.score(
                answers(model, tokenizer, prompts, task.max_new_tokens, **mode)
            )
        read = teacher_forced(model, tokenizer, task.rows, EXITS)
        for i, k in enumerate(EXITS):
            assert results["exits"][str(k)]["loss"] == pytest.approx(read.losses[i].mean().item(), rel=1e-4)
            assert results["exits"][str(k)]["agreement"] == pytest.approx(read.agrees[i].float().mean().item())
        assert results["exits"]["4"]["agreement"] == 1.0
        assert [s["wanted_agreement"] for s in results["suggested_thresholds"]] == [0.9, 0.95, 0.99]
    assert list(record["speed"]) == [*modes, "draft 1", "draft 2"]
    assert record["exits"]["2"]["parameters"] == cost_of_exit(model, 2).parameters
    assert record["made_by"]["versions"]["torch"] == torch.__version__
    assert record["made_by"]["command"] == "sorted-llama evaluate 'a model'"


def test_stopped_run_goes_on(folder, monkeypatch):
    asked, real = [], evaluation.answers

    def stopping(model, tokenizer, prompts, max_new_tokens, batch_size, progress, **decoding):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((progress, decoding))
        return real(model, tokenizer, prompts, max_new_tokens, batch_size, **decoding)

    monkeypatch.setattr(evaluation, "answers", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(folder / "model"), data(folder), **QUICK)
    before = load_evaluation(folder / "model")
    assert list(before["tasks"]["trivia"]["settings"]) == ["exit 1", "exit 2", "exit 4"]
    asked.clear()
    monkeypatch.setattr(evaluation, "answers", lambda *a, **kw: asked.append(a[5]) or real(*a[:5], **kw))
    record = evaluate(str(folder / "model"), data(folder), **QUICK)
    assert asked == ["trivia, threshold 0.5"] + [f"held_out, {name}" for name in record["tasks"]["trivia"]["settings"]]
    assert record["tasks"]["trivia"]["exits"] == before["tasks"]["trivia"]["exits"]
    assert record["made_by"] == before["made_by"]


@pytest.mark.slow
def test_tasks_of_the_harness(folder, monkeypatch):
    rows = [{"question": f"what is {i}?", "choices": [f" {i}", " none"]} for i in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "numbers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": 0,
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    yaml_file = str(folder / "numbers.yaml")
    (folder / "numbers.yaml").write_text(yaml.safe_dump(task))
    record = evaluate(str(folder / "model"), harness_tasks=[yaml_file], **QUICK)
    by_exit = record["harness"][yaml_file]["numbers"]
    assert list(by_exit) == [str(k) for k in EXITS] and record == load_evaluation(folder / "model")
    monkeypatch.setattr("sorted_llama.hub_card.harness.evaluate_harness", None)  # what is there is not run again
    assert evaluate(str(folder / "model"), harness_tasks=[yaml_file], **QUICK) == record
    write_card(folder / "model")
    page = (folder / "model" / "README.md").read_text()
    header, *shown = cells(page)[:4]
    assert header[1] == "numbers: acc,none"
    assert [row[1] for row in shown] == [f"{by_exit[str(k)]['acc,none']:.4g}" for k in EXITS]
    assert "acc, 1 of 4 layers" in page


def test_results_of_other_settings_are_kept(folder):
    evaluate(str(folder / "model"), data(folder)[:1], **QUICK)
    (folder / "trivia.jsonl").write_text('{"question": "another?", "answer": "no"}')
    with pytest.raises(ValueError, match="`output=.*holds results of another tasks.*`overwrite`"):
        evaluate(str(folder / "model"), data(folder)[:1], **QUICK)
    record = evaluate(str(folder / "model"), data(folder)[:1], overwrite=True, **QUICK)
    assert record["request"]["tasks"]["trivia"]["rows"] == 1
    model = SortedLlamaForCausalLM.from_pretrained(folder / "model")
    model.model.layers[0].mlp.down_proj.weight.data *= 1.5  # trained on
    model.save_pretrained(folder / "model")
    with pytest.raises(ValueError, match="holds results of another weights"):
        evaluate(str(folder / "model"), data(folder)[:1], **QUICK)


def test_a_file_of_an_earlier_version_is_read_and_gone_on_with(folder):
    """It held fields that nothing reads."""
    path = folder / "model"
    record = evaluate(str(path), data(folder)[:1], **QUICK)
    old = json.loads(json.dumps(record))
    old["exits"]["1"]["weight_bytes"] = 5
    task = old["tasks"]["trivia"]
    task["kind"] = "qa"
    task["suggested_thresholds"][0]["agreement"] = 0.9
    task["exits"]["1"] |= {"expected_draft_speed_up": 1.2, "expected_drafts": 3}
    task["exits"]["1"]["reliability"]["bins"] = [{"confidence": 0.5, "agreement": 0.5, "share": 1.0}]
    del old["speed"], task["settings"]["threshold 0.5"]
    (path / "evaluation.json").write_text(json.dumps(old))
    write_card(path)
    again = evaluate(str(path), data(folder)[:1], **QUICK)
    assert again["request"] == record["request"] and again["made_by"] == record["made_by"]
    assert again["tasks"]["trivia"]["settings"] == record["tasks"]["trivia"]["settings"] and list(again["speed"])
    assert again["tasks"]["trivia"]["exits"] == task["exits"]
    write_card(path)


def test_other_exits_than_the_config_names(folder):
    """What is evaluated at a threshold leaves at the exits that are evaluated."""
    save_tiny(folder / "plain", tiny_llama(initializer_range=0.2))
    record = evaluate(str(folder / "plain"), data(folder)[:1], exit_layers=[2, 4], **QUICK)
    model, tokenizer = tiny_sorted(initializer_range=0.2, exit_layers=[2, 4]), tiny_tokenizer()
    task = load_task(*data(folder)[0], tokenizer)
    said = answers(model, tokenizer, [r["prompt"] for r in task.rows], task.max_new_tokens, exit_threshold=0.5)
    assert record["tasks"]["trivia"]["settings"]["threshold 0.5"] == task.score(said)
    save_tiny(folder / "lens", tiny_sorted(exit_layers=EXITS, exit_heads="lens"))
    with pytest.raises(ValueError, match=r"those that the checkpoint has weights for, \[1, 2, 4\], got \[2, 4\]"):
        evaluate(str(folder / "lens"), data(folder)[:1], exit_layers=[2, 4], **QUICK)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "nothing to evaluate"),
        ({"output": "nowhere/results.json"}, "`output` must be"),
        ({"exit_layers": [1, 2]}, r"`exit_layers` must be .* ends in 2: pass \[1, 2, 4\]"),
        ({"exit_layers": []}, "`exit_layers` must be .* is empty"),
        ({"exit_layers": "1,2,4"}, r"`exit_layers` must be .* pass \[1,2,4\]"),
        ({"exit_thresholds": [-0.1]}, "`exit_thresholds` must be a finite number of at least 0, got -0.1"),
        ({"exit_thresholds": [float("nan")]}, "`exit_thresholds` must be .* got nan"),
        ({"exit_thresholds": ["0.5"]}, "`exit_thresholds` must be .* got '0.5'"),
        ({"device": "cuda:99"}, "`device` must be one that torch finds here, got 'cuda:99'"),
        ({"device": "gpu"}, "`device` must be one that torch finds here, got 'gpu'"),
        ({"device": "meta"}, "`device` must be one that torch finds here, got 'meta'"),
        ({"output": "."}, "`output` must be a file"),
        ({"exit_layers": [2, 1, 4]}, "`exit_layers` must be"),
        ({"exit_layers": [0, 4]}, "`exit_layers` must be"),
        ({"drafts": [4]}, "`drafts` must be an integer from 1 to 3, got 4"),
        ({"runs": 0}, "`runs` must be an integer of at least 1, got 0"),
        ({"num_timed": 0}, "`num_timed` must be an integer of at least 1, got 0"),
        ({"limit": 0}, "`limit` must be an integer of at least 1, got 0"),
        ({"harness_tasks": ["no_such_task"]}, "lm-evaluation-harness has no task 'no_such_task'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_told_before_weights_are_loaded(folder, monkeypatch, options, message):
    monkeypatch.setattr(evaluation, "load_model", None)
    with pytest.raises(ValueError, match=message):
        evaluate(str(folder / "model"), data(folder) if options else (), **QUICK | options)
    assert not (folder / "model" / "evaluation.json").exists()


def test_two_files_of_one_name(folder):
    (folder / "other").mkdir()
    (folder / "other" / "trivia.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(ValueError, match="`data` has two tasks named 'trivia'"):
        evaluate(
            str(folder / "model"), [data(folder)[0], ("completions", str(folder / "other" / "trivia.jsonl"))], **QUICK
        )


def test_later_schema(folder):
    (folder / "evaluation.json").write_text('{"schema_version": 2}')
    with pytest.raises(ValueError, match="schema version 2, this version reads 1"):
        load_evaluation(folder)


# The page


def cells(page):
    table = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_page(folder, capsys):
    path = str(folder / "model")
    files = [f"{kind}={source}" for kind, source in data(folder)]
    flags = [
        "--exit_thresholds",
        "0.5",
        "--num_timed",
        "1",
        "--max_new_tokens",
        "2",
        "--runs",
        "1",
        "--dtype",
        "float32",
    ]
    main(["evaluate", path, "--data", *files, *flags])
    printed = capsys.readouterr().out
    main(["card", path, "--name", "user/name", "--base_model", "base/llama", "--license", "apache-2.0"])
    assert "README.md" in capsys.readouterr().out
    record, page = load_evaluation(path), (folder / "model" / "README.md").read_text()

    assert cells(printed) == [row for row in cells(page) if row[0]][: len(cells(printed))]
    results, full = record["tasks"]["trivia"], record["speed"]["exit 4"]["median"]
    calls, exits_of_page = cells(page)[:7], cells(page)[7:11]
    names = [f"exit {k}" for k in EXITS] + ["threshold 0.5", "draft 1", "draft 2"]
    shown_calls = ["exit_layer=1", "exit_layer=2", "exit_layer=4", "exit_threshold=0.5"]
    shown_calls += ["assistant_early_exit=1", "assistant_early_exit=2"]
    for row, name, call in zip(calls[1:], names, shown_calls, strict=True):
        shown = dict(zip(calls[0], row, strict=True))
        assert row[0] == f"`{call}`" + (" (full)" if name == "exit 4" else "")
        score = results["settings"]["exit 4" if "draft" in name else name]["exact_match"]
        assert shown["trivia: exact match"] == f"{100 * score:.1f} %"
        assert shown["speed-up"] == f"{record['speed'][name]['median'] / full:.2f}x"
    for row, k in zip(exits_of_page[1:], map(str, EXITS), strict=True):
        shown = dict(zip(exits_of_page[0], row, strict=True))
        assert shown["exit"] == k and shown["KV bytes a token"] == f"{record['exits'][k]['kv_bytes']:,}"
        assert shown["trivia: loss"] == f"{results['exits'][k]['loss']:.3f}"
        assert f"{100 * results['exits'][k]['agreement']:.1f} %" in row
    assert (folder / "model" / "quality_speed.png").read_bytes().startswith(b"\x89PNG")
    assert "(quality_speed.png)" in page
    assert "not evaluated" not in page.lower()

    metadata = yaml.safe_load(page.split("---")[1])
    assert metadata["base_model"] == "base/llama" and metadata["license"] == "apache-2.0"
    assert {"sorted-llama", "soft", "early-exit", "self-speculation"} <= set(metadata["tags"])
    (index,) = metadata["model-index"]
    values = {
        (result["dataset"]["name"], metric["name"]): metric["value"]
        for result in index["results"]
        for metric in result["metrics"]
    }
    for k in EXITS:
        score = record["tasks"]["trivia"]["settings"][f"exit {k}"]["f1"]
        assert values["trivia", f"f1, {k} of 4 layers"] == pytest.approx(score, abs=1e-6)
    assert len(values) == 3 * (2 + 1)


def test_calls_on_the_page_are_those_of_the_exits_and_of_the_tokenizer(folder):
    """That they run: tests/trainer/test_model_card.py."""
    path = folder / "model"
    write_card(path, name=str(path))
    (code,) = re.findall(r"```python\n(.*?)```", (path / "README.md").read_text(), re.DOTALL)
    asked = re.findall(r"generate\(\*\*inputs, (.*?), max_new_tokens", code)
    assert asked == ["exit_layer=1", "exit_threshold=0.9", "assistant_early_exit=1"]
    assert "apply_chat_template" in code
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (path / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(path)
    write_card(path, name=str(path))
    assert "apply_chat_template" not in (path / "README.md").read_text()
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "x"}))  # as older versions do
    write_card(path, name=str(path))
    assert "apply_chat_template" in (path / "README.md").read_text()


def test_every_n_wherever_exits_are_asked_for(folder, capsys):
    record = evaluate(str(folder / "model"), data(folder)[:1], exit_layers="every:2", **QUICK)
    assert record["request"]["exit_layers"] == [2, 4]
    quick = ["--exit_thresholds", "--num_timed", "1", "--max_new_tokens", "2", "--runs", "1", "--dtype", "float32"]
    output = ["--output", str(folder / "out.json")]
    for given, exits in (["every:3"], [3, 4]), (["1", "4"], [1, 4]):
        asked = ["--data", f"qa={folder / 'trivia.jsonl'}", *quick, *output, "--overwrite", "--exit_layers", *given]
        main(["evaluate", str(folder / "model"), *asked])
        assert load_evaluation(folder / "out.json")["request"]["exit_layers"] == exits
    for given, message in (["1", "x"], "got 'x' in"), (["1,4"], r"pass \[1,4\]"), (["every:0"], "got 'every:0'"):
        with pytest.raises(SystemExit, match=message):
            main(["evaluate", str(folder / "model"), "--data", "qa=x.jsonl", "--exit_layers", *given])


def test_a_model_that_gives_no_numbers(folder):
    model = tiny_sorted(exit_layers=EXITS)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    model.save_pretrained(folder / "model")
    with pytest.raises(ValueError, match="`tasks.trivia.exits.2.loss` must be a finite number, got nan"):
        evaluate(str(folder / "model"), data(folder)[:1], **QUICK)
    assert not (folder / "model" / "evaluation.json").exists()


def test_weights_that_are_missing_are_not_made_up(folder):
    weights = load_file(folder / "model" / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 tensors, model.layers.3.mlp.up_proj.weight"):
        evaluate(str(folder / "model"), data(folder)[:1], **QUICK)
    (folder / "model" / "model.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="The weights of .* could not be loaded"):
        evaluate(str(folder / "model"), data(folder)[:1], **QUICK)


def test_the_revision_is_of_the_repository_that_holds_the_package(tmp_path, monkeypatch):
    """Not of the one in whose environment it was installed, nor of one that a hook of git names."""

    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    package = tmp_path / ".venv" / "hub_card"
    package.mkdir(parents=True)
    (package / "record.py").write_text("")
    monkeypatch.setattr(record_module, "__file__", str(package / "record.py"))
    git("commit", "-q", "--allow-empty", "-m", "theirs")
    assert record_module._git_revision() is None
    git("add", "-f", ".venv")
    git("commit", "-q", "-m", "ours")
    assert record_module._git_revision() == git("rev-parse", "HEAD")
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    revision = record_module._git_revision()
    monkeypatch.delenv("GIT_DIR")
    assert revision == git("rev-parse", "HEAD")


def test_nothing_unmeasured_is_shown(folder):
    path = folder / "model"
    write_card(path)
    page = (path / "README.md").read_text()
    assert "Not evaluated yet" in page and "model-index" not in page
    assert "Exits 1, 2, 4 with weights 1, 1, 1" in page
    evaluate(str(path), data(folder)[:1], exit_layers=[2, 4], **QUICK)
    write_card(path)
    rows = cells((path / "README.md").read_text())
    (missing,) = [row for row in rows if row[0] == "`exit_layer=1`"]
    assert missing[1] == "not evaluated" and not any(missing[2:])


def test_edits_of_the_owner_survive(folder):
    path = folder / "model"
    write_card(path)
    file = path / "README.md"
    mine = file.read_text().replace("# model\n", "# My model\n\nMy words.\n").replace("license", "licence")
    mine = mine.replace("tags:\n", "language: nl\ntags:\n- mine\n") + "\n## More of mine\n\nThe end.\n"
    # The block of limits is taken out, with its marks
    mine = re.sub(r"<!-- sorted-llama: limits -->.*<!-- /sorted-llama: limits -->", "Mine.", mine, flags=re.DOTALL)
    file.write_text(mine)
    evaluate(str(path), data(folder)[:1], **QUICK)
    for _ in range(2):
        write_card(path)
        page = file.read_text()
        for words in ("# My model\n\nMy words.\n", "## More of mine\n\nThe end.", "language: nl", "- mine", "Mine."):
            assert page.count(words) == 1, words
        assert "Not evaluated yet" not in page and "trivia: loss" in page and "cache that was filled" not in page
    assert ModelCard.load(file).data.language == "nl"


def test_page_of_somebody_else_stays(folder):
    file = folder / "model" / "README.md"
    file.write_text("---\nlicense: mit\ndatasets:\n- some/data\n---\n# Theirs\n\nText.\n")
    write_card(folder / "model")
    page = file.read_text()
    assert "# Theirs\n\nText." in page and page.index("## The exits") < page.index("# Theirs")
    card = ModelCard.load(file)
    assert card.data.license == "mit" and card.data.datasets == ["some/data"] and "early-exit" in card.data.tags


def test_peers_are_shown_where_they_were_measured_alike(folder, capsys):
    path = folder / "model"
    save_tiny(folder / "small", tiny_sorted(num_hidden_layers=2, initializer_range=0.2, exit_layers=None))
    with pytest.raises(ValueError, match="the checkpoint has none"):
        write_card(path, peers=[("small", write_results(folder, "small"))])
    record, peer = (load_evaluation(write_results(folder, name)) for name in ("model", "small"))
    write_card(path)
    alone = (path / "quality_speed.png").read_bytes()
    main(["card", str(path), "--peers", f"a small Llama={folder / 'small'}"])
    (row,) = [row for row in cells((path / "README.md").read_text()) if row[0] == "a small Llama"]
    score, speed = peer["tasks"]["trivia"]["settings"]["exit 2"]["exact_match"], peer["speed"]["exit 2"]["median"]
    assert row[1] == f"{100 * score:.1f} %"
    assert row[3] == f"{speed / record['speed']['exit 4']['median']:.2f}x"
    assert (path / "quality_speed.png").read_bytes() != alone
    write_card(path, name="user/name")  # as pushing does: what was shown stays
    assert row in cells((path / "README.md").read_text())

    (folder / "trivia.jsonl").write_text('{"question": "another?", "answer": "no"}')
    write_results(folder, "small", overwrite=True, **QUICK | {"max_new_tokens": 3})
    with pytest.raises(ValueError, match="`peers`: 'small' was measured with other rows .*; timed .*'max_new_tokens'"):
        write_card(path, peers=[("small", folder / "small")])
    with pytest.raises(SystemExit, match="`--peers` takes NAME=PATH"):
        main(["card", str(path), "--peers", str(folder / "small")])


def write_results(folder, name, **options):
    evaluate(str(folder / name), data(folder)[:1], **QUICK | options)
    return folder / name


@pytest.mark.parametrize("make", ["no folder", "other model"])
def test_wrong_page(folder, make):
    if make == "no folder":
        with pytest.raises(ValueError, match="`path` must be the folder of a checkpoint"):
            write_card(folder)
        return
    evaluate(str(folder / "model"), data(folder)[:1], output=folder / "results.json", **QUICK)
    save_tiny(folder / "shallow", tiny_sorted(num_hidden_layers=3, exit_layers=[1, 3]))
    with pytest.raises(ValueError, match="`evaluation` is of a model of 4 layers"):
        write_card(folder / "shallow", evaluation=folder / "results.json")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "held_out.jsonl"], "KIND=FILE"),
        (["--data", "poems=held_out.jsonl"], "`kind` must be one of"),
        ([], "nothing to evaluate"),
    ],
    ids=str,
)
def test_wrong_command(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match=message):
        main(["evaluate", "model", *arguments])
