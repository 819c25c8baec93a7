"""What comes along with a call at moving depth: streamers, processors, criteria, adapters of rows, attention."""

import ast
import copy
import inspect
import itertools
import math

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AttentionInterface,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TextIteratorStreamer,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import logits_process
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sorted_llama import SortedCache, SortedLlamaForCausalLM
from sorted_llama.modeling_sorted_llama.compat_sorted_llama import CACHE_NAME
from sorted_llama.modeling_sorted_llama.modes_sorted_llama import STATEFUL_PROCESSORS, row_hooks
from tests.modeling_sorted_llama.decoding import (
    EXITS,
    assert_as_the_runs,
    batch_with_ends,
    cached_model,
    end_token,
    following,
    generate,
    naive,
    padded,
    reaching,
    rows_of,
    thresholds_at,
    undecided,
)
from tests.tiny import prompts, reference_llama, tiny_sorted, tiny_tokenizer


# Streamers


class Log(BaseStreamer):
    """Keeps what it is given, in order."""

    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append(("put", value.tolist()))

    def end(self):
        self.events.append(("end", None))


class LogWithExits(Log):
    def put_exits(self, exit_layers, confidences):
        assert confidences is None or all(isinstance(c, float) for c in confidences)
        self.events.append(("exits", (list(exit_layers), confidences and list(confidences))))


@pytest.mark.parametrize("mode", ["threshold", "list"])
@pytest.mark.parametrize("streamer_class", [Log, LogWithExits])
def test_streamers(streamer_class, mode):
    """The prompt, then the columns of the result, each as soon as it is known; before it, how deep it was run."""
    model, inputs, thresholds, _, options = batch_with_ends()
    asked = {"threshold": {"exit_threshold": list(thresholds.values())}, "list": {"exit_layer": [4, 1, 2]}}
    asked = {**options, **asked[mode]}
    streamer = streamer_class()
    output = generate(model, **inputs, **asked, streamer=streamer)
    expected = [("put", inputs["input_ids"].tolist())]
    for step in range(output.exit_layers_used.shape[1]):
        if streamer_class is LogWithExits:
            confidences = pytest.approx(output.exit_confidences[:, step].tolist()) if mode == "threshold" else None
            expected.append(("exits", (output.exit_layers_used[:, step].tolist(), confidences)))
        expected.append(("put", output.sequences[:, 6 + step].tolist()))
    assert streamer.events == [*expected, ("end", None)]


def test_streamed_while_it_runs():
    """A column is put before the next token's layers run."""
    model, order = tiny_sorted(), []
    streamer = Log()
    streamer.put = lambda value: order.append("put")
    model.model.layers[0].register_forward_pre_hook(lambda *_: order.append("layer"))
    generate(model, **prompts((5, 3)), exit_threshold=0.15, max_new_tokens=4, eos_token_id=[], streamer=streamer)
    assert order == ["put"] + ["layer", "put"] * 4


def test_text_streamer():
    model, tokenizer = cached_model(), tiny_tokenizer()
    inputs = tokenizer("hello", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    output = generate(model, **inputs, exit_threshold=0.15, max_new_tokens=8, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :])


# Criteria and processors that look at the text or at the row


def test_stopping_criteria_of_the_user():
    """Each row ends where its own text says so."""

    class Sevens(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -2:].sum(1) % 5 == 0

    model, inputs = cached_model(), prompts((6, 3, 5), seed=6)
    rows = rows_of(inputs)
    thresholds = thresholds_at(model, rows, {1: 0.6, 2: 0.5})
    how = {"stop": lambda ids: sum(ids[-2:]) % 5 == 0, "new_tokens": 12}
    runs = [naive(model, row, reaching(thresholds), **how) for row in rows]
    assert len({len(run.tokens) for run in runs}) == 3 and not undecided(runs, thresholds)
    options = {"stopping_criteria": StoppingCriteriaList([Sevens()]), "max_new_tokens": 12}
    output = generate(model, **inputs, exit_threshold=list(thresholds.values()), **options)
    assert_as_the_runs(output, inputs, runs)
    depths = [2, 4, 1]
    runs = [naive(model, row, following([k] * 12), **how) for row, k in zip(rows, depths, strict=True)]
    output = generate(model, **inputs, exit_layer=depths, **options)
    assert_as_the_runs(output, inputs, runs, check_confidences=False)


