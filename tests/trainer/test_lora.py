"""LoRA on a sorted model: what is trained and saved, and how it is loaded again, with and without this project."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
)
from trl import SFTTrainer

from sorted_llama import SortedLlamaForCausalLM
from tests.tiny import reference_llama, save_tiny, tiny_llama, tiny_sorted
from tests.trainer.runs import (
    EXITS,
    assert_equal_weights,
    make_data,
    make_trainer,
    naive_sums,
)


pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's deprecations of options that it still has
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


INPUT_IDS = torch.tensor([[1, 50, 60, 70, 80, 90]])


def assert_equal_exits(actual, expected):
    """Logits of every exit. Merged and unmerged adapters differ by rounding."""
    for k in EXITS:
        with torch.no_grad():
            logits = [model.eval()(input_ids=INPUT_IDS, exit_layer=k).logits for model in (actual, expected)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A trainer that trained LoRA on PEFT's default modules of a sorted folder, and the folder of the adapter."""
    tmp_path = tmp_path_factory.mktemp("lora")
    base = save_tiny(tmp_path / "base", tiny_sorted())
    trainer = make_trainer(
        tmp_path / "out", base, processing_class=None, peft_config=LoraConfig(r=4), learning_rate=0.05, max_steps=5
    )
    trainer.train()
    adapter = tmp_path / "adapter"
    trainer.save_model(str(adapter))
    trainer.model.eval()
    return trainer, adapter


def test_lora_trains_the_modules_of_a_llama(lora):
    trainer, _ = lora
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=4))
    trained = {name for name, param in trainer.model.named_parameters() if param.requires_grad}
    assert trained == {name for name, param in theirs.named_parameters() if param.requires_grad}


def test_lora_adapter_is_reloaded(lora):
    trainer, adapter = lora
    untrained = SortedLlamaForCausalLM.from_pretrained(adapter.parent / "base").eval()
    with torch.no_grad():
        change = (
            trainer.model(input_ids=INPUT_IDS, exit_layer=1).logits
            - untrained(input_ids=INPUT_IDS, exit_layer=1).logits
        )
    assert change.abs().max() > 0.1
    reloaded = AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert isinstance(reloaded.get_base_model(), SortedLlamaForCausalLM)
    assert_equal_exits(reloaded, trainer.model)


def test_lora_is_merged(lora, tmp_path):
    trainer, adapter = lora
    merged = AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload()
    assert isinstance(merged, SortedLlamaForCausalLM)
    assert_equal_exits(merged, trainer.model)
    merged.save_pretrained(tmp_path)
    assert_equal_exits(AutoModelForCausalLM.from_pretrained(tmp_path), trainer.model)
    for k in EXITS:  # and an exit's plain Llama has it too
        with torch.no_grad():
            logits = reference_llama(merged, k)(input_ids=INPUT_IDS).logits
            torch.testing.assert_close(logits, merged(input_ids=INPUT_IDS, exit_layer=k).logits)


def test_two_adapters_are_merged_into_one_sorted_model(tmp_path):
    """`"cat"` keeps what each adapter adds: the merged weights are the base's and the weighted sum of both."""
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(tiny_sorted(), config).save_pretrained(tmp_path / name)

    def merged(name: str) -> SortedLlamaForCausalLM:
        model = PeftModel.from_pretrained(tiny_sorted(), tmp_path / "first", adapter_name="first")
        model.load_adapter(tmp_path / "second", adapter_name="second")
        model.add_weighted_adapter(["first", "second"], [0.7, 0.3], "both", combination_type="cat")
        model.set_adapter(name)
        return model.merge_and_unload()

    base, both, *alone = (model.state_dict() for model in (tiny_sorted(), *map(merged, ("both", "first", "second"))))
    for name, weight in both.items():
        first, second = (of_one[name] - base[name] for of_one in alone)
        torch.testing.assert_close(weight, base[name] + 0.7 * first + 0.3 * second, rtol=1e-5, atol=1e-5)
    merged("both").save_pretrained(tmp_path / "both")
    loaded = SortedLlamaForCausalLM.from_pretrained(tmp_path / "both")
    assert loaded.config.exit_layers == EXITS
    assert_equal_exits(loaded, merged("both"))


def test_lora_adapter_generates_at_an_exit(lora):
    trainer, adapter = lora
    reloaded = AutoPeftModelForCausalLM.from_pretrained(adapter)
    reference = reference_llama(AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload(), 2)
    arguments = {"input_ids": INPUT_IDS, "max_new_tokens": 8, "do_sample": False}
    assert reloaded.generate(**arguments, exit_layer=2).tolist() == reference.generate(**arguments).tolist()


