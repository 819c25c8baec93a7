"""The example scripts as modules: a fixture each."""

import importlib
import sys
from pathlib import Path

import pytest


def _example(name):
    @pytest.fixture(scope="module", name=name)
    def module():
        sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
        yield importlib.import_module(name)
        sys.path.pop(0)

    return module


demo = _example("demo")
generate = _example("generate")
plan = _example("plan")
study = _example("study")
train = _example("train")
serve = _example("serve")
