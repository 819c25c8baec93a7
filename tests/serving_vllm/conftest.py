"""What the tests of this folder run under, and the engines that they share."""

import gc
import os
from pathlib import Path
from typing import Any

import pytest


# Before torch and vLLM are imported, which read some of them once. The other tests compile nothing; vLLM compiles what
# finds log-probabilities, even where a model is not.
os.environ.pop("CXX", None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # tests ask workers about their models

from tests.serving_vllm.engines import make  # noqa: E402


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Makes checkpoints, each once: path and model."""
    made: dict[str, tuple[Path, Any]] = {}

    def checkpoint(**fields):
        key = repr(sorted(fields.items()))
        if key not in made:
            path = tmp_path_factory.mktemp("checkpoint") / "model"
            made[key] = path, make(path, **fields)
        return made[key]

    return checkpoint


@pytest.fixture(scope="session")
def start():
    """
    Starts engines, one at a time. The one that runs is kept for the next who asks for the same, and what it holds of
    prefixes is dropped. It runs in this process, where a test can look into it and which has imported vLLM once.
    """
    from vllm import LLM, envs

    running: dict[str, LLM] = {}

    def stop():
        for llm in running.values():
            llm.llm_engine.engine_core.shutdown()
        running.clear()
        gc.collect()

    def start(path, **options) -> LLM:
        options = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 4, "enforce_eager": True, **options}
        options = {"skip_tokenizer_init": True, "disable_log_stats": False, **options}
        key = repr([str(path), sorted(options.items())])
        if key not in running or running[key].llm_engine.has_unfinished_requests():
            stop()
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
                running[key] = LLM(str(path), **options)
            envs.disable_envs_cache()  # an engine keeps what it has read for the whole process
        assert running[key].reset_prefix_cache()
        return running[key]

    yield start
    stop()
