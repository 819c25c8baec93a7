"""`forward`: an exit equals, bit for bit, transformers' own Llama of its layers."""

import inspect
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel, StaticCache

from sorted_llama import SortedLlamaForCausalLM, SortedLlamaModel
from tests.tiny import reference_llama, tiny_fields, tiny_sorted


VOCAB = 259
VARIANTS = {
    "grouped_query": {},
    "multi_head": {"num_key_value_heads": 4},
    "multi_query": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 16},
    "llama3_rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


def count_layer_calls(model) -> list[int]:
    """The layers (from 1) that run from now on, in the order of their calls."""
    calls = []
    for number, layer in enumerate(model.base_model.layers, start=1):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    return calls


def batch(lengths=(9, 9), padding="right", seed=0) -> dict[str, torch.Tensor]:
    """Random tokens, a mask, and labels with some tokens and all padding masked."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[(width - length if padding == "left" else 0) :][:length] = 1
    input_ids = torch.randint(3, VOCAB, mask.shape, generator=generator) * mask
    keep = (torch.rand(mask.shape, generator=generator) < 0.7) & mask.bool()
    keep[:, -2:] |= mask[:, -2:].bool()
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(~keep, -100)}


def assert_same(output, expected, depth=None):
    """Bit for bit: everything that Llama returns, and nothing less."""
    assert torch.equal(output.logits, expected.logits)
    assert (output.loss is None) == (expected.loss is None)
    assert output.loss is None or torch.equal(output.loss, expected.loss)
    for name in ("hidden_states", "attentions"):
        mine, theirs = getattr(output, name), getattr(expected, name)
        assert (mine is None) == (theirs is None)
        for a, b in zip(mine or (), theirs or (), strict=True):
            assert torch.equal(a, b)
    assert (output.past_key_values is None) == (expected.past_key_values is None)
    if expected.past_key_values is not None:
        mine, theirs = output.past_key_values.layers, expected.past_key_values.layers
        assert len(mine) == len(theirs) == (depth or len(theirs))
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


@torch.no_grad()
def check(model, depth, **inputs):
    """`model` at `depth` against the reference; returns the output."""
    reference = reference_llama(model, depth)
    output = model(**inputs, exit_layer=depth)
    assert_same(output, reference(**inputs), depth)
    return output


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_exit_equals_its_submodel(variant, padding, attention):
    model = tiny_sorted(exit_layers=[1, 2, 3, 4], attn_implementation=attention, **VARIANTS[variant])
    inputs = batch((9, 5, 1), padding)
    for depth in (1, 2, 3, 4):
        output = check(
            model, depth, **inputs, output_hidden_states=True, output_attentions=attention == "eager", use_cache=True
        )
        assert len(output.hidden_states) == depth + 1
        assert output.exit_losses is None
    assert torch.equal(output.logits, model(**inputs).logits)  # no exit asked for: full depth


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("padding", ["left", "right"])
def test_flex_attention_gives_the_sub_models_logits(padding):
    model = tiny_sorted(attn_implementation="flex_attention", num_attention_heads=2)
    with torch.compiler.set_stance("force_eager"):  # inductor would need a C++ compiler
        for depth in (1, 4):
            check(model, depth, **batch((9, 5), padding), output_hidden_states=True, use_cache=True)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_config_depth_and_padding(data):
    """Random architecture, random depth, random padding: always the sub-model, bit for bit."""
    layers = data.draw(st.integers(1, 5), "layers")
    heads = data.draw(st.sampled_from([1, 2, 4, 8]), "heads")
    model = tiny_sorted(
        seed=data.draw(st.integers(0, 99), "seed"),
        exit_layers=None,
        num_hidden_layers=layers,
        hidden_size=16 * data.draw(st.integers(1, 2), "hidden"),
        num_attention_heads=heads,
        num_key_value_heads=data.draw(st.sampled_from([n for n in (1, 2, 4, 8) if heads % n == 0]), "kv heads"),
        attn_implementation=data.draw(st.sampled_from(["eager", "sdpa"]), "attention"),
        attention_bias=data.draw(st.booleans(), "attention bias"),
        mlp_bias=data.draw(st.booleans(), "mlp bias"),
        tie_word_embeddings=data.draw(st.booleans(), "tied"),
        hidden_act=data.draw(st.sampled_from(["silu", "gelu"]), "activation"),
    )
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4), "lengths")
    inputs = batch(lengths, data.draw(st.sampled_from(["left", "right"]), "padding"))
    if max(lengths) < 2 or (inputs["labels"][:, 1:] == -100).all():
        del inputs["labels"]
    check(model, data.draw(st.integers(1, layers), "depth"), **inputs, output_hidden_states=True, use_cache=True)


@pytest.mark.parametrize("depth", [1, 2, 4])
class TestArguments:
    """Every argument of Llama's keeps its meaning at every exit."""

    def test_position_ids_reach_the_layers_of_an_exit(self, depth):
        model, inputs = tiny_sorted(), batch()
        position_ids = torch.arange(9).flip(0).expand(2, -1) * 3
        shifted = check(model, depth, **inputs, position_ids=position_ids)
        assert not torch.equal(shifted.logits, model(**inputs, exit_layer=depth).logits)

    def test_packed_sequences_do_not_see_each_other(self, depth):
        inputs = batch((12,))
        del inputs["attention_mask"]
        check(tiny_sorted(), depth, **inputs, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]]))

    def test_embeddings_stand_in_for_tokens(self, depth):
        model, inputs = tiny_sorted(), batch((7, 4), "left")
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        check(model, depth, **inputs, inputs_embeds=embeds, output_hidden_states=True)

    @pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4, 8]), torch.tensor([2])], ids=str)
    def test_logits_to_keep_keeps_the_last(self, depth, keep):
        inputs = batch()
        del inputs["labels"]
        output = check(tiny_sorted(), depth, **inputs, logits_to_keep=keep)
        assert output.logits.shape[1] == (keep if isinstance(keep, int) else len(keep))

    @pytest.mark.parametrize("name", ["past_key_values", "cache"])
    def test_cache_by_either_name(self, depth, name):
        """transformers 5.24 renamed the argument; both names work, in `forward` and in the inner model's."""
        model, (first, second) = tiny_sorted(), batch((9, 9))["input_ids"].split((5, 4), dim=1)
        reference = reference_llama(model, depth)
        with torch.no_grad():
            cache, expected_cache = DynamicCache(), DynamicCache()
            model(first, exit_layer=depth, **{name: cache})
            output = model(second, exit_layer=depth, **{name: cache})
            reference(first, past_key_values=expected_cache)
            expected = reference(second, past_key_values=expected_cache)
            assert output.past_key_values is cache
            assert_same(output, expected, depth)

            inner_cache = DynamicCache()
            model.model(first, exit_layer=depth, **{name: inner_cache})
            inner = model.model(second, exit_layer=depth, **{name: inner_cache})
        assert torch.equal(model.lm_head(inner.last_hidden_state), expected.logits)

    def test_an_exit_decodes_with_a_static_cache(self, depth):
        model, tokens = tiny_sorted(), batch((9, 9))["input_ids"]
        reference = reference_llama(model, depth)
        cache = StaticCache(config=model.config, max_cache_len=16)
        expected_cache = StaticCache(config=reference.config, max_cache_len=16)
        with torch.no_grad():
            for part in tokens.split((5, 1, 3), dim=1):
                output = model(part, past_key_values=cache, exit_layer=depth)
                assert torch.equal(output.logits, reference(part, past_key_values=expected_cache).logits)
        assert all(not layer.is_initialized for layer in cache.layers[depth:])

    def test_no_cache_is_made_where_none_is_asked_for(self, depth):
        assert check(tiny_sorted(), depth, **batch(), use_cache=False).past_key_values is None

    def test_a_tuple_is_returned_where_one_is_asked_for(self, depth):
        model, inputs = tiny_sorted(), batch()
        output = model(**inputs, exit_layer=depth, return_dict=False, use_cache=False)
        expected = reference_llama(model, depth)(**inputs, return_dict=False, use_cache=False)
        assert len(output) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(output, expected, strict=True))

    def test_a_four_dimensional_mask_is_taken_as_it_is(self, depth):
        inputs = batch()
        mask = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)
        mask[5:, :3] = torch.finfo(torch.float32).min
        check(tiny_sorted(), depth, input_ids=inputs["input_ids"], attention_mask=mask.expand(2, 1, -1, -1))

    def test_low_precision_gives_the_sub_models_logits(self, depth):
        model = tiny_sorted().to(torch.bfloat16)
        check(model, depth, **batch((9, 4), "left"), output_hidden_states=True)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_the_inner_model_runs_to_an_exit(depth):
    """`SortedLlamaModel` alone: the normed output and all hidden states of `LlamaModel`, and the exits' raw states."""
    model = tiny_sorted(exit_layers=[1, 2, 3, 4]).model
    config = LlamaConfig(**tiny_fields(num_hidden_layers=depth))
    reference = LlamaModel(config).eval()
    reference.load_state_dict({k: v for k, v in model.state_dict().items() if k in reference.state_dict()})
    inputs = batch((9, 6), "left")
    del inputs["labels"]
    with torch.no_grad():
        output = model(**inputs, exit_layer=depth, output_hidden_states=True)
        expected = reference(**inputs, output_hidden_states=True)
        kept = model(**inputs, exit_layer=depth, exit_layers=range(1, depth + 1)).exit_hidden_states
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, expected.hidden_states, strict=True))
    assert output.exit_hidden_states is None
    # transformers returns the last state normed, the ones before raw
    assert all(torch.equal(a, b) for a, b in zip(kept[:-1], expected.hidden_states[1:-1], strict=True))
    assert torch.equal(reference.norm(kept[-1]), expected.last_hidden_state)


