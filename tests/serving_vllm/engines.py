"""Tiny checkpoints for vLLM, and what a test asks of an engine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, RequestOutput, SamplingParams

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.modeling_sorted_llama.heads_sorted_llama import EXIT_HEADS
from tests.tiny import save_tiny, tiny_sorted


PER_REQUEST = {"exit_layer": "request"}  # `additional_config` of a server that takes a depth from each request
SEGMENTED = [kind for kind in EXIT_HEADS if kind != "layer"]  # what such a server, and one that drafts, takes
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Requests = list[tuple[list[int], int | None]]  # prompts, and the depth that each asks for


def make(folder: Path, exit_layers: Sequence[int] = (1, 2, 4), **fields: Any) -> SortedLlamaForCausalLM:
    """A checkpoint with heads of a width that vLLM's kernels know, whose exits, where they own weights, differ."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_sorted(exit_layers=list(exit_layers), **{**sizes, "num_hidden_layers": exit_layers[-1], **fields})
    own = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "exit_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=own)
    save_tiny(folder, model)
    return model


def quantize(folder: Path) -> None:
    """Weights in 8 bits, a scale a row, as compressed-tensors has them."""
    state, quantized = load_file(folder / "model.safetensors"), {}
    for name, tensor in state.items():
        if name.split(".")[-2] in LINEARS:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            quantized[name] = (tensor / scale).round().to(torch.int8)
            quantized[f"{name}_scale"] = scale
        else:
            quantized[name] = tensor
    save_file(quantized, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


def random_prompts(count: int, longest: int, shared: int = 0) -> list[list[int]]:
    """Prompts of many lengths, of which the first `shared` tokens, or as many as there are, are the same."""
    generator = torch.Generator().manual_seed(count)
    same = torch.randint(3, 259, (shared,), generator=generator).tolist()
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    rows = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]
    return [(same + row[shared:])[: len(row)] for row in rows]


def sampling(exit_layer: Any = None, **options: Any) -> SamplingParams:
    """Greedy, of 12 tokens, whatever they are."""
    extra = {} if exit_layer is None else {"exit_layer": exit_layer}
    options = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "detokenize": False, **options}
    return SamplingParams(extra_args=extra, **options)


def ask(llm: LLM, requests: Requests, lora_request: Any = None, **options: Any) -> list[RequestOutput]:
    """Answers to all requests at once."""
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    params = [sampling(exit_layer, **options) for _, exit_layer in requests]
    return llm.generate(prompts, params, lora_request=lora_request, use_tqdm=False)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def expected_tokens(model: Any, requests: Requests, max_tokens: int = 12) -> list[list[int]]:
    """What `generate` of the model itself answers, a row at a time."""
    found = []
    for prompt, exit_layer in requests:
        inputs = torch.tensor([prompt])
        options = {"max_new_tokens": max_tokens, "min_new_tokens": 0, "do_sample": False, "eos_token_id": None}
        row = model.generate(inputs, attention_mask=torch.ones_like(inputs), exit_layer=exit_layer, **options)
        found.append(row[0, len(prompt) :].tolist())
    return found


def scores(model: Any, tokens: list[int], exit_layer: int | None) -> torch.Tensor:
    """Log-probabilities, `(len(tokens) - 1, vocab_size)`, of what follows each token."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), exit_layer=exit_layer).logits.log_softmax(-1)[0, :-1]


def counters(llm: LLM) -> dict[str, int]:
    """vLLM's metrics of the engine that was started last, as far as they only grow."""
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def cached_tokens(llm: LLM) -> int:
    """For how many tokens there is memory, at the depth of the server."""
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size


def scheduler_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def runner_of(llm: LLM) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def free_blocks(llm: LLM) -> int:
    return scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()