class RowLimits(StoppingCriteria):
    """Another length for each row of the batch: transformers always calls with all of them."""

    def __init__(self, limits):
        self.limits = torch.tensor(limits)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.limits


@pytest.mark.parametrize("asked", [{"exit_threshold": 2.0}, {"exit_layer": [4, 4, 4]}], ids=["threshold", "list"])
def test_a_criterion_that_depends_on_the_row(asked):
    model, inputs = cached_model(), prompts((6, 3, 5), seed=6)
    options = {"stopping_criteria": StoppingCriteriaList([RowLimits([9, 12, 10])]), "max_new_tokens": 12}
    expected = generate(reference_llama(model, 4), **inputs, **options).sequences
    assert (expected[:, 6:] != 0).sum(1).tolist() == [3, 6, 4]
    assert torch.equal(generate(model, **inputs, **asked, **options).sequences, expected)


@pytest.mark.parametrize("asked", [{"exit_threshold": 2.0}, {"exit_layer": [4, 4, 4]}], ids=["threshold", "list"])
def test_rows_without_an_end_token(asked):
    """Without an end token rows go on until all are done, as in transformers."""
    model, inputs = tiny_sorted(eos_token_id=None), prompts((6, 3, 5), seed=6)
    options = {"stopping_criteria": StoppingCriteriaList([RowLimits([9, 12, 10])]), "max_new_tokens": 12}
    expected = generate(reference_llama(model, 4), **inputs, **options).sequences
    assert expected.shape[1] == 12
    output = generate(model, **inputs, **asked, **options)
    assert torch.equal(output.sequences, expected)
    assert output.exit_layers_used.tolist() == [[4] * 6] * 3


