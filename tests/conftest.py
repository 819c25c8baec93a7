"""What every test runs under."""

import gc
import os

import pytest
import torch
from transformers.utils import logging


# Nothing is compiled here, nor in what a test starts: torch's C++ extensions and inductor stop where they call this
os.environ["CXX"] = "no-compiler-in-tests"


@pytest.fixture(scope="module", autouse=True)
def what_is_there_is_no_garbage():
    """Each training collects garbage, and would walk over all that was imported and cached: most of its time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models are slower on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def logging_of_transformers():
    """Put back behind the tests of a file: commands and scripts, which run in this process, hide it for good."""
    verbosity, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    if progress_bar:
        logging.enable_progress_bar()


@pytest.fixture
def offline(monkeypatch):
    """As with HF_HUB_OFFLINE=1, which is read at import: without a network, asking the Hub takes 23 seconds."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
