"""`generate(assistant_early_exit=k)` with all that comes along: outputs, streamers, adapters, files, pipelines."""

import contextlib
import itertools
import json
import threading
from types import SimpleNamespace

import peft
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    TextStreamer,
    pipeline,
)

from sorted_llama import SortedCache, SortedLlamaForCausalLM
from sorted_llama.modeling_sorted_llama import drafting_sorted_llama
from sorted_llama.modeling_sorted_llama.compat_sorted_llama import CACHE_NAME
from tests.modeling_sorted_llama.decoding import (
    MODELS,
    RETURN,
    ends,
    layer_calls,
    row_lengths,
    since_transformers_5_20,
)
from tests.tiny import Pieces, prompts, reference_llama, tiny_tokenizer


@pytest.fixture
def even_clock(monkeypatch):
    """Every cycle takes as long as any other: drafting pays, whatever else the machine does."""
    monkeypatch.setattr(drafting_sorted_llama, "time", SimpleNamespace(perf_counter=itertools.count().__next__))


# What plain decoding returns and streams


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("depth", [3, 4])
def test_drafting_returns_everything_that_plain_decoding_does(depth, kind):
    """Scores and logits token by token: those of plain decoding, and zeros behind a row's end."""
    model, inputs = MODELS[kind](), prompts()
    reference = reference_llama(model, depth)
    eos = ends(reference, inputs, (4, 9))
    arguments = {**inputs, **RETURN, "max_new_tokens": 14, "eos_token_id": eos, "repetition_penalty": 1.0}
    arguments |= {"output_scores": True, "output_logits": True, "suppress_tokens": [7]}
    expected = reference.generate(**arguments)
    output = model.generate(**arguments, exit_layer=depth, assistant_early_exit=1, num_assistant_tokens=4)
    assert torch.equal(output.sequences, expected.sequences)
    lengths = row_lengths(expected.sequences, 6, eos)
    assert min(lengths) < max(lengths)

    for name in ("scores", "logits"):
        assert len(output[name]) == len(expected[name]) == max(lengths)
        for step, (mine, theirs) in enumerate(zip(output[name], expected[name], strict=True)):
            assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
            for row, length in enumerate(lengths):
                if step < length:
                    torch.testing.assert_close(mine[row], theirs[row], atol=1e-4, rtol=1e-4)
                else:
                    assert not mine[row].any(), (name, step, row)


def test_transition_scores_of_drafting():
    model, arguments = MODELS["mixed"](), {**prompts(), **RETURN, "output_scores": True, "max_new_tokens": 12}
    output = model.generate(**arguments, assistant_early_exit=1, num_assistant_tokens=3)
    expected = reference_llama(model, 4).generate(**arguments)
    mine = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    theirs = model.compute_transition_scores(expected.sequences, expected.scores, normalize_logits=True)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("eos", [True, False])
