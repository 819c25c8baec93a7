"""`generate(exit_layer=k)`: token-identical to the extracted sub-model, whatever the decoding strategy."""

import contextlib
import inspect
import logging
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    cache_utils,
    pipeline,
)

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.modeling_sorted_llama.compat_sorted_llama import CACHE_NAME
from sorted_llama.modeling_sorted_llama.generation_sorted_llama import SortedGenerationMixin
from tests.tiny import Pieces, prompts, reference_llama, save_tiny, tiny_llama, tiny_sorted, tiny_tokenizer


DEPTHS = [1, 2, 4]


def count_layer_calls(model) -> list[int]:
    """The layers (from 1) that run from now on, in the order of their calls."""
    calls = []
    for number, layer in enumerate(model.base_model.layers, start=1):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    return calls


def generate(model, seed=0, **arguments):
    torch.manual_seed(seed)
    return model.generate(**arguments)


def submodel_tokens(model, depth, seed=0, **arguments):
    """What transformers' own Llama of the first `depth` layers generates."""
    return generate(reference_llama(model, depth), seed, **arguments)


STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "min_p": {"do_sample": True, "min_p": 0.1},
    "beams": {"num_beams": 3},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True},
    "beam_sampling": {"do_sample": True, "num_beams": 3, "top_k": 30},
    "several_samples": {"do_sample": True, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 8},
    "no_cache": {"use_cache": False},
    "chunked_prefill": {"prefill_chunk_size": 2},
}


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_on_a_left_padded_batch(strategy, depth):
    model, arguments = tiny_sorted(), {**prompts(), **STRATEGIES[strategy], "max_new_tokens": 12}
    calls = count_layer_calls(model)
    tokens = generate(model, exit_layer=depth, **arguments)
    assert torch.equal(tokens, submodel_tokens(model, depth, **arguments))
    assert set(calls) == set(range(1, depth + 1))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_model_depth_and_batch(data):
    layers = data.draw(st.integers(1, 4), "layers")
    model = tiny_sorted(
        seed=data.draw(st.integers(0, 99), "seed"),
        exit_layers=None,
        num_hidden_layers=layers,
        num_key_value_heads=data.draw(st.sampled_from([1, 2, 4]), "kv heads"),
        tie_word_embeddings=data.draw(st.booleans(), "tied"),
        attn_implementation=data.draw(st.sampled_from(["eager", "sdpa"]), "attention"),
    )
    arguments = prompts(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3), "lengths"))
    arguments |= data.draw(st.sampled_from(list(STRATEGIES.values())), "strategy")
    depth = data.draw(st.integers(1, layers), "depth")
    tokens = generate(model, exit_layer=depth, max_new_tokens=6, **arguments)
    assert torch.equal(tokens, submodel_tokens(model, depth, max_new_tokens=6, **arguments))


