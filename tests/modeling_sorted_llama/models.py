"""What the tests of checkpoints and of sub-models hold two models to."""

import torch

from sorted_llama import SortedLlamaConfig
from tests.tiny import reference_llama


TOKENS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, **arguments) -> torch.Tensor:
    return model(TOKENS.to(model.device), **arguments).logits


def assert_same_weights(model, expected):
    mine, theirs = model.state_dict(), expected.state_dict()
    assert list(mine) == list(theirs)
    for name in mine:
        assert torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype


def assert_is_whole(model, expected_exits=None):
    """Sorted in memory as on disk, and each exit the sub-model."""
    assert model.config.model_type == "sorted_llama" and type(model.config) is SortedLlamaConfig
    assert model.config.exit_layers == expected_exits
    assert model.model.config is model.config
    for depth in (1, 2, 4):
        assert torch.equal(logits(model, exit_layer=depth), logits(reference_llama(model, depth)))
