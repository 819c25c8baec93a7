"""Checkpoints as version 0.1.0 saved them, one with its code. Later versions load them too: they stay as they are."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sorted_llama import SortedLlamaForCausalLM
from tests.tiny import reference_llama, run_as_stranger


ARCHIVE = Path(__file__).parents[1] / "fixtures" / "checkpoints_v0.tar.gz"

LOAD_SAVED = """
import json

import torch
from transformers import AutoModelForCausalLM

results = []
for folder, prompt, calls in zip(sys.argv[1::3], map(json.loads, sys.argv[2::3]), map(json.loads, sys.argv[3::3])):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    tokens = [
        model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, **call)[0, len(prompt) :].tolist()
        for call in calls
    ]
    results.append({"tokens": tokens, "code": sys.modules[type(model).__module__].__file__})
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def saved_folders(tmp_path_factory):
    """The folders of the checkpoints, each with the code of its time, which the archive holds once."""
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for path in (folder / "checkpoint_v0").glob("*.py"):
        shutil.copy(path, folder / "checkpoint_v0_lens")
    return [folder / "checkpoint_v0", folder / "checkpoint_v0_lens"]


@pytest.fixture(scope="module", params=["shared", "lens"])
def saved(request, saved_folders):
    return saved_folders[request.param == "lens"]


def expected_tokens(saved):
    """Prompt, and pairs of a call's arguments and the tokens it gave when the checkpoint was saved."""
    expected = json.loads((saved / "expected_tokens.json").read_text())
    return expected["prompt"], [(call["arguments"], call["tokens"]) for call in expected["calls"]]


@pytest.mark.parametrize("load", [SortedLlamaForCausalLM, AutoModelForCausalLM, "trust_remote_code"])
def test_an_older_checkpoint_loads_where_the_package_is_installed(load, saved):
    """Whoever imports the package gets its class, also with `trust_remote_code=True`."""
    prompt, calls = expected_tokens(saved)
    arguments = {"trust_remote_code": True} if load == "trust_remote_code" else {}
    auto = AutoModelForCausalLM if load == "trust_remote_code" else load
    model, info = auto.from_pretrained(saved, dtype=torch.float32, output_loading_info=True, **arguments)
    assert not any(info.values())
    assert type(model) is SortedLlamaForCausalLM
    inputs = torch.tensor([prompt])
    for call, tokens in calls:
        generated = model.generate(inputs, max_new_tokens=12, do_sample=False, **call)
        assert generated[0, len(prompt) :].tolist() == tokens, call


def test_the_expected_tokens_are_those_of_plain_llamas(saved):
    model = SortedLlamaForCausalLM.from_pretrained(saved, dtype=torch.float32)
    prompt, calls = expected_tokens(saved)
    depths = {call.get("exit_layer"): tokens for call, tokens in calls}
    for depth in model.config.exit_layers:
        llama = model.extract_submodel(depth) if saved.name.endswith("lens") else reference_llama(model, depth)
        tokens = llama.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert tokens[0, len(prompt) :].tolist() == depths[depth]


def test_older_checkpoints_load_with_their_own_code_alone(saved_folders, tmp_path):
    arguments, expected = [], []
    for saved in saved_folders:
        prompt, calls = expected_tokens(saved)
        arguments += [saved, json.dumps(prompt), json.dumps([call for call, _ in calls])]
        expected.append([tokens for _, tokens in calls])
    printed = run_as_stranger(LOAD_SAVED, *arguments, folder=tmp_path)
    results = json.loads(printed.splitlines()[-1])
    assert [result["tokens"] for result in results] == expected
    for saved, result in zip(saved_folders, results, strict=True):
        assert Path(result["code"]).read_bytes() == (saved / "modeling_sorted_llama.py").read_bytes()