@pytest.mark.parametrize("depth", DEPTHS)
def test_everything_that_generate_returns(depth):
    model = tiny_sorted(attn_implementation="eager")
    arguments = {**prompts(), "max_new_tokens": 5, "return_dict_in_generate": True}
    arguments |= {
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
        "output_attentions": True,
    }
    output = generate(model, exit_layer=depth, **arguments)
    expected = submodel_tokens(model, depth, **arguments)
    assert torch.equal(output.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert all(torch.equal(a, b) for a, b in zip(output[name], expected[name], strict=True))
    for name in ("hidden_states", "attentions"):
        for step, expected_step in zip(output[name], expected[name], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(step, expected_step, strict=True))


@pytest.mark.parametrize("depth", DEPTHS)
def test_processors_criteria_and_embeddings(depth):
    class Even(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(-1, torch.arange(1, 259, 2), -torch.inf)

    class Long(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9)

    model, inputs = tiny_sorted(), prompts()
    tools = {
        "logits_processor": LogitsProcessorList([Even()]),
        "stopping_criteria": StoppingCriteriaList([Long()]),
        "max_new_tokens": 20,
    }
    tokens = generate(model, exit_layer=depth, **inputs, **tools)
    assert torch.equal(tokens, submodel_tokens(model, depth, **inputs, **tools))

    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    embeds["attention_mask"] = inputs["attention_mask"]
    tokens = generate(model, exit_layer=depth, **embeds, max_new_tokens=6)
    assert torch.equal(tokens, submodel_tokens(model, depth, **embeds, max_new_tokens=6))


# Caches


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded_static": {"cache_implementation": "offloaded_static"},
}
if hasattr(cache_utils, "Fp8QuantizedLayer"):  # the older backends need a package each
    CACHES["quantized"] = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", CACHES)
def test_cache_kinds(kind, beams, depth):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_sorted(hidden_size=64).to(device)
    arguments = {key: value.to(device) for key, value in prompts().items()}
    arguments |= {**CACHES[kind], "num_beams": beams, "max_new_tokens": 12, "return_dict_in_generate": True}
    if kind == "static":
        arguments["disable_compile"] = True
    output = generate(model, exit_layer=depth, **arguments)
    expected = generate(reference_llama(model, depth).to(device), **arguments)
    assert torch.equal(output.sequences, expected.sequences)
    assert type(output.past_key_values) is type(expected.past_key_values)
    assert len(output.past_key_values.layers) == len(expected.past_key_values.layers) == depth


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cache_bytes(kind, depth):
    """Keys and values of the layers that ran, and no more."""
    model, arguments = tiny_sorted(), {**prompts((6, 4)), "max_new_tokens": 5, "min_new_tokens": 5}
    output = generate(
        model,
        exit_layer=depth,
        cache_implementation=kind,
        return_dict_in_generate=True,
        disable_compile=True,
        **arguments,
    )
    tensors = [t for layer in output.past_key_values.layers for t in (layer.keys, layer.values)]
    # keys and values, batch, 2 heads, all tokens but the newest, head size, float32
    assert sum(t.numel() * t.element_size() for t in tensors) == depth * 2 * 2 * 2 * (6 + 5 - 1) * 8 * 4


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", sorted({"past_key_values", CACHE_NAME}))
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chat_turn_with_the_returned_cache(kind, name, depth):
    """The cache of one turn, handed to the next: what a run from scratch and the sub-model generate."""
    model = tiny_sorted()
    arguments = {"max_new_tokens": 5, "return_dict_in_generate": True, "do_sample": False, "eos_token_id": []}
    question = prompts((5, 5))["input_ids"]
    turn = prompts((4, 4), seed=1)["input_ids"]

    def two_turns(model, **depth):
        given = {} if kind == "dynamic" else {name: StaticCache(config=model.config, max_cache_len=40)}
        first = model.generate(question, **given, **arguments, **depth)
        both = torch.cat([first.sequences, turn], dim=1)
        second = model.generate(both, **{name: first.past_key_values}, **arguments, **depth)
        return second, model.generate(both, **arguments, **depth)

    continued, afresh = two_turns(model, exit_layer=depth)
    expected, _ = two_turns(reference_llama(model, depth))
    assert torch.equal(continued.sequences, expected.sequences)
    assert torch.equal(continued.sequences, afresh.sequences)
    if kind == "dynamic":
        assert len(continued.past_key_values.layers) == depth


def test_returned_cache_continued_equals_one_run():
    model, inputs = tiny_sorted(), prompts((6, 3))
    arguments = {"exit_layer": 2, "return_dict_in_generate": True, "min_new_tokens": 4}
    first = model.generate(**inputs, **arguments, max_new_tokens=4)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)
    second = model.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values, **arguments, max_new_tokens=4
    )
    whole = model.generate(**inputs, **{**arguments, "min_new_tokens": 8}, max_new_tokens=8)
    assert torch.equal(second.sequences, whole.sequences)
    for mine, theirs in zip(second.past_key_values.layers, whole.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("depths", [(2, 4), (1, 2), (2, None), (4, 2, 4)], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "returned_static", "own_static", "own_dynamic"])
