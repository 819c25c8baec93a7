"""
One vLLM server, a depth for every request, against this package's own model at that depth.
"""

import itertools
import shutil

import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import StructuredOutputsParams

from sorted_llama.hub_card.extract import extract
from sorted_llama.modeling_sorted_llama.vllm_scheduler import AsyncDepthScheduler, DepthScheduler
from tests.serving_vllm.engines import (
    PER_REQUEST,
    SEGMENTED,
    ask,
    counters,
    expected_tokens,
    free_blocks,
    quantize,
    random_prompts,
    runner_of,
    sampling,
    scheduler_of,
    scores,
    tokens_of,
)
from tests.tiny import tiny_tokenizer


EXITS = [2, 3, 6]  # segments of 2, 1 and 3 layers
BLOCKS = 48  # of 32 tokens and one layer each
# Chunks shorter than a prompt, and memory for one or two long requests of full depth
SMALL = {
    "additional_config": PER_REQUEST,
    "max_model_len": 160,
    "max_num_seqs": 24,
    "max_num_batched_tokens": 64,
    "block_size": 32,
    "num_gpu_blocks_override": BLOCKS + 1,  # vLLM keeps one
    "skip_tokenizer_init": False,
}
every_kind_of_heads = pytest.mark.parametrize("server", SEGMENTED, indirect=True)


@pytest.fixture(scope="module")
def server(request, checkpoint, start):
    """An engine and its model; exits that own weights, where a test wants them."""
    path, model = checkpoint(exit_layers=EXITS, exit_heads=getattr(request, "param", "shared"))
    return lambda **options: (start(path, **{**SMALL, **options}), model)


def mixed(prompts) -> list:
    """Requests of all depths, and of none, which is full depth."""
    return list(zip(prompts, itertools.cycle([6, 2, None, 3, 2])))


def in_steps(llm, requests, then=None) -> dict[str, list[int]]:
    """
    Run an engine step by step until it has nothing to do; `then(number of the step)` may add and abort requests.
    Returns the tokens of those that came to their end, by name.
    """
    engine, ended = llm.llm_engine, {}
    for name, (prompt, exit_layer, max_tokens) in requests.items():
        engine.add_request(name, {"prompt_token_ids": prompt}, sampling(exit_layer, max_tokens=max_tokens))
    for step in itertools.count(1):
        if not engine.has_unfinished_requests():
            return ended
        ended.update({o.request_id: list(o.outputs[0].token_ids) for o in engine.step() if o.finished})
        if then is not None:
            then(step, ended)


@every_kind_of_heads
def test_a_request_of_a_mixed_batch_is_its_exit(server):
    llm, model = server()
    requests = mixed(random_prompts(20, longest=24))
    assert tokens_of(ask(llm, requests)) == expected_tokens(model, requests)


@every_kind_of_heads
def test_log_probabilities_are_those_of_the_exit(server):
    llm, model = server()
    requests = mixed([[5], *random_prompts(6, longest=90)])  # some prompts are computed in chunks
    for (prompt, exit_layer), output in zip(requests, ask(llm, requests, logprobs=3, prompt_logprobs=2)):
        row = prompt + list(output.outputs[0].token_ids)
        expected = scores(model, row, exit_layer)
        steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        assert output.prompt_logprobs[0] is None and len(steps) == len(expected)
        for token, found, of_token in zip(row[1:], steps, expected):
            assert token in found
            best = of_token.topk(2)
            assert set(best.indices.tolist()) <= found.keys()
            found_scores = torch.tensor([entry.logprob for entry in found.values()])
            torch.testing.assert_close(found_scores, of_token[list(found)], rtol=0, atol=1e-4)


@every_kind_of_heads
def test_prefixes_are_shared_across_depths_and_computed_in_chunks(server):
    llm, model = server()
    requests = mixed(random_prompts(15, longest=100, shared=80))
    expected = expected_tokens(model, requests)
    for _ in range(2):
        outputs = ask(llm, requests)
        assert tokens_of(outputs) == expected
    assert sum(output.num_cached_tokens for output in outputs) > 0