def test_stop_strings():
    model, tokenizer = cached_model(), tiny_tokenizer()
    letters = tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    others = [token for token in range(259) if token not in letters]
    texts = ["hello", "you", "dear reader"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    rows, how = rows_of(inputs), {"processors": [SuppressTokensLogitsProcessor(others)], "new_tokens": 14, "eos": ()}
    thresholds = thresholds_at(model, rows, {1: 0.6, 2: 0.5}, **how)
    free = [tokenizer.decode(naive(model, row, reaching(thresholds), **how).tokens) for row in rows]
    strings = [free[0][3:5], free[1][6:9]]
    runs = [
        naive(model, row, reaching(thresholds), stop=lambda ids: tokenizer.decode(ids).endswith(tuple(strings)), **how)
        for row in rows
    ]
    assert len(runs[0].tokens) < len(runs[1].tokens) < 14 and not undecided(runs, thresholds)
    assert {k for run in runs for k in run.depths} == set(EXITS)
    output = generate(
        model,
        **inputs,
        exit_threshold=list(thresholds.values()),
        stop_strings=strings,
        tokenizer=tokenizer,
        suppress_tokens=others,
        max_new_tokens=14,
    )
    assert_as_the_runs(output, inputs, runs)


@pytest.mark.parametrize("mode", ["threshold", "list"])
def test_allowed_tokens_that_depend_on_the_row(mode):
    """Rows that decide at another exit than their neighbours, or go on after them, keep their own constraint."""

    def allowed(row, ids):
        return [token for token in range(3, 259) if token % 3 == row and token != int(ids[-1])]

    model, inputs = cached_model(), prompts((6, 3, 5), seed=6)
    rows = rows_of(inputs)
    constraints = [[PrefixConstrainedLogitsProcessor(lambda _, ids, r=r: allowed(r, ids), 1)] for r in range(3)]
    thresholds = thresholds_at(model, [rows[1]], {1: 0.7, 2: 0.2}, processors=constraints[1])
    if mode == "threshold":
        asked, rules = {"exit_threshold": list(thresholds.values())}, [reaching(thresholds)] * 3
    else:
        asked, rules = {"exit_layer": [2, 4, 1]}, [following([k] * 9) for k in (2, 4, 1)]
    pairs = list(zip(rows, rules, constraints, strict=True))
    free = [naive(model, row, rule, processors=p, new_tokens=9) for row, rule, p in pairs]
    eos = [end_token(free[0], 2), end_token(free[2], 5)]
    runs = [naive(model, row, rule, processors=p, new_tokens=9, eos=eos) for row, rule, p in pairs]
    assert len({len(run.tokens) for run in runs}) == 3 and not undecided(runs, thresholds)
    assert {k for run in runs for k in run.depths} == set(EXITS)
    options = {"prefix_allowed_tokens_fn": allowed, "eos_token_id": eos, "max_new_tokens": 9}
    output = generate(model, **inputs, **asked, **options)
    assert_as_the_runs(output, inputs, runs, check_confidences=mode == "threshold")


class RowBan(LogitsProcessor):
    """Bans other tokens in each row of the batch: transformers always calls with all of them."""

    def __init__(self, rows):
        self.banned = torch.tensor([[token % 3 == row for token in range(259)] for row in rows])

    def __call__(self, input_ids, scores):
        return scores.masked_fill(self.banned, -math.inf)


@pytest.mark.parametrize("mode", ["threshold", "list"])
@pytest.mark.parametrize("kind", ["own", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty"])
def test_processors_that_depend_on_the_row(kind, mode):
    """A processor with something for each row of the batch (here also transformers' own, with the prompts)."""
    model, inputs = cached_model(), prompts((5, 5, 5), seed=6)
    rows = rows_of(inputs)
    # alone in a batch of one, the row's own part
    if kind == "own":
        arguments = [{"logits_processor": LogitsProcessorList([RowBan([row])])} for row in range(3)]
        together = {"logits_processor": LogitsProcessorList([RowBan(range(3))])}
    else:
        together = {kind: 1 if kind == "encoder_no_repeat_ngram_size" else 0.2}
        arguments = [together] * 3
    options = {"max_new_tokens": 10, "eos_token_id": list(range(3, 60))}
    asked = [{"exit_threshold": 0.15}] * 3
    if mode == "list":
        asked = [{"exit_layer": [depth]} for depth in (2, 4, 1)]
    alone = [
        generate(model, input_ids=torch.tensor([row]), **options, **own, **mine)
        for row, own, mine in zip(rows, arguments, asked, strict=True)
    ]
    lengths = [single.exit_layers_used.shape[1] for single in alone]
    assert len(set(lengths)) > 1
    asked = {"exit_threshold": 0.15} if mode == "threshold" else {"exit_layer": [2, 4, 1]}
    output = generate(model, **inputs, **options, **together, **asked)
    expected = [single.sequences[0, 5:].tolist() for single in alone]
    assert output.sequences[:, 5:].tolist() == padded(expected, max(lengths))
    depths = [single.exit_layers_used[0].tolist() for single in alone]
    assert output.exit_layers_used.tolist() == padded(depths, max(lengths))


# All of them give full depth's tokens, in any batch of three


FULL_DEPTH = {
    "threshold": {"exit_threshold": 2.0},
    "depths": {"exit_layer": [4, 4, 4]},
    "drafts": {"assistant_early_exit": 2, "num_assistant_tokens": 3},
    "auto drafts": {"assistant_early_exit": "auto"},
}


ENDLESS = {"eos_token_id": None}


def greedy(model, inputs, **options):
    return model.generate(**inputs, do_sample=False, **{"max_new_tokens": 12, **options})


def depths_for(mode: dict, rows: int) -> dict:
    return {**mode, "exit_layer": mode["exit_layer"][:rows]} if "exit_layer" in mode else mode


def first_layer_calls(model) -> list[int]:
    calls: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    return calls


# Angles that depend on how long the text is


ROPE_LENGTH = 32


ROPES = {
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.5, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": ROPE_LENGTH,
            "factor": 4.0,
        },
        "max_position_embeddings": 4 * ROPE_LENGTH,
    },
}


def tiny_with_rope(kind: str, seed: int = 0) -> SortedLlamaForCausalLM:
    return tiny_sorted(seed, **{"max_position_embeddings": ROPE_LENGTH, **ENDLESS, **ROPES[kind]})


@pytest.mark.parametrize(
    "lengths, name",
    [*itertools.product([(30,), (40,)], ["threshold", "drafts"]), *(((36, 20, 4), name) for name in FULL_DEPTH)],
)
@pytest.mark.parametrize("kind", ROPES)
def test_full_depth_beyond_the_original_length_of_rope_is_plain_llamas(kind, lengths, name):
    """Plain decoding turns each token by the angles of its own step; a block of tokens has the angles of no step."""
    model, inputs, mode = tiny_with_rope(kind, seed=1), prompts(lengths, seed=1), FULL_DEPTH[name]
    expected = greedy(reference_llama(model, 4), inputs, max_new_tokens=24)
    assert torch.equal(greedy(model, inputs, max_new_tokens=24, **depths_for(mode, len(lengths))), expected)
    # Nor do they depend on what the model has read before
    assert torch.equal(greedy(model, inputs, max_new_tokens=24, **depths_for(mode, len(lengths))), expected)


@pytest.mark.parametrize("kind", ROPES)
def test_rows_at_their_depths_beyond_the_original_length_of_rope_are_the_submodels(kind):
    model, inputs, depths = tiny_with_rope(kind), prompts((30, 25, 36)), [1, 4, 2]
    tokens = greedy(model, inputs, exit_layer=depths, max_new_tokens=20)
    for row, depth in enumerate(depths):
        expected = greedy(reference_llama(model, depth), inputs, max_new_tokens=20)
        assert torch.equal(tokens[row], expected[row])


@pytest.mark.parametrize("second", ["threshold", "drafts"])
@pytest.mark.parametrize("ends", [False, True], ids=["endless", "a row ends"])
@pytest.mark.parametrize("first", [{"exit_threshold": 0.0}, FULL_DEPTH["drafts"]], ids=["pending", "drafts"])
@pytest.mark.parametrize("kind", ROPES)
def test_a_second_turn_beyond_the_original_length_of_rope(kind, first, second, ends):
    """
    Also where the first turn left all its tokens pending, or padding behind a row that has ended: the reference runs
    them one at a time, as a turn does.
    """
    model, inputs = tiny_with_rope(kind), prompts((30, 25))
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, **first}
    turn = greedy(model, inputs, **options)
    if ends:
        turn = greedy(model, inputs, **options, eos_token_id=int(turn.sequences[0, 32]), pad_token_id=0)
        assert (turn.sequences[:, -1] == 0).tolist() == [True, False]
    ids = torch.cat([turn.sequences, prompts((5, 5), seed=1)["input_ids"]], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 13, dtype=torch.long)], dim=1)
    longer = {"input_ids": ids, "attention_mask": mask}
    output = greedy(
        model, {**longer, CACHE_NAME: turn[CACHE_NAME]}, **FULL_DEPTH[second], return_dict_in_generate=True
    )

    plain, cache, size = reference_llama(model, 4), DynamicCache(), inputs["input_ids"].shape[1]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        for start, end in [(0, size), *((i, i + 1) for i in range(size, size + 7))]:
            step = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end], CACHE_NAME: cache}
            plain(input_ids=ids[:, start:end], **step)
    assert torch.equal(output.sequences, greedy(plain, {**longer, CACHE_NAME: cache}))
    for mine, theirs in zip(output[CACHE_NAME].layers, cache.layers, strict=True):  # also angles that tip no token
        keys = (layer.keys.transpose(1, 2)[:, : mask.shape[1]][mask.bool()] for layer in (mine, theirs))
        torch.testing.assert_close(*keys, atol=1e-4, rtol=1e-4)