def test_lora_on_a_plain_llamas_folder_is_loaded_around_it(tmp_path):
    """An adapter trained on a plain Llama's folder is loaded around that folder as a sorted model."""
    base = save_tiny(tmp_path / "base")
    trainer = make_trainer(tmp_path / "out", base, processing_class=None, peft_config=LoraConfig(r=4))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    reloaded = PeftModel.from_pretrained(
        SortedLlamaForCausalLM.from_pretrained(base, exit_layers=EXITS), tmp_path / "adapter"
    )
    assert_equal_exits(reloaded, trainer.model)


def test_lora_step_equals_the_naive_sum(tmp_path):
    model = tiny_llama(initializer_range=0.1)
    llama = copy.deepcopy(model)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(model, copy.deepcopy(config))
    reference = get_peft_model(llama, copy.deepcopy(config))
    reference.load_state_dict(model.state_dict())
    data = make_data().select(range(4))
    trainer = make_trainer(
        tmp_path, model, data, optim="sgd", lr_scheduler_type="constant", learning_rate=0.05, max_grad_norm=0,
        max_steps=2, per_device_train_batch_size=4,
    )  # fmt: skip
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.train()
    optimizer = torch.optim.SGD([param for param in reference.parameters() if param.requires_grad], lr=0.05)
    for _ in range(2):
        sums, *_, count = naive_sums(reference.get_base_model(), batch)
        optimizer.zero_grad()
        (sums.sum() / count).backward()
        optimizer.step()
    assert_equal_weights(trainer.model, reference, 2e-5)


def test_detached_exits_with_adapters_are_trained_and_saved(tmp_path):
    """PEFT freezes what the exits own, unless it is told to train and save it."""
    options = {"exit_heads": "lens", "detach_exits": True, "max_steps": 4, "learning_rate": 1e-2}
    for peft_config in (LoraConfig(r=2), LoraConfig(r=2, modules_to_save=["exit_norms.1"])):
        for wanted in ({}, {"detach_exits": False, "exit_learning_rate": 1e-3}):
            with pytest.raises(ValueError, match=r"modules_to_save=\['exit_norms.1', 'exit_norms.2'\]"):
                make_trainer(tmp_path, peft_config=peft_config, **{**options, **wanted})
    peft_config = LoraConfig(r=2, modules_to_save=["exit_norms.1", "exit_norms.2"])
    trainer = make_trainer(tmp_path, peft_config=peft_config, eval_dataset=make_data(), **options)
    untrained = trainer.evaluate()
    trainer.train()
    evaluated = trainer.evaluate()
    for k in EXITS:
        assert evaluated[f"eval_exit_{k}_loss"] < untrained[f"eval_exit_{k}_loss"]
    trainer.save_model()
    base = SortedLlamaForCausalLM.from_llama(tiny_llama(), exit_layers=EXITS, exit_heads="lens")
    reloaded = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    inputs = torch.arange(3, 23).view(2, 10)
    model = trainer.model.eval()
    with torch.no_grad():
        for k in EXITS:
            expected = model(input_ids=inputs, exit_layer=k).logits
            for merged in (reloaded(input_ids=inputs, exit_layer=k), reloaded.extract_submodel(k)(inputs)):
                torch.testing.assert_close(merged.logits, expected, rtol=1e-4, atol=1e-4)


# TRL's own trainer on a sorted model: what needs its path, its config or PEFT's tables


@pytest.mark.parametrize("with_auto_map", [True, False])
def test_trl_loads_a_sorted_folder(tmp_path, with_auto_map):
    """TRL reads `config.auto_map` of classes that transformers does not know."""
    folder = Path(save_tiny(tmp_path / "model", tiny_sorted()))
    if not with_auto_map:
        config = json.loads((folder / "config.json").read_text())
        del config["auto_map"]
        (folder / "config.json").write_text(json.dumps(config))
    trainer = make_trainer(tmp_path, str(folder), trainer_class=SFTTrainer, peft_config=LoraConfig(r=2))
    assert isinstance(trainer.model.get_base_model(), SortedLlamaForCausalLM)
    trainer.train()


def test_peft_knows_the_default_modules_of_a_sorted_model():
    model = get_peft_model(tiny_sorted(), LoraConfig())
    expected = get_peft_model(tiny_llama(), LoraConfig())
    assert model.peft_config["default"].target_modules == expected.peft_config["default"].target_modules