def test_a_cache_that_drafting_returned_goes_on_in_every_mode(eos, kind):
    """All tokens but the newest are in it, and each mode goes on from there as if it had run all along."""
    model, inputs = MODELS[kind](), prompts((5, 5))
    reference = reference_llama(model, 4)
    arguments = {"eos_token_id": ends(reference, inputs, (4, 9)) if eos else [], "max_new_tokens": 12, **RETURN}
    arguments |= {"assistant_early_exit": 2, "num_assistant_tokens": 3}
    turn = prompts((4, 4), seed=1)["input_ids"]
    for mode in ({}, {"assistant_early_exit": 1}, {"exit_threshold": 2.0}, {"exit_layer": [4, 4]}):
        first = model.generate(**inputs, **arguments)
        cache = first[CACHE_NAME]
        assert isinstance(cache, SortedCache)
        assert cache.lengths == (first.sequences.shape[1] - 1,) * 2 and cache.get_seq_length() == cache.lengths[0]
        both = torch.cat([first.sequences, turn], dim=1)
        both_mask = torch.ones_like(both)
        continued = model.generate(
            both, attention_mask=both_mask, **{CACHE_NAME: cache}, **mode, max_new_tokens=8, eos_token_id=[]
        )
        afresh = reference.generate(both, attention_mask=both_mask, max_new_tokens=8, eos_token_id=[])
        assert torch.equal(continued, afresh), mode


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("lengths", [(5,), (6, 4, 1)], ids=str)
def test_drafting_streams_what_plain_decoding_streams(lengths, kind, capsys):
    """What is put, in what order, token by token; ended rows put padding."""
    model, tokenizer, inputs = MODELS[kind](), tiny_tokenizer(), prompts(lengths)
    reference = reference_llama(model, 4)
    arguments = {**inputs, "max_new_tokens": 17, "eos_token_id": ends(reference, inputs, (4, 9, 13))}
    drafting = {"assistant_early_exit": 1, "num_assistant_tokens": 3}
    mine, theirs = Pieces(), Pieces()
    model.generate(**arguments, **drafting, streamer=mine)
    reference.generate(**arguments, streamer=theirs)
    assert mine.pieces == theirs.pieces and mine.ended == theirs.ended == 1
    if len(lengths) == 1:
        arguments["eos_token_id"] = []
        model.generate(**arguments, **drafting, streamer=TextStreamer(tokenizer, skip_prompt=True))
        printed = capsys.readouterr().out
        reference.generate(**arguments, streamer=TextStreamer(tokenizer, skip_prompt=True))
        assert printed == capsys.readouterr().out and printed


def test_streamer_that_sees_the_exits():
    """`put_exits` comes before the token it tells of."""

    class Exits(Pieces):
        def put_exits(self, depths, confidences):
            self.pieces.append(("exits", list(depths), confidences))

    model, inputs = MODELS["mixed"](), prompts()
    eos = ends(reference_llama(model, 4), inputs, (4, 9))
    streamer = Exits()
    output = model.generate(
        **inputs,
        **RETURN,
        assistant_early_exit=1,
        num_assistant_tokens=3,
        eos_token_id=eos,
        max_new_tokens=14,
        streamer=streamer,
    )
    used = output.exit_layers_used
    assert set(used.unique().tolist()) == {0, 1, 4}
    assert (used > 0).sum(1).tolist() == row_lengths(output.sequences, 6, eos)
    expected = [inputs["input_ids"].tolist()]
    for step in range(used.shape[1]):
        expected += [("exits", used[:, step].tolist(), None), output.sequences[:, 6 + step].tolist()]
    assert streamer.pieces == expected


@pytest.mark.parametrize("kind", MODELS)
def test_drafting_samples_several_sequences(kind):
    """Sampling from one token at most is greedy decoding, whatever is drawn; without that limit rows differ."""
    model, arguments = MODELS[kind](), {**prompts(), "max_new_tokens": 9, "do_sample": True, "num_return_sequences": 3}
    greedy = reference_llama(model, 4).generate(**prompts(), max_new_tokens=9)
    torch.manual_seed(0)
    tokens = model.generate(**arguments, top_k=1, assistant_early_exit=1, num_assistant_tokens=3)
    assert torch.equal(tokens, greedy.repeat_interleave(3, dim=0))
    tokens = model.generate(**arguments, temperature=2.0, assistant_early_exit=1, num_assistant_tokens=3)
    assert tokens.shape == (9, 15) and len(set(map(tuple, tokens.tolist()))) == 9
    assert torch.equal(tokens[:, :6], prompts()["input_ids"].repeat_interleave(3, dim=0))


# What it composes with


