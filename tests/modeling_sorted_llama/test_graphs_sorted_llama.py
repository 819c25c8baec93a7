"""
Compiled decoding: the same tokens as uncompiled, from a number of graphs that is known before. Nothing is made faster
here: what stands in for a compiler counts the graphs that it is given and runs them as they are.
"""

import copy
import inspect
import logging

import peft
import pytest
import torch
from transformers import CompileConfig, GenerationConfig

from sorted_llama import SortedCache
from sorted_llama.modeling_sorted_llama import cache_sorted_llama
from sorted_llama.modeling_sorted_llama.compat_sorted_llama import CACHE_NAME
from sorted_llama.modeling_sorted_llama.graphs_sorted_llama import MAX_WIDTH
from tests.modeling_sorted_llama.caches import random_tokens
from tests.modeling_sorted_llama.decoding import MODELS, RETURN, ends
from tests.tiny import Pieces, prompts, reference_llama, tiny_sorted


MODES = {
    "threshold": {"exit_threshold": 0.05},
    "thresholds": {"exit_threshold": [0.9, 0.05], "exit_confidence": "margin"},
    "depths": {"exit_layer": [4, 1, 2]},
    "drafts": {"assistant_early_exit": 1, "num_assistant_tokens": 3},
    "learned drafts": {"assistant_early_exit": "auto", "num_assistant_tokens": "auto"},
}


class Compiler(list):
    """The graphs that were made, and how to ask for them."""

    def __init__(self, backend="eager"):
        super().__init__()

        def make(graph, example_inputs):
            self.append(graph)
            return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

        self.config = CompileConfig(backend=make, mode=None, fullgraph=True)
        self.options = {"cache_implementation": "static", "compile_config": self.config}


@pytest.fixture
def compiler(request):
    torch._dynamo.reset()
    yield Compiler(getattr(request, "param", "eager"))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind, mode", [*(("mixed", m) for m in MODES), ("accepting", "drafts")])
def test_compiled_tokens_are_those_of_uncompiled_decoding(kind, mode, compiler):
    """Rows of different prompts that end at different lengths, a second batch with the graphs of the first."""
    model, options = MODELS[kind](), compiler.options
    for lengths in ((6, 4, 1), (3, 7, 7)):
        inputs = prompts(lengths, seed=lengths[0])
        inputs |= {"eos_token_id": ends(reference_llama(model, 4), inputs, (4, 9)), "max_new_tokens": 14, **RETURN}
        expected = model.generate(**inputs, **MODES[mode], output_scores=True)
        output = model.generate(**inputs, **MODES[mode], **options, output_scores=True)
        assert torch.equal(output.sequences, expected.sequences)
        if "learned" not in mode:  # which has a clock
            assert torch.equal(output.exit_layers_used, expected.exit_layers_used)
            torch.testing.assert_close(output.exit_confidences, expected.exit_confidences)
        for mine, theirs in zip(output.scores, expected.scores, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert 0 < len(compiler) <= 2 * len(model.config.exit_layers)


def test_two_graphs_an_exit_serve_all_modes(compiler):
    """One for a token a row, one for several; whatever mode, depth, tokens, widths and lengths there are."""
    model, options = MODELS["mixed"](), compiler.options
    calls = [{"assistant_early_exit": 2, "num_assistant_tokens": n} for n in (2, 1, 5, 9)]
    calls += [{"exit_threshold": t} for t in (0.05, 0.2, 2.0)] + [{"exit_layer": [2, 4]}]
    for call in calls:
        first = model.generate(**prompts((5, 3)), **call, **options, **RETURN, max_new_tokens=12, eos_token_id=[])
    ids = torch.cat([first.sequences, prompts((4, 4))["input_ids"]], dim=1)  # the lowest layers' several tokens
    model.generate(
        ids, **{CACHE_NAME: first[CACHE_NAME]}, **calls[0], max_new_tokens=4, compile_config=options["compile_config"]
    )
    assert len(compiler) == 2 * len(model.config.exit_layers)
    norms = [sum("rsqrt" in str(node.target) for node in graph.graph.nodes) for graph in compiler]
    assert sorted(norms) == [3, 3, 3, 3, 5, 5]  # two a layer, and the exit's
    for seed, call in enumerate(calls):
        model.generate(**prompts((7, 7), seed=seed), **call, **options, max_new_tokens=17, eos_token_id=[])
    assert len(compiler) == 2 * len(model.config.exit_layers)


@pytest.mark.parametrize("compiler", ["aot_eager"], indirect=True)
def test_a_graph_of_a_compiler_that_takes_writes_apart(compiler):
    """`aot_eager` makes what inductor is given: pure functions, and copies back into the storage."""
    model, inputs = MODELS["mixed"](), prompts()
    for mode in ("thresholds", "drafts"):
        expected = model.generate(**inputs, **MODES[mode], max_new_tokens=10)
        options = compiler.options
        assert torch.equal(model.generate(**inputs, **MODES[mode], **options, max_new_tokens=10), expected)


@pytest.mark.parametrize("mode", ["threshold", "drafts"])
def test_compiled_sampling_draws_the_same_tokens(mode, compiler):
    model, inputs = MODELS["mixed"](), prompts()
    arguments = {
        **inputs,
        **MODES[mode],
        "do_sample": True,
        "top_k": 20,
        "max_new_tokens": 12,
        "num_return_sequences": 2,
    }
    torch.manual_seed(3)
    expected = model.generate(**arguments)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**arguments, **compiler.options), expected)
    assert compiler


