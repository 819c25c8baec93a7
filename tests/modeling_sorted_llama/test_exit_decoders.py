"""Exits with a decoder layer of their own (`exit_heads="layer"`): where it runs, and what the caches hold of it."""

import copy

import pytest
import torch
from transformers import BitsAndBytesConfig, DynamicCache, LlamaForCausalLM, StaticCache

from sorted_llama import SortedCache, SortedLlamaForCausalLM
from sorted_llama.hub_card.cost import cost_of_exit
from sorted_llama.modeling_sorted_llama.compat_sorted_llama import CACHE_NAME
from tests.modeling_sorted_llama.caches import CLOSE, catch_up, random_tokens, run, run_plain, sorted_model
from tests.modeling_sorted_llama.decoding import (
    assert_as_the_runs,
    generate,
    naive,
    never,
    quiet,
    reaching,
    rows_of,
    thresholds_at,
    undecided,
)
from tests.tiny import prompts, reference_llama, save_tiny, tiny_llama, tiny_sorted


EXITS = [1, 2, 4]
ENDLESS = {"eos_token_id": [], "max_new_tokens": 12, "do_sample": False}


def own_layers(seed=0, **fields):
    """A model whose exits have drifted from what they began as."""
    model = tiny_sorted(seed, exit_layers=EXITS, exit_heads="layer", **fields)
    drift = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "exit_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=drift)
    return model


def layer_calls(model):
    """Who is called from now on: the number of a layer of the model, or `"own 2"`, and with how many tokens."""
    calls = []

    def note(name):
        return lambda _, args: calls.append((name, args[0].shape[0] * args[0].shape[1]))

    for number, layer in enumerate(model.model.layers, start=1):
        layer.register_forward_pre_hook(note(number))
    for k, layer in model.model.exit_decoders.items():
        layer.register_forward_pre_hook(note(f"own {k}"))
    return calls


def test_an_exit_runs_its_own_layer_and_no_other():
    model, ids = own_layers(), prompts((5,))["input_ids"]
    calls = layer_calls(model)
    model(ids, exit_layer=2)
    assert calls == [(1, 5), (2, 5), ("own 2", 5)]
    calls.clear()
    model(ids)
    assert calls == [(layer, 5) for layer in (1, 2, 3, 4)]
    calls.clear()
    model(ids, labels=ids)
    assert len(calls) == 6 and {*calls} == {(1, 5), (2, 5), (3, 5), (4, 5), ("own 1", 5), ("own 2", 5)}


@pytest.mark.parametrize("k", EXITS)
def test_hidden_states_and_attentions_at_an_exit_are_the_sub_models(k):
    model, ids = own_layers(attn_implementation="eager"), prompts((5,))["input_ids"]
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected, output = model.extract_submodel(k)(ids, **asked), model(ids, exit_layer=k, **asked)
    for name in ("hidden_states", "attentions"):
        assert len(output[name]) == len(expected[name])
        assert all(torch.equal(a, b) for a, b in zip(output[name], expected[name], strict=True))


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_states_of_all_layers_are_refused_beside_those_of_several_exits(name):
    model, ids = own_layers(attn_implementation="eager"), prompts((5,))["input_ids"]
    calls = layer_calls(model)
    with pytest.raises(ValueError, match=rf"Exits \[1, 2\] own decoder layers, for which `{name}=True` has no place"):
        model(ids, labels=ids, **{name: True})
    assert calls == []


def test_every_exit_is_read_beside_a_cache_of_full_depth():
    """One that the call makes, or a `SortedCache` with what came before; another one has no place for the exits."""
    model, ids = own_layers(), prompts((6, 6))["input_ids"]
    with torch.no_grad():
        whole = model(ids, labels=ids, use_cache=True)
        expected = model(ids, use_cache=True)
        for layer, same in zip(whole[CACHE_NAME].layers, expected[CACHE_NAME].layers, strict=True):
            assert torch.equal(layer.keys, same.keys)
        with pytest.raises(ValueError, match=r"Exits \[1, 2\] own decoder layers, for which a DynamicCache has no"):
            model(ids[:, 4:], labels=ids[:, 4:], **{CACHE_NAME: model(ids[:, :4], use_cache=True)[CACHE_NAME]})
        cache = SortedCache()
        model(ids[:, :4], **{CACHE_NAME: cache})
        behind = model(ids[:, 4:], labels=ids[:, 4:], **{CACHE_NAME: cache})
        counted = torch.where(torch.arange(6) > 4, ids, -100)
        expected = [model(ids, labels=counted, exit_layer=k).loss for k in EXITS]
    torch.testing.assert_close(behind.exit_losses, torch.stack(expected), **CLOSE)


# Caches of one depth