@every_kind_of_heads
def test_requests_that_are_preempted_go_on_at_their_depth(server):
    llm, model = server()
    requests = mixed(random_prompts(20, longest=40, shared=33))
    before = counters(llm)["vllm:num_preemptions"]
    assert tokens_of(ask(llm, requests, max_tokens=60)) == expected_tokens(model, requests, max_tokens=60)
    assert counters(llm)["vllm:num_preemptions"] > before
    assert free_blocks(llm) == BLOCKS


def test_a_request_hits_blocks_of_its_depth_and_of_deeper_ones(server):
    llm, model = server()
    first, second = random_prompts(2, longest=1)[0] * 70, [9, 8] * 35  # two blocks, and a rest
    longer = first[:64] + [7] * 70

    def cached(prompt, exit_layer):
        output = ask(llm, [(prompt, exit_layer)])
        assert tokens_of(output) == expected_tokens(model, [(prompt, exit_layer)])
        return output[0].num_cached_tokens

    assert [cached(first, 6), cached(first, 2), cached(first, 3), cached(first, None)] == [0, 64, 64, 64]
    assert [cached(second, 2), cached(second, 3), cached(second, 2)] == [0, 0, 64]
    assert [cached(second, 6), cached(second, 3), cached(second, 6)] == [0, 64, 64]
    # Of a prefix that shallow requests know further than deep ones, a deep one has what is there in all layers
    assert [cached(longer, 2), cached(longer, 6), cached(longer, 3), cached(longer, 6)] == [64, 64, 128, 128]


def test_shallow_requests_take_memory_for_the_layers_that_they_run(server):
    """A block of memory is of 32 tokens and one layer here, and these requests need one a layer."""
    llm, model = server()
    most = {}
    for exit_layer in (2, 3, 6):
        requests = {str(i): ([5 + i, *[4] * 20], exit_layer, 12) for i in range(24)}
        at_once = []

        def watch(*_, at_once=at_once):
            free = free_blocks(llm)
            at_once.append((len(scheduler_of(llm).running), BLOCKS - free))

        before = counters(llm)["vllm:num_preemptions"]
        ended = in_steps(llm, requests, watch)
        expected = expected_tokens(model, [request[:2] for request in requests.values()])
        assert [ended[name] for name in requests] == expected
        assert counters(llm)["vllm:num_preemptions"] == before
        most[exit_layer] = max(at_once)
        llm.reset_prefix_cache()
    assert most == {2: (24, 48), 3: (16, 48), 6: (8, 48)}


