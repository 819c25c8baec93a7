"""A certificate for a tiny model: what is promised is what free generation shows, and is kept, shown and applied."""

import functools
import json
import random
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
from scipy.stats import binom
from tokenizers.normalizers import Lowercase
from transformers import AutoTokenizer, GenerationConfig

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card import answering, certify, evaluate, load_evaluation
from sorted_llama.hub_card.card import write_card
from sorted_llama.hub_card.certificate import certificate_line, find_faults
from sorted_llama.hub_card.commands import main
from sorted_llama.hub_card.measure import answers
from sorted_llama.hub_card.tasks import closed_book
from tests.hub_card.records import EXITS, QUICK
from tests.tiny import prompts, save_tiny, tiny_sorted, tiny_tokenizer


LOOSE = {"risk": 0.2, "delta": 0.2, "num_timed": 1, "device": "cpu"}  # 8 prompts without a failure are enough


@functools.cache
def answer_alone(change: float, prompt: str, length: int, mode: str) -> str:
    """What the model that is changed so much answers to one prompt; the mode is JSON."""
    return answers(as_good_as_full_depth(2, change), tiny_tokenizer(), [prompt], length, **json.loads(mode))[0]


def as_good_as_full_depth(exit_layer, change=0.0):
    """A model whose layers behind an exit change nothing, or that share of what they would."""
    model = tiny_sorted(exit_layers=EXITS)
    for layer in model.model.layers[exit_layer:]:
        layer.self_attn.o_proj.weight.data *= change
        layer.mlp.down_proj.weight.data *= change
    return model


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A checkpoint and its questions; what is generated, by mode and prompt."""
    rows = [{"question": f"what is {i}{'?' * (i % 3)}", "answers": [f"it is {i}", "none"]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    generated, made = [], answering.answers_with_exits

    def counting(model, tokenizer, asked, *arguments, **mode):
        generated.extend((json.dumps(mode), prompt) for prompt in asked)
        return made(model, tokenizer, asked, *arguments, **mode)

    monkeypatch.setattr(answering, "answers_with_exits", counting)
    return SimpleNamespace(
        path=save_tiny(tmp_path / "model", as_good_as_full_depth(2)),
        folder=tmp_path,
        data=("qa", str(tmp_path / "rows.jsonl")),
        rows={f"Question: {row['question']}\nAnswer:": row for row in rows},
        generated=generated,
    )


def halves(rows, seed=0):
    drawn = random.Random(seed).sample(list(rows), len(rows))
    return drawn[: len(rows) // 2], drawn[len(rows) // 2 :]


def test_an_exit_that_is_full_depth_is_certified(run):
    found = certify.certify(run.path, run.data, **LOOSE)
    assert found["setting"] == "exit 2" and found["speed_up"] > 0
    assert found["tested"] == [{"setting": "exit 2", "mean_loss": 0.0, "p_value": pytest.approx(0.8**20)}]
    assert (found["looked_at_on"], found["tested_on"]) == (20, 20)
    assert found["looked_at"]["exit 2"]["mean_loss"] == 0 < found["looked_at"]["exit 1"]["mean_loss"]
    assert load_evaluation(run.path)["certificates"] == [json.loads(json.dumps(found))]


@pytest.mark.parametrize("loss, change", [("differs", 0.02), ("exact_match", 0.05), ("f1", 0.05)])
def test_what_is_lost_is_what_free_generation_loses(run, loss, change):
    """Against answers to each prompt alone, scored here; the right answers are made from full depth's own."""
    for i, (prompt, row) in enumerate(run.rows.items()):
        text = answer_alone(change, prompt, 24, '{"exit_layer": 4}').strip() or "x"
        row["answers"] = [text if i % 3 else text[: len(text) // 2] or "x", "no such answer"]
    (run.folder / "rows.jsonl").write_text("\n".join(map(json.dumps, run.rows.values())))
    path, wide = save_tiny(run.folder / "other", as_good_as_full_depth(2, change)), {"risk": 0.5, "delta": 0.5}
    found = certify.certify(path, run.data, loss=loss, thresholds=[0.9, [2, 0.6], 0.3], **{**LOOSE, **wide})
    length, (first, second) = found["decoding"]["max_new_tokens"], halves(run.rows)

    def mean_loss(half, name):
        kind, value = name.split(" ", 1)
        mode, lost = f'{{"{dict(exit="exit_layer", threshold="exit_threshold")[kind]}": {value}}}', []
        for prompt in half:
            ours, best = (answer_alone(change, prompt, length, m) for m in (mode, '{"exit_layer": 4}'))
            ours_scores, best_scores = (closed_book(text, run.rows[prompt]["answers"]) for text in (ours, best))
            lost.append(ours != best if loss == "differs" else max(best_scores[loss] - ours_scores[loss], 0))
        return sum(lost) / len(lost)

    assert {"exit 2", "threshold 0.9", "threshold [2, 0.6]", "threshold 0.3"} <= found["looked_at"].keys()
    assert max(seen["mean_loss"] for seen in found["looked_at"].values()) > 0
    for name, seen in found["looked_at"].items():
        assert seen["mean_loss"] == pytest.approx(mean_loss(first, name))
    for test in found["tested"]:
        assert test["mean_loss"] == pytest.approx(mean_loss(second, test["setting"]))
        if loss != "f1":
            assert test["p_value"] == pytest.approx(binom.cdf(round(20 * test["mean_loss"]), 20, 0.5))
    assert found["tested"] and all(test["p_value"] <= 0.5 for test in found["tested"][:-1])


def test_the_weights_that_a_threshold_reads_are_those_of_its_tokens(run):
    path = save_tiny(run.folder / "other", tiny_sorted(exit_layers=EXITS))
    found = certify.certify(path, run.data, thresholds=[[2, 0.3]], **{**LOOSE, "risk": 0.5})
    model, tokenizer, read = SortedLlamaForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path), []
    layer, head = (sum(p.numel() for p in m.parameters()) for m in (model.model.layers[0], model.lm_head))
    head += model.model.norm.weight.numel()
    for prompt in halves(run.rows)[0]:
        asked = {"exit_threshold": [2, 0.3], "max_new_tokens": found["decoding"]["max_new_tokens"]}
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, **asked, do_sample=False, return_dict_in_generate=True)
        # Exit 1 is closed, so that nothing is read there
        read += [2 * layer + head if k == 2 else 4 * layer + 2 * head for k in output.exit_layers_used[0].tolist()]
    assert {2 * layer + head, 4 * layer + 2 * head} == set(read)
    assert found["looked_at"]["threshold [2, 0.3]"]["weights_read"] == pytest.approx(sum(read) / len(read))
    assert found["looked_at"]["exit 2"]["weights_read"] == 2 * layer + head


