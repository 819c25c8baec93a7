"""Which mode of `generate` a call asks for, wherever it says so, and what is refused before any work."""

import json
import math
import threading

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    pipeline,
)

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.modeling_sorted_llama.compat_sorted_llama import CACHE_NAME
from sorted_llama.modeling_sorted_llama.modes_sorted_llama import REMOVED_FIELDS, SORTED_GENERATION_FIELDS
from tests.modeling_sorted_llama.decoding import (
    EXITS,
    RETURN,
    alone,
    assert_as_the_runs,
    cached_model,
    generate,
    naive,
    reaching,
    record_work,
    rows_of,
    shallow_model,
    since_transformers_5_20,
    thresholds_at,
    undecided,
)
from tests.tiny import prompts, reference_llama, run_as_stranger, save_tiny, tiny_sorted, tiny_tokenizer


# Where the options come from


MODES = {
    "threshold": {"exit_threshold": [2.0, 0.0]},
    "thresholds": {"exit_threshold": [0.13, 0.12], "exit_confidence": "margin", "exit_layer": 2},
    "list": {"exit_layer": [2, 1, 4]},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_source_of_options_says_the_same(mode, tmp_path):
    """A keyword argument, a generation config, the model's own and its file say the same; objects are left alone."""
    model, inputs, asked = tiny_sorted(), {**prompts(), "max_new_tokens": 8}, MODES[mode]
    model.load_state_dict(shallow_model().state_dict())
    before = dict(vars(model.generation_config))
    plain = generate(model, **inputs)
    expected = generate(model, **inputs, **asked)
    assert not torch.equal(expected.sequences, plain.sequences)

    def same(output):
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.exit_layers_used, expected.exit_layers_used)

    given = GenerationConfig(**asked, max_new_tokens=8, eos_token_id=2, pad_token_id=0)
    as_given = dict(vars(given))
    same(generate(model, **prompts(), generation_config=given))
    assert vars(given) == as_given and vars(model.generation_config) == before

    # An ordinary call afterwards is an ordinary call
    after = generate(model, **inputs)
    assert torch.equal(after.sequences, plain.sequences) and type(after) is type(plain)
    assert isinstance(after.past_key_values, DynamicCache)

    for name, value in asked.items():
        setattr(model.generation_config, name, value)
    edited = dict(vars(model.generation_config))
    same(generate(model, **inputs))
    same(generate(model, **prompts(), generation_config=GenerationConfig(max_new_tokens=8)))
    assert vars(model.generation_config) == edited
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: saved[name] for name in asked} == asked
    loaded = SortedLlamaForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(loaded.generation_config, name) for name in asked} == asked
    same(generate(loaded, **inputs))


def test_a_call_has_the_last_word():
    """Keyword arguments come before a generation config, which comes before the model's."""
    model, inputs = tiny_sorted(), {**prompts(), "max_new_tokens": 8}
    expected = {k: generate(reference_llama(model, k), **inputs).sequences for k in EXITS}
    model.generation_config.exit_threshold = 0.0
    given = GenerationConfig(exit_threshold=[2.0, 0.0], max_new_tokens=8)
    assert torch.equal(generate(model, **inputs).sequences, expected[1])
    assert torch.equal(generate(model, **prompts(), generation_config=given).sequences, expected[2])
    assert torch.equal(
        generate(model, **prompts(), generation_config=given, exit_threshold=2.0).sequences, expected[4]
    )


def test_a_depth_of_the_call_replaces_that_of_the_file():
    """Depths of rows in `generation_config.json` are no obstacle to other calls."""
    model, inputs = tiny_sorted(), {**prompts(), "max_new_tokens": 8}
    model.generation_config.exit_layer = [1, 2, 4]
    for depth in EXITS:
        expected = generate(reference_llama(model, depth), **inputs).sequences
        assert torch.equal(generate(model, **inputs, exit_layer=depth).sequences, expected)
    output = generate(model, **inputs, exit_layer=[1, 1, 1])
    assert torch.equal(output.sequences, generate(reference_llama(model, 1), **inputs).sequences)


