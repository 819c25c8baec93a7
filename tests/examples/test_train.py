"""`examples/train.py` as its users run it: with a YAML file or flags, alone and under `accelerate launch`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.trainer import SortedSFTConfig
from tests.tiny import reference_llama, save_tiny


ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "examples" / "train.py")

FIELDS = {
    "exit_layers": [1, 2, 4],
    "max_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "max_length": 64,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "steps",
    "save_steps": 3,
}


def run(folder, *command):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "HF_"))}
    env |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr[-20_000:]  # pytest would cut the end
    return result.stdout


def run_here(train, folder, *flags):
    """As `run` with the script, in this process, which has imported all that is slow to import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [SCRIPT, *flags])
        train.main()


def make_inputs(folder):
    """A folder with a model, and data with prompts and completions of different lengths."""
    save_tiny(folder / "model")
    rows = [{"prompt": f"count to {n}:", "completion": " " + " ".join(map(str, range(n)))} for n in range(1, 21)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def inputs(tmp_path):
    return make_inputs(tmp_path)


def write_config(folder, **fields):
    fields = {"model_name_or_path": "model", "dataset_name": "data.jsonl", "output_dir": "out", **FIELDS, **fields}
    (folder / "config.yaml").write_text(yaml.safe_dump(fields))


def history(folder):
    (checkpoint,) = folder.glob("checkpoint-*")
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def test_accelerate_launch_trains_what_a_yaml_file_says(inputs):
    """`accelerate launch --num_processes 2 --cpu`; without MPI, accelerate starts one process for it."""
    write_config(inputs, eval_strategy="steps", eval_steps=3)
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    output = run(inputs, *launch, SCRIPT, "--config", "config.yaml", "--exit_layers", "every:2")
    model = AutoModelForCausalLM.from_pretrained(inputs / "out")
    assert isinstance(model, SortedLlamaForCausalLM)
    assert model.config.exit_layers == [2, 4]
    tokenizer = AutoTokenizer.from_pretrained(inputs / "out")
    before = load_file(inputs / "model" / "model.safetensors")["model.norm.weight"]
    assert not torch.equal(model.model.norm.weight, before)

    entries = history(inputs / "out")
    assert all(sum(f"exit_{k}_loss" in entry for entry in entries) == 3 for k in (2, 4))
    (evaluation,) = (entry for entry in entries if "eval_loss" in entry)
    assert {f"eval_exit_{k}_{name}" for k in (2, 4) for name in ("loss", "agreement")} <= evaluation.keys()

    # The printed line, run as it is
    assert output.count("The model is in out.") == 1
    (line,) = re.findall(r"^    (AutoModelForCausalLM.*)$", output, re.MULTILINE)
    tokens = tokenizer("count to 3:", return_tensors="pt").to(model.device)
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "inputs": tokens}
    printed = line.replace('"out"', repr(str(inputs / "out")))
    expected = reference_llama(model, 2).generate(**tokens)
    assert "exit_layer=2" in line
    assert eval(printed, names).tolist() == expected.tolist()


def test_flags_train_an_adapter(train, inputs, capsys):
    flags = [f"--{name}={value}" for name, value in FIELDS.items() if name != "exit_layers"]
    run_here(
        train, inputs, "--model_name_or_path", "model", "--dataset_name", "data.jsonl", "--output_dir", "out",
        "--exit_layers", "1", "4", "--use_peft", "--lora_r", "4", *flags,
    )  # fmt: skip
    output = capsys.readouterr().out
    assert (inputs / "out" / "adapter_model.safetensors").is_file()
    assert not (inputs / "out" / "model.safetensors").exists()
    (line,) = re.findall(r"^    (PeftModel.*)$", output, re.MULTILINE)
    tokenizer = AutoTokenizer.from_pretrained(inputs / "out")
    names = {"PeftModel": PeftModel, "SortedLlamaForCausalLM": SortedLlamaForCausalLM}
    tokens = tokenizer("count to 3:", return_tensors="pt")
    printed = line.replace('"out"', repr(str(inputs / "out"))).replace('"model"', repr(str(inputs / "model")))
    assert "exit_layer=1" in line and "exit_layers=[1, 4]" in line
    assert eval(printed, {**names, "inputs": tokens}).shape[1] > tokens["input_ids"].shape[1]


