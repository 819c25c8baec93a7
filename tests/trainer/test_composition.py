"""What sorted training composes with: TRL's other trainers and its dataset formats."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from tests.tiny import reference_llama, save_tiny, tiny_llama, tiny_sorted, tiny_tokenizer
from tests.trainer.runs import EXITS, logged, make_args, make_data, make_trainer, naive_means, text
from trainer import SortedSFTTrainer


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
def test_dpo_at_an_exit(tmp_path, exit_layer):
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
def test_grpo_at_an_exit(tmp_path, exit_layer):
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


# Quantized and sharded weights


def test_qlora(tmp_path):
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


def test_tensor_parallel_plan():
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
def test_formats(tmp_path, name, streamed):
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


def test_processes_that_prepare_the_data(tmp_path):
    """`dataset_num_proc` changes nothing in what is trained."""
    runs = [make_trainer(tmp_path, data=make_data("messages"), dataset_num_proc=n) for n in (None, 2)]
    for trainer in runs:
        trainer.train()
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