def test_too_few_prompts_are_told_before_a_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr(certify, "load_model", None)
    with pytest.raises(ValueError, match="takes 59 prompts to test, .* `data` needs 117 rows, got 40"):
        certify.certify(run.path, run.data, device="cpu")
    with pytest.raises(ValueError, match="takes 29 prompts to test, .* `data` needs 57 rows, got 40"):
        certify.certify(run.path, run.data, risk=0.1, device="cpu")
    with pytest.raises(TypeError, match="NoneType"):  # 20 are enough to test: it goes on
        certify.certify(run.path, run.data, risk=0.14, device="cpu")


def test_nothing_is_generated_twice_nor_before_it_is_needed(run, monkeypatch):
    monkeypatch.setattr(answering, "BATCH_SIZE", 7)
    counting = answering.answers_with_exits

    def stopping(*arguments, **mode):
        if len(run.generated) > 50:
            raise KeyboardInterrupt
        return counting(*arguments, **mode)

    with monkeypatch.context() as patch:
        patch.setattr(answering, "answers_with_exits", stopping)
        with pytest.raises(KeyboardInterrupt):
            certify.certify(run.path, run.data, **LOOSE)
    found = certify.certify(run.path, run.data, **LOOSE)
    first, second = halves(run.rows)
    assert max(Counter(run.generated).values()) == 1
    tested = {mode for mode, prompt in run.generated if prompt in second}
    assert tested == {json.dumps({"exit_layer": k}) for k in (2, 4)}  # the only one in the sequence, and full depth
    assert {prompt for mode, prompt in run.generated if mode == json.dumps({"exit_layer": 1})} == set(first)
    before = len(run.generated)
    again = certify.certify(run.path, run.data, **{**LOOSE, "risk": 0.3})
    assert again["setting"] == found["setting"] and len(run.generated) == before


def test_a_setting_that_is_worse_is_not_certified(run):
    """Exit 1 is left to choose from, and it is not full depth."""
    model = as_good_as_full_depth(2)
    model.config.exit_layers = [1, 4]
    path = save_tiny(run.folder / "other", model)
    GenerationConfig(exit_layer=1).save_pretrained(path)  # applied to other weights
    found = certify.certify(path, run.data, thresholds=[0], apply=True, **LOOSE)
    assert found["tested"] == [] and "setting" not in found and "speed_up" not in found
    assert "exit_layer" not in json.loads((run.folder / "other" / "generation_config.json").read_text())
    assert "Of no setting cheaper than full depth" in certificate_line(found)