def test_the_depth_of_the_config_is_the_default():
    """`config.exit_layer` is the depth of every call that asks for none."""
    model, inputs = tiny_sorted(exit_layer=2), batch()
    calls = count_layer_calls(model)
    with torch.no_grad():
        assert_same(model(**inputs), reference_llama(model, 2)(**inputs), 2)
        assert calls == [1, 2]
        assert_same(model(**inputs, exit_layer=4), reference_llama(model, 4)(**inputs), 4)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_layers_above_an_exit_do_not_run(depth):
    model = tiny_sorted(exit_layers=[1, 2, 3, 4])
    calls = count_layer_calls(model)
    model(**batch(), exit_layer=depth)
    assert calls == list(range(1, depth + 1))


def test_cache_holds_the_layers_that_ran():
    model, inputs = tiny_sorted(), batch((9, 9))
    with torch.no_grad():
        for depth in (1, 2, 4):
            cache = model(**inputs, exit_layer=depth, use_cache=True).past_key_values
            size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
            # keys and values, batch, 2 heads, tokens, head size, float32
            assert size == depth * 2 * 2 * 2 * 9 * 8 * 4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cache_continued_shallower_equals_the_submodel(attention):
    """The lower layers of a deep cache are the sub-model's own cache."""
    model, (first, second) = tiny_sorted(attn_implementation=attention), batch((9, 9))["input_ids"].split((5, 4), 1)
    with torch.no_grad():
        cache = model(first, use_cache=True).past_key_values
        output = model(second, past_key_values=cache, exit_layer=2)
        reference = reference_llama(model, 2)
        expected = reference(second, past_key_values=reference(first, use_cache=True).past_key_values)
    assert torch.equal(output.logits, expected.logits)


