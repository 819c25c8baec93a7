"""
Reinforcement learning with TRL: weights that its trainer sends into a running vLLM reach drafts and depths too.

TRL's own code starts the engine, names the weights and sends them. What it cannot be told, the test tells vLLM.
"""

import functools
import itertools
import json
import os
from unittest import mock

import pytest
import torch
import trl.generation.vllm_generation
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import GRPOConfig, GRPOTrainer
from trl.cli import main as trl_command

from sorted_llama import SortedLlamaForCausalLM
from tests.serving_vllm.engines import PER_REQUEST, SEGMENTED, counters, expected_tokens, make
from tests.tiny import save_tiny, tiny_tokenizer


EXITS = (1, 2, 4)
DRAFTS = 3  # at a time, by layer 2
TOKENS = 24
# One is longer than a block, so that keys and values of the weights before would be found
PROMPTS = [[5, 40, 7, 100], [200, 3, 9], [30] * 40 + [11, 12], [77]]


@pytest.fixture(scope="module", autouse=True)
def as_on_a_gpu():
    """
    Linear layers keep their weights. vLLM's CPU build packs them when it loads a model, where nothing that is loaded
    later finds them, of whatever model. What TRL tells vLLM through the environment ends with these tests.
    """

    def keep(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    name = "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm"
    with mock.patch.dict(os.environ), mock.patch(name, keep):
        yield


def make_policy(folder, seed, exit_heads):
    """A checkpoint, and its model, whose layers above the draft say little, so that many drafts are accepted."""
    untied = {"tie_word_embeddings": exit_heads != "separate"}
    model = make(folder, EXITS, seed=seed, exit_heads=exit_heads, initializer_range=0.3, **untied)
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight *= 0.3
            layer.mlp.down_proj.weight *= 0.3
    save_tiny(folder, model)
    return SortedLlamaForCausalLM.from_pretrained(folder).eval()


def settings(serving, folder):
    if serving == "depths":
        return {"additional_config": PER_REQUEST}
    if serving == "one depth":
        return {"hf_overrides": {"exit_layer": 2}}
    draft = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": DRAFTS}
    return {"hf_overrides": {"assistant_early_exit": 2}, "speculative_config": draft}


def told(start, serving, folder):
    """In TRL's module, the class that it starts an engine with: TRL's own arguments, and these beside them."""
    options = {**settings(serving, folder), "weight_transfer_config": {"backend": "nccl"}}
    options |= {"dtype": "float32", "block_size": 32}
    return mock.patch.object(
        trl.generation.vllm_generation, "LLM", lambda model, **given: start(model, **{**given, **options})
    )


class Server:
    """TRL's engine beside a trainer ("colocate") on one policy, and another policy for it."""

    def __init__(self, start, serving, exit_heads, folder):
        self.serving = serving
        self.first = make_policy(folder / "first", 0, exit_heads)
        self.second = make_policy(folder / "second", 7, exit_heads)
        with told(start, serving, folder / "first"):
            self.trl = trl.generation.vllm_generation.VLLMGeneration(
                self.first,
                Accelerator(cpu=True),
                tiny_tokenizer(),
                max_model_length=128,
                max_num_seqs=4,
                gpu_memory_utilization=0.1,
                temperature=0.0,
                max_completion_length=TOKENS,
            )
        self.worker = self.trl.llm.llm_engine.model_executor.driver_worker.worker
        assert self.serves(self.first)

    def sync(self, policy, tensors_at_once=None):
        """As TRL does beside the trainer, or as a server does that gets so many tensors at once from TRL."""
        self.trl.model = policy
        if tensors_at_once is None:
            self.trl.sync_weights()
            return
        self.worker.start_weight_update()
        named = list(self.trl._iter_named_params())
        for i in range(0, len(named), tensors_at_once):
            # NCCL, which needs GPUs, brings the tensors here
            self.worker.weight_transfer_engine.model.load_weights(named[i : i + tensors_at_once])
        self.worker.finish_weight_update()
        self.trl.llm.reset_prefix_cache()

    def answers(self, exit_layer=None):
        extra = {} if exit_layer is None else {"extra_args": {"exit_layer": exit_layer}}
        self.trl.generation_kwargs = {"ignore_eos": True, **extra}
        return self.trl.generate(PROMPTS, None, 1)[1]

    def serves(self, policy):
        if self.serving == "depths":
            for exit_layer in EXITS:
                assert self.answers(exit_layer) == expected_tokens(policy, requests(exit_layer), TOKENS)
        elif self.serving == "one depth":
            assert self.answers() == expected_tokens(policy, requests(2), TOKENS)
        else:
            before = draft_counts(self.trl.llm)
            assert self.answers() == expected_tokens(policy, requests(), TOKENS)
            counts = [count - past for count, past in zip(draft_counts(self.trl.llm), before)]
            assert counts == expected_draft_counts(policy)
            assert counts[1] > 0
        return True


def requests(exit_layer=None):
    return [(prompt, exit_layer) for prompt in PROMPTS]


def draft_counts(llm):
    return [counters(llm)[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted")]


@functools.cache
def expected_draft_counts(policy):
    """Drafted tokens and accepted ones, of a server that drafts with the first layers of this very policy."""
    drafted = accepted = 0
    rows = expected_tokens(policy, requests(), TOKENS + DRAFTS)
    for prompt, row in zip(PROMPTS, rows):
        done = 1  # by the pass over the prompt
        while done < TOKENS:
            (drafts,) = expected_tokens(policy, [(prompt + row[:done], 2)], DRAFTS)
            hits = [draft == token for draft, token in zip(drafts, row[done:])]
            kept = [*hits, False].index(False)
            drafted, accepted, done = drafted + DRAFTS, accepted + kept, done + kept + 1
    return [drafted, accepted]


# Of one depth, the kinds whose head is made of two tensors that come one after the other, and whose exits own layers
SERVERS = [*itertools.product(("drafts", "depths"), SEGMENTED), ("one depth", "lens"), ("one depth", "layer")]


@pytest.fixture(scope="module", params=SERVERS, ids=str)
def server(request, start, tmp_path_factory):
    return Server(start, *request.param, tmp_path_factory.mktemp("policies"))


def test_a_sync_beside_the_trainer_reaches_drafts_and_depths(server):
    for policy in (server.second, server.first):
        server.sync(policy)
        assert server.serves(policy)


@pytest.mark.parametrize("tensors_at_once", [1, 1000])
def test_a_sync_into_a_server_reaches_drafts_and_depths(server, tensors_at_once):
    server.sync(server.first)
    server.sync(server.second, tensors_at_once)
    assert server.serves(server.second)


def test_a_sync_of_merged_adapters_reaches_drafts_and_depths(server, tmp_path):
    torch.manual_seed(3)
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    copy = make_policy(tmp_path / "copy", 5, server.first.config.exit_heads)
    adapted = get_peft_model(copy, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    server.sync(adapted)
    assert server.serves(adapted.merge_and_unload())


def test_a_draft_has_nothing_to_save_when_the_engine_sleeps(server):
    """TRL's `vllm_enable_sleep_mode` has vLLM ask."""
    draft = server.worker.get_draft_model()
    if server.serving == "drafts":
        assert not list(draft.named_parameters()) and not list(draft.named_buffers())
    else:
        assert draft is None


def test_steps_of_grpo_with_drafts(start, tmp_path):
    """Log-probabilities of drafted tokens are those of the policy that trains."""
    policy = make_policy(tmp_path / "policy", 0, "shared")
    arguments = GRPOConfig(
        output_dir=str(tmp_path / "out"),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.1,
        vllm_max_model_length=128,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=TOKENS,
        max_steps=3,
        learning_rate=5e-3,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    )

    def reward(completion_ids, **_):
        return [sum(token < 130 for token in row) / len(row) for row in completion_ids]

    prompts = Dataset.from_list([{"prompt": f"number {i}"} for i in range(8)])
    with told(start, "drafts", tmp_path / "policy"):
        trainer = GRPOTrainer(policy, reward, arguments, prompts, processing_class=tiny_tokenizer())
    trainer.train()
    assert draft_counts(trainer.vllm_generation.llm)[1] > 0
    differences = [log["sampling/sampling_logp_difference/max"] for log in trainer.state.log_history[:-1]]
    assert len(differences) == 3
    assert max(differences) < 1e-3
    trained, untrained = trainer.model.eval(), SortedLlamaForCausalLM.from_pretrained(tmp_path / "policy")
    assert not torch.equal(trained.lm_head.weight, untrained.lm_head.weight)
    trainer.vllm_generation.sync_weights()
    trainer.vllm_generation.temperature = 0.0
    trainer.vllm_generation.generation_kwargs = {"ignore_eos": True}
    assert trainer.vllm_generation.generate(PROMPTS, None, 1)[1] == expected_tokens(trained, requests(), TOKENS)


def test_trls_server_takes_both_settings():
    draft, overrides = json.dumps({"method": "draft_model", "model": "m"}), json.dumps({"assistant_early_exit": 2})
    arguments = ["--model", "m", "--speculative_config", draft, "--hf-overrides", overrides]
    with (
        mock.patch("sys.argv", ["trl", "vllm-serve", *arguments]),
        mock.patch("os.execve") as run,
        pytest.warns(FutureWarning, match="now only runs vLLM's own server"),
    ):
        trl_command()
    command = run.call_args.args[1]
    assert command[command.index("--speculative-config") + 1] == draft
    assert command[command.index("--hf-overrides") + 1] == overrides