def test_default_depth_bounds_the_search(tmp_path):
    """A model loaded with a depth goes no deeper, unless the call says so."""
    saved, inputs = save_tiny(tmp_path, tiny_sorted()), {**prompts(), "max_new_tokens": 8}
    model = SortedLlamaForCausalLM.from_pretrained(saved, exit_layer=2)
    work = record_work(model)
    rows = rows_of(inputs)
    thresholds = thresholds_at(model, rows, {1: 0.5}, exits=[1, 2])
    runs = [naive(model, row, reaching(thresholds), exits=[1, 2]) for row in rows]
    assert {k for run in runs for k in run.depths} == {1, 2} and not undecided(runs, thresholds)
    work.clear()
    assert_as_the_runs(generate(model, **inputs, exit_threshold=[thresholds[1], 0.0]), inputs, runs)
    full = generate(model, **inputs, exit_threshold=2.0)
    assert torch.equal(full.sequences, generate(reference_llama(model, 2), **inputs).sequences)
    assert max(call[1] for call in work if call[0] == "layer") == 2
    deep = generate(model, **inputs, exit_threshold=2.0, exit_layer=4)
    assert torch.equal(deep.sequences, generate(reference_llama(model, 4), **inputs).sequences)


@pytest.mark.parametrize("at", [pytest.param("constructor", marks=since_transformers_5_20), "call", "model"])
@pytest.mark.parametrize(
    "asked, depth",
    [
        ({"exit_threshold": 0.0, "exit_layer": 2}, 1),
        ({"exit_threshold": [2.0, 0.0], "exit_confidence": "entropy"}, 2),
        ({"exit_layer": [2]}, 2),
    ],
)
def test_a_pipeline_takes_every_mode(asked, depth, at):
    model, tokenizer = tiny_sorted(), tiny_tokenizer()
    if at == "model":
        for name, value in asked.items():
            setattr(model.generation_config, name, value)
    pipe = pipeline("text-generation", model, tokenizer=tokenizer, **(asked if at == "constructor" else {}))
    text = {"max_new_tokens": 6, "do_sample": False}
    (result,) = pipe("hello", **text, **(asked if at == "call" else {}), return_tensors=True)
    inputs = tokenizer("hello", return_tensors="pt")
    expected = {k: generate(reference_llama(model, k), **inputs, **text).sequences[0].tolist() for k in EXITS}
    assert result["generated_token_ids"] == expected[depth] != expected[4]


@since_transformers_5_20
def test_a_pipeline_takes_a_depth_for_each_row_of_a_batch():
    model, tokenizer = tiny_sorted(), tiny_tokenizer()
    pipe = pipeline("text-generation", model, tokenizer=tokenizer, exit_layer=[1, 4, 2])
    text = {"max_new_tokens": 6, "do_sample": False}
    results = pipe(["hello", "you", "there!"], batch_size=3, return_tensors=True, **text)
    for (result,), prompt, depth in zip(results, ["hello", "you", "there!"], [1, 4, 2], strict=True):
        row = tokenizer(prompt)["input_ids"]
        new = alone(model, row, depth, **text)
        assert [t for t in result["generated_token_ids"] if t != 0] == [*row, *(t for t in new if t != 0)]


DECODE = """
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder, tokens, mask, modes, out = sys.argv[1:]
inputs = {"input_ids": torch.tensor(json.loads(tokens)), "attention_mask": torch.tensor(json.loads(mask))}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")


def run(**asked):
    output = model.generate(**inputs, **asked, max_new_tokens=8, return_dict_in_generate=True)
    return [output.sequences.tolist(), output.exit_layers_used.tolist()]


results = {mode: run(**asked) for mode, asked in json.loads(modes).items()}
turn = model.generate(**inputs, assistant_early_exit=1, max_new_tokens=4, return_dict_in_generate=True)
cache = turn["cache" if "cache" in turn else "past_key_values"]
mask = torch.nn.functional.pad(inputs["attention_mask"], (0, turn.sequences.shape[1] - 6), value=1)
again = model.generate(turn.sequences, attention_mask=mask, cache=cache, assistant_early_exit=1, max_new_tokens=4)
results["turn"] = again.tolist()
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.generation_config.exit_threshold = [2.0, 0.0]
model.save_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
results["file"] = run()
pipe = pipeline("text-generation", model=folder, trust_remote_code=True)
results["pipe"] = pipe("hello", max_new_tokens=6, do_sample=False)[0]["generated_text"]
with open(out, "w") as file:
    json.dump(results, file)
"""