@pytest.mark.parametrize("mode", ["thresholds", "depths", "drafts"])
def test_compiled_decoding_with_processors_and_a_streamer(mode, compiler):
    model, inputs = MODELS["mixed"](), prompts((6, 4, 1))
    arguments = {**inputs, **MODES[mode], "max_new_tokens": 12, "repetition_penalty": 1.3, "suppress_tokens": [7]}
    mine, theirs = Pieces(), Pieces()
    model.generate(**arguments, streamer=theirs)
    model.generate(**arguments, streamer=mine, **compiler.options)
    assert mine.pieces == theirs.pieces and mine.ended == theirs.ended == 1 and compiler


def test_a_cache_that_compiled_decoding_returned_goes_on_in_every_mode(compiler):
    model, inputs = MODELS["mixed"](), prompts((5, 5))
    modes = [{"exit_layer": [4, 4]}, {"exit_threshold": 2.0}, {"assistant_early_exit": 1}]
    turn, config = prompts((4, 4), seed=1)["input_ids"], compiler.config
    arguments = {**MODES["drafts"], **RETURN, "max_new_tokens": 10}
    for mode in modes:
        first = model.generate(**inputs, **arguments, cache_implementation="static", compile_config=config)
        both = torch.cat([first.sequences, turn], dim=1)
        given = {"attention_mask": torch.ones_like(both), "max_new_tokens": 8, "eos_token_id": []}
        continued = model.generate(both, **given, **{CACHE_NAME: first[CACHE_NAME]}, **mode, compile_config=config)
        assert torch.equal(continued, reference_llama(model, 4).generate(both, **given)), mode


CONFIGS = {
    "exits with a layer of their own": {"exit_heads": "layer"},
    "exits with a norm and a head of their own": {"exit_heads": "separate"},
    "angles that depend on the length": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "max_position_embeddings": 8,
    },
    "eager attention": {"attn_implementation": "eager"},
}


@pytest.mark.parametrize(
    "name, mode",
    [
        *((name, "thresholds") for name in CONFIGS),
        ("exits with a layer of their own", "drafts"),
        ("angles that depend on the length", "drafts"),
    ],
)
def test_compiled_decoding_of_a_model_with(name, mode, compiler):
    model, inputs = tiny_sorted(**CONFIGS[name]), prompts((6, 4, 1))
    for norm in model.model.exit_norms.values():  # as trained: no copy of the final one
        torch.nn.init.uniform_(norm.weight, 0.1, 3.0)
    expected = model.generate(**inputs, **MODES[mode], max_new_tokens=12)
    assert torch.equal(model.generate(**inputs, **MODES[mode], **compiler.options, max_new_tokens=12), expected)
    assert compiler