@pytest.mark.parametrize("length", [3, "auto"])
@pytest.mark.parametrize("kind", MODELS)
def test_drafting_takes_the_prompt_in_every_way(kind, length):
    model, inputs = MODELS[kind](), prompts()
    reference = reference_llama(model, 4)
    drafting = {"assistant_early_exit": 2, "num_assistant_tokens": length, "max_new_tokens": 14}
    expected = reference.generate(**inputs, max_new_tokens=14)
    for chunk in (1, 2, 4, 100):
        assert torch.equal(model.generate(**inputs, **drafting, prefill_chunk_size=chunk), expected)
    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    embeds["attention_mask"] = inputs["attention_mask"]
    assert torch.equal(model.generate(**embeds, **drafting), expected[:, 6:])
    output = model.generate(**embeds, **drafting, **RETURN, output_scores=True)
    assert torch.equal(output.sequences, expected[:, 6:]) and len(output.scores) == 14
    assert torch.equal(model.generate(**{**inputs, **embeds}, **drafting), expected)
    static = model.generate(**inputs, **drafting, cache_implementation="static", **RETURN)
    assert torch.equal(static.sequences, expected)
    ample = model.generate(**inputs, **drafting, **{CACHE_NAME: SortedCache(max_cache_len=300)}, **RETURN)
    assert torch.equal(ample.sequences, expected) and ample[CACHE_NAME].lengths == (expected.shape[1] - 1,) * 3


@pytest.mark.parametrize("length", [3, "auto"])
def test_drafting_with_a_lora_adapter(length):
    """Through the wrapped model, the adapter at work in drafts and verification alike."""
    model, arguments = MODELS["mixed"](), {**prompts(), "max_new_tokens": 16}
    without = model.generate(**arguments)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, config).eval()
    calls = layer_calls(model)
    output = wrapped.generate(**arguments, assistant_early_exit=1, num_assistant_tokens=length, **RETURN)
    assert len([layer for layer, _ in calls if layer == 1]) > len([layer for layer, _ in calls if layer == 4])
    assert output.draft_statistics.drafted > 0
    expected = reference_llama(wrapped.merge_and_unload(), 4).generate(**arguments)
    assert torch.equal(output.sequences, expected) and not torch.equal(expected, without)


def test_drafting_with_a_compiled_layer():
    torch._dynamo.reset()
    model, arguments = MODELS["accepting"](), {**prompts((5,)), "max_new_tokens": 5}
    expected = reference_llama(model, 4).generate(**arguments)
    counter = CompileCounter()
    model.model.layers[3].compile(backend=counter)
    output = model.generate(**arguments, assistant_early_exit=1, num_assistant_tokens=3, **RETURN)
    torch._dynamo.reset()
    assert torch.equal(output.sequences, expected) and output.draft_statistics.accepted > 0
    assert counter.frame_count > 0


@pytest.mark.parametrize("kind", MODELS)
def test_drafting_in_bfloat16(kind):
    """Rounding of blocks may part the tokens from plain decoding's; each is still full depth's choice, within it."""
    model = MODELS[kind]().to(torch.bfloat16)
    output = model.generate(
        **prompts(), **RETURN, output_scores=True, max_new_tokens=16, assistant_early_exit=1, num_assistant_tokens=3
    )
    assert output.sequences.shape == (3, 22) and output.scores[0].dtype == torch.float32
    mask = torch.nn.functional.pad(prompts()["attention_mask"], (0, 16), value=1)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = reference_llama(model, 4)(output.sequences, attention_mask=mask, position_ids=positions).logits
    logits = logits[:, 5:-1].float()
    chosen = logits.gather(2, output.sequences[:, 6:, None]).squeeze(2)
    assert (logits.amax(-1) - chosen).max() < 0.05 * logits.abs().max()
    scores = torch.stack(output.scores, dim=1)
    assert (scores - logits).abs().max() < 0.05 * logits.abs().max()


def test_drafting_with_quantized_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    model, arguments = MODELS["mixed"](), {**prompts(), "max_new_tokens": 16}
    unquantized = model(**prompts()).logits
    model.save_pretrained(tmp_path)
    model = SortedLlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
    )
    assert not torch.equal(model(**prompts()).logits, unquantized)
    expected = model.generate(**arguments)
    output = model.generate(**arguments, assistant_early_exit=1, num_assistant_tokens=3, **RETURN)
    assert torch.equal(output.sequences, expected) and output.draft_statistics.accepted > 0