def new_cache(kind, model):
    return DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=32)


@pytest.mark.parametrize("inner", [False, True], ids=["causal_lm", "inner_model"])
@pytest.mark.parametrize("kind", ["dynamic", "dynamic_with_config", "static"])
@pytest.mark.parametrize("depths", [(2, 4), (1, 2), (2, None), (4, 2, 4)], ids=str)
def test_shallow_cache_continued_deeper_is_an_error(kind, depths, inner):
    """The upper layers lack tokens, all of them or (`4, 2, 4`) only the later ones: an error, never a wrong answer."""
    model, tokens = tiny_sorted(), batch((9,))["input_ids"]
    cache = DynamicCache(config=model.config) if kind == "dynamic_with_config" else new_cache(kind, model)
    forward = model.model if inner else model
    with torch.no_grad():
        for depth in depths[:-1]:
            forward(tokens, past_key_values=cache, exit_layer=depth)
        calls = count_layer_calls(model)
        with pytest.raises(ValueError, match="cache.*exit_layer"):
            forward(tokens, past_key_values=cache, exit_layer=depths[-1])
        assert calls == []


BAD_EXIT_LAYER = [0, -1, 5, True, 2.0, float("nan"), "2", [1, 2], torch.tensor(2.5)]
BAD_EXIT_LAYERS = [[], "1,4", 4, [0, 4], [1, 5], [1, 2], [2, 1, 4], [1, 1, 4], [True, 4], [1.0, 4], ["1", 4], [-1, 4]]
BAD_WEIGHTS = [
    [],
    [1.0],
    [1.0] * 4,
    [1, 1, float("nan")],
    [1, -1, 1],
    [0, 0, 0],
    [True, 1, 1],
    ["1", 1, 1],
    "111",
    1.0,
]


