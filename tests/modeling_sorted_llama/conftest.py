"""What several tests of the model need."""

import pytest
import torch
import torch.distributed as dist

from sorted_llama.modeling_sorted_llama import loss_sorted_llama


class NoStream:
    """Stands in for a CUDA stream where there is no CUDA: nothing runs beside anything else."""

    def wait_stream(self, _):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def streams(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "Stream", NoStream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: NoStream())


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of four rows of `make_inputs`' vocabulary: several, the last one ragged."""
    monkeypatch.setattr(loss_sorted_llama, "_TILE_BYTES_CPU", 4 * 4 * 17)