def test_the_certified_setting_is_applied(run):
    """The checkpoint decodes so by itself; another certificate is not bounded by what is applied."""
    GenerationConfig(exit_threshold=0.5, eos_token_id=2, repetition_penalty=1.1).save_pretrained(run.path)
    found = certify.certify(run.path, run.data, apply=True, **LOOSE)
    assert found["setting"] == "exit 2" and found["decoding"]["repetition_penalty"] == 1.1
    saved = json.loads((run.folder / "model" / "generation_config.json").read_text())
    assert saved["exit_layer"] == 2 and saved["repetition_penalty"] == 1.1 and "exit_threshold" not in saved
    model, asked = SortedLlamaForCausalLM.from_pretrained(run.path), {**prompts(), "max_new_tokens": 8}
    plain, at_exit, full = (model.generate(**asked, **mode) for mode in ({}, {"exit_layer": 2}, {"exit_layer": 1}))
    assert plain.equal(at_exit) and not plain.equal(full)
    again = certify.certify(run.path, run.data, **LOOSE)
    assert again["looked_at"] == found["looked_at"] and again["decoding"] == found["decoding"]
    with pytest.warns(UserWarning, match="The checkpoint differs from what 'rows' has certified in dtype"):
        certify.certify(run.path, run.data, apply=True, dtype="bfloat16", **LOOSE)


def test_a_setting_that_is_slower_here_is_applied_with_a_warning(run, monkeypatch):
    monkeypatch.setattr(certify, "_speed_up", lambda *_: 0.8)
    with pytest.warns(UserWarning, match=r"slower than full depth: `exit_layer=2` reads .* ran at 0.80x"):
        certify.certify(run.path, run.data, apply=True, **LOOSE)


def test_prompts_that_repeat_are_told(run):
    rows = (run.folder / "rows.jsonl").read_text().splitlines()
    (run.folder / "rows.jsonl").write_text("\n".join(rows + rows[:3]))
    with pytest.warns(UserWarning, match="3 of 43 prompts of `data` repeat others"):
        certify.certify(run.path, run.data, **LOOSE)


def test_an_evaluation_and_its_certificates_live_in_one_file(run):
    for risk in (0.2, 0.3, 0.2):
        certify.certify(run.path, run.data, **{**LOOSE, "risk": risk})
    certificates = load_evaluation(run.path)["certificates"]
    assert [one["risk"] for one in certificates] == [0.3, 0.2]
    record = evaluate(run.path, [run.data], **QUICK)  # in place of an evaluation of nothing
    assert record["certificates"] == certificates and record["tasks"]
    certify.certify(run.path, run.data, loss="f1", **LOOSE)
    again = evaluate(run.path, [run.data], **QUICK)  # goes on
    assert again["tasks"] == record["tasks"] and len(again["certificates"]) == 3
    other = evaluate(run.path, [run.data], overwrite=True, **{**QUICK, "exit_thresholds": [0.9]})
    assert other["certificates"] == again["certificates"] == load_evaluation(run.path)["certificates"]


CHANGES = {
    "weights": lambda model, tokenizer: model.model.embed_tokens.weight.data[5, 3].add_(1),  # one of them all
    "config": lambda model, tokenizer: setattr(model.config, "rms_norm_eps", 0.1),
    "tokenizer": lambda model, tokenizer: setattr(tokenizer.backend_tokenizer, "normalizer", Lowercase()),
    "generation config": lambda model, tokenizer: setattr(model.generation_config, "repetition_penalty", 1.8),
    "chat template": lambda model, tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
    "dtype": lambda model, tokenizer: model.bfloat16(),
}


def test_a_certificate_is_shown_and_void_where_the_checkpoint_has_changed(run, recwarn):
    main(["certify", run.path, "--data", "=".join(run.data), *("--risk 0.2 --delta 0.2 --num_timed 1").split()])
    write_card(run.path)
    page = (run.folder / "model" / "README.md").read_text()
    assert "With 80 % certainty, at most 20 % of the answers to prompts like those of rows (n = 20) differ" in page
    assert "at `exit_layer=2`, at " in page and "Not promised: other prompts, other weights, another precision" in page
    assert "Void" not in page and "greedy answers" not in page and not recwarn
    for name, change in CHANGES.items():
        path = shutil.copytree(run.path, run.folder / name)
        model, tokenizer = SortedLlamaForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        change(model, tokenizer)
        for part in (model, tokenizer):
            part.save_pretrained(path)
        with pytest.warns(UserWarning, match=f"The checkpoint differs from what 'rows' has certified in .*{name}"):
            write_card(path)
        page = (path / "README.md").read_text()
        assert "**Void: the checkpoint differs" in page and "With 80 % certainty" in page