@pytest.mark.parametrize("make", [DynamicCache, lambda **given: StaticCache(max_cache_len=40, **given)])
@pytest.mark.parametrize("filled", EXITS[:-1] + [3, 4])
@pytest.mark.parametrize("depth", EXITS)
def test_a_cache_goes_on_at_the_exit_that_filled_it(make, filled, depth):
    """Layer 3 of exit 2 and of full depth are two: nothing tells their keys and values from one another."""
    model, ids = own_layers(), prompts((6, 6))["input_ids"]
    cache = make(config=model.config)
    options = {**ENDLESS, "return_dict_in_generate": True, "disable_compile": True, "max_new_tokens": 4}
    first = model.generate(ids, **{CACHE_NAME: cache}, exit_layer=filled, **options)
    more = torch.cat([first.sequences, ids], dim=1)
    if depth == filled:
        second = model.generate(more, **{CACHE_NAME: cache}, exit_layer=depth, **options)
        assert torch.equal(second.sequences, model.extract_submodel(depth).generate(more, **options).sequences)
        return
    for continued in (
        lambda: model.generate(more, **{CACHE_NAME: cache}, exit_layer=depth, **options),
        lambda: model(ids, **{CACHE_NAME: cache}, exit_layer=depth),
    ):
        with pytest.raises(ValueError, match=f"filled at another `exit_layer`, and `exit_layer={depth}`"):
            continued()


def test_a_cache_that_generate_makes_holds_the_layers_of_the_sub_model():
    model, ids = own_layers(), prompts((6,))["input_ids"]
    for k, layers in zip(EXITS, (2, 3, 4), strict=True):
        output = model.generate(ids, **ENDLESS, return_dict_in_generate=True, exit_layer=k)
        assert len(output[CACHE_NAME].layers) == layers
        assert len(model(ids, exit_layer=k, use_cache=True)[CACHE_NAME].layers) == layers


@pytest.mark.parametrize("k", EXITS)
def test_the_cost_of_an_exit_counts_its_own_layer(k):
    model = own_layers()
    cost, submodel = cost_of_exit(model, k, context=7), model.extract_submodel(k)
    plain = cost_of_exit(SortedLlamaForCausalLM.from_llama(submodel), submodel.config.num_hidden_layers, context=7)
    assert cost == plain and cost.parameters == sum(p.numel() for p in submodel.parameters())


# Depth that moves


def batch(seed=0, **fields):
    """A model, prompts with left padding, thresholds that send tokens everywhere, and what they then generate."""
    model, inputs = own_layers(seed, **fields), prompts((6, 4, 1), seed=seed)
    thresholds = thresholds_at(model, rows_of(inputs), {1: 0.6, 2: 0.5})
    runs = [naive(model, row, reaching(thresholds), new_tokens=10) for row in rows_of(inputs)]
    assert not undecided(runs, thresholds) and {k for run in runs for k in run.depths} == {*EXITS}
    return model, inputs, thresholds, runs


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_leave_where_a_loop_without_a_cache_lets_them(seed, options):
    model, inputs, thresholds, runs = batch(seed)
    arguments = {**inputs, "exit_threshold": list(thresholds.values()), "max_new_tokens": 10}
    assert_as_the_runs(generate(model, **arguments, **options), inputs, runs)


def test_a_closed_exit_is_passed_and_can_be_read_in_the_next_turn():
    """Its layer then runs what went by: all of the first turn, and of the drafts what was kept."""
    model, inputs = own_layers(), prompts((6, 4, 1))
    rows, cache = rows_of(inputs), SortedCache()
    first = generate(model, **inputs, exit_threshold=[2, 0.0], max_new_tokens=5, eos_token_id=[], cache=cache)
    assert cache.exit_layers[1].lengths == (0, 0, 0) and cache.exit_layers[1].arrived == cache.lengths
    assert set(first.exit_layers_used.unique().tolist()) == {2}
    drafted = {"assistant_early_exit": 2, "num_assistant_tokens": 3, "max_new_tokens": 5, "eos_token_id": []}
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    second = generate(model, input_ids=first.sequences, attention_mask=mask, cache=cache, **drafted)
    mask = torch.nn.functional.pad(mask, (0, 5), value=1)
    third = generate(
        model,
        input_ids=second.sequences,
        attention_mask=mask,
        cache=cache,
        exit_threshold=[0.0, 0.0],
        max_new_tokens=5,
        eos_token_id=[],
    )
    for number, row in enumerate(rows):
        tokens = list(row)
        for output, depth in ((first, 2), (second, 4), (third, 1)):
            new = naive(model, tokens, never, exits=[depth], new_tokens=5, eos=()).tokens
            assert output.sequences[number, -5:].tolist() == new
            tokens += new