def assert_refused(model, words, **arguments):
    calls = count_layer_calls(model)
    with pytest.raises(ValueError) as error:
        model(**arguments)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert calls == []


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("value", BAD_EXIT_LAYER, ids=repr)
def test_a_bad_exit_layer_of_a_call_is_refused(value, with_labels):
    inputs = batch()
    if not with_labels:
        del inputs["labels"]
    assert_refused(tiny_sorted(), ["`exit_layer`", repr(value), "1 to 4"], **inputs, exit_layer=value)


@pytest.mark.parametrize("value", BAD_EXIT_LAYER, ids=repr)
def test_bad_exit_layer_of_the_inner_model(value):
    words = ["`exit_layer`", repr(value), "1 to 4"]
    assert_refused(tiny_sorted().model, words, input_ids=batch()["input_ids"], exit_layer=value)


@pytest.mark.parametrize("value", BAD_EXIT_LAYERS, ids=repr)
@pytest.mark.parametrize("source", ["argument", "config"])
def test_bad_exit_layers_of_a_call_are_refused(value, source):
    """Also where a user has written nonsense into the config of a model that exists."""
    model, inputs = tiny_sorted(), batch()
    if source == "argument":
        inputs["exit_layers"] = value
    else:
        model.config.exit_layers = value
    wrong = value if not isinstance(value, list) or value in ([], [1, 2], [2, 1, 4], [1, 1, 4]) else None
    shown = repr(value) if wrong is not None else repr(next(v for v in value if type(v) is not int or not 0 < v < 5))
    assert_refused(model, ["`exit_layers`", shown, "4"], **inputs)


@pytest.mark.parametrize("value", BAD_WEIGHTS, ids=repr)
def test_bad_loss_weights_of_a_call_are_refused(value):
    assert_refused(tiny_sorted(), ["`exit_loss_weights`", repr(value), "3"], **batch(), exit_loss_weights=value)


def test_arguments_that_contradict_each_other_are_refused():
    inputs = batch()
    assert_refused(
        tiny_sorted(), ["`exit_layer=2`", "`exit_layers=[1, 4]`"], **inputs, exit_layer=2, exit_layers=[1, 4]
    )
    del inputs["labels"]
    assert_refused(tiny_sorted(), ["`exit_layers=[1, 4]`", "`labels`"], **inputs, exit_layers=[1, 4])
    assert_refused(tiny_sorted(), ["input_ids"], exit_layer=2)
    assert_refused(tiny_sorted(), ["input_ids"], input_ids=inputs["input_ids"], inputs_embeds=torch.zeros(2, 9, 32))


@pytest.mark.parametrize(
    "argument",
    [
        {"exit_loss_weights": [1, 1, 1]},
        {"exit_loss_reduction": "mean"},
        {"loss_type": "dft"},
        {"label_smoothing": 0.1},
    ],
    ids=lambda argument: next(iter(argument)),
)
@pytest.mark.parametrize("without", ["exits", "labels", "several exits"])
def test_arguments_of_the_soft_loss_are_not_ignored_without_one(without, argument):
    inputs = batch()
    model = tiny_sorted(exit_layers=None) if without == "exits" else tiny_sorted()
    if without == "labels":
        del inputs["labels"]
    depth = {"exit_layer": 2} if without == "several exits" else {}
    assert_refused(model, [next(iter(argument)), "`labels`", "`exit_layers`"], **inputs, **depth, **argument)


