"""What an installation gives: one name, from a wheel, an sdist and an editable install."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import sorted_llama


ROOT = Path(__file__).parent.parent
PACKAGE_FOLDERS = ["sorted_llama", "modeling_sorted_llama", "trainer", "hub_card"]


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    # Without what this Python was started with: the interpreter of the installation finds its own way
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        text=True,
        capture_output=True,
        **kwargs,
    )


def run_well(*command, **kwargs) -> str:
    done = run(*command, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(what: str, source: Path, folder: Path) -> Path:
    """Calls the build backend as pip does, but with the setuptools that is here."""
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(folder)!r}))"
    return folder / run_well(sys.executable, "-c", code, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tree, where a build may leave its files."""
    folder = tmp_path_factory.mktemp("source")
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, folder)
    for name in PACKAGE_FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_of_sdist(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    archive = build("sdist", source, folder)
    shutil.unpack_archive(archive, folder, filter="data")
    return build("wheel", folder / archive.name.removesuffix(".tar.gz"), folder)


def install(wheel: Path, folder: Path) -> Path:
    """An environment with nothing of its own but the wheel, and below it what this one has installed."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = Path(run_well(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    # As plain paths: the .pth files in them, such as the one of this project's editable install, are not followed
    (packages / "below.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run_well(*pip, "--ignore-installed", "--no-compile", wheel)
    return python


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return install(wheel, tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def installed_editable(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("editable")
    return install(build("editable", source, folder), folder / "environment")


def test_a_wheel_holds_one_package_with_its_types_and_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"sorted_llama"}
    expected = {
        f"sorted_llama/{path.relative_to(ROOT)}".replace("sorted_llama/sorted_llama/", "sorted_llama/")
        for folder in PACKAGE_FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"sorted_llama/py.typed", "sorted_llama/trainer/model_card.md"} < expected
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_an_sdist_makes_the_same_wheel_as_the_tree(wheel, wheel_of_sdist):
    def files(path):
        archive = zipfile.ZipFile(path)
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}

    assert files(wheel_of_sdist) == files(wheel)


def test_the_metadata_are_what_an_index_shows(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = message_from_string(archive.read(name).decode())
    assert metadata["Name"] == "sorted-llama" and metadata["Version"] == sorted_llama.__version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"
    assert "Paper, https://arxiv.org/abs/2309.08968" in metadata.get_all("Project-URL")
    assert "Typing :: Typed" in metadata.get_all("Classifier")


# In its order: what is asked of a fresh import comes before what imports more
USE_THE_MODEL = """
    import sys
    import sorted_llama

    print(sorted_llama.__file__)
    assert "trl" not in sys.modules, "importing the model imports TRL"
    from importlib.metadata import version
    assert sorted_llama.__version__ == version("sorted-llama")
    assert set(sorted_llama.__all__) <= set(dir(sorted_llama)) and "trl" not in sys.modules
    assert not hasattr(sorted_llama, "no_such_name")

    from transformers import AutoConfig
    config = AutoConfig.for_model("sorted_llama", hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    assert type(config) is sorted_llama.SortedLlamaConfig
    model = sorted_llama.SortedLlamaForCausalLM(config)

    assert not {"peft", "sorted_llama.trainer"} & {*sys.modules}
    import peft  # last, and yet it knows what LoRA is put on
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    assert sorted(adapted.peft_config["default"].target_modules) == ["q_proj", "v_proj"]

    import trainer
    assert trainer.MINE, "the user's own trainer.py is hidden"

    model.save_pretrained("checkpoint")
    sys.path.insert(0, "checkpoint")
    try:
        import modeling_sorted_llama
    except ImportError as error:
        assert "checkpoint/modeling_sorted_llama.py" in str(error)
        assert "the installed package is `sorted_llama`" in str(error)
    else:
        raise AssertionError("the code of a checkpoint is imported by hand")
"""
USE_ALL = """
    from sorted_llama import *
    for name in sorted_llama.__all__:
        assert globals()[name] is getattr(sorted_llama, name)
    assert SortedSFTTrainer.__module__ == "sorted_llama.trainer.sorted_sft_trainer"

    import runpy
    sys.argv[1:] = ["--help"]
    try:
        runpy.run_module("sorted_llama", run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0
    sys.argv[1:] = ["card", "nowhere"]
    runpy.run_module("sorted_llama", run_name="__main__")
"""


def run_beside_a_trainer(python: Path, script: str, folder: Path) -> subprocess.CompletedProcess:
    (folder / "trainer.py").write_text("MINE = True\n")
    (folder / "script.py").write_text(textwrap.dedent(script))
    return run(python, folder / "script.py", cwd=folder)


def test_a_wheel_gives_all_public_names_and_the_command_and_leaves_the_users_trainer_alone(installed, tmp_path):
    """A command that fails ends in one line, and with an exit code."""
    done = run_beside_a_trainer(installed, USE_THE_MODEL + USE_ALL, tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        done.stderr.splitlines()[-1] == "`path` must be the folder of a checkpoint, with a config.json, got 'nowhere'."
    )
    where, *help_text = done.stdout.splitlines()
    assert Path(where).is_relative_to(installed.parent.parent)
    for command in ("evaluate", "card", "push", "judge", "extract", "certify"):
        assert command in "\n".join(help_text)
    assert "from sorted_llama.__main__ import main" in installed.with_name("sorted-llama").read_text()


def test_an_editable_install_gives_the_same_from_the_tree(installed_editable, source, tmp_path):
    done = run_beside_a_trainer(installed_editable, USE_THE_MODEL, tmp_path)
    assert done.returncode == 0, done.stderr
    where, *_ = done.stdout.splitlines()
    assert Path(where).is_relative_to(source)


WITHOUT_TRL = """
import runpy
import sys

sys.modules["trl"] = None  # importing it fails
import sorted_llama

exec("from sorted_llama import *")

# The command first: it would find the modules that a failed import of the package leaves behind
uses = [
    lambda: runpy.run_module("sorted_llama", run_name="__main__"),
    lambda: sorted_llama.SortedSFTTrainer,
    lambda: __import__("sorted_llama.trainer"),
]
for use in uses:
    try:
        use()
    except (ImportError, SystemExit) as error:
        print(type(error).__name__, error)
"""


def test_a_missing_extra_is_named_with_the_command_that_installs_it(tmp_path):
    errors = run_well(sys.executable, "-c", WITHOUT_TRL, cwd=tmp_path).splitlines()
    # Of the command, which shows no traceback, the name and the package; the model itself needs no extra
    assert [error.split()[0] for error in errors] == ["SystemExit", "ImportError", "ImportError"]
    for error in errors:
        assert re.search(r"trl.*pip install \"sorted-llama\[(train|eval)\]\"", error)


def test_the_source_tree_in_front_of_an_installation_says_what_it_is(installed, source):
    done = run(installed, "-c", "import sorted_llama", cwd=source)
    assert done.returncode == 1 and "in the source tree" in done.stderr and "pip install -e ." in done.stderr


def test_mypy_sees_the_types_of_an_installation(installed, tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\n"
        "[mypy-torch.*,transformers.*,trl.*,peft.*,accelerate.*,datasets.*]\nfollow_imports = skip\n"
        "[mypy-sorted_llama.*]\nignore_errors = true\n"
    )
    (tmp_path / "script.py").write_text(
        "from sorted_llama import SortedLlamaForCausalLM, SortedSFTConfig, __version__\n"
        "number: int = __version__\n"
        "SortedLlamaForCausalLM.extract_submodel()\n"
    )
    done = run(
        sys.executable,
        "-m",
        "mypy",
        "--python-executable",
        installed,
        "--cache-dir",
        tmp_path,
        "script.py",
        cwd=tmp_path,
    )
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(errors) == 2 and "[assignment]" in errors[0] and "[call-arg]" in errors[1], done.stdout