def test_shallow_cache_continued_deeper_is_an_error(kind, depths, name):
    """The upper layers lack all tokens or (`4, 2, 4`) only the later ones: an error, never a wrong answer."""
    model = tiny_sorted()
    arguments = {"max_new_tokens": 3, "min_new_tokens": 3, "return_dict_in_generate": True, "disable_compile": True}
    tokens, cache = prompts((5,))["input_ids"], None
    if kind.startswith("own"):
        static = kind == "own_static"
        cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
    for depth in depths[:-1]:
        given = {} if cache is None else {name: cache}
        if kind == "returned_static" and cache is None:
            given = {"cache_implementation": "static", "max_cache_len": 64}
        output = model.generate(tokens, **given, **arguments, exit_layer=depth)
        tokens, cache = torch.cat([output.sequences, tokens], dim=1), output.past_key_values
    calls = count_layer_calls(model)
    with pytest.raises(ValueError, match="cache.*exit_layer"):
        model.generate(tokens, **{name: cache}, **arguments, exit_layer=depths[-1])
    assert calls == []


def test_a_deep_cache_continues_shallower():
    """The lower layers of a full-depth prefix are the sub-model's own: a long prompt's cache serves every exit."""
    model, tokens = tiny_sorted(), prompts((9,))["input_ids"]
    cache = model(tokens[:, :-1], use_cache=True).past_key_values
    output = model.generate(tokens, past_key_values=cache, exit_layer=2, max_new_tokens=6)
    assert torch.equal(output, submodel_tokens(model, 2, input_ids=tokens, max_new_tokens=6))


# Streamers and pipelines


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("sample", [False, True])
def test_streamed_pieces(sample, depth, capsys):
    model, tokenizer, tokens = tiny_sorted(), tiny_tokenizer(), prompts((5,))["input_ids"]
    arguments = {"input_ids": tokens, "max_new_tokens": 10, "do_sample": sample}
    mine, theirs = Pieces(), Pieces()
    output = generate(model, exit_layer=depth, streamer=mine, **arguments)
    submodel_tokens(model, depth, streamer=theirs, **arguments)
    assert mine.pieces == theirs.pieces and mine.ended == theirs.ended == 1
    assert mine.pieces[0] == tokens.tolist() or mine.pieces[0] == tokens[0].tolist()
    assert sum(mine.pieces[1:], []) == output[0, 5:].tolist()

    generate(model, exit_layer=depth, streamer=TextStreamer(tokenizer, skip_prompt=True), **arguments)
    printed = capsys.readouterr().out
    submodel_tokens(model, depth, streamer=TextStreamer(tokenizer, skip_prompt=True), **arguments)
    assert printed == capsys.readouterr().out and printed

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**arguments, "do_sample": False, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == tokenizer.decode(model.generate(tokens, max_new_tokens=10, do_sample=False)[0, 5:])


CHAT = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "what is it?"}]]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("where", ["call", "constructor", "generation_config", "from_pretrained"])
def test_pipeline(where, depth, tmp_path, caplog):
    model, tokenizer = tiny_sorted(), tiny_tokenizer()
    arguments = {"max_new_tokens": 8, "do_sample": False, "batch_size": 2}
    texts = ["hello", "a longer prompt"]
    expected = pipeline("text-generation", model=reference_llama(model, depth), tokenizer=tokenizer)
    in_constructor, in_call = {}, {}
    if where == "call":
        in_call = {"exit_layer": depth}
    elif where == "constructor":
        in_constructor = {"exit_layer": depth}
    elif where == "generation_config":
        model.generation_config.exit_layer = depth
    else:
        model = SortedLlamaForCausalLM.from_pretrained(save_tiny(tmp_path, model), exit_layer=depth)
    calls = count_layer_calls(model)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, **in_constructor)
    assert "not supported" not in caplog.text
    for prompt in (texts, CHAT):
        assert pipe(prompt, **arguments, **in_call) == expected(prompt, **arguments)
    assert set(calls) == set(range(1, depth + 1))


