"""
A vLLM server whose drafts come from the target's own first layers, against this package's own model.
"""

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from sorted_llama.modeling_sorted_llama.vllm_drafts import FirstLayers, FirstLayersProposer
from tests.serving_vllm.engines import (
    SEGMENTED,
    ask,
    cached_tokens,
    counters,
    expected_tokens,
    free_blocks,
    random_prompts,
    runner_of,
    scores,
    tokens_of,
)


# Weights with which an exit often says what full depth says
FIELDS = {"exit_layers": (1, 2, 4, 6), "initializer_range": 0.1}
DRAFTS = 3
OPTIONS = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 32}
every_kind_of_heads = pytest.mark.parametrize("drafting", SEGMENTED, indirect=True)


@pytest.fixture(scope="module")
def drafting(request, checkpoint, start):
    """An engine that drafts with 4 of 6 layers, and its model; exits that own weights, where a test wants them."""
    path, model = checkpoint(**FIELDS, exit_heads=getattr(request, "param", "shared"))
    # The same folder, written otherwise
    draft = {"method": "draft_model", "model": f"{path}/", "num_speculative_tokens": DRAFTS}
    fixed = {**OPTIONS, "speculative_config": draft, "hf_overrides": {"assistant_early_exit": 4}}
    return lambda **options: (start(path, **fixed, **options), model)


def counted(llm, requests, **options):
    """Answers, and by how much vLLM's counters of drafted tokens and of accepted ones grow."""
    names = ["vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"]
    before = [counters(llm)[name] for name in names]
    outputs = ask(llm, requests, **options)
    return outputs, *(counters(llm)[name] - past for name, past in zip(names, before))


@every_kind_of_heads
def test_drafts_change_nothing_and_are_accepted_as_generate_accepts_them(drafting):
    llm, model = drafting()
    requests = [(prompt, None) for prompt in random_prompts(16, longest=40)]
    outputs, drafted, accepted = counted(llm, requests, max_tokens=40)
    assert tokens_of(outputs) == expected_tokens(model, requests, max_tokens=40)
    expected = torch.zeros(2)
    for prompt, _ in requests:
        inputs = torch.tensor([prompt])
        found = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            assistant_early_exit=4,
            num_assistant_tokens=DRAFTS,
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        expected += torch.tensor([found.draft_statistics.drafted, found.draft_statistics.accepted])
    # vLLM also counts drafts for which a row has no room left
    assert accepted / drafted == pytest.approx((expected[1] / expected[0]).item(), abs=0.05)


@every_kind_of_heads
def test_chunks_and_prefixes_change_nothing(drafting):
    llm, model = drafting()
    requests = [(prompt, None) for prompt in random_prompts(12, longest=100, shared=80)]
    expected = expected_tokens(model, requests)
    for _ in range(2):
        outputs, drafted, accepted = counted(llm, requests)
        assert tokens_of(outputs) == expected and 0 <= accepted < drafted
    assert sum(output.num_cached_tokens for output in outputs) > 0


def test_log_probabilities_are_those_of_full_depth(drafting):
    llm, model = drafting()
    requests = [(prompt, None) for prompt in random_prompts(4, longest=30)]
    for (prompt, _), output in zip(requests, ask(llm, requests, logprobs=1)):
        row = list(output.outputs[0].token_ids)
        found = torch.tensor([step[token].logprob for token, step in zip(row, output.outputs[0].logprobs)])
        expected = scores(model, prompt + row, None)[len(prompt) - 1 :]
        torch.testing.assert_close(found, expected.gather(1, torch.tensor(row)[:, None])[:, 0], rtol=0, atol=1e-4)


def test_samples_come_again_with_their_seed(drafting):
    llm, _ = drafting()
    # In one piece each: on a CPU, vLLM ends with a prompt in chunks whose request has a seed
    requests = [(prompt, None) for prompt in random_prompts(6, longest=10)]
    sampled = {"temperature": 1.0, "max_tokens": 30}
    first = tokens_of(ask(llm, requests, seed=5, **sampled))
    assert tokens_of(ask(llm, requests, seed=5, **sampled)) == first
    assert tokens_of(ask(llm, requests, seed=6, **sampled)) != first