# Accelerate knows no FSDP on CPUs: told that they are GPUs, it shards over them just the same. DeepSpeed compiles
# collectives through shared memory where it finds a compiler: told that it cannot, it takes gloo's.
ON_CPUS = """
import runpy
import sys
from accelerate import PartialState
from accelerate.utils import DistributedType

init = PartialState.__init__


def init_as_gpus(self, *args, **kwargs):
    init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = init_as_gpus
if sys.platform == "linux":  # elsewhere there is none
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.fixture(scope="module")
def in_one_process(train, tmp_path_factory):
    """Folder with a configuration of some options, and in `one` what a single process makes of it."""
    folders = {}

    def train_alone(options):
        key = str(options)
        if key not in folders:
            folders[key] = make_inputs(tmp_path_factory.mktemp("one_process"))
            fields = {"train_sampling_strategy": "sequential", "max_steps": 10, "save_steps": 10, **options}
            write_config(folders[key], **fields)
            run_here(train, folders[key], "--config", "config.yaml", "--output_dir", "one")
        return folders[key]

    return train_alone


# Weights of the exits' own, at a learning rate of their own, which not every step trains. Not with ZeRO: it takes a
# missing gradient for 0, so that Adam's momentum still moves them.
LENSES = {"exit_heads": "lens", "detach_exits": True, "exit_learning_rate": 5e-3}
LENSES |= {"exit_schedule": "random", "self_distillation_weight": 0.5}
HEADS = {"exit_heads": "separate"}  # weights that the loss uses without calling their modules


LAYERS = {"exit_heads": "layer"}
RUNS = [("ddp", LENSES), ("fsdp2", LAYERS), ("zero2", {}), ("zero3", HEADS)]


@pytest.mark.parametrize("engine, options", RUNS, ids=str)
def test_two_processes_equal_one(in_one_process, tmp_path, engine, options):
    """
    The same global batches split over two processes, with each engine's configuration: the losses and weights of a
    single process, and a checkpoint that loads without it.
    """
    inputs = shutil.copytree(in_one_process(options), tmp_path, dirs_exist_ok=True)
    (inputs / "on_cpus.py").write_text(ON_CPUS)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"examples/accelerate/{engine}.yaml")]
    if engine == "ddp":  # accelerate launches several processes on CPUs with MPI only
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    else:
        launch += ["--num_processes", "2", "--mixed_precision", "no"]
    script = [SCRIPT] if engine == "ddp" else ["on_cpus.py", SCRIPT]
    flags = ["--config", "config.yaml", "--output_dir", "two", "--per_device_train_batch_size", "2"]
    output = run(inputs, *launch, *script, *flags)
    assert output.count("The model is in two.") == 1

    one, two = history(inputs / "one"), history(inputs / "two")
    assert len(one) == len(two) == 10
    for entry, expected in zip(two, one, strict=True):
        assert entry.keys() == expected.keys()
        keys = [k for k in expected if k.endswith(("loss", "accuracy", "num_tokens", "grad_norm", "divergence"))]
        assert len(keys) == 10
        for key in keys:
            assert entry[key] == pytest.approx(expected[key], rel=1e-5), key
    expected = load_file(inputs / "one" / "model.safetensors")
    for folder in ("two", "two/checkpoint-10"):
        weights = load_file(inputs / folder / "model.safetensors")
        for name, tensor in expected.items():
            difference = (weights[name] - tensor).abs().max().item()
            assert difference <= 1e-5 * tensor.abs().max().item(), name
    assert sorted(path.name for path in (inputs / "two").glob("*.py")) == sorted(
        path.name for path in (inputs / "one").glob("*.py")
    )
    assert json.loads((inputs / "two" / "config.json").read_text()) == json.loads(
        (inputs / "one" / "config.json").read_text()
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_accelerate_knows_every_field_of_its_configurations(engine):
    """Accelerate knows every field of the configurations; several GPUs in all, of one machine."""
    config = load_config_from_file(str(ROOT / "examples" / "accelerate" / f"{engine}.yaml"))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type == kinds.get(engine, "DEEPSPEED")
    assert config.num_processes > 1 and config.mixed_precision == "bf16"


def test_every_line_of_the_yaml_file_is_an_option():
    """Every line of the example's YAML file is an option, and stays one."""
    parser = TrlParser((ScriptArguments, SortedSFTConfig, ModelConfig))
    path = str(ROOT / "examples" / "train.yaml")
    _, config, model_args = parser.parse_args_and_config(
        ["--config", path, "--use_cpu", "--bf16", "false"], fail_with_unknown_args=True
    )
    assert config.exits_of(30) == [10, 15, 20, 30]
    assert model_args.use_peft is False