@pytest.mark.parametrize("kind", ["rejecting", "accepting"])
def test_drafts_run_each_layer_once_for_a_token_that_stays(kind):
    """Drafting catches up with what verification has kept, in the exit's own layer too."""
    model = own_layers()
    if kind == "accepting":
        quiet(model, 2, 0.0)  # nothing above exit 2, and what it owns passes its states on
        own = model.model.exit_decoders["2"]
        own.self_attn.o_proj.weight.data.zero_(), own.mlp.down_proj.weight.data.zero_()
        model.model.exit_norms["2"].load_state_dict(model.model.norm.state_dict())
    calls, inputs = layer_calls(model), prompts((6,))
    options = {**ENDLESS, "max_new_tokens": 13}
    output = generate(model, **inputs, **options, assistant_early_exit=2, num_assistant_tokens=3)
    statistics = output.draft_statistics
    assert kind == "rejecting" or statistics.acceptance_rate == 1
    assert statistics.layer_token_passes == sum(tokens for _, tokens in calls)
    assert all(name != "own 1" for name, _ in calls)
    drafts = [tokens for name, tokens in calls if name == "own 2"]
    # The prompt and the first draft at once; afterwards the newest token, and the last draft where it was kept
    assert drafts[0] == 7 and set(drafts[1:]) <= {1, 2}
    assert torch.equal(output.sequences, reference_llama(model, 4).generate(**inputs, **options))


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("mode", [{"num_assistant_tokens": 3}, {"num_assistant_tokens": "auto"}], ids=str)
def test_drafts_are_verified_at_any_depth(mode, depth):
    model, inputs = own_layers(), prompts((6, 4, 1))
    expected = model.extract_submodel(depth).generate(**inputs, **ENDLESS)
    found = model.generate(**inputs, **ENDLESS, **mode, assistant_early_exit=1, exit_layer=depth)
    assert torch.equal(found, expected)


def test_sampled_drafts_are_distributed_as_full_depth():
    """The first two tokens, of many rows, against the probabilities of full depth."""
    model, ids = own_layers(vocab_size=8, initializer_range=0.1, eos_token_id=None, pad_token_id=None), [[3, 5, 6]]
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 4, "eos_token_id": [], "pad_token_id": 0}
    tokens = model.generate(torch.tensor(ids * 10_000), assistant_early_exit=2, num_assistant_tokens=2, **options)[
        :, 3:5
    ]
    with torch.no_grad():
        first = model(torch.tensor(ids)).logits[0, -1].softmax(-1)
        second = model(torch.tensor([[*ids[0], token] for token in range(8)])).logits[:, -1].softmax(-1)
    expected = (first[:, None] * second).flatten()
    found = torch.bincount(tokens[:, 0] * 8 + tokens[:, 1], minlength=64) / len(tokens)
    assert (found - expected).abs().max() < 5 * (expected.max() / len(tokens)).sqrt()


def test_rows_at_depths_of_their_own_are_the_sub_models():
    model, inputs = own_layers(), prompts((6, 4, 1))
    rows = model.generate(**inputs, **ENDLESS, exit_layer=[2, 4, 1])
    for row, k in enumerate([2, 4, 1]):
        assert torch.equal(rows[row], model.extract_submodel(k).generate(**inputs, **ENDLESS)[row])


MODES = [{"exit_threshold": 0.0}, {"assistant_early_exit": 2}, {"exit_layer": [2, 2]}]


@pytest.mark.parametrize("call", MODES, ids=str)
def test_angles_that_depend_on_the_length_are_those_of_each_tokens_own_step(call):
    rope = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    model, inputs = own_layers(max_position_embeddings=32, **rope), prompts((30, 20))
    depth = {"exit_threshold": 1, "assistant_early_exit": 4, "exit_layer": 2}[next(iter(call))]
    expected = model.extract_submodel(depth).generate(**inputs, **ENDLESS)
    assert torch.equal(model.generate(**inputs, **ENDLESS, **call), expected)


