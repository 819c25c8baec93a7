"""What sorted training composes with: TRL's other trainers and its dataset formats."""

import copy
import json
import math
import pickle

import pytest
import torch
import yaml
from datasets import Dataset, IterableDataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)

from sorted_llama.modeling_sorted_llama import SortedLlamaConfig, SortedLlamaForCausalLM
from sorted_llama.trainer import SortedSFTTrainer
from tests.tiny import reference_llama, run_as_stranger, save_tiny, tiny_llama, tiny_sorted, tiny_tokenizer
from tests.trainer.runs import EXITS, logged, make_args, make_data, make_trainer, naive_means, text


# Other trainers


def preferences():
    return Dataset.from_list(
        [{"prompt": text(i, 2), "chosen": text(i + 2, 3), "rejected": text(i + 5, 4)} for i in range(6)]
    )


TINY_RUN = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_steps": 2,
    "learning_rate": 1e-3,
}


@pytest.mark.parametrize("exit_layer", [2, 4])
def test_dpo_trains_an_exit_as_a_plain_llama(tmp_path, exit_layer):
    """DPO trains the depth that the config names, as it trains a plain Llama of as many layers."""
    model = tiny_sorted()
    plain = save_tiny(tmp_path / "plain", reference_llama(model, exit_layer))
    model.config.exit_layer = exit_layer
    trainers = []
    for folder in (save_tiny(tmp_path / "sorted", model), plain):
        args = DPOConfig(str(tmp_path), per_device_train_batch_size=2, max_length=64, **TINY_RUN)
        trainers.append(DPOTrainer(folder, args=args, train_dataset=preferences()))
        trainers[-1].train()
    for key in ("loss", "rewards/margins"):
        assert logged(trainers[0], key) == pytest.approx(logged(trainers[1], key), rel=1e-4, abs=1e-5)
    trained, expected = (trainer.model.state_dict() for trainer in trainers)
    for name, weight in expected.items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-4, atol=1e-5)
    for name in trained.keys() - expected.keys():  # above the exit
        assert torch.equal(trained[name], model.state_dict()[name])


@pytest.mark.parametrize("exit_layer", [2, 4])
def test_grpo_trains_the_layers_of_an_exit_alone(tmp_path, exit_layer):
    """GRPO generates and trains at the depth that the config names."""
    model = tiny_sorted()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    model.config.exit_layer = exit_layer
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
        args=GRPOConfig(
            str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=8, **TINY_RUN
        ),
        train_dataset=preferences().select_columns("prompt"),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert len(logged(trainer, "reward")) == 2
    changed = {name for name, param in model.named_parameters() if (param != before[name]).any()}
    assert {int(name.split(".")[2]) for name in changed if "layers" in name} == set(range(exit_layer))


# References that a trainer loads a second time, by the policy's path


def loaded_at_2(folder):
    return SortedLlamaForCausalLM.from_pretrained(folder, exit_layer=2)


def changed_to_2(folder):
    model = SortedLlamaForCausalLM.from_pretrained(folder)
    model.config.exit_layer = 2
    return model


def first_2_layers(folder):
    return SortedLlamaForCausalLM.from_pretrained(folder, num_hidden_layers=2)


def full_depth_of_a_shallow_checkpoint(folder):
    return SortedLlamaForCausalLM.from_pretrained(folder, exit_layer=None)


@pytest.mark.parametrize("load", [loaded_at_2, changed_to_2, first_2_layers, full_depth_of_a_shallow_checkpoint])
def test_dpo_starts_from_a_reference_of_the_policys_depth(tmp_path, load):
    """Before the first step policy and reference are one model: the loss is that of a coin."""
    saved = tiny_sorted()
    if load is full_depth_of_a_shallow_checkpoint:
        saved.config.exit_layer = 2
    model = load(save_tiny(tmp_path / "model", saved))
    args = DPOConfig(str(tmp_path), max_length=64, **{**TINY_RUN, "learning_rate": 0.0, "max_steps": 1})
    trainer = DPOTrainer(model, args=args, train_dataset=preferences(), processing_class=tiny_tokenizer())
    trainer.train()
    assert trainer.ref_model is not None
    assert logged(trainer, "loss") == pytest.approx([math.log(2)], rel=1e-6)