# Assisted decoding


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("sample", [False, True])
def test_prompt_lookup(sample, depth):
    model = tiny_sorted()
    pattern = prompts((4,))["input_ids"]
    arguments = {"input_ids": pattern.repeat(1, 4), "max_new_tokens": 16, "do_sample": sample}
    tokens = generate(model, exit_layer=depth, prompt_lookup_num_tokens=3, **arguments)
    assert torch.equal(tokens, submodel_tokens(model, depth, prompt_lookup_num_tokens=3, **arguments))
    if not sample:
        assert torch.equal(tokens, submodel_tokens(model, depth, **arguments))


def assistant(kind):
    if kind == "plain":
        return tiny_llama(num_hidden_layers=2)
    model = tiny_sorted(exit_layer=2 if kind == "sorted_at_2" else None)
    if kind == "sorted_by_generation_config":
        model.generation_config.exit_layer = 1
    return model


@pytest.mark.parametrize(
    "kind, assistant_depth", [("plain", 2), ("sorted", 4), ("sorted_at_2", 2), ("sorted_by_generation_config", 1)]
)
def test_ordinary_assistant_model(kind, assistant_depth):
    """The assistant drafts at its own depth, and the tokens are full depth's."""
    model, draft = tiny_sorted(), assistant(kind)
    arguments = {**prompts((5,)), "max_new_tokens": 14}
    calls, draft_calls = count_layer_calls(model), count_layer_calls(draft)
    tokens = model.generate(**arguments, assistant_model=draft)
    assert torch.equal(tokens, submodel_tokens(model, 4, **arguments))
    assert set(calls) == {1, 2, 3, 4}
    assert set(draft_calls) == set(range(1, assistant_depth + 1))

    sampled = {**arguments, "do_sample": True}
    tokens = generate(model, assistant_model=draft, **sampled)
    assert torch.equal(tokens, submodel_tokens(model, 4, assistant_model=assistant(kind), **sampled))


@pytest.mark.parametrize("source", ["argument", "generation_config", "given_generation_config", "config"])
def test_an_assistant_model_beside_a_depth_is_refused(source):
    """transformers would hand the depth to the assistant, too."""
    model, arguments = (
        tiny_sorted(exit_layer=3 if source == "config" else None),
        {**prompts((5,)), "max_new_tokens": 4},
    )
    if source == "argument":
        arguments["exit_layer"] = 3
    elif source == "generation_config":
        model.generation_config.exit_layer = 3
    elif source == "given_generation_config":
        arguments = {**prompts((5,)), "generation_config": GenerationConfig(exit_layer=3, max_new_tokens=4)}
    calls = count_layer_calls(model)
    with pytest.raises(ValueError, match="`assistant_model` .*`exit_layer=3`.*`assistant_early_exit=k`"):
        model.generate(**arguments, assistant_model=tiny_llama(num_hidden_layers=2))
    assert calls == []


def test_one_depth_of_a_call_goes_before_drafts_of_a_generation_config():
    model, arguments = tiny_sorted(), {**prompts((5,)), "max_new_tokens": 8}
    model.generation_config.assistant_early_exit = 1
    assert torch.equal(model.generate(**arguments, exit_layer=2), submodel_tokens(model, 2, **arguments))


def test_a_sorted_model_drafts_for_a_plain_llama():
    target, draft = tiny_llama(seed=0), tiny_sorted(seed=0, exit_layer=2)
    arguments = {**prompts((5,)), "max_new_tokens": 14}
    draft_calls = count_layer_calls(draft)
    tokens = target.generate(**arguments, assistant_model=draft)
    assert torch.equal(tokens, target.generate(**arguments))
    assert set(draft_calls) == {1, 2}


# Where the depth comes from