def test_an_exit_that_another_model_went_by_is_refused():
    """Without the exit's layer, or with tokens that came to it and others that did not: never a wrong answer."""
    model, tokens = sorted_model(exit_heads="layer"), random_tokens(2, 9)
    other = SortedLlamaForCausalLM.from_llama(model.extract_submodel(4), exit_layers=[1, 2, 3, 4])
    for filled in (0, 3):
        cache = SortedCache()
        if filled:
            run(cache, tokens[:, :filled], model=model)
        run(cache, tokens[:, filled:5], model=other)
        for depth in (1, 2, 3):
            message = f"5 tokens in layer {depth} but 0 in the one that exit {depth} owns.*`exit_layer={depth}`"
            with pytest.raises(ValueError, match=message):
                run(cache, tokens[:, 5:6], depth, model)
            with pytest.raises(ValueError, match=message):
                model.generate(tokens, cache=copy.deepcopy(cache), exit_layer=depth, max_new_tokens=2)
        states = run(cache, tokens[:, 5:], model=model)
        torch.testing.assert_close(states, run_plain(tokens, exit_heads="layer")[0][:, 5:], **CLOSE)
        with pytest.raises(ValueError, match="9 tokens in layer 2 but 0 in the one that exit 2 owns"):
            catch_up(cache, 2, model=model)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_cache_goes_on_after_an_error_in_an_exits_own_layer(number):
    model, tokens, cache = sorted_model(exit_heads="layer"), random_tokens(2, 9), SortedCache()
    run(cache, tokens[:, :4], model=model)

    def fail(*_):
        raise RuntimeError("out of order")

    hook = model.model.exit_decoders[str(number)].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of order"):
        run(cache, tokens[:, 4:6], number, model)
    hook.remove()
    kept = cache.get_seq_length()
    for depth in (number, 4):
        states = run(cache, tokens[:, kept : kept + 2], depth, model)
        expected = run_plain(tokens[:, : kept + 2], depth, exit_heads="layer")[0]
        torch.testing.assert_close(states[:, -2:], expected[:, -2:], **CLOSE)
        kept += 2


def test_states_of_all_layers_are_refused_where_tokens_wait_for_the_exits_layer():
    model, tokens, cache = own_layers(), random_tokens(2, 6), SortedCache()
    with torch.no_grad():
        model(tokens[:, :4], **{CACHE_NAME: cache})
        with pytest.raises(ValueError, match="pending.*`exit_layer=2`"):
            model(tokens[:, 4:], exit_layer=2, output_hidden_states=True, **{CACHE_NAME: cache})
        model(tokens[:, :0], exit_layer=2, **{CACHE_NAME: cache})
        output = model(tokens[:, 4:], exit_layer=2, output_hidden_states=True, **{CACHE_NAME: cache})
        expected = model(tokens, exit_layer=2, output_hidden_states=True)
    for states, whole in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(states, whole[:, -2:], **CLOSE)


# Made from a Llama


def test_an_exits_layer_attends_as_the_model_does():
    made = SortedLlamaForCausalLM.from_llama(tiny_llama(), exit_layers=EXITS, exit_heads="layer")
    for model in (own_layers(), made):
        assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))
        assert [layer.self_attn.layer_idx for layer in model.model.exit_decoders.values()] == [1, 2]
        model.set_attn_implementation("eager")
        assert len(model(prompts()["input_ids"], exit_layer=2, output_attentions=True).attentions) == 3


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_gradients(reentrant, detach):
    model, ids = own_layers().train(), prompts((6, 6))["input_ids"]
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids, use_cache=False, detach_exits=detach).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_adapters_on_all_linear_layers_are_on_those_of_the_exits():
    """Trained by the exits' losses as what they are copies of would be; the sub-model has them."""
    peft = pytest.importorskip("peft")
    model, ids = own_layers(), prompts((6, 6))["input_ids"]
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model(input_ids=ids, labels=ids).loss.backward()
    adapted = [name for name, p in model.named_parameters() if "exit_decoders.2." in name and p.requires_grad]
    assert len(adapted) == 2 * 7 and all(model.get_parameter(name).grad.abs().sum() > 0 for name in adapted)
    expected = model(input_ids=ids, exit_layer=2).logits
    merged = model.merge_and_unload().extract_submodel(2)
    torch.testing.assert_close(merged(ids).logits, expected, **CLOSE)


def test_a_saved_model_is_quantized_with_its_exits_and_a_quantized_one_gets_none(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, ids = own_layers(hidden_size=64), prompts((6,))["input_ids"]
    load = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)}
    quantized = SortedLlamaForCausalLM.from_pretrained(save_tiny(tmp_path / "sorted", model), **load)
    assert isinstance(quantized.model.exit_decoders["2"].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    with torch.no_grad():
        assert torch.equal(quantized.extract_submodel(2)(ids).logits, quantized(ids, exit_layer=2).logits)
    path = save_tiny(tmp_path / "plain", tiny_llama(hidden_size=64))
    fields = {"exit_layers": EXITS, "exit_heads": "layer"}
    with pytest.raises(ValueError, match="`exit_heads='layer'` makes copies of decoder layers.*quantized"):
        SortedLlamaForCausalLM.from_llama(LlamaForCausalLM.from_pretrained(path, **load), **fields)
    with pytest.raises(ValueError, match="`exit_heads='layer'` makes copies of decoder layers.*quantized"):
        SortedLlamaForCausalLM.from_pretrained(path, **fields, **load)