@pytest.mark.parametrize("length", ["auto", 2])
@pytest.mark.parametrize("edited", [True, False], ids=["models_own_edited", "replaced"])
def test_drafting_from_a_generation_config_file(tmp_path, even_clock, edited, length):
    """Saved and reloaded, a model drafts without being asked; a call may ask otherwise."""
    model, inputs = MODELS["accepting"](), {**prompts(), "max_new_tokens": 64}
    if not edited:
        model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.generation_config.assistant_early_exit = 2
    model.generation_config.num_assistant_tokens = length
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["assistant_early_exit"] == 2 and saved["num_assistant_tokens"] == length
    loaded = SortedLlamaForCausalLM.from_pretrained(tmp_path)
    output = loaded.generate(**inputs, **RETURN)
    assert torch.equal(output.sequences, reference_llama(model, 4).generate(**inputs_of(inputs)))
    assert set(output.draft_statistics.exit_layers) == {2}
    if length == 2:
        assert output.draft_statistics.cycles == 1 + 63 // 3
    assert set(loaded.generate(**inputs, **RETURN, assistant_early_exit=1).draft_statistics.exit_layers) == {1}
    # the calls leave it as it was
    assert loaded.generation_config.assistant_early_exit == 2
    assert loaded.generation_config.num_assistant_tokens == length


def inputs_of(arguments):
    """For a reference that must not draft, whatever its generation config says."""
    return {**arguments, "generation_config": GenerationConfig(eos_token_id=2, pad_token_id=0)}


@pytest.mark.parametrize("length", [3, "auto"])
@pytest.mark.parametrize("where", ["call", pytest.param("constructor", marks=since_transformers_5_20)])
def test_drafting_in_a_pipeline(even_clock, where, length):
    model, tokenizer = MODELS["accepting"](), tiny_tokenizer()
    arguments = {"max_new_tokens": 64, "do_sample": False, "batch_size": 2}
    texts = ["hello", "a longer prompt"]
    expected = pipeline("text-generation", model=reference_llama(model, 4), tokenizer=tokenizer)(texts, **arguments)
    drafting = {"assistant_early_exit": 2, "num_assistant_tokens": length}
    in_constructor, in_call = (drafting, {}) if where == "constructor" else ({}, drafting)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, **in_constructor)
    calls = layer_calls(model)
    assert pipe(texts, **arguments, **in_call) == expected
    layers = [layer for layer, _ in calls]
    assert layers.count(1) == layers.count(2) > layers.count(3) == layers.count(4)


def test_drafting_beside_other_modes_in_threads():
    """Three calls that overlap do not disturb each other."""
    model, inputs = MODELS["mixed"](), {**prompts(), "max_new_tokens": 14, "min_new_tokens": 14, **RETURN}
    modes = {
        "drafts": {"assistant_early_exit": 1, "num_assistant_tokens": 3},
        "confidence": {"exit_threshold": 0.3},
        "fixed": {"exit_layer": 2, "output_hidden_states": True},
    }
    expected = {name: model.generate(**inputs, **mode) for name, mode in modes.items()}
    plain = reference_llama(model, 4).generate(**inputs).sequences
    barrier, turn = threading.Barrier(3, timeout=60), threading.local()

    def meet(*_):
        turn.calls = getattr(turn, "calls", 0) + 1
        if turn.calls <= 14:
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait()

    hook = model.model.layers[0].register_forward_pre_hook(meet)
    results = {}

    def run(name):
        results[name] = model.generate(**inputs, **modes[name])

    threads = [threading.Thread(target=run, args=(name,)) for name in modes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert not barrier.broken and set(results) == set(modes)
    for name, output in results.items():
        assert torch.equal(output.sequences, expected[name].sequences), name
        for mine, theirs in zip(output.hidden_states or (), expected[name].hidden_states or (), strict=True):
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b)
    assert torch.equal(results["drafts"].sequences, plain)
    assert results["drafts"].draft_statistics == expected["drafts"].draft_statistics