def test_generation_config():
    model, inputs = tiny_sorted(), prompts()
    expected = {depth: submodel_tokens(model, depth, **inputs, max_new_tokens=8) for depth in DEPTHS}
    assert not torch.equal(expected[2], expected[4])

    given = GenerationConfig(exit_layer=2, max_new_tokens=8, eos_token_id=2, pad_token_id=0)
    assert torch.equal(model.generate(**inputs, generation_config=given), expected[2])
    assert given.exit_layer == 2  # the caller's object is left alone
    assert torch.equal(model.generate(**inputs, generation_config=given, exit_layer=1), expected[1])
    assert torch.equal(model.generate(**inputs, max_new_tokens=8), expected[4])

    model.generation_config.exit_layer = 2
    assert torch.equal(model.generate(**inputs, max_new_tokens=8), expected[2])
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, exit_layer=1), expected[1])
    partial = GenerationConfig(max_new_tokens=8)
    assert torch.equal(model.generate(**inputs, generation_config=partial), expected[2])


@pytest.mark.parametrize("edited", [True, False], ids=["models_own_edited", "replaced"])
def test_generation_config_file(tmp_path, edited):
    """Saved and reloaded, also where the model's own generation config, made from its config, was edited."""
    model, inputs = tiny_sorted(), {**prompts(), "max_new_tokens": 8}
    if edited:
        model.generation_config.exit_layer = 2
    else:
        model.generation_config = GenerationConfig(exit_layer=2, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(tmp_path)
    assert '"exit_layer": 2' in (tmp_path / "generation_config.json").read_text()
    loaded = SortedLlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.exit_layer == 2
    assert torch.equal(loaded.generate(**inputs), submodel_tokens(model, 2, **inputs))
    assert GenerationConfig.from_pretrained(tmp_path).exit_layer == 2


def test_from_pretrained_depth(tmp_path):
    model, inputs = tiny_sorted(), prompts()
    folder = save_tiny(tmp_path, model)
    loaded = SortedLlamaForCausalLM.from_pretrained(folder, exit_layer=2)
    assert torch.equal(
        loaded.generate(**inputs, max_new_tokens=8), submodel_tokens(model, 2, **inputs, max_new_tokens=8)
    )
    # it holds for every call, and a call may ask for another depth, deeper too
    assert torch.equal(loaded(**inputs).logits, reference_llama(model, 2)(**inputs).logits)
    assert torch.equal(
        loaded.generate(**inputs, max_new_tokens=8, exit_layer=4),
        submodel_tokens(model, 4, **inputs, max_new_tokens=8),
    )


def test_config_depth_is_overruled_by_generation_config_by_argument():
    model, inputs = tiny_sorted(exit_layer=1), {**prompts(), "max_new_tokens": 8}
    expected = {depth: submodel_tokens(model, depth, **inputs) for depth in DEPTHS}
    assert torch.equal(model.generate(**inputs), expected[1])
    model.generation_config.exit_layer = 2
    assert torch.equal(model.generate(**inputs), expected[2])
    assert torch.equal(model.generate(**inputs, exit_layer=4), expected[4])


@pytest.mark.parametrize("source", ["argument", "generation_config", "given_generation_config", "config"])
@pytest.mark.parametrize("value", [0, -1, 5, True, 2.0, float("nan"), "2", {"k": 1}], ids=repr)
def test_bad_depth(source, value):
    model, arguments = tiny_sorted(), {**prompts(), "max_new_tokens": 3}
    if source == "argument":
        arguments["exit_layer"] = value
    elif source == "given_generation_config":
        arguments["generation_config"] = GenerationConfig(exit_layer=value)
    elif source == "config":
        model.config.exit_layer = value
    else:
        model.generation_config.exit_layer = value
    calls = count_layer_calls(model)
    with pytest.raises(ValueError) as error:
        model.generate(**arguments)
    assert all(word in str(error.value) for word in ("`exit_layer`", repr(value), "1 to 4"))
    assert calls == []


def test_exits_of_a_loss_mean_nothing_in_generate():
    model = tiny_sorted()
    calls = count_layer_calls(model)
    with pytest.raises(ValueError, match="exit_layers"):
        model.generate(**prompts(), exit_layers=[1, 4], max_new_tokens=3)
    assert calls == []


def test_unknown_arguments_are_still_refused():
    with pytest.raises(ValueError, match="exit_layr"):
        tiny_sorted().generate(**prompts(), exit_layr=2, max_new_tokens=3)


def test_threads_at_different_depths():
    """Calls that overlap at every layer do not disturb each other."""
    model, inputs = tiny_sorted(exit_layers=[1, 2, 3, 4]), prompts()
    arguments = {**inputs, "max_new_tokens": 12, "min_new_tokens": 12, "return_dict_in_generate": True}
    expected = {depth: submodel_tokens(model, depth, **arguments).sequences for depth in (1, 2, 3, 4)}
    barrier = threading.Barrier(4, timeout=60)
    turn = threading.local()

    def meet(*_):
        # Every thread waits for the others before its first layers, so that the calls are under way together
        turn.calls = getattr(turn, "calls", 0) + 1
        if turn.calls <= 12:
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait()

    hook = model.model.layers[0].register_forward_pre_hook(meet)
    results = {}

    def run(depth):
        results[depth] = model.generate(**arguments, exit_layer=depth)

    threads = [threading.Thread(target=run, args=(depth,)) for depth in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert not barrier.broken
    for depth, tokens in expected.items():
        assert torch.equal(results[depth].sequences, tokens)
        assert len(results[depth].past_key_values.layers) == depth
    assert model.config.num_hidden_layers == 4


def test_compiled_generation_with_a_static_cache():
    """A loop with a compiled forward: what the sub-model generates, and no graph made twice for a depth."""
    torch._dynamo.reset()
    model = tiny_sorted()
    arguments = {**prompts(), "max_new_tokens": 8, "min_new_tokens": 8, "cache_implementation": "static"}
    expected = {depth: submodel_tokens(model, depth, **arguments, disable_compile=True) for depth in (1, 2)}
    counter = CompileCounter()
    eager = model.forward
    compiled = torch.compile(eager, fullgraph=True, backend=counter)

    def forward(input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, exit_layer=None, **kwargs):
        step = compiled if input_ids.shape[1] == 1 else eager  # as `generate` does on an accelerator
        return step(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            exit_layer=exit_layer,
            **kwargs,
        )

    model.forward = forward
    counts = []
    for depth in (1, 2, 1, 2):
        assert torch.equal(model.generate(**arguments, exit_layer=depth), expected[depth])
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[0] >= 1
    assert counts[1] == counts[2] == counts[3]


OVERRIDDEN = {
    "_prepare_generation_config": ["generation_config", "kwargs"],
    "_prepare_cache_for_generation": ["generation_config", "model_kwargs"],
    "_sample": ["input_ids", "logits_processor", "stopping_criteria", "generation_config"],
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_private_methods_exist(name):
    """A transformers that renames one of these leaves the override dead: this test says so before a user finds out."""
    assert name in vars(SortedGenerationMixin), f"the model no longer overrides {name}: update this test"
    theirs = getattr(GenerationMixin, name, None)
    assert theirs is not None, f"transformers dropped GenerationMixin.{name}: the override is dead code"
    parameters = inspect.signature(theirs).parameters
    missing = [argument for argument in OVERRIDDEN[name] if argument not in parameters]
    assert not missing, f"GenerationMixin.{name} no longer takes {missing}"
    assert list(parameters)[1 : 1 + len(OVERRIDDEN[name])] == OVERRIDDEN[name]  # passed by position, after `self`


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_private_methods_are_called(name, monkeypatch):
    """And `generate` still goes through them, with the arguments that the overrides read."""
    seen = []
    original = getattr(SortedLlamaForCausalLM, name)

    def spy(self, *args, **kwargs):
        seen.append(inspect.signature(getattr(GenerationMixin, name)).bind(self, *args, **kwargs).arguments)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SortedLlamaForCausalLM, name, spy)
    tiny_sorted().generate(**prompts((5,)), max_new_tokens=3, exit_layer=2)
    assert seen
    for argument in OVERRIDDEN[name]:
        assert argument in seen[0]
