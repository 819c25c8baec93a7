"""
What the pages and docstrings show runs as it stands there. Only what would be downloaded has a stand-in: a folder of
the very name, which `from_pretrained` and `load_dataset` take before they ask the Hub.
"""

import argparse
import ast
import contextlib
import doctest
import importlib.metadata
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from datasets import load_dataset
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from trl import TrlParser

import sorted_llama.hub_card.commands as commands
from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card.push import files_to_push
from sorted_llama.trainer import SortedSFTConfig, SortedSFTTrainer
from tests.families import tiny_family
from tests.tiny import save_tiny, tiny_llama, tiny_sorted


ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "docs/*.md", "examples/space/README.md"]
PACKAGES = ["modeling_sorted_llama/*.py", "trainer/*.py"]
SCRIPTS = ["hub_card/*.py", "examples/**/*.py", "benchmarks/*.py"]  # their tests, and .ci/run, run them

# What stands on a page and is not run, by how it begins
NOT_RUN = {
    "pip install": "downloads into the environment",
    "trl vllm-serve ": "the same",
    "vllm serve ": "vLLM has an environment of its own: tests/serving_vllm",
    "accelerate launch ": "several processes: tests/examples/test_train.py",
    "torchrun ": "several processes: tests/examples/test_train.py",
    "python examples/serve.py out/demo/final": "a server that stays: tests/examples/test_serve.py",
    "python examples/space/app.py --model out/demo/final": "a server that stays: tests/examples/test_space.py",
    "python -m sorted_llama.hub_card.harness --model sorted-llama": "its own command line, with PATH: tests/hub_card",
    "lm_eval --model hf --model_args pretrained=PATH": "a help text, with PATH: docs/hub.md has it in full",
    "hf ": "makes and fills a repository on the Hub",
    ".ci/run": "runs this test",
    "from openai import OpenAI": "asks a server: tests/examples/test_serve.py and tests/serving_vllm do",
    "curl http://localhost:8000/": "asks a server: tests/serving_vllm",
}


class Block(NamedTuple):
    where: str
    language: str
    text: str
    is_script: bool = False

    def __str__(self):
        return self.where


def fences(where: str, text: str, is_script: bool = False) -> list[Block]:
    found = re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    return [Block(f"{where} {i}", block[2], block[3], is_script) for i, block in enumerate(found, 1)]


def docstrings(file: Path, is_script: bool = False) -> list[Block]:
    where = file.relative_to(ROOT).as_posix()
    blocks = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            assert text.count("```") % 2 == 0, f"{where}: a fence is not closed"
            blocks += fences(f"{where}:{getattr(node, 'name', 'module')}", text, is_script)
    return blocks


def files(patterns: list[str]) -> list[Path]:
    return [file for pattern in patterns for file in sorted(ROOT.glob(pattern))]


BLOCKS = [
    *(block for page in files(PAGES) for block in fences(page.relative_to(ROOT).as_posix(), page.read_text())),
    *(block for file in files(PACKAGES) for block in docstrings(file)),
    *(block for file in files(SCRIPTS) for block in docstrings(file, is_script=True)),
]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def lines_of(block: Block) -> list[str]:
    """The commands of a shell block: one each, without comments and continuations."""
    commands = (shlex.join(shlex.split(line, comments=True)) for line in block.text.replace("\\\n", " ").splitlines())
    return [part for line in commands if line for part in line.split(" '&&' ")]


COMMANDS = [
    pytest.param(block, line, id=f"{block.where}: {line}")
    for block in BLOCKS
    if block.language == "shell"
    for line in lines_of(block)
]