# Processors and criteria


def stateful_processors(model) -> dict:
    return {
        "guidance": UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model),
        "SynthID": SynthIDTextWatermarkLogitsProcessor(5, [1, 2, 3], 16, 0, 10, torch.device("cpu")),
    }


@pytest.mark.parametrize("mode", FULL_DEPTH.values(), ids=FULL_DEPTH)
@pytest.mark.parametrize("name", ["guidance", "SynthID"])
def test_a_processor_that_counts_its_calls_is_refused_by_name_also_as_an_object(name, mode):
    model = tiny_sorted()
    processor, calls = stateful_processors(model)[name], first_layer_calls(model)
    with pytest.raises(ValueError, match=type(processor).__name__):
        greedy(model, prompts(), logits_processor=LogitsProcessorList([processor]), **mode)
    assert not calls


@pytest.mark.parametrize("mode", FULL_DEPTH.values(), ids=FULL_DEPTH)
def test_guidance_is_refused_as_an_argument(mode):
    model = tiny_sorted()
    calls = first_layer_calls(model)
    with pytest.raises(ValueError, match="`guidance_scale`"):
        greedy(model, prompts(), guidance_scale=2.0, **mode)
    assert not calls


def test_no_other_processor_of_transformers_keeps_state_from_call_to_call():
    """Those that set an attribute when they are called, by their source; a new one has to be looked at."""

    def sets_attributes(method: ast.FunctionDef) -> bool:
        targets = [t for node in ast.walk(method) if isinstance(node, ast.Assign) for t in node.targets]
        targets += [node.target for node in ast.walk(method) if isinstance(node, ast.AugAssign)]
        return any(ast.unparse(target).startswith("self.") for target in targets)

    found = set()
    for node in ast.parse(inspect.getsource(logits_process)).body:
        methods = [m for m in getattr(node, "body", ()) if isinstance(m, ast.FunctionDef) and m.name != "__init__"]
        if isinstance(node, ast.ClassDef) and node.name.endswith(
            ("Processor", "Detection", "Warper", "Penalty", "Bias")
        ):
            found |= {node.name for method in methods if sets_attributes(method)}
    moved_to_the_device = {"ExponentialDecayLengthPenalty", "RepetitionPenaltyLogitsProcessor"}
    prepared_once, by_a_setter = {"SequenceBiasLogitsProcessor"}, {"SuppressTokensAtBeginLogitsProcessor"}
    harmless = moved_to_the_device | prepared_once | by_a_setter
    of_other_models = {name for name in found if name.startswith(("Whisper", "Dia"))}
    assert found - harmless - of_other_models == {processor.__name__ for processor in STATEFUL_PROCESSORS}


