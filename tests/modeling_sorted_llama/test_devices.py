"""Where tensors are: layers on two devices, an offloaded cache, and a default device that is not the model's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import Pieces, prompts, tiny_sorted


MODES = {
    "exit_layer": {"exit_layer": 2},
    "lone_layer": {"exit_layer": 1},
    "exit_threshold": {"exit_threshold": 0.3},
    "lone_layer_mostly": {"exit_threshold": [0.0, 0.3]},
    "depths_of_rows": {"exit_layer": [1, 4, 2]},
    "drafts": {"assistant_early_exit": 1, "num_assistant_tokens": 3},
    "learned_drafts": {"assistant_early_exit": "auto"},
    "sampling": {"exit_threshold": 0.3, "do_sample": True},
}


INPUTS = prompts()


def generate(model, **arguments):
    torch.manual_seed(0)
    return model.generate(**INPUTS, max_new_tokens=16, **arguments)


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("mode", ["exit_layer", "lone_layer"])
def test_an_offloaded_cache_changes_no_token_at_an_exit(mode):
    model = tiny_sorted()
    expected = generate(model, **MODES[mode])
    assert torch.equal(generate(model, **MODES[mode], cache_implementation="offloaded"), expected)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("exit_layer", "lone_layer")])
def test_an_offloaded_cache_is_refused_where_depth_moves(mode):
    with pytest.raises(ValueError, match="`cache_implementation=.offloaded.`: its cache is .dynamic. or .static."):
        generate(tiny_sorted(), **MODES[mode], cache_implementation="offloaded")


@pytest.mark.parametrize("mode", MODES)
def test_the_default_device_changes_no_token(mode):
    """With `torch.set_default_device`, a tensor that names no device would be somewhere else than the model's."""
    model, streamer = tiny_sorted(), Pieces()
    expected = generate(model, **MODES[mode])
    with torch.device("meta"):
        torch.manual_seed(0)
        found = model.generate(**INPUTS, max_new_tokens=16, streamer=streamer, **MODES[mode])
    assert torch.equal(found, expected)
    new_tokens = torch.tensor(streamer.pieces[1:]).T
    assert torch.equal(new_tokens, expected[:, -new_tokens.shape[1] :])


TWO_DEVICES = '''
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from sorted_llama import SortedCache
from sorted_llama.modeling_sorted_llama.loss_sorted_llama import multi_exit_loss
from tests.tiny import tiny_sorted

_setup_privateuseone_for_python_backend("fake")
FIRST, SECOND = torch.device("fake:0"), torch.device("fake:1")


def place(module, device):
    """Put a module on a device, and bring its inputs there, as accelerate's hooks do."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = torch.empty(tensor.shape, device=device)
                    moved = torch.nn.Parameter(moved) if tensors is part._parameters else moved
                    tensors[name] = moved
    forward = module.forward

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return tuple(map(move, value)) if isinstance(value, tuple) else value

    module.forward = lambda *args, **kwargs: forward(*map(move, args), **{k: move(v) for k, v in kwargs.items()})


with FakeTensorMode(allow_non_fake_inputs=True):
    model = tiny_sorted(exit_layers=[2, 3, 4], tie_word_embeddings=False)
    model.lm_head._hf_hook = True  # what tells the loss to call a head that something moves
    for module in (model.model.embed_tokens, model.model.rotary_emb, model.lm_head, *model.model.layers[:2]):
        place(module, FIRST)
    for module in (model.model.norm, *model.model.layers[2:]):
        place(module, SECOND)
    tokens = torch.zeros(2, 5, dtype=torch.long, device=FIRST)
    mask = torch.ones_like(tokens)

    with torch.no_grad():  # a pass to an exit, and one that takes along what it left pending, over the border
        cache = SortedCache()
        model.model(input_ids=tokens, attention_mask=mask, cache=cache, exit_layer=1)
        states = model.model(input_ids=tokens[:, :1], attention_mask=mask[:, :1], cache=cache, exit_layer=4)
        assert states.last_hidden_state.device == SECOND and states.last_hidden_state.shape[1] == 6
        layers = [layer.keys.device for layer in cache.layers]
        assert layers == [FIRST, FIRST, SECOND, SECOND], layers

        # A tied head stays with the embeddings, where the labels are too; the normed states are on the last device
        states = [torch.zeros(10, 32, device=SECOND) for _ in range(3)]
        assert multi_exit_loss(states, model.lm_head, tokens.flatten()).loss.device == SECOND
'''


def test_a_model_on_two_devices_mixes_none():
    """Layers on two devices, as `device_map` spreads them: devices that compute nothing, and refuse to be mixed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", TWO_DEVICES], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