def test_the_command_takes_thresholds_and_says_what_was_found(run, capsys):
    arguments = ["certify", run.path, "--data", "=".join(run.data), "--risk", "0.2", "--delta", "0.2"]
    main([*arguments, "--loss", "exact_match", "--thresholds", "0.9", "2,0.8", "--num_timed", "1", "--apply"])
    looked_at = load_evaluation(run.path)["certificates"][0]["looked_at"]
    assert list(looked_at) == ["exit 2", "exit 1", "threshold 0.9", "threshold [2, 0.8]"]
    printed = capsys.readouterr().out
    assert "is at most 20 points of 100 below full depth's, gains not counted, at `exit_layer=1`, at " in printed


WRONG = [
    ({"risk": 0}, "`risk` must be a finite number above 0 and of at most 0.5, got 0"),
    ({"risk": 5}, "`risk` .* got 5"),
    ({"delta": 0.6}, "`delta` .* got 0.6"),
    ({"loss": "bleu"}, "`loss` must be 'differs', 'exact_match' or 'f1', got 'bleu'"),
    ({"thresholds": [-1]}, "`thresholds` .* got -1"),
    ({"thresholds": [[0.5]]}, r"`thresholds` must hold numbers, or lists .* each of exits \[1, 2\], got \[0.5\]"),
    ({"num_timed": 0}, "`num_timed` must be an integer of at least 1"),
    ({"seed": None}, "`seed` must be an integer of at least 0, got None"),
    ({"device": "gpu"}, "`device` must be one that torch finds here"),
    ({"data": ("poems", "x")}, "`kind` must be one of"),
    ({"output": "nowhere/x.json"}, "`output` must be a file in a folder that exists"),
]


IMPOSSIBLE = [
    ({"num_beams": 2}, False, "works with greedy decoding and sampling, not with beam_search"),
    ({"prompt_lookup_num_tokens": 3}, False, "not with assisted_generation"),
    ({"output_attentions": True}, False, "does not work with `output_attentions=True`"),
    ({"temperature": 0.6}, True, "temperature"),  # saved without `do_sample`, it is refused
]


@pytest.mark.parametrize("options, apply, message", IMPOSSIBLE, ids=str)
def test_a_generation_config_that_makes_it_impossible_is_told_before_an_answer_is_made(run, options, apply, message):
    (run.folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **options}))
    with pytest.raises(ValueError, match=message):
        certify.certify(run.path, run.data, apply=apply, **LOOSE)
    assert not run.generated


def test_weights_of_losses_have_no_say_in_a_certificate(run, recwarn):
    config = run.folder / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "exit_loss_weights": [0.1, 0.1, 1.0]}))
    certify.certify(run.path, run.data, **LOOSE)
    assert find_faults(load_evaluation(run.path)["certificates"], run.path) == [""] and not recwarn


def test_an_option_that_is_taken_out_of_the_generation_config_makes_it_void(run):
    GenerationConfig(eos_token_id=2, repetition_penalty=1.3).save_pretrained(run.path)
    certify.certify(run.path, run.data, **LOOSE)
    GenerationConfig(eos_token_id=2).save_pretrained(run.path)
    with pytest.warns(UserWarning, match="certified in generation config"):
        assert find_faults(load_evaluation(run.path)["certificates"], run.path) == ["generation config"]


def test_answers_of_other_weights_are_not_taken_for_its_own(run):
    certify.certify(run.path, run.data, **LOOSE)
    model, before = SortedLlamaForCausalLM.from_pretrained(run.path), len(run.generated)
    model.model.layers[0].mlp.down_proj.weight.data[3, 5] += 1
    model.save_pretrained(run.path)
    certify.certify(run.path, run.data, **LOOSE)
    assert len(run.generated) > before


@pytest.mark.parametrize("options, message", WRONG, ids=str)
def test_what_is_wrong_is_told_before_a_model_is_loaded(run, monkeypatch, options, message):
    monkeypatch.setattr(certify, "load_model", None)
    with pytest.raises(ValueError, match=message):
        certify.certify(run.path, **{"data": run.data, **LOOSE, **options})


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"exit_layers": None},
            "must be a checkpoint that was trained with exits below full depth, got `exit_layers=None`",
        ),
        ({"exit_layer": 2}, "a config.json without a depth of its own, which bounds all others, got `exit_layer=2`"),
        ({"num_hidden_layers": 2, "exit_layers": [1, 2]}, "is the evaluation of a model of 4 layers, `path` has 2"),
    ],
    ids=str,
)
def test_a_checkpoint_that_cannot_be_certified_is_told(run, monkeypatch, fields, message):
    certify.certify(run.path, run.data, **LOOSE)
    monkeypatch.setattr(certify, "load_model", None)
    config = run.folder / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        certify.certify(run.path, run.data, apply=True, **LOOSE)