def test_every_line_that_is_commented_out_is_an_option(tmp_path):
    """So is every line that is commented out."""
    text = (ROOT / "examples" / "train.yaml").read_text()
    (tmp_path / "all.yaml").write_text(re.sub(r"^# ([a-z]\w*: )", r"\1", text, flags=re.MULTILINE))
    fields = yaml.safe_load((tmp_path / "all.yaml").read_text())
    assert fields["use_peft"] and fields["load_in_4bit"] and fields["exit_schedule"]
    parser = TrlParser((ScriptArguments, SortedSFTConfig, ModelConfig))
    _, config, model_args = parser.parse_args_and_config(
        ["--config", str(tmp_path / "all.yaml"), "--use_cpu", "--bf16", "false"], fail_with_unknown_args=True
    )
    assert config.push_to_hub and config.weights_of([10, 20, 30]) == [0.15, 0.15, 1.0]
    assert model_args.use_peft and model_args.lora_r == fields["lora_r"]


WRONG = {
    "no_file": (["--dataset_name", "nowhere.jsonl"], "nowhere.jsonl"),
    "empty": (["--dataset_name", "empty.jsonl"], "empty.jsonl cannot be read: it is empty"),
    "broken": (["--dataset_name", "broken.jsonl"], "broken.jsonl cannot be read: JSON parse error"),
    "columns": (["--dataset_name", "columns.jsonl"], "['question', 'answer']"),
    "dataset_offline": (["--dataset_name", "user/data"], "user/data"),
    "split": (["--dataset_train_split", "training"], "--dataset_train_split must be one of train"),
    "model_offline": (["--model_name_or_path", "user/model"], "user/model"),
    "not_a_llama": (["--model_name_or_path", "gpt2"], "gpt2"),
    "wrong_types": (["--model_name_or_path", "types"], "hidden_size"),
    "comma_list": (["--exit_layers", "1,2,4"], "'1,2,4'"),
    "not_ascending": (
        ["--exit_layers", "2", "1", "4"],
        "from 1 to the full depth, ascending",
    ),
    "too_deep": (["--exit_layers", "2", "5"], "from 1 to 4, ascending"),
    "no_exits": ([], "--exit_layers is required"),
    "no_config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "broken_config": (["--config", "broken.yaml"], "broken.yaml"),
}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("flags, said", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line_before_a_model_is_loaded(train, inputs, monkeypatch, flags, said):
    (inputs / "empty.jsonl").write_text("")
    (inputs / "broken.jsonl").write_text('{"prompt": "a", "compl')
    (inputs / "columns.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (inputs / "broken.yaml").write_text("max_steps: [1")
    (inputs / "gpt2").mkdir()
    (inputs / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    (inputs / "types").mkdir()
    (inputs / "types" / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(train, "train", None)
    given = ["--model_name_or_path", "model", "--dataset_name", "data.jsonl", "--use_cpu", "--bf16", "false"]
    exits = [] if "--exit_layers" in flags or not flags else ["--exit_layers", "every:2"]
    monkeypatch.setattr(sys, "argv", ["train.py", *given, *exits, *flags])
    with pytest.raises(SystemExit) as error:
        train.main()
    assert said in error.value.code and "\n" not in error.value.code