def test_samples_follow_the_law_of_full_depth(drafting):
    """Of the second token, the first one that is a draft, accepted or not."""
    llm, model = drafting()
    torch.manual_seed(0)  # in this process: the same samples each time
    prompt, count = [5, 40, 7], 1000
    (output,) = ask(llm, [(prompt, None)], n=count, temperature=0.7, max_tokens=4)
    found = torch.bincount(torch.tensor([sample.token_ids[1] for sample in output.outputs]), minlength=259) / count
    rows = torch.tensor([[*prompt, first] for first in range(259)])
    with torch.no_grad():
        firsts, seconds = (model(rows).logits[:, -2:] / 0.7).softmax(-1).unbind(1)
    expected = firsts[0] @ seconds
    likely = expected.topk(10).indices
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() < 4 * deviation)[likely].all()
    by_draft = (firsts[0] @ (model(rows, exit_layer=4).logits[:, -1] / 0.7).softmax(-1)).detach()
    assert not ((found - by_draft).abs() < 4 * deviation)[likely].all()  # the test would have seen it


def test_a_draft_has_no_parameters_no_attention_and_no_cache_of_its_own(drafting, checkpoint, start):
    llm, _ = drafting()
    runner = runner_of(llm)
    assert type(runner.drafter) is FirstLayersProposer and type(runner.drafter.model) is FirstLayers
    assert runner.drafter.model.target is runner.model and not list(runner.drafter.model.named_modules())[1:]
    assert not list(runner.drafter.model.parameters()) and not list(runner.drafter.model.buffers())
    assert len(llm.llm_engine.vllm_config.compilation_config.static_forward_context) == 6
    assert len(runner.kv_caches) == 6
    with_drafts = cached_tokens(llm)
    assert with_drafts == cached_tokens(start(checkpoint(**FIELDS)[0], **OPTIONS))


def test_a_small_cache_changes_nothing(drafting):
    llm, model = drafting(num_gpu_blocks_override=13)
    requests = [(prompt, None) for prompt in random_prompts(16, longest=40)]
    outputs, drafted, accepted = counted(llm, requests, max_tokens=60)
    assert tokens_of(outputs) == expected_tokens(model, requests, max_tokens=60) and 0 < accepted < drafted
    assert counters(llm)["vllm:num_preemptions"] > 0
    assert free_blocks(llm) == 12


def test_a_request_of_another_depth_is_refused(drafting):
    llm, model = drafting()
    with pytest.raises(VLLMValidationError, match="`exit_layer` must be 6, the only depth of this server.*, got 4"):
        ask(llm, [([5], 4)])
    assert tokens_of(ask(llm, [([5], 6)])) == expected_tokens(model, [([5], 6)])


def test_a_target_below_full_depth_drafts_too(checkpoint, start):
    path, model = checkpoint(**FIELDS)
    draft = {"method": "draft_model", "model": str(path), "num_speculative_tokens": DRAFTS}
    overrides = {"exit_layer": 4, "assistant_early_exit": 2}
    llm = start(path, **OPTIONS, speculative_config=draft, hf_overrides=overrides)
    requests = [(prompt, None) for prompt in random_prompts(8, longest=20)]
    outputs, drafted, _ = counted(llm, requests)
    assert tokens_of(outputs) == expected_tokens(model, [(prompt, 4) for prompt, _ in requests]) and drafted


def dynamo_counts(worker) -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["stats"])


def test_a_segment_is_compiled_once_for_drafts_and_their_check(drafting):
    llm, model = drafting(enforce_eager=False, distributed_executor_backend="mp")
    before = llm.collective_rpc(dynamo_counts)
    requests = [(prompt, None) for prompt in random_prompts(16, longest=100, shared=50)]
    outputs, drafted, accepted = counted(llm, requests)
    assert tokens_of(outputs) == expected_tokens(model, requests) and 0 < accepted < drafted
    assert llm.collective_rpc(dynamo_counts) == before
    assert before[0]["unique_graphs"] == 2


def test_two_processes_draft_through_an_exits_own_head(checkpoint, start, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # a core each, also where there is one NUMA node
    path, model = checkpoint(**FIELDS, exit_heads="separate", num_key_value_heads=2)
    draft = {"method": "draft_model", "model": str(path), "num_speculative_tokens": DRAFTS}
    options = {**OPTIONS, "tensor_parallel_size": 2, "hf_overrides": {"assistant_early_exit": 4}}
    llm = start(path, **options, speculative_config=draft)
    requests = [(prompt, None) for prompt in random_prompts(8, longest=40)]
    outputs, drafted, accepted = counted(llm, requests, max_tokens=24)
    assert tokens_of(outputs) == expected_tokens(model, requests, max_tokens=24) and 0 < accepted < drafted
