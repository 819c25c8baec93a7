"""What the tests of the cache share: a model that no test changes, transformers' own, and passes of both."""

import functools

import torch
from transformers import DynamicCache

from sorted_llama.modeling_sorted_llama.compat_sorted_llama import CACHE_NAME
from tests.tiny import reference_llama, tiny_sorted


LAYERS = 4
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@functools.cache
def sorted_model(attention="sdpa"):
    """A model that no test changes."""
    return tiny_sorted(exit_layers=[1, 2, 3, 4], attn_implementation=attention)


@functools.cache
def reference(depth=LAYERS):
    """transformers' own Llama of the first layers of `sorted_model()`."""
    return reference_llama(sorted_model("eager"), depth)


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
def run_plain(tokens, depth=LAYERS, cache=None, **arguments):
    """Normed states of a pass of the plain Llama, and its cache (a `DynamicCache` by default)."""
    cache = DynamicCache() if cache is None else cache
    outputs = reference(depth).model(input_ids=tokens, **{CACHE_NAME: cache}, **arguments)
    return outputs.last_hidden_state, cache


def assert_equals_straight_pass(cache, tokens, depth=LAYERS):
    """Keys and values of rows without padding."""
    _, expected = run_plain(tokens, depth)
    for layer, expected_layer in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected_layer.keys, **CLOSE)
        torch.testing.assert_close(layer.values, expected_layer.values, **CLOSE)


def count_layer_calls(model) -> list[int]:
    calls = []
    for number, layer in enumerate(model.base_model.layers, start=1):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    return calls


def storages(cache):
    return [tensor.untyped_storage() for layer in cache.layers for tensor in (layer.keys, layer.values)]