def test_aborted_requests_leave_nothing_behind(server):
    llm, model = server()
    requests = {str(i): (*request, 40) for i, request in enumerate(mixed(random_prompts(20, longest=70)))}
    aborted = [name for name in requests if int(name) % 3 == 0]

    def abort(step, ended):
        # Some wait, some are in the middle of their prompts, some of their answers
        if step in (2, 5, 9, 14):
            llm.llm_engine.abort_request(aborted[: step // 2])

    ended = in_steps(llm, requests, abort)
    kept = [name for name in requests if name not in aborted]
    assert sorted(ended) == sorted(kept)
    assert [ended[name] for name in kept] == expected_tokens(model, [requests[name][:2] for name in kept], 40)
    assert free_blocks(llm) == BLOCKS
    assert scheduler_of(llm).requests == {}
    assert not scheduler_of(llm).running and not scheduler_of(llm).waiting
    for manager in scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers:
        assert not any(manager.req_to_blocks.values())
    ask(llm, [([5], 2)])  # with the next step the runner hears of it
    assert len(runner_of(llm).requests) == 1


@pytest.mark.parametrize("others, depth, steps", [(6, 2, 6), (2, 6, 24)])
def test_no_depth_waits_for_all_of_another(server, others, depth, steps):
    """
    A request of 5 tokens among many that do not end: a shallow one takes part in every step, a deep one in every
    fourth at least, since three steps of 2 layers cost as much as one of 6.
    """
    llm, _ = server()
    ended_at = {}

    def then(step, ended):
        if step == 4:
            llm.llm_engine.add_request("late", {"prompt_token_ids": [7, 8]}, sampling(depth, max_tokens=5))
        if "late" in ended:
            ended_at.setdefault("late", step)
            llm.llm_engine.abort_request([str(i) for i in range(4)])

    assert list(in_steps(llm, {str(i): ([5 + i], others, 120) for i in range(4)}, then)) == ["late"]
    assert ended_at["late"] - 4 <= steps


def test_deep_requests_go_on_while_shallow_ones_come_and_go(server):
    llm, model = server()
    added = itertools.count()

    def then(step, ended):
        if step < 60 and step % 2 == 0:
            name = f"shallow {next(added)}"
            llm.llm_engine.add_request(name, {"prompt_token_ids": [5, step]}, sampling(2, max_tokens=6))
        steps.setdefault("deep", step) if "deep" in ended else None

    steps = {}
    ended = in_steps(llm, {"deep": ([9, 9, 9], 6, 12)}, then)
    assert ended["deep"] == expected_tokens(model, [([9, 9, 9], 6)])[0]
    assert steps["deep"] <= 50 and len(ended) == 30


def test_samples_of_a_request_are_those_of_its_exit_and_seed(server):
    llm, _ = server()
    random = {"temperature": 1.0, "seed": 7, "max_tokens": 20}
    prompt = [5, 40, 7]
    rows = {}
    for exit_layer, output in zip((2, 3, 6), ask(llm, [(prompt, 2), (prompt, 3), (prompt, 6)], n=3, **random)):
        rows[exit_layer] = [list(sample.token_ids) for sample in output.outputs]
        # vLLM's samples of a request have seeds of their own, one after another; here each has the engine for itself
        alone = [ask(llm, [(prompt, exit_layer)], **{**random, "seed": 7 + i}) for i in range(3)]
        assert rows[exit_layer] == [tokens_of(output)[0] for output in alone]
    assert len({tuple(row) for samples in rows.values() for row in samples}) == 9


def test_structured_outputs_are_what_the_exit_likes_best_of_the_allowed(server):
    llm, model = server()
    tokenizer, choices = tiny_tokenizer(), ["abc", "xyz", "mno"]
    firsts = torch.tensor([tokenizer.encode(choice)[0] for choice in choices])
    free = mixed(random_prompts(8, longest=10))
    prompts = random_prompts(9, longest=12)
    bound = list(zip(prompts, itertools.cycle([6, 2, 3])))
    params = [sampling(exit_layer) for _, exit_layer in free]
    params += [
        sampling(exit_layer, structured_outputs=StructuredOutputsParams(choice=choices), ignore_eos=False)
        for _, exit_layer in bound
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in free + bound], params, use_tqdm=False)
    assert tokens_of(outputs[: len(free)]) == expected_tokens(model, free)
    expected = [choices[scores(model, [*p, 0], k)[-1, firsts].argmax()] for p, k in bound]
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in tokens_of(outputs[len(free) :])] == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("asked", [1, 0, -2, 7, "2", "full", True, 2.0, [2]], ids=repr)
def test_another_depth_is_refused_with_those_that_there_are(server, asked):
    llm, model = server()
    with pytest.raises(VLLMValidationError) as refused:
        ask(llm, [([5], 2), ([5], asked)])
    assert str(refused.value) == f"`exit_layer` must be one of 2, 3, 6, got {asked!r}."
    assert not llm.llm_engine.has_unfinished_requests()
    assert tokens_of(ask(llm, [([5], 2)])) == expected_tokens(model, [([5], 2)])


def test_no_depth_and_none_are_full_depth(server):
    llm, model = server()
    params = sampling()
    params.extra_args = {"exit_layer": None}
    outputs = llm.generate([{"prompt_token_ids": [5, 6]}] * 2, [params, sampling()], use_tqdm=False)
    assert tokens_of(outputs) == expected_tokens(model, [([5, 6], 6)]) * 2