def test_a_process_without_the_package_decodes_in_every_mode(tmp_path):
    model, inputs = tiny_sorted(), prompts()
    model.load_state_dict(shallow_model().state_dict())
    folder, out = save_tiny(tmp_path / "model", model), tmp_path / "out.json"
    arguments = [json.dumps(values.tolist()) for values in inputs.values()]
    modes = {**MODES, "drafts": {"assistant_early_exit": 1, "num_assistant_tokens": 3}}
    run_as_stranger(DECODE, folder, *arguments, json.dumps(modes), out, folder=tmp_path)
    results = json.loads(out.read_text())
    for mode, asked in {**modes, "file": {"exit_threshold": [2.0, 0.0]}}.items():
        expected = generate(model, **inputs, **asked, max_new_tokens=8)
        assert results[mode] == [expected.sequences.tolist(), expected.exit_layers_used.tolist()]
    first = reference_llama(model, 4).generate(**inputs, max_new_tokens=4)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, first.shape[1] - 6), value=1)
    second = reference_llama(model, 4).generate(first, attention_mask=mask, max_new_tokens=4)
    assert results["turn"] == second.tolist()
    pipe = pipeline("text-generation", model, tokenizer=tiny_tokenizer())
    expected = pipe("hello", exit_layer=2, max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert results["pipe"] == expected


def test_threads_in_different_modes():
    """Calls on one model do not see each other."""
    model, inputs = cached_model(), {**prompts(), "max_new_tokens": 20, "eos_token_id": []}
    calls = [{"exit_threshold": 0.14}, {"exit_layer": [4, 1, 2]}, {"exit_layer": 2}, {}]
    expected = [model.generate(**inputs, **asked) for asked in calls]
    results = {}

    def work(number):
        results[number] = [model.generate(**inputs, **calls[number]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(tokens, expected[n]) for n in range(len(calls)) for tokens in results[n])


# Errors


ERRORS = {
    "threshold_text": ({"exit_threshold": "x"}, ["exit_threshold", "'x'", "list of 2"]),
    "threshold_nan": ({"exit_threshold": math.nan}, ["exit_threshold", "nan", "list of 2"]),
    "threshold_bool": ({"exit_threshold": True}, ["exit_threshold", "True", "list of 2"]),
    "thresholds_too_few": ({"exit_threshold": [0.5]}, ["exit_threshold", "[0.5]", "list of 2", "[1, 2]"]),
    "thresholds_too_many": ({"exit_threshold": [0.5] * 3}, ["exit_threshold", "[0.5, 0.5, 0.5]", "list of 2"]),
    "thresholds_empty": ({"exit_threshold": []}, ["exit_threshold", "[]", "list of 2"]),
    "thresholds_nan": ({"exit_threshold": [0.5, math.nan]}, ["exit_threshold", "[0.5, nan]", "list of 2"]),
    "thresholds_bool": ({"exit_threshold": [0.5, False]}, ["exit_threshold", "False", "list of 2"]),
    "thresholds_text": ({"exit_threshold": [0.5, "x"]}, ["exit_threshold", "[0.5, 'x']", "list of 2"]),
    "thresholds_none": ({"exit_threshold": [0.5, None]}, ["exit_threshold", "[0.5, None]", "list of 2"]),
    "confidence_unknown": (
        {"exit_threshold": 0.5, "exit_confidence": "sure"},
        ["exit_confidence", "'sure'", "max_prob", "margin", "entropy", "callable"],
    ),
    "confidence_list": ({"exit_threshold": 0.5, "exit_confidence": ["margin"]}, ["exit_confidence", "['margin']"]),
    "confidence_number": ({"exit_threshold": 0.5, "exit_confidence": 3}, ["exit_confidence", "3", "max_prob"]),
    "confidence_empty": ({"exit_threshold": 0.5, "exit_confidence": ""}, ["exit_confidence", "''", "max_prob"]),
    **{
        f"bound_{value}": ({"exit_threshold": 0.5, "exit_layer": value}, ["exit_layer", repr(value), "1 to 4"])
        for value in (0, 5, -1)
    },
    "threshold_and_list": (
        {"exit_threshold": 0.5, "exit_layer": [1, 2]},
        ["exit_threshold=0.5", "exit_layer=[1, 2]", "one of them"],
    ),
    "threshold_and_draft": (
        {"exit_threshold": 0.5, "assistant_early_exit": 2},
        ["exit_threshold=0.5", "assistant_early_exit=2", "one of them"],
    ),
    "list_and_draft": (
        {"exit_layer": [1, 2], "assistant_early_exit": 2},
        ["exit_layer=[1, 2]", "assistant_early_exit=2", "one of them"],
    ),
    "confidence_alone": ({"exit_confidence": "margin"}, ["exit_confidence='margin'", "exit_threshold"]),
    "confidence_with_list": (
        {"exit_confidence": "margin", "exit_layer": [1, 2]},
        ["exit_confidence='margin'", "exit_threshold"],
    ),
    "min_exit_layer": ({"min_exit_layer": 2, "exit_threshold": 0.5}, ["min_exit_layer=2", "removed", "[2, 0.9]"]),
    "max_exit_layer": ({"max_exit_layer": 2, "exit_threshold": 0.5}, ["max_exit_layer=2", "removed", "exit_layer=k"]),
    "exit_agreement": ({"exit_agreement": 0.9}, ["exit_agreement=0.9", "removed", "exit_threshold"]),
    "auto_depth": ({"exit_layer": "auto"}, ['exit_layer="auto"', "removed", "exit_threshold", "exit_layer=[...]"]),
    "depth_0": ({"exit_layer": [0, 1]}, ["exit_layer", "1 to 4", "0"]),
    "depth_too_large": ({"exit_layer": [5, 1]}, ["exit_layer", "1 to 4", "5"]),
    "depths_empty": ({"exit_layer": []}, ["exit_layer", "[]", "1 to 4", "list"]),
    "depth_text": ({"exit_layer": ["a", 1]}, ["exit_layer", "'a'", "1 to 4"]),
    "depth_float": ({"exit_layer": [2.0, 1]}, ["exit_layer", "2.0", "1 to 4"]),
    "depth_bool": ({"exit_layer": [True, 1]}, ["exit_layer", "True", "1 to 4"]),
    "depth_none": ({"exit_layer": [None, 1]}, ["exit_layer", "None", "1 to 4"]),
    "depth_word": ({"exit_layer": "deep"}, ["exit_layer", "'deep'", "1 to 4", "list"]),
    "depth_single_float": ({"exit_layer": 2.0}, ["exit_layer", "2.0", "1 to 4", "list"]),
    "depths_too_few": ({"exit_layer": [2]}, ["exit_layer", "[2]", "2 rows"]),
    "depths_too_many": ({"exit_layer": [2, 1, 4]}, ["exit_layer", "[2, 1, 4]", "2 rows"]),
    "depths_as_many_as_sequences": (
        {"exit_layer": [2, 1, 4, 4], "do_sample": True, "num_return_sequences": 2},
        ["exit_layer", "[2, 1, 4, 4]", "2 rows"],
    ),
}


def assert_refused(model, asked, words):
    """A `ValueError` that says all of `words`, before any layer runs."""
    work = record_work(model)
    before = dict(vars(model.generation_config))
    with pytest.raises(ValueError) as error:
        model.generate(**prompts((5, 3)), max_new_tokens=4, **asked)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in {error.value}"
    assert not work
    assert vars(model.generation_config) == before


@pytest.mark.parametrize("case", ERRORS)
def test_values_that_are_refused(case):
    assert_refused(tiny_sorted(), *ERRORS[case])


@pytest.mark.parametrize("name", REMOVED_FIELDS)
def test_a_removed_option_is_refused_wherever_it_stands(name):
    """In a call and its generation config, and in the model's where it has a meaning; a plain Llama loses it."""
    model, words = tiny_sorted(), [f"{name}=2", "removed"]
    assert_refused(model, {name: 2}, words)
    assert_refused(model, {"generation_config": GenerationConfig(**{name: 2})}, words)
    setattr(model.generation_config, name, 2)
    assert_refused(model, {"exit_threshold": 0.5}, words)
    assert torch.equal(model.generate(**prompts(), exit_layer=2), tiny_sorted().generate(**prompts(), exit_layer=2))
    assert not hasattr(model.extract_submodel(2).generation_config, name)


def test_the_fields_of_the_modes_that_transformers_does_not_know():
    assert set(SORTED_GENERATION_FIELDS) == {"exit_layer", "exit_threshold", "exit_confidence"}


@pytest.mark.parametrize("exits", [None, [4]])
def test_thresholds_need_exits(exits):
    asked = {"exit_threshold": 0.5}
    assert_refused(tiny_sorted(exit_layers=exits), asked, ["exit_threshold=0.5", "config.exit_layers", str(exits)])


MODE_CALLS = {
    "exit_threshold=0.5": {"exit_threshold": 0.5},
    "exit_layer=[1, 2]": {"exit_layer": [1, 2]},
}


@pytest.mark.parametrize("call", MODE_CALLS)
@pytest.mark.parametrize(
    "asked, words",
    [
        ({"num_beams": 2}, ["num_beams=2", "greedy", "sampling"]),
        ({"num_beams": 2, "do_sample": True}, ["num_beams=2", "greedy", "sampling"]),
        ({"prompt_lookup_num_tokens": 3}, ["prompt_lookup_num_tokens=3", "greedy", "sampling"]),
        ({"use_cache": False}, ["use_cache=False"]),
        ({"output_attentions": True, "return_dict_in_generate": True}, ["output_attentions"]),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, ["hidden states"]),
        ({"cache_implementation": "quantized"}, ["cache_implementation", "quantized", "dynamic"]),
        ({"cache_implementation": "offloaded"}, ["cache_implementation", "offloaded", "dynamic"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_options_that_no_mode_honours_are_refused(asked, words, call):
    assert_refused(tiny_sorted(), {**MODE_CALLS[call], **asked}, [call, *words])


@pytest.mark.parametrize("call", MODE_CALLS)
def test_an_assistant_model_is_refused(call):
    """Drafting by another model and moving depth are two ways of decoding: not silently one of them."""
    asked = {**MODE_CALLS[call], "assistant_model": tiny_sorted(1)}
    if call == "exit_layer=[1, 2]":
        asked["exit_layer"] = [1]
    model = tiny_sorted()
    work = record_work(model)
    with pytest.raises(ValueError, match="assistant_model|assisted"):
        model.generate(**prompts((5,)), max_new_tokens=4, **asked)
    assert not work


@pytest.mark.parametrize("call", MODE_CALLS)
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_another_cache_is_refused(name, call):
    model = tiny_sorted()
    assert_refused(
        model, {**MODE_CALLS[call], name: DynamicCache(config=model.config)}, ["DynamicCache", "SortedCache"]
    )


# Errors, before any layer runs


@pytest.mark.parametrize("source", ["argument", "generation_config"])
@pytest.mark.parametrize("value", [0, -1, 4, 5, True, 2.0, "x"], ids=repr)
def test_a_draft_exit_out_of_range_is_refused(value, source):
    model, asked = tiny_sorted(), {"assistant_early_exit": value}
    if source == "generation_config":
        model.generation_config.assistant_early_exit, asked = value, {}
    assert_refused(model, asked, ["`assistant_early_exit`", repr(value), "from 1 to 3", '"auto"'])


@pytest.mark.parametrize("value", [2, 3, 4])
def test_a_draft_exit_that_is_not_below_the_verifying_depth_is_refused(value):
    asked = {"exit_layer": 2, "assistant_early_exit": value}
    assert_refused(tiny_sorted(), asked, ["`assistant_early_exit`", repr(value), "from 1 to 1", "2 layers"])


REFUSED = {
    "beams": ({"num_beams": 2}, ["num_beams=2", "greedy", "sampling"]),
    "attentions": ({"output_attentions": True, **RETURN}, ["attentions", "output_attentions=True"]),
    "no_cache": ({"use_cache": False}, ["use_cache=False"]),
    "quantized": ({"cache_implementation": "quantized"}, ["cache_implementation", "'quantized'", "'dynamic'"]),
    "no_tokens": ({"num_assistant_tokens": 0}, ["`num_assistant_tokens`", "0", "positive integer", '"auto"']),
    "negative": ({"num_assistant_tokens": -2}, ["`num_assistant_tokens`", "-2", "positive integer", '"auto"']),
    "tokens_bool": ({"num_assistant_tokens": True}, ["`num_assistant_tokens`", "True", "positive integer"]),
    "tokens_float": ({"num_assistant_tokens": 2.5}, ["`num_assistant_tokens`", "2.5", "positive integer"]),
    "tokens_text": ({"num_assistant_tokens": "x"}, ["`num_assistant_tokens`", "'x'", "positive integer", '"auto"']),
    **{
        schedule: ({"num_assistant_tokens_schedule": schedule}, ["num_assistant_tokens_schedule=", schedule, '"auto"'])
        for schedule in ("linear", "heuristic", "heuristic_transient")
    },
    "hidden_states": ({"output_hidden_states": True, **RETURN}, ["hidden states", "output_hidden_states=True"]),
    "offloaded": ({"cache_implementation": "offloaded"}, ["cache_implementation", "'offloaded'", "'dynamic'"]),
    "lookup_size": ({"max_matching_ngram_size": 3}, ["max_matching_ngram_size=3", "exit alone"]),
    "confidence": ({"assistant_confidence_threshold": "x"}, ["`assistant_confidence_threshold`", "'x'", "number"]),
    "lookup": ({"prompt_lookup_num_tokens": 3}, ["prompt_lookup_num_tokens=3", "exit alone", "exit_layer=k"]),
    "threshold": ({"exit_threshold": 0.9}, ["exit_threshold=0.9", "assistant_early_exit=1", "contradict"]),
    "depths": ({"exit_layer": [1, 2, 4]}, ["exit_layer=[1, 2, 4]", "assistant_early_exit=1", "contradict"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_drafting_does_not_take_is_refused(name):
    asked, words = REFUSED[name]
    assert_refused(tiny_sorted(), {"assistant_early_exit": 1, **asked}, words)


def test_drafting_refuses_a_cache_of_another_kind():
    asked = {"assistant_early_exit": 1, CACHE_NAME: DynamicCache()}
    assert_refused(tiny_sorted(), asked, ["DynamicCache", "SortedCache()"])


# Numbers


# Numbers


def greedy(model, inputs, **options):
    return model.generate(**inputs, do_sample=False, max_new_tokens=12, **options)


@pytest.mark.parametrize("number", [np.int64, torch.tensor], ids=["numpy", "tensor"])
def test_integers_of_other_libraries_are_depths_and_lengths(number):
    model, inputs = tiny_sorted(eos_token_id=None), prompts((6, 4, 5))
    calls = [
        {"exit_layer": 2},
        {"exit_layer": [1, 2, 4]},
        {"assistant_early_exit": 2, "num_assistant_tokens": 3},
        {"assistant_early_exit": 1, "exit_layer": 2},
    ]
    for call in calls:
        other = {k: [number(n) for n in v] if isinstance(v, list) else number(v) for k, v in call.items()}
        assert torch.equal(greedy(model, inputs, **other), greedy(model, inputs, **call))
    logits = model(**inputs, exit_layer=number(2)).logits
    assert torch.equal(logits, model(**inputs, exit_layer=2).logits)


@pytest.mark.parametrize("threshold", [np.float32(0.5), np.array([0.5, 0.5]), torch.tensor([0.5, 0.5])], ids=repr)
def test_thresholds_of_other_libraries(threshold):
    model, inputs = tiny_sorted(eos_token_id=None), prompts((6, 4, 5))
    expected = greedy(model, inputs, exit_threshold=0.5)
    assert torch.equal(greedy(model, inputs, exit_threshold=threshold), expected)


@pytest.mark.parametrize("threshold", [-0.1, [0.5, -1], -1])
def test_a_negative_threshold_is_refused_unless_the_confidence_is_the_callers(threshold):
    model = tiny_sorted()
    with pytest.raises(ValueError, match="`exit_threshold` must be a number of at least 0"):
        greedy(model, prompts(), exit_threshold=threshold)
    greedy(model, prompts(), exit_threshold=threshold, exit_confidence=lambda scores, *_: -scores.amax(-1))