class EndsWith(StoppingCriteria):
    """A user's, which keeps its token as a number: transformers only asks whether there is one."""

    def __init__(self, eos_token_id: int):
        self.eos_token_id = eos_token_id

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.eos_token_id


@pytest.mark.parametrize("mode", FULL_DEPTH.values(), ids=FULL_DEPTH)
def test_a_criterion_with_an_end_token_that_is_a_number_ends_rows_as_in_transformers(mode):
    model, inputs = tiny_sorted(**ENDLESS), prompts((6, 4, 5))
    plain = reference_llama(model, 4)
    token = int(greedy(plain, inputs)[1, 8])
    options = {"stopping_criteria": StoppingCriteriaList([EndsWith(token)]), "pad_token_id": 0}
    expected = greedy(plain, inputs, **options)
    assert (expected[1, 9:] == 0).all() and (expected[0, 9:] != 0).any()  # the rows do not end together
    assert torch.equal(greedy(model, inputs, **options, **mode), expected)


@pytest.mark.parametrize("mode", FULL_DEPTH.values(), ids=FULL_DEPTH)
def test_hooks_of_the_model_itself_are_refused_where_they_would_not_be_called(mode):
    model = tiny_sorted()
    handle = model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="forward hooks of the model itself"):
        greedy(model, prompts(), **mode)
    handle.remove()
    seen = []
    model.model.layers[3].register_forward_hook(lambda *_: seen.append(1))
    greedy(model, prompts(), **mode)
    assert seen


# Adapters of rows


