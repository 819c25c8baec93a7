"""What the tests of the cache share: a model that no test changes, transformers' own, and passes of both."""

import functools

import torch
from transformers import DynamicCache

from sorted_llama.modeling_sorted_llama.compat_sorted_llama import CACHE_NAME
from tests.tiny import reference_llama, tiny_sorted


LAYERS = 4
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@functools.cache
def sorted_model(attention="sdpa", exit_heads="shared"):
    """A model that no test changes; what its exits own has drifted from what it began as."""
    model = tiny_sorted(exit_layers=[1, 2, 3, 4], attn_implementation=attention, exit_heads=exit_heads)
    drift = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "exit_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=drift)
    return model


@functools.cache
def reference(depth=LAYERS, exit_heads="shared"):
    """transformers' own Llama of the first layers of `sorted_model()`, and of the one that the exit owns."""
    model = sorted_model("eager", exit_heads)
    if exit_heads == "shared" or depth == LAYERS:
        return reference_llama(model, depth)
    llama = reference_llama(model, depth + 1)
    llama.model.layers[depth].load_state_dict(model.model.exit_decoders[str(depth)].state_dict())
    llama.model.norm.load_state_dict(model.model.exit_norms[str(depth)].state_dict())
    return llama


def random_tokens(*shape, seed=0):
    return torch.randint(3, 259, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(cache, tokens, depth=LAYERS, model=None, **arguments):
    """Normed states of a pass of the sorted model; `tokens` of shape `(num_rows, 0)` only take pending ones along."""
    model = model or sorted_model()
    return model.model(input_ids=tokens, cache=cache, exit_layer=depth, **arguments).last_hidden_state


def catch_up(cache, depth=LAYERS, **arguments):
    return run(cache, torch.empty(len(cache.lengths), 0, dtype=torch.long), depth, **arguments)


@torch.no_grad()
def run_plain(tokens, depth=LAYERS, cache=None, exit_heads="shared", **arguments):
    """Normed states of a pass of the plain Llama, and its cache (a `DynamicCache` by default)."""
    cache = DynamicCache() if cache is None else cache
    outputs = reference(depth, exit_heads).model(input_ids=tokens, **{CACHE_NAME: cache}, **arguments)
    return outputs.last_hidden_state, cache


def assert_equals_straight_pass(cache, tokens, depth=LAYERS):
    """Keys and values of rows without padding."""
    _, expected = run_plain(tokens, depth)
    for layer, expected_layer in zip(cache.layers[:depth], expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected_layer.keys, **CLOSE)
        torch.testing.assert_close(layer.values, expected_layer.values, **CLOSE)


def count_layer_calls(model) -> list[int]:
    calls = []
    for number, layer in enumerate(model.base_model.layers, start=1):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    return calls


def storages(cache):
    return [of.untyped_storage() for layer in cache.layers for of in (layer.keys, layer.values) if of is not None]