class _NoStream:
    """Of a device that the CPU is not."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, *args):
        pass

    record = synchronize = wait_stream


def test_a_step_may_be_scheduled_before_the_last_one_has_ended(server, monkeypatch):
    """
    vLLM's asynchronous scheduling, which it turns off on a CPU: the runner hands tokens from one step to the next
    itself, and the scheduler plans with some that it does not know yet.
    """
    platform = type(current_platform)
    check = platform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(platform, "check_and_update_config", classmethod(check_and_update_config))
    monkeypatch.setattr(torch.cuda, "Stream", _NoStream)
    monkeypatch.setattr(torch.cuda, "Event", _NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", _NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    llm, model = server(async_scheduling=True)
    assert type(scheduler_of(llm)) is AsyncDepthScheduler
    requests = mixed(random_prompts(20, longest=40, shared=33))
    before = counters(llm)["vllm:num_preemptions"]
    for _ in range(2):
        assert tokens_of(ask(llm, requests, max_tokens=60)) == expected_tokens(model, requests, max_tokens=60)
    assert counters(llm)["vllm:num_preemptions"] > before
    assert free_blocks(llm) == BLOCKS and scheduler_of(llm).requests == {}


def test_a_scheduler_is_synchronous_where_the_server_is(server):
    llm, _ = server(async_scheduling=False)
    assert type(scheduler_of(llm)) is DepthScheduler


@pytest.mark.parametrize("exit_layer", [2, 4])
def test_the_configs_depth_is_that_of_a_request_without_one(start, checkpoint, exit_layer):
    """Also one that was not trained: it is among the depths of the server then."""
    path, model = checkpoint(exit_layers=[2, 5], exit_layer=exit_layer)
    llm = start(path, additional_config=PER_REQUEST)
    depths = sorted({2, 5, exit_layer})
    requests = list(zip(random_prompts(12, longest=20), itertools.cycle([None, *depths])))
    expected = expected_tokens(model, [(prompt, k or exit_layer) for prompt, k in requests])
    assert tokens_of(ask(llm, requests)) == expected
    with pytest.raises(VLLMValidationError, match=f"must be one of {', '.join(map(str, depths))}, got 3"):
        ask(llm, [([5], 3)])


def test_an_exit_of_a_quantized_checkpoint_is_the_extracted_llama(start, checkpoint, tmp_path):
    path, _ = checkpoint(exit_layers=EXITS)
    shutil.copytree(path, tmp_path / "quantized")
    quantize(tmp_path / "quantized")
    requests = list(zip(random_prompts(8, longest=12), itertools.cycle([6, 2, 3, 2])))
    options = {"dtype": "bfloat16", "max_num_seqs": 8}
    found = tokens_of(ask(start(tmp_path / "quantized", additional_config=PER_REQUEST, **options), requests))
    for exit_layer in (2, 6):
        plain = start(extract(tmp_path / "quantized", exit_layer, tmp_path / f"plain_{exit_layer}"), **options)
        expected = [tokens_of(ask(plain, [(p, None)]))[0] if k == exit_layer else None for p, k in requests]
        assert [row if k == exit_layer else None for row, (_, k) in zip(found, requests)] == expected


@pytest.mark.parametrize("exit_heads", ["shared", "separate"])
def test_two_processes_run_a_request_to_its_exit(start, checkpoint, monkeypatch, exit_heads):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # a core each, also where there is one NUMA node
    path, model = checkpoint(exit_layers=EXITS, exit_heads=exit_heads, num_key_value_heads=2)
    llm = start(path, **{**SMALL, "tensor_parallel_size": 2})
    requests = mixed(random_prompts(15, longest=80, shared=50))
    expected = expected_tokens(model, requests)
    for _ in range(2):  # then with prefixes
        assert tokens_of(ask(llm, requests)) == expected


def dynamo_counts(worker) -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["stats"])


def test_a_segment_is_compiled_once_for_all_batches(start, checkpoint):
    path, model = checkpoint(exit_layers=EXITS)
    # In a process of its own, whose counts are of nothing else
    llm = start(path, **{**SMALL, "enforce_eager": False, "distributed_executor_backend": "mp"})
    before = llm.collective_rpc(dynamo_counts)
    requests = mixed(random_prompts(20, longest=80, shared=50))
    assert tokens_of(ask(llm, requests)) == expected_tokens(model, requests)
    requests = [(prompt, 3) for prompt, _ in requests]
    assert tokens_of(ask(llm, requests)) == expected_tokens(model, requests)
    assert llm.collective_rpc(dynamo_counts) == before
    assert before[0]["unique_graphs"] == len(EXITS)