def adapted(modules=("q_proj", "v_proj")):
    """A model with adapters "a" and "b", both of which change what it says."""
    model = tiny_sorted(**ENDLESS)
    config = LoraConfig(r=4, target_modules=list(modules), init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = get_peft_model(model, config, adapter_name="a")
    model.add_adapter("b", copy.deepcopy(config))
    return model.eval()


ROW_MODES = {
    **FULL_DEPTH,
    "early": {"exit_threshold": 0.3},
    "own depths": {"exit_layer": [1, 4, 2]},
}


@pytest.mark.parametrize(
    "mode_name, module", [*((n, "v_proj") for n in ROW_MODES), ("drafts", "lm_head"), ("early", "lm_head")]
)
def test_each_row_with_its_adapter_is_as_the_row_alone(mode_name, module):
    model, inputs, names = adapted(("q_proj", module)), prompts((6, 6, 6)), ["a", "b", "__base__"]
    mode = ROW_MODES[mode_name]
    tokens = greedy(model, inputs, adapter_names=names, **mode)
    assert not row_hooks(model)
    for row, name in enumerate(names):
        of_row = {key: value[row : row + 1] for key, value in inputs.items()}
        own = {**mode, "exit_layer": mode["exit_layer"][row : row + 1]} if "exit_layer" in mode else mode
        if name == "__base__":
            with model.disable_adapter():
                alone = greedy(model, of_row, **own)
        else:
            model.set_adapter(name)
            alone = greedy(model, of_row, **own)
        assert torch.equal(tokens[row], alone[0]), name


def test_rows_with_adapters_end_one_by_one():
    model, inputs, names = adapted(), prompts((6, 6, 6)), ["a", "b", "__base__"]
    plain = greedy(model, inputs, adapter_names=names)
    options = {"eos_token_id": int(plain[0, 8]), "pad_token_id": 0}
    expected = greedy(model, inputs, adapter_names=names, **options)
    for mode in ROW_MODES:
        if mode in FULL_DEPTH:
            tokens = greedy(model, inputs, adapter_names=names, **options, **ROW_MODES[mode])
            assert torch.equal(tokens, expected), mode


def test_an_error_leaves_no_hook_of_an_adapter_behind():
    model, inputs, names = adapted(), prompts((6, 6, 6)), ["a", "b", "__base__"]
    expected = greedy(model, inputs)
    for wrong in ({"exit_layer": 9}, {"exit_threshold": "x"}, {"num_beams": 2, "exit_threshold": 0.5}):
        with pytest.raises(ValueError, match="exit_"):
            greedy(model, inputs, adapter_names=names, **wrong)
        assert not row_hooks(model)

    def fail(*_):
        raise RuntimeError("in the last layer")

    handle = model.base_model.model.model.layers[3].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the last layer"):
        greedy(model, inputs, adapter_names=names, exit_threshold=2.0)
    handle.remove()
    assert not row_hooks(model)
    assert torch.equal(greedy(model, inputs), expected)


def test_activated_lora_which_counts_from_the_end_of_a_block_is_refused():
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    model = get_peft_model(tiny_sorted(), config).eval()
    inputs = {"input_ids": torch.tensor([[7, 5, 6, 8, 9]])}
    greedy(model, inputs, exit_layer=2)
    with pytest.raises(ValueError, match="activated LoRA"):
        greedy(model, inputs, exit_threshold=0.5)
    assert not row_hooks(model)


@pytest.mark.parametrize("mode", FULL_DEPTH.values(), ids=FULL_DEPTH)
def test_a_tuned_prompt_is_read_once(mode):
    model, inputs, mode = tiny_sorted(**ENDLESS), prompts((6,)), depths_for(mode, 1)
    plain = reference_llama(model, 4)
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    embeds = torch.cat([tuned.get_prompt(1), plain.model.embed_tokens(inputs["input_ids"])], dim=1)
    expected = greedy(plain, {"inputs_embeds": embeds.detach()})
    assert torch.equal(greedy(tuned, inputs, **mode)[:, 6:], expected)


@pytest.mark.parametrize("mode", FULL_DEPTH.values(), ids=FULL_DEPTH)
def test_a_tuned_prefix_is_refused_where_its_keys_and_values_would_be_lost(mode):
    model, inputs = tiny_sorted(**ENDLESS), prompts((6, 6, 6))
    tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    calls = first_layer_calls(model)
    with pytest.raises(ValueError, match="prefix tuning"):
        greedy(tuned, inputs, **mode)
    assert not calls


# Attention


def own_mask(*args, **kwargs):
    return sdpa_mask(*args, **kwargs)


@pytest.fixture(params=["shares sdpa's mask", "makes its own mask"])
def own_attention(request, monkeypatch):
    """An attention of the user's own; returns its name, whether its masks are ours to make, and its calls."""
    calls = []

    def attend(*args, **kwargs):
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    shares = request.param == "shares sdpa's mask"
    monkeypatch.setitem(AttentionInterface._global_mapping, "of_the_user", attend)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "of_the_user", sdpa_mask if shares else own_mask)
    return "of_the_user", shares, calls


