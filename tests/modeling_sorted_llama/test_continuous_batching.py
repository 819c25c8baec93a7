"""transformers' continuous batching: right tokens at the config's depth, and no other depth in silence."""

import re
from functools import partial

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from sorted_llama.modeling_sorted_llama.compat_sorted_llama import CACHE_NAME
from tests.tiny import reference_llama, tiny_sorted


pytestmark = pytest.mark.skipif(CACHE_NAME != "cache", reason="refused before transformers 5.24")

PROMPTS = [[5, 40, 7, 100], [200, 3, 9], [30] * 20 + [11, 12]]
PLAIN = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
SMALL = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)


@pytest.mark.parametrize("exit_heads", ["shared", "lens", "layer"])
@pytest.mark.parametrize("exit_layer", [None, 2])
def test_runs_at_the_depth_of_the_config(exit_layer, exit_heads):
    model = tiny_sorted(exit_layer=exit_layer, exit_heads=exit_heads)
    config = GenerationConfig(**PLAIN, exit_layer=exit_layer)  # what runs anyway may be asked for
    found = model.generate_batch(PROMPTS, generation_config=config, continuous_batching_config=SMALL)
    for prompt, output in zip(PROMPTS, found.values(), strict=True):
        assert output.error is None
        make = model.extract_submodel if exit_heads == "layer" else partial(reference_llama, model)
        reference = make(exit_layer or 4)
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert output.generated_tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "asked",
    [{"exit_layer": 1}, {"exit_threshold": 0.5}, {"assistant_early_exit": 1}, {"exit_layer": [1, 2, 4]}],
    ids=str,
)
def test_other_depths_are_refused(asked):
    model = tiny_sorted()
    message = "`?Continuous batching runs all requests at .* 4 layers now, and cannot honour .*" + re.escape(
        str(asked)[1:-1]
    )
    config = GenerationConfig(**PLAIN, **asked)
    with pytest.raises(ValueError, match=message):
        model.generate_batch(PROMPTS, generation_config=config, continuous_batching_config=SMALL)
    with pytest.raises(ValueError, match=message):
        model.generate_batch(PROMPTS, GenerationConfig(**PLAIN), continuous_batching_config=SMALL, **asked)
    with pytest.raises(ValueError, match=message):
        model.init_continuous_batching(generation_config=config)
    with pytest.raises(ValueError, match=message), model.continuous_batching_context_manager(config):
        pass
    for name, value in asked.items():  # the checkpoint's own default
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=message):
        model.generate_batch(PROMPTS, continuous_batching_config=SMALL)
