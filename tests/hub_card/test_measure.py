"""What is measured at the exits, against transformers' own Llama of as many layers."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from sorted_llama.hub_card import measure
from sorted_llama.hub_card.cost import cost_of_exit
from sorted_llama.hub_card.tasks import as_text
from tests.tiny import reference_llama, tiny_sorted, tiny_tokenizer


EXITS = [1, 2, 4]
ROWS = {
    "text": [{"prompt": f"say {i}:", "completion": f" {i}{i}"} for i in range(5)],
    "chat": [
        {
            "prompt": [{"role": "user", "content": f"say {i}"}],
            "completion": [{"role": "assistant", "content": f"{i}{i}"}],
        }
        for i in range(5)
    ],
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("tile", [5, 2**26])
def test_exits_read_and_answer_as_llamas_of_their_depth(kind, tile, monkeypatch):
    monkeypatch.setattr(measure, "_LOGITS", tile * 259)
    model, tokenizer = tiny_sorted(initializer_range=0.1), tiny_tokenizer()
    rows = as_text(ROWS[kind], tokenizer)
    read = measure.teacher_forced(model, tokenizer, rows, EXITS, batch_size=2)
    greedy, losses, confidences = {}, {}, {}
    for k in EXITS:
        reference, expected = reference_llama(model, k), []
        greedy[k], losses[k], confidences[k] = [], [], []
        for row in rows:
            prompt, completion = (
                torch.tensor(tokenizer(row[part])["input_ids"])[None] for part in ("prompt", "completion")
            )
            logits = reference(torch.cat([prompt, completion], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
            losses[k] += cross_entropy(logits, completion[0], reduction="none").tolist()
            greedy[k] += logits.argmax(-1).tolist()
            confidences[k] += logits.softmax(-1).amax(-1).tolist()
            tokens = reference.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
            expected.append(tokenizer.decode(tokens, skip_special_tokens=True))
        prompts = [row["prompt"] for row in rows]
        assert measure.answers(model, tokenizer, prompts, batch_size=2, exit_layer=k) == expected
    # The rows are read in another order
    for i, k in enumerate(EXITS):
        assert sorted(read.losses[i].tolist()) == pytest.approx(sorted(losses[k]), rel=1e-4)
        assert sorted(read.confidences[i].tolist()) == pytest.approx(sorted(confidences[k]), rel=1e-4)
        assert read.agrees[i].sum() == sum(a == b for a, b in zip(greedy[k], greedy[4], strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cost_of_an_exit_is_that_of_its_sub_model(tied, dtype):
    model = tiny_sorted(tie_word_embeddings=tied).to(dtype)
    for k in EXITS:
        llama = model.extract_submodel(k)
        cost = cost_of_exit(model, k)
        assert cost.parameters == sum(p.numel() for p in llama.parameters())
        outputs = llama(torch.arange(3, 13)[None], use_cache=True)
        cache = outputs.past_key_values if "past_key_values" in outputs else outputs.cache
        kept = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        assert cost.kv_bytes == kept / 10


@pytest.mark.parametrize("k", EXITS)
def test_the_flops_of_a_token_are_those_that_torch_counts(k):
    """One token after 63: matrix products, and attention's, of the extracted sub-model."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_sorted(attn_implementation="eager")
    llama = model.extract_submodel(k)
    ids = torch.randint(3, 259, (1, 64))
    outputs = llama(ids[:, :63], use_cache=True)
    name = "past_key_values" if "past_key_values" in outputs else "cache"
    with FlopCounterMode(display=False) as counter:
        llama(ids[:, 63:], **{name: outputs[name]})
    # The rotary embedding's product is counted by torch, and not by us
    counted, rotary = counter.get_total_flops(), 2 * (model.config.head_dim // 2)
    assert counted == pytest.approx(cost_of_exit(model, k, context=64).flops, abs=rotary)


def test_all_settings_are_timed():
    model, tokenizer = tiny_sorted(), tiny_tokenizer()
    settings = {"low": {"exit_layer": 1}, "sure": {"exit_threshold": 0.5}}
    speeds = measure.decoding_speeds(model, tokenizer, ["one", "two"], settings, max_new_tokens=3, runs=2)
    assert list(speeds) == ["low", "sure"]
    assert all(0 < s.median <= s.best for s in speeds.values())