def test_a_block_of_many_pending_tokens_runs_uncompiled(compiler):
    """Tokens leave early for long, then one goes deeper with all of them: more than the widest graph."""
    model, long = tiny_sorted(), [4, *[1] * (2 * MAX_WIDTH), 4, 4, 4]
    depths = iter(long)
    chosen_depth = [0]

    def confidence(scores, exit_layer, input_ids):
        if exit_layer == 1:
            chosen_depth[0] = next(depths)
        return torch.full((len(scores),), float(chosen_depth[0] == exit_layer))

    arguments = {"exit_threshold": 0.5, "exit_confidence": confidence, "max_new_tokens": len(long)}
    output = model.generate(random_tokens(1, 3), **arguments, **compiler.options, **RETURN, eos_token_id=[])
    assert output.exit_layers_used[0].tolist() == long
    assert len(compiler) == len(model.config.exit_layers)  # those of a token a row
    ids = output.sequences
    with torch.no_grad():
        at_exit, full = (reference_llama(model, k)(ids).logits.argmax(-1)[0] for k in (1, 4))
    chosen = [(at_exit if depth == 1 else full)[2 + i].item() for i, depth in enumerate(long)]
    assert chosen == ids[0, 3:].tolist()


@torch.no_grad()
def test_one_graph_takes_blocks_of_every_width(compiler):
    """Also where no token alone came before them, by which torch would know that the width varies."""
    model, cache, tokens = tiny_sorted(), SortedCache(max_cache_len=64), random_tokens(1, 40)
    start = 0
    for width in (20, 5, 2, 3, MAX_WIDTH - 6):
        given = {CACHE_NAME: cache, "exit_layer": 4, "compile_config": compiler.config if start else None}
        states = model.model(tokens[:, start : start + width], **given).last_hidden_state
        start += width
        expected = reference_llama(model, 4).model(tokens[:, :start]).last_hidden_state[:, -width:]
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-4)
    assert len(compiler) == len(model.config.exit_layers)


def test_a_cache_that_has_become_too_small_grows_uncompiled(compiler, monkeypatch):
    monkeypatch.setattr(cache_sorted_llama, "STORAGE_STEP", 16)
    model, inputs = MODELS["mixed"](), {**prompts((5, 5)), "max_new_tokens": 40, "eos_token_id": []}
    expected = model.generate(**inputs, **MODES["drafts"])
    given = {CACHE_NAME: SortedCache(max_cache_len=24), "compile_config": compiler.config}
    output = model.generate(**inputs, **MODES["drafts"], **given, **RETURN)
    assert torch.equal(output.sequences, expected)
    assert output[CACHE_NAME].layers[0].storage[0].shape[-2] > 24
    assert 0 < len(compiler) <= 4 * len(model.config.exit_layers)  # those of two sizes


# How it is asked for


def test_nothing_is_compiled_unless_it_is_asked_for(compiler):
    model, inputs, mode = MODELS["mixed"](), prompts(), MODES["drafts"]
    options = compiler.options
    for given in ({**options, "disable_compile": True}, {"cache_implementation": "static"}):
        model.generate(**inputs, **mode, **given, max_new_tokens=8)
    assert not compiler  # on an accelerator, the second would be

    config = options["compile_config"]
    model.generate(**inputs, **mode, generation_config=GenerationConfig(**options, max_new_tokens=8))
    assert compiler and "_compile_all_devices" not in vars(config)


def test_a_compile_config_that_cannot_be_followed_is_told(compiler, caplog, monkeypatch):
    model, inputs = MODELS["mixed"](), prompts()
    with caplog.at_level(logging.WARNING, "transformers"):
        model.generate(**inputs, **MODES["drafts"], compile_config=compiler.config, max_new_tokens=4)
        assert "unable to meet the criteria for compilation" in caplog.text
        monkeypatch.setattr(model, "hf_device_map", {"model": 0, "lm_head": 1}, raising=False)
        model.generate(**inputs, **MODES["drafts"], **compiler.options, max_new_tokens=4)
        assert "does not compile with layers on several devices" in caplog.text
        monkeypatch.delattr(model, "hf_device_map")
        adapted = peft.get_peft_model(tiny_sorted(), peft.LoraConfig(target_modules=["q_proj"])).eval()
        names = {"adapter_names": ["default", "__base__", "default"]}
        adapted.generate(**inputs, **MODES["drafts"], **compiler.options, **names, max_new_tokens=4)
        assert "does not compile with adapters by row" in caplog.text
    assert not compiler