def not_run(text: str) -> str | None:
    return next((start for start in NOT_RUN if text.startswith(start)), None)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The folder of a reader who has the models and data that the pages name."""
    folder = tmp_path_factory.mktemp("reader")
    fields = {"num_hidden_layers": 30, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 4096}
    sizes = fields | {"num_attention_heads": 2, "num_key_value_heads": 1}
    save_tiny(folder / "HuggingFaceTB/SmolLM2-135M-Instruct", tiny_llama(**sizes))
    for name in ("out/math", "out/code"):
        get_peft_model(tiny_llama(**sizes), LoraConfig()).save_pretrained(folder / name)
    model = tiny_sorted(exit_layers=[10, 15, 20, 30], **sizes)
    save_tiny(folder / "user/sorted-llama", model)
    model.generation_config.eos_token_id = [2, *range(100, 259)]  # short answers to what is measured many times
    save_tiny(folder / "out/demo/final", model)
    qwen = save_tiny(folder / "Qwen/Qwen2.5-0.5B-Instruct", tiny_family("qwen2", num_hidden_layers=24))
    save_tiny(folder / "user/sorted-qwen", SortedLlamaForCausalLM.from_pretrained(qwen, exit_layers=[12, 24]))
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    data = {
        "trl-lib/Capybara/train.jsonl": [{"messages": chat}] * 8,
        "calibration.jsonl": [{"prompt": f"{i} - 1 = ", "completion": f"{i - 1}"} for i in range(117)],
        "out/demo/held_out.jsonl": [{"prompt": f"{i} + 1 = ", "completion": f"{i + 1}"} for i in range(2)],
        "openai/gsm8k/main/train.jsonl": [{"question": "1 + 1?", "answer": "#### 2"}] * 5,
        "openai/gsm8k/main/test.jsonl": [{"question": "1 + 1?", "answer": "#### 2"}],
    }
    choice = {"question": "Up?", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "A"}
    data |= {f"allenai/ai2_arc/ARC-Easy/{split}.jsonl": [choice] for split in ("train", "validation", "test")}
    for file, rows in data.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, config in (("openai/gsm8k", "main"), ("allenai/ai2_arc", "ARC-Easy")):
        page = f"---\nconfigs:\n- config_name: {config}\n  data_dir: {config}\n---\n"
        (folder / name / "README.md").write_text(page)
    return folder


@pytest.fixture(scope="module", autouse=True)
def harness_tasks_are_read_once():
    """lm-evaluation-harness reads thousands of files for each command."""
    with pytest.MonkeyPatch.context() as patch:
        found = TaskManager().task_index
        patch.setattr("lm_eval.tasks.manager.TaskIndex.build", lambda self, folders: dict(found))
        yield


@pytest.fixture
def at_home(reader, monkeypatch):
    """In that folder."""
    monkeypatch.chdir(reader)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return reader


def test_every_block_says_what_it_is():
    assert {block.language for block in BLOCKS} == {"python", "shell", "text", "bibtex"}
    assert len(PYTHON) > 8 and len(COMMANDS) > 30
    for page in files(PAGES):
        assert page.read_text().count("```") == 2 * len(fences("", page.read_text())), page


def test_what_is_not_run_stands_on_a_page_and_has_a_reason():
    texts = [block.text for block in PYTHON] + [param.values[1] for param in COMMANDS]
    assert {not_run(text) for text in texts} - {None} == set(NOT_RUN)
    assert all((ROOT / test).exists() for reason in NOT_RUN.values() for test in re.findall(r"tests/\S+", reason))


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_block_of_python_runs_and_prints(block, at_home, capsys):
    if not not_run(block.text):
        assert run(block, capsys).strip(), "prints nothing"


def run(block: Block, capsys) -> str:
    """What a reader who pastes it into a new process sees."""
    asked_as_trained = '"role": "user"' in block.text or 'Answer:"' in block.text  # a chat, or the demo's questions
    assert asked_as_trained or not re.search(r"\.generate\(|pipeline\(", block.text)
    capsys.readouterr()
    examples = doctest.DocTestParser().get_examples(block.text)
    namespace = {"__name__": "__main__"}
    if not examples:
        exec(compile(block.text, block.where, "exec"), namespace)
        return capsys.readouterr().out
    printed = ""
    for example in examples:
        exec(compile(example.source, block.where, "single"), namespace)
        out = capsys.readouterr().out
        assert not example.want or out == example.want
        printed += out
    return printed


def test_the_blocks_of_pages_that_are_made_run(at_home, capsys):
    """Of a checkpoint, of an extracted Llama, of an adapter."""
    commands.main(["card", "user/sorted-llama"])
    commands.main(["extract", "user/sorted-llama", "--exit", "15", "out/fifteen"])
    base, data = "HuggingFaceTB/SmolLM2-135M-Instruct", load_dataset("trl-lib/Capybara", split="train")
    options = {"exit_layers": "every:10", "max_steps": 1, "report_to": "none"}
    args = SortedSFTConfig("out/adapter", **options)
    trainer = SortedSFTTrainer(base, args=args, train_dataset=data, peft_config=LoraConfig())
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    for folder in ("user/sorted-llama", "out/fifteen", "out/adapter"):
        page = Path(folder, "README.md").read_text()
        blocks = [block for block in fences(folder, page) if block.language == "python"]
        assert blocks
        for block in blocks:
            assert run(block, capsys).strip(), block.text


@pytest.mark.parametrize("block, line", COMMANDS)
def test_a_command_runs(block, line, at_home, monkeypatch, capsys):
    words = shlex.split(line)
    for word in words:
        if re.match(r"(examples|benchmarks|docs|tests|\.ci)/", word):
            assert (ROOT / word).exists() or word.endswith(".png")
    if not_run(line):
        return
    if words[0] == "make":
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "lm_eval":
        (command,) = importlib.metadata.entry_points(group="console_scripts", name=words[0])
        monkeypatch.setattr(sys, "argv", words)
        command.load()()
        assert "|" in capsys.readouterr().out
    elif words[0] == "sorted-llama":
        run_hub_card(words[1:], block.is_script, monkeypatch)
        assert block.is_script or capsys.readouterr().out
    else:
        assert Path(words[0]).name == "python" and block.is_script
        read_flags(ROOT / words[1], words[1:], monkeypatch)


def run_hub_card(arguments: list[str], only_read: bool, monkeypatch) -> None:
    def upload(folder, name, message, private=False, *_, **__):
        return f"https://hub/{name}: {len(files_to_push(folder))} files"

    monkeypatch.setattr("sorted_llama.hub_card.push.upload", upload)
    if only_read:
        commands.parse(arguments)
    else:
        commands.main(arguments)


class Read(Exception):
    """The flags were read, and there is nothing more to see."""


def read_flags(script: Path, words: list[str], monkeypatch) -> None:
    def then_stop(read):
        def read_and_stop(*arguments, **kwargs):
            read(*arguments, **kwargs)
            raise Read

        return read_and_stop

    for parser, method in ((argparse.ArgumentParser, "parse_args"), (TrlParser, "parse_args_and_config")):
        monkeypatch.setattr(parser, method, then_stop(getattr(parser, method)))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    with pytest.raises(Read), contextlib.redirect_stderr(io.StringIO()) as errors:
        runpy.run_path(str(script), run_name="__main__")
    assert not errors.getvalue()