def test_references_of_other_trainers_have_the_policys_depth(tmp_path):
    folder = save_tiny(tmp_path / "model", tiny_sorted())
    judged = [{"prompt": text(i, 2), "completion": text(i + 2, 3), "label": i % 2 == 0} for i in range(6)]
    grpo = {"beta": 0.1, "num_generations": 2, "per_device_train_batch_size": 2}
    rewards = {"reward_funcs": lambda completions, **_: [1.0 for _ in completions]}
    prompts_only = preferences().select_columns("prompt")
    for trainer_class, config, data, kwargs in (
        (
            KTOTrainer,
            KTOConfig(str(tmp_path), per_device_train_batch_size=2, **TINY_RUN),
            Dataset.from_list(judged),
            {},
        ),
        (GRPOTrainer, GRPOConfig(str(tmp_path), **grpo, **TINY_RUN), prompts_only, rewards),
        (RLOOTrainer, RLOOConfig(str(tmp_path), **grpo, **TINY_RUN), prompts_only, rewards),
    ):
        model = loaded_at_2(folder)
        trainer = trainer_class(model, args=config, train_dataset=data, processing_class=tiny_tokenizer(), **kwargs)
        inputs = {"input_ids": torch.arange(3, 11)[None]}
        logits = trainer.ref_model(**inputs).logits
        torch.testing.assert_close(logits, reference_llama(tiny_sorted(), 2)(**inputs).logits)


SORTED = {"exit_layers": [1, 2, 4], "exit_loss_weights": [1.0, 0.5, 2.0], "exit_layer": 2, "exit_heads": "lens"}


@pytest.mark.parametrize("load", [SortedLlamaConfig.from_pretrained, AutoConfig.from_pretrained])
def test_a_configs_path_carries_its_depth(tmp_path, load):
    """What is passed goes before it, and the plain path is the checkpoint, as ever."""
    folder = save_tiny(tmp_path / "model", tiny_sorted())

    def path(**fields):
        config = load(folder, **fields)
        config.name_or_path = folder  # as a model's `from_pretrained` does
        return config._name_or_path

    again = load(path(**SORTED))
    assert {name: getattr(again, name) for name in SORTED} == SORTED
    assert load(path(**SORTED), exit_layer=None).exit_layer is None
    assert load(path(**SORTED), exit_layer=1).exit_layer == 1
    cut = load(path(exit_layer=1), num_hidden_layers=2)
    assert (cut.num_hidden_layers, cut.exit_layers, cut.exit_layer) == (2, [1, 2], 1)
    assert load(path(num_hidden_layers=3)).num_hidden_layers == 3
    for plain in (folder, str(path(**SORTED)), copy.deepcopy(path(**SORTED))):
        assert load(plain).to_dict() == load(folder).to_dict()
        assert load(plain).exit_layer is None
    loaded = SortedLlamaForCausalLM.from_pretrained(folder, exit_layer=2)
    loaded.config.exit_layer = 1
    assert load(copy.deepcopy(loaded).config._name_or_path).exit_layer == 1


def test_a_configs_path_is_a_text_in_files(tmp_path):
    folder = save_tiny(tmp_path / "model", tiny_sorted())
    path = AutoConfig.from_pretrained(folder, exit_layer=2)._name_or_path
    assert path == folder and isinstance(path, str) and hash(path) == hash(folder)
    assert json.loads(json.dumps({"base_model": path})) == {"base_model": folder}
    for dump in (yaml.dump, yaml.safe_dump):
        assert dump({"base_model": path}) == dump({"base_model": folder})
    for copied in (copy.copy(path), copy.deepcopy(path), pickle.loads(pickle.dumps(path))):
        assert type(copied) is str and copied == folder
    assert type(SortedLlamaConfig.from_pretrained(folder).to_dict()["_name_or_path"]) is str
    assert "_name_or_path" not in json.loads((tmp_path / "model" / "config.json").read_text())


RELOAD = """
import pickle
from transformers import AutoModelForCausalLM

first = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, exit_layer=2)
for path in (first.config._name_or_path, pickle.loads(pickle.dumps(first.config._name_or_path))):
    print(AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).config.exit_layer)
"""


def test_a_path_carries_the_depth_without_this_project(tmp_path):
    folder = save_tiny(tmp_path / "model", tiny_sorted())
    assert run_as_stranger(RELOAD, folder, folder=tmp_path).split() == ["2", "None"]


def test_a_reward_model_is_a_plain_llama(tmp_path):
    """A sorted model is none, and TRL says so; the sub-model of an exit becomes one."""
    model = tiny_sorted()
    folder = save_tiny(tmp_path / "model", model)
    arguments = {"train_dataset": preferences(), "processing_class": tiny_tokenizer()}
    config = RewardConfig(str(tmp_path), **TINY_RUN)
    with pytest.raises(ValueError, match="SortedLlamaConfig.*AutoModelForSequenceClassification"):
        RewardTrainer(folder, args=config, **arguments)
    with pytest.raises(ValueError, match="num_labels"):
        RewardTrainer(loaded_at_2(folder), args=config, **arguments)
    plain = save_tiny(tmp_path / "plain", model.extract_submodel(2))
    assert RewardTrainer(plain, args=config, **arguments).model.config.num_hidden_layers == 2