@pytest.mark.parametrize("mode", FULL_DEPTH.values(), ids=FULL_DEPTH)
@pytest.mark.parametrize("lengths", [(7,), (6, 6, 6), (6, 3, 5)], ids=str)
def test_an_attention_of_the_user(own_attention, lengths, mode):
    name, shares, calls = own_attention
    model, inputs, mode = tiny_sorted(**ENDLESS), prompts(lengths), depths_for(mode, len(lengths))
    model.set_attn_implementation(name)
    expected = greedy(reference_llama(model, 4), inputs)
    calls.clear()
    if shares or "assistant_early_exit" not in mode or len(lengths) == 1:  # rows at their own pace part
        assert torch.equal(greedy(model, inputs, **mode), expected)
        assert calls
    else:
        with pytest.raises(ValueError, match="'of_the_user'.*rows of different lengths.*'sdpa'"):
            greedy(model, inputs, **{**mode, "num_assistant_tokens": 3, "assistant_early_exit": 2})


@pytest.mark.parametrize("mode", FULL_DEPTH.values(), ids=FULL_DEPTH)
def test_an_attention_without_a_mask_is_refused_for_blocks_of_several_tokens(mode, monkeypatch):
    """transformers gives it none: a block behind others would attend to the wrong ones."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "without_mask", sdpa_attention_forward)
    model, inputs, mode = tiny_sorted(**ENDLESS), prompts((7,)), depths_for(mode, 1)
    model.set_attn_implementation("without_mask")
    if "assistant_early_exit" in mode:
        with pytest.raises(ValueError, match="'without_mask'` has no mask.*AttentionMaskInterface"):
            greedy(model, inputs, **{**mode, "num_assistant_tokens": 3, "assistant_early_exit": 2})
    else:  # token by token
        assert torch.equal(greedy(model, inputs, **mode), greedy(reference_llama(model, 4), inputs))


# Where the cache comes from


@pytest.mark.parametrize("mode", FULL_DEPTH.values(), ids=FULL_DEPTH)
def test_a_checkpoint_trained_without_a_cache_decodes_with_one(mode, tmp_path):
    """`use_cache: false` in a config.json is what a training leaves; the caller has not asked for it."""
    trained = tiny_sorted(use_cache=False, **ENDLESS)
    trained.save_pretrained(tmp_path)
    model, inputs = SortedLlamaForCausalLM.from_pretrained(tmp_path), prompts((6, 4, 5))
    assert model.generation_config.use_cache is False
    expected = greedy(reference_llama(model, 4), inputs)
    assert torch.equal(greedy(model, inputs, **mode), expected)
    config = copy.deepcopy(model.generation_config)  # as a pipeline passes it
    assert torch.equal(greedy(model, inputs, generation_config=config, **mode), expected)
    assert model.generation_config.use_cache is False
    with pytest.raises(ValueError, match="use_cache=False"):
        greedy(model, inputs, use_cache=False, **mode)
    model.generation_config.use_cache = None
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(**inputs, generation_config=GenerationConfig(use_cache=False, **mode))


@pytest.mark.parametrize("first, second", [(name, list(FULL_DEPTH)[i - 1]) for i, name in enumerate(FULL_DEPTH)])
def test_a_turn_under_inference_mode_goes_on_outside_of_it(first, second):
    model, inputs = tiny_sorted(**ENDLESS), prompts((6, 6, 6))
    with torch.inference_mode():
        turn = greedy(model, inputs, return_dict_in_generate=True, **FULL_DEPTH[first])
    ids = torch.cat([turn.sequences.clone(), prompts((4, 4, 4), seed=1)["input_ids"]], dim=1)
    tokens = greedy(model, {"input_ids": ids, CACHE_NAME: turn[CACHE_NAME]}, **FULL_DEPTH[second])
    assert torch.equal(tokens, greedy(reference_llama(model, 4), {"input_ids": ids}))


def test_pending_states_made_under_inference_mode_can_be_trained_through():
    model, ids, cache = tiny_sorted(**ENDLESS), prompts((6,))["input_ids"], SortedCache()
    with torch.inference_mode():
        model(ids, exit_layer=2, **{CACHE_NAME: cache})
    model(ids[:, :0], **{CACHE_NAME: cache}).logits.sum().backward()
    assert model.model.layers[3].mlp.up_proj.weight.grad.abs().sum() > 0
