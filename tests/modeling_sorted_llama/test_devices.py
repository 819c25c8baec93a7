"""Where tensors are: caches offloaded to the CPU, and no tensor on a default device that is not the model's."""

import pytest
import torch
from transformers.cache_utils import CacheLayerMixin

from modeling_sorted_llama.cache_sorted_llama import SortedCacheLayer, index_tensor
from tests.tiny import Pieces, prompts, tiny_sorted


MODES = {
    "exit_layer": {"exit_layer": 2},
    "lone_layer": {"exit_layer": 1},
    "exit_threshold": {"exit_threshold": 0.3},
    "lone_layer_mostly": {"exit_threshold": [0.0, 0.3]},
    "depths_of_rows": {"exit_layer": [1, 4, 2]},
    "auto_depth": {"exit_layer": "auto"},
    "drafts": {"assistant_early_exit": 1, "num_assistant_tokens": 3},
    "learned_drafts": {"assistant_early_exit": "auto"},
    "sampling": {"exit_threshold": 0.3, "do_sample": True},
}


INPUTS = prompts()


def generate(model, **arguments):
    torch.manual_seed(0)
    return model.generate(**INPUTS, max_new_tokens=16, **arguments)


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("mode", MODES)
def test_offloading_changes_no_token(mode):
    model = tiny_sorted()
    expected = generate(model, **MODES[mode])
    assert torch.equal(generate(model, **MODES[mode], cache_implementation="offloaded"), expected)


class SideStream:
    """A stream beside the default one: what is asked of it is done once the default one has waited for it."""

    queue: list = []
    entered = False

    def wait_stream(self, _):
        pass

    def __enter__(self):
        SideStream.entered = True

    def __exit__(self, *_):
        SideStream.entered = False


class DefaultStream:
    def wait_stream(self, _):
        while SideStream.queue:
            SideStream.queue.pop(0)()


@pytest.fixture
def layers_away(monkeypatch):
    """Layers that really go away: keys and values that nobody has fetched, or waited for, are NaN."""
    away = {}

    def names(layer):
        return ("_keys", "_values") if isinstance(layer, SortedCacheLayer) else ("keys", "values")

    def offload(layer):
        away[layer] = [getattr(layer, name) for name in names(layer)]
        for name, tensor in zip(names(layer), away[layer], strict=True):
            setattr(layer, name, torch.full_like(tensor, torch.nan))

    def fetch(layer):
        for name, tensor in zip(names(layer), away.pop(layer, ())):
            setattr(layer, name, tensor)

    def prefetch(layer):
        if layer in away:
            SideStream.queue.append(lambda: fetch(layer)) if SideStream.entered else fetch(layer)

    for layer_class in (CacheLayerMixin, SortedCacheLayer):
        monkeypatch.setattr(layer_class, "offload", offload)
        monkeypatch.setattr(layer_class, "prefetch", prefetch)
    monkeypatch.setattr(torch, "Stream", SideStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: DefaultStream())
    SideStream.queue.clear()
    return away


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_is_fetched_before_it_is_used(layers_away, mode):
    model = tiny_sorted()
    expected = generate(model, **MODES[mode])
    assert torch.equal(generate(model, **MODES[mode], cache_implementation="offloaded"), expected)
    assert bool(layers_away) == (mode != "lone_layer")  # transformers would fetch a lone layer while it is in use


@pytest.mark.parametrize("mode", MODES)
def test_default_device(mode):
    """With `torch.set_default_device`, a tensor that names no device would be somewhere else than the model's."""
    model, streamer = tiny_sorted(), Pieces()
    expected = generate(model, **MODES[mode])
    with torch.device("meta"):
        torch.manual_seed(0)
        found = model.generate(**INPUTS, max_new_tokens=16, streamer=streamer, **MODES[mode])
    assert torch.equal(found, expected)
    new_tokens = torch.tensor(streamer.pieces[1:]).T
    assert torch.equal(new_tokens, expected[:, -new_tokens.shape[1] :])


def test_index_tensor():
    index = index_tensor(range(3), torch.device("cpu"))
    assert index.dtype == torch.long and index.tolist() == [0, 1, 2]
    assert index_tensor([], torch.device("cpu")).dtype == torch.long
    with torch.device("meta"):
        assert index_tensor([7], torch.device("cpu")).tolist() == [7]
