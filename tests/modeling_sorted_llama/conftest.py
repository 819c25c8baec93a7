"""What several tests of the model need."""

import pytest
import torch


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