@pytest.mark.parametrize("auto_class", [AutoPeftModelForCausalLM, AutoModelForCausalLM])
def test_adapter_of_an_exit_is_loaded_by_its_path(tmp_path, auto_class):
    """What the adapter's file knows of its base is the path: the depth is an argument again."""
    model = get_peft_model(
        loaded_at_2(save_tiny(tmp_path / "model", tiny_sorted())),
        LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    inputs = {"input_ids": torch.arange(3, 11)[None]}
    loaded = auto_class.from_pretrained(tmp_path / "adapter", exit_layer=2).eval()
    torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)


# Quantized and sharded weights


def test_qlora_trains_adapters_alone_with_the_losses_of_a_plain_llama(tmp_path):
    """Adapters on 4-bit weights: the losses of a plain Llama in 4 bits, and only the adapters are trained."""
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    folder = save_tiny(tmp_path / "model", tiny_llama(hidden_size=64))
    trainer = SortedSFTTrainer(
        folder,
        args=make_args(tmp_path / "out", exit_layers=EXITS, max_steps=2, seed=1),
        train_dataset=make_data(),
        quantization_config=quantization,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    layer = trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert type(layer).__name__ == "Linear4bit"
    before = layer.weight.clone()
    batches = watched_batches(trainer)
    trainer.train()
    plain = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization)
    losses, *_ = naive_means(plain, batches[:1])
    assert [logged(trainer, f"exit_{k}_loss")[0] for k in EXITS] == pytest.approx(losses, rel=1e-3)
    assert torch.equal(layer.weight, before)
    trained = [name for name, param in trainer.model.named_parameters() if param.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_a_sorted_model_has_a_llamas_tensor_parallel_plan():
    """Loading with `tp_plan="auto"` shards a sorted model as it does a Llama."""
    assert tiny_sorted().tp_plan == tiny_llama().tp_plan != {}
    assert tiny_sorted().config.base_model_tp_plan == tiny_llama().config.base_model_tp_plan


# TRL's dataset formats, at every exit: the logged losses are the naive ones of what the collator makes

TOOLS_TEMPLATE = (
    "{% if tools %}<s>tools\n{{ tools | tojson }}</s>{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}{{ m['content'] or '' }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def turns(i):
    """Two turns of a conversation."""
    roles = ("user", "assistant", "user", "assistant")
    return [{"role": role, "content": text(i + j, 2 + j % 2)} for j, role in enumerate(roles)]


def tool_row(i):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": i, "b": 1}}}
    tool = {"type": "function", "function": {"name": "add", "description": "a sum", "parameters": {"type": "object"}}}
    messages = [
        {"role": "user", "content": text(i, 2)},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": str(i + 1)},
        {"role": "assistant", "content": text(i, 3)},
    ]
    return {"messages": messages, "tools": [tool]}


def watched_batches(trainer):
    """Collated batches, as they are trained on."""
    batches, compute_loss = [], trainer.compute_loss

    def compute_and_keep(model, inputs, *args, **kwargs):
        batches.append(inputs)
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_and_keep
    return batches


FORMATS = {
    "several turns": ([{"messages": turns(i)} for i in range(4)], {}),
    "several turns, what the assistant says": (
        [{"messages": turns(i)} for i in range(4)],
        {"assistant_only_loss": True},
    ),
    "several completions a prompt": (
        [{"prompt": text(i // 2, 2), "completion": text(i + 3, 4)} for i in range(4)],
        {},
    ),
    "tools": ([tool_row(i) for i in range(4)], {"assistant_only_loss": True}),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_dataset_formats_have_naive_losses_at_every_exit(tmp_path, name, streamed):
    rows, options = FORMATS[name]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOLS_TEMPLATE
    data = IterableDataset.from_generator(lambda: iter(rows)) if streamed else Dataset.from_list(rows)
    trainer = make_trainer(
        tmp_path, data=data, processing_class=tokenizer, max_length=256, max_steps=1, seed=3, **options
    )
    batches = watched_batches(trainer)
    trainer.train()
    losses, *_ = naive_means(tiny_llama(), batches)
    labelled = [(batch["labels"] != -100).float().mean().item() for batch in batches]
    assert 0 < max(labelled) < 1
    assert [logged(trainer, f"exit_{k}_loss")[0] for k in EXITS] == pytest.approx(losses, rel=1e-4)


def test_processes_that_prepare_the_data_change_nothing(tmp_path):
    """`dataset_num_proc` changes nothing in what is trained."""
    runs = [make_trainer(tmp_path, data=make_data("messages"), dataset_num_proc=n) for n in (None, 2)]
    for trainer in runs:
        trainer.train()
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