def run_compiled(model, cache, tokens, config):
    """Two passes to full depth, the first of which makes the storage."""
    for part in (tokens[:, :-1], tokens[:, -1:]):
        output = model.model(part, **{CACHE_NAME: cache}, exit_layer=1, compile_config=config)
    return output.last_hidden_state


@torch.no_grad()
def test_many_models_of_other_shapes_compile_in_one_process(compiler):
    """More than torch's own limit of variants, of which the next would fail, or run uncompiled."""
    tokens, number = random_tokens(1, 4), torch._dynamo.config.recompile_limit + 2
    for size in range(1, number + 1):
        model = tiny_sorted(hidden_size=32 + 8 * size, head_dim=8, num_hidden_layers=1, exit_layers=[1])
        states = run_compiled(model, SortedCache(max_cache_len=32), tokens, compiler.config)
        expected = reference_llama(model, 1).model(tokens).last_hidden_state[:, -1:]
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-4)
    assert len(compiler) == number


@torch.no_grad()
def test_hooks_that_come_and_go_after_compiling_run(compiler):
    model, tokens = tiny_sorted(num_hidden_layers=1, exit_layers=[1]), random_tokens(1, 4)

    def states():
        return run_compiled(model, SortedCache(max_cache_len=32), tokens, compiler.config)

    plain = states()
    for module in (model.model.layers[0], model.model.layers[0].mlp, model.model.norm):
        for factor in (2.0, 3.0):
            hook = module.register_forward_hook(lambda _, args, output, factor=factor: output * factor)
            expected = model.model(tokens).last_hidden_state[:, -1:]
            torch.testing.assert_close(states(), expected, atol=1e-5, rtol=1e-4)
            assert not torch.allclose(expected, plain) or module is model.model.layers[0]  # the norm takes it out
            hook.remove()
            torch.testing.assert_close(states(), plain)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"compile_config": {"backend": "eager"}},
            "`compile_config` must be a `CompileConfig` of transformers, got {",
        ),
        ({CACHE_NAME: SortedCache()}, "`compile_config` needs a `SortedCache` that is allocated at once"),
        ({CACHE_NAME: None}, "`compile_config` needs a `SortedCache` that is allocated at once"),
        ({"output_attentions": True}, "`compile_config` needs an output without `output_attentions`"),
    ],
)
def test_a_forward_that_no_graph_can_do_is_refused(arguments, message, compiler):
    given = {CACHE_NAME: SortedCache(max_cache_len=32), "compile_config": compiler.config, **arguments}
    with pytest.raises(ValueError, match=message):
        MODELS["mixed"]().model(random_tokens(1, 3), **given)


def test_an_attention_without_a_mask_of_slots_is_refused(compiler):
    model = tiny_sorted(attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="needs `attn_implementation` 'sdpa' or 'eager', and not 'flex_attention'"):
        run_compiled(model, SortedCache(max_cache_len=32), random_tokens(1, 3), compiler.config)


def test_a_fixed_depth_compiles_once_a_depth(compiler):
    """transformers' own path, of as many layers."""
    model, inputs, options, made = MODELS["mixed"](), prompts(), compiler.options, []
    for depth in (1, 4, 1, 4):
        arguments = {**inputs, "max_new_tokens": 8, "eos_token_id": []}
        output = model.generate(**arguments, exit_layer=depth, **options)
        assert torch.equal(output, reference_llama(model, depth).generate(**arguments))
        made.append(len(compiler))
    assert made == [1, 2, 2, 2]


def test_a_compiled_model_is_copied_and_keeps_its_weights_apart(compiler):
    model, inputs = copy.deepcopy(MODELS["mixed"]()), prompts()
    arguments = {**inputs, **MODES["drafts"], **compiler.options, "max_new_tokens": 8}
    model.generate(**arguments)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.model.layers.parameters():
            weight.mul_(0.5)
    expected = reference_llama(other, 4).generate(**inputs, max_new_tokens=8)
    assert torch.equal(other.generate(**arguments), expected)


def test_transformers_still_decides_where_to_compile():
    """Private: what `compile_config_for` asks."""
    model = MODELS["mixed"]()
    assert list(inspect.signature(model._valid_auto_compile_criteria).parameters) == [
        "model_kwargs",
        "generation_config",
    ]
    assert isinstance(model._default_compile_config(), CompileConfig)
    assert CompileConfig._compile_all_devices is None