@pytest.mark.parametrize(
    "argument, allowed",
    [
        ({"exit_loss_reduction": "none"}, "'sum' or 'mean'"),
        ({"loss_type": "focal"}, "'nll' or 'dft'"),
        ({"label_smoothing": 1.5}, "from 0 to 1"),
    ],
)
def test_bad_options_of_the_soft_loss_are_refused(argument, allowed):
    assert_refused(tiny_sorted(), [allowed, repr(next(iter(argument.values())))], **batch(), **argument)


def test_a_temperature_of_the_distillation_is_refused_as_no_option_any_more():
    options = {"self_distillation_weight": 1.0, "self_distillation_temperature": 2.0}
    assert_refused(tiny_sorted(), ["`self_distillation_temperature=2.0`", "no option any more"], **batch(), **options)


def test_untrained_exit_warns_once(caplog):
    model = tiny_sorted(num_hidden_layers=7, exit_layers=[3, 7])
    tokens = batch()["input_ids"]
    with caplog.at_level(logging.WARNING):
        for depth in (3, 7, None):
            model(tokens, exit_layer=depth)
        assert "exit_layer" not in caplog.text
        for _ in range(3):
            model(tokens, exit_layer=5)
    assert sum("exit_layer=5" in record.getMessage() for record in caplog.records) == 1


def test_inner_model_is_built_once(monkeypatch):
    """A second inner model, built and thrown away, costs memory and breaks transformers' own model tests."""
    built = []
    init = LlamaModel.__init__
    monkeypatch.setattr(LlamaModel, "__init__", lambda self, config: (built.append(type(self)), init(self, config))[1])
    tiny_sorted()
    assert built == [SortedLlamaModel]


def test_parameters_are_llamas_own():
    for tied in (True, False):
        model = tiny_sorted(tie_word_embeddings=tied)
        plain = LlamaForCausalLM(LlamaConfig(**tiny_fields(tie_word_embeddings=tied)))
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
        assert isinstance(model, LlamaForCausalLM) and isinstance(model.model, LlamaModel)


def test_a_plain_config_makes_a_sorted_model():
    plain = LlamaConfig(**tiny_fields())
    for model in (SortedLlamaForCausalLM(plain), SortedLlamaModel(plain)):
        assert model.config.model_type == "sorted_llama"
        assert model.base_model.config is model.config
    assert plain.model_type == "llama"


@pytest.mark.parametrize("function", ["forward", "inner_forward"])
def test_forward_takes_any_other_keyword(function):
    """transformers hands its own keywords through every `forward`: it must name the known ones and take the rest."""
    model = tiny_sorted()
    forward = model.forward if function == "forward" else model.model.forward
    parameters = inspect.signature(forward).parameters
    assert any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    reference = reference_llama(model, 4)
    expected = inspect.signature(reference.forward if function == "forward" else reference.model.forward).parameters
    assert {*expected, "exit_layer"} - {"past_key_values"} <= parameters.keys()  # the old name of `cache`


def attention_calls(graphs) -> int:
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    return sum("scaled_dot_product_attention" in target for target in targets)


class TestCompile:
    """`torch.compile` of the model: one graph a depth, of as many layers, and no other when a depth is seen again."""

    @pytest.fixture(autouse=True)
    def reset(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("use_cache", [False, True])
    def test_one_graph_a_depth(self, use_cache):
        model, inputs = tiny_sorted(num_hidden_layers=2, exit_layers=[1, 2]), batch((9, 5), "left")
        graphs = []

        def backend(graph, _):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(model, fullgraph=True, backend=backend)
        arguments = {**inputs, "use_cache": use_cache}
        with torch.no_grad():
            for depth in (1, 2):
                before = len(graphs)
                output = compiled(**arguments, exit_layer=depth)
                assert len(graphs) == before + 1
                assert attention_calls(graphs[before:]) == depth
                assert_same(output, reference_llama(model, depth)(**arguments), depth)
            before = len(graphs)
            for depth in (2, 1, 1, 2):
                compiled(**arguments, exit_layer=depth)
            assert len(graphs) == before

    def test_a_compiled_model_still_refuses_wrong_depths(self):
        model = tiny_sorted()
        compiled = torch.compile(model, backend="eager")
        for bad in (0, 5):
            with pytest.raises(ValueError, match="`exit_layer`.*1 to 4"):
                compiled(batch()["input_ids"], exit_layer=bad)
