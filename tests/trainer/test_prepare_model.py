"""The model that is trained: what is taken for one, its exits and weights, and what of it is trained."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.trainer.prepare_model import _freeze_backbone
from tests.families import CASES, tiny_family
from tests.tiny import prompts, save_tiny, tiny_fields, tiny_llama, tiny_sorted, tiny_tokenizer
from tests.trainer.runs import (
    EXITS,
    SGD,
    assert_equal_weights,
    make_data,
    make_trainer,
    naive_step,
    owned,
)


pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's deprecations of options that it still has
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def test_a_plain_llama_becomes_sorted_without_a_copy(tmp_path):
    llama = tiny_llama()
    trainer = make_trainer(tmp_path, llama)
    assert isinstance(trainer.model, SortedLlamaForCausalLM)
    theirs = dict(llama.named_parameters())
    for name, param in trainer.model.named_parameters():
        assert param.data_ptr() == theirs[name].data_ptr()
    assert trainer.model.get_output_embeddings().weight is trainer.model.get_input_embeddings().weight
    before = llama.model.layers[0].mlp.up_proj.weight.clone()
    trainer.train()
    assert not torch.equal(llama.model.layers[0].mlp.up_proj.weight, before)


def test_a_sorted_model_is_taken_as_it_is(tmp_path):
    model = tiny_sorted()
    trainer = make_trainer(tmp_path, model, exit_layers=None)
    assert trainer.model is model
    assert trainer.exit_layers == EXITS
    trainer.train()


@pytest.mark.parametrize("make, end", [(tiny_llama, ""), (tiny_sorted, ""), (tiny_llama, "/")])
def test_a_folder_is_loaded_as_a_sorted_model(tmp_path, make, end):
    """A folder of a plain Llama (`model_type` that TRL knows) and of a sorted one (which it does not)."""
    saved = make()
    folder = save_tiny(tmp_path / "model", saved) + end
    trainer = make_trainer(tmp_path / "out", folder, processing_class=None)
    assert isinstance(trainer.model, SortedLlamaForCausalLM)
    assert trainer.model.config.model_type == "sorted_llama"
    assert trainer.model.dtype == torch.float32
    assert trainer.model.config.exit_layers == EXITS
    assert trainer.processing_class.get_vocab() == tiny_tokenizer().get_vocab()
    assert_equal_weights(trainer.model, saved, 0.0)
    trainer.train()


def test_model_init_kwargs_reach_the_loading_and_stay_in_the_arguments(tmp_path):
    folder = save_tiny(tmp_path / "model")
    model_init_kwargs = {"dtype": "bfloat16", "attn_implementation": "eager", "num_hidden_layers": 2}
    trainer = make_trainer(
        tmp_path / "out", folder, processing_class=None, exit_layers=[1, 2], model_init_kwargs=model_init_kwargs
    )
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.model.config._attn_implementation == "eager"
    assert len(trainer.model.model.layers) == 2
    assert trainer.args.model_init_kwargs == model_init_kwargs
    trainer.train()


@pytest.mark.parametrize("make", [tiny_llama, tiny_sorted])
def test_a_peft_model_keeps_its_adapter_around_a_sorted_model(tmp_path, make):
    """A `PeftModel` of a plain Llama becomes one of a sorted model, with the same adapter."""
    base = make()
    weights = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    trainer = make_trainer(tmp_path, model)
    assert isinstance(trainer.model, PeftModel)
    assert isinstance(trainer.model.get_base_model(), SortedLlamaForCausalLM)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora" in name for name in changed)
    assert changed == {name for name in before if "lora" in name}
    assert_equal_weights(trainer.model.unload(), weights, 0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Qwen2ForCausalLM(Qwen2Config(**tiny_fields())).model,
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=259)),
        lambda: get_peft_model(Qwen2ForCausalLM(Qwen2Config(**tiny_fields())), LoraConfig()),
        lambda: tiny_llama().model,
    ],
    ids=["headless_qwen2", "gpt2", "peft_qwen2", "headless_llama"],
)
def test_a_model_that_is_no_llama_is_refused(tmp_path, make):
    with pytest.raises(TypeError, match="`model` must be .*Llama"):
        make_trainer(tmp_path, make())


@pytest.mark.parametrize("name", ["GPTNeoX", "Qwen3", "Gemma2"])
def test_the_path_of_another_architecture_is_refused(tmp_path, name):
    """Another architecture's weights must not be read as a Llama's, with what is missing made up."""
    config = getattr(transformers, f"{name}Config")(**tiny_fields())
    folder = save_tiny(tmp_path / "model", getattr(transformers, f"{name}ForCausalLM")(config))
    with pytest.raises((TypeError, ValueError), match="(?i)llama"):
        make_trainer(tmp_path / "out", folder, processing_class=None)


@pytest.mark.parametrize("case", CASES)
def test_the_path_of_a_family_that_is_a_llama_is_trained(tmp_path, case):
    """All of it, but for the biases that the family has not."""
    folder = save_tiny(tmp_path / "model", tiny_family(case))
    trainer = make_trainer(tmp_path / "out", folder, max_steps=1, learning_rate=0.1)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    still = {name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])}
    absent = {name for name in before if name.endswith("o_proj.bias")} if case.startswith(("qwen2", "seed")) else set()
    assert still == absent and not any(before[name].any() for name in absent)
    assert trainer.model.config.exit_layers == [1, 2, 4]
    trainer.save_model()
    saved = SortedLlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert not any(saved.get_parameter(name).any() for name in absent)


@pytest.mark.parametrize("case", ["mistral", "qwen2", "phi3", "gemma"])
def test_a_model_of_a_family_that_is_a_llama_is_trained_as_its_path_is(tmp_path, case):
    model = tiny_family(case)
    folder = save_tiny(tmp_path / "model", model)
    model.generation_config.max_new_tokens = 7
    of_model, of_path = (
        make_trainer(tmp_path / name, source, max_steps=1, learning_rate=0.1)
        for name, source in (("of_model", model), ("of_path", folder))
    )
    assert_equal_weights(of_model.model, of_path.model, 0.0)
    assert of_model.model.config.base_model_type == model.config.model_type
    assert of_model.model.generation_config.max_new_tokens == 7
    of_model.train(), of_path.train()
    assert_equal_weights(of_model.model, of_path.model, 0.0)


def test_a_layer_of_an_exit_does_not_train_the_bias_that_its_family_lacks(tmp_path):
    tiny_family("qwen2").save_pretrained(tmp_path)
    model = SortedLlamaForCausalLM.from_pretrained(tmp_path, exit_layers=[2, 4], exit_heads="layer")
    trained = {name for name, p in _freeze_backbone(model).named_parameters() if p.requires_grad}
    assert "model.exit_decoders.2.self_attn.q_proj.bias" in trained
    assert not any(name.endswith("o_proj.bias") for name in trained)


@pytest.mark.parametrize("case, kind", [("qwen2", ""), ("phi3", " (converted to a Llama)")])
def test_adapters_of_a_family_are_trained_and_saved(tmp_path, case, kind):
    """For the base that they name."""
    folder = save_tiny(tmp_path / "model", tiny_family(case))
    trainer = make_trainer(tmp_path / "out", folder, max_steps=1, learning_rate=0.1, peft_config=LoraConfig(r=2))
    trainer.train()
    trainer.save_model()
    base = SortedLlamaForCausalLM.from_pretrained(folder, exit_layers=EXITS)
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    assert model.peft_config["default"].base_model_name_or_path == f"{folder}{kind}"
    assert_equal_weights(model.merge_and_unload(), trainer.model.merge_and_unload(), 0.0)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["o_proj"]}])
def test_adapters_do_not_train_the_bias_that_their_family_lacks(tmp_path, options):
    folder = save_tiny(tmp_path / "model", tiny_family("qwen2"))
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"] + ["o_proj"] * ("bias" in options), **options)
    trainer = make_trainer(tmp_path / "out", folder, max_steps=1, learning_rate=0.1, peft_config=lora)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any("bias" in name or "o_proj.modules_to_save" in name for name in trained)
    trainer.train()
    merged = trainer.model.merge_and_unload()
    biases = [parameter for name, parameter in merged.named_parameters() if name.endswith("o_proj.bias")]
    assert len(biases) == 4 and not any(map(torch.any, biases))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_adapters_that_are_made_by_hand_do_not_train_it_either(tmp_path, bias):
    """So they do on the family's own model what they do here."""
    folder = save_tiny(tmp_path / "model", tiny_family("qwen2"))
    lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], bias=bias, task_type="CAUSAL_LM")
    model = get_peft_model(SortedLlamaForCausalLM.from_pretrained(folder, exit_layers=EXITS), lora)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(**prompts(), labels=prompts()["input_ids"]).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path / "adapter")
    own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(own(**prompts()).logits, model(**prompts()).logits)


# Exits and weights


def test_exits_and_weights_reach_the_config(tmp_path):
    trainer = make_trainer(tmp_path, tiny_sorted(), exit_layers="every:3", exit_loss_weights=[0.5, 2])
    assert trainer.exit_layers == [3, 4]
    assert trainer.model.config.exit_layers == [3, 4]
    assert trainer.model.config.exit_loss_weights == [0.5, 2.0]


@pytest.mark.parametrize("exits, weights", [(None, [1.0, 2.0, 3.0]), ([1, 2, 4], [1.0, 2.0, 3.0]), ([2, 4], None)])
def test_weights_of_the_model_hold_for_its_exits_only(tmp_path, exits, weights):
    model = tiny_sorted()
    model.config.exit_loss_weights = [1.0, 2.0, 3.0]
    assert make_trainer(tmp_path, model, exit_layers=exits).model.config.exit_loss_weights == weights


def test_a_model_without_exits_needs_them_in_the_configuration(tmp_path):
    with pytest.raises(ValueError, match="`exit_layers` is not set"):
        make_trainer(tmp_path, exit_layers=None)


@pytest.mark.parametrize("exits", [[1, 2], [1, 8]])
def test_exits_that_do_not_fit_the_model_are_refused(tmp_path, exits):
    with pytest.raises(ValueError, match="`exit_layers`.*4"):
        make_trainer(tmp_path, exit_layers=exits)


@pytest.mark.parametrize("exits", [EXITS, "every:2", None], ids=str)
def test_weights_that_do_not_fit_the_exits_are_refused(tmp_path, exits):
    with pytest.raises(ValueError, match="`exit_loss_weights` must be"):
        make_trainer(tmp_path, tiny_sorted(), exit_layers=exits, exit_loss_weights=[1.0] * 4)


def test_weights_that_are_all_zero_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one above 0"):
        make_trainer(tmp_path, exit_loss_weights=[0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    "options, said",
    [
        ({"exit_layers": [4], "exit_schedule": "random"}, "`exits_per_step=1` .* has 0 of them"),
        ({"exit_layers": [1, 2, 4], "exit_schedule": "random", "exits_per_step": 3}, "`exits_per_step=3` .* has 2 of"),
        ({"exit_layers": [4], "self_distillation_weight": 0.5}, "`self_distillation_weight=0.5` .* has none"),
    ],
    ids=str,
)
def test_options_for_exits_that_the_model_lacks_are_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        make_trainer(tmp_path, **options)


@pytest.mark.parametrize("options", [{"detach_exits": True}, {"exit_learning_rate": 1e-3}], ids=str)
@pytest.mark.parametrize("exit_heads", [None, "shared"])
def test_options_for_what_exits_own_are_refused_where_they_own_nothing(tmp_path, options, exit_heads):
    with pytest.raises(ValueError, match=f"^`{next(iter(options))}=[^`]*`[^`]*`exit_heads='shared'`"):
        make_trainer(tmp_path, exit_heads=exit_heads, **options)


def test_the_folder_of_an_adapter_is_refused_as_a_model(tmp_path):
    """transformers would load it, with adapters in the layers that no training reaches and no checkpoint loads."""
    folder = save_tiny(tmp_path / "base")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter, not a model: merge it first, .*merge_and_unload"):
        make_trainer(tmp_path, str(tmp_path / "adapter"))


def test_full_depth_alone_is_trained_with_a_warning(tmp_path, caplog):
    """A spacing of more than all layers, for example."""
    with caplog.at_level("WARNING"):
        trainer = make_trainer(tmp_path, exit_layers="every:9")
    assert trainer.exit_layers == [4] and "`exit_layers=[4]` is full depth alone" in caplog.text


# What is trained


def changed(model, before):
    return {name for name, p in model.named_parameters() if name not in before or not torch.equal(p, before[name])}


def snapshot(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_exits_alone_train_the_shared_norm_and_head(tmp_path, tied):
    """ICT through the shared norm and head: the backbone stays, a tied head leaves the embeddings."""
    llama = tiny_llama(tie_word_embeddings=tied)
    before = snapshot(llama)
    trainer = make_trainer(tmp_path, llama, trainable="exits", save_strategy="steps", save_steps=2)
    trainer.train()
    model = trainer.model
    assert changed(model, before) == {"model.norm.weight", "lm_head.weight"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"model.norm.weight", "lm_head.weight"}
    assert model.config.tie_word_embeddings is False
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert_equal_weights(reloaded, model, 0.0)


def test_exits_alone_train_the_shared_norm_and_head_as_the_naive_sum(tmp_path):
    data = make_data("prompt_completion").select(range(8))
    llama = tiny_llama(initializer_range=0.1, tie_word_embeddings=False)
    reference = copy.deepcopy(llama).requires_grad_(False)
    for part in (reference.model.norm, reference.lm_head):
        part.requires_grad_(True)
    trainer = make_trainer(tmp_path, llama, data, trainable="exits", per_device_train_batch_size=8, **SGD)
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.train()
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        loss, _ = naive_step(reference, batch, EXITS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_equal_weights(trainer.model, reference, 2e-5)


@pytest.mark.parametrize(
    "tied, make, exit_heads",
    [
        (True, tiny_llama, "separate"),
        (False, tiny_sorted, "separate"),
        (True, tiny_sorted, "lens"),
        (False, tiny_llama, "lens"),
        (True, tiny_llama, "layer"),
        (False, tiny_sorted, "layer"),
    ],
)
def test_exits_alone_train_what_they_own_and_leave_full_depth(tmp_path, tied, make, exit_heads):
    """The paper's ICT: a norm and a head an exit are trained, and full depth is to the bit what it was."""
    before_model = make(tie_word_embeddings=tied)
    before = snapshot(before_model)
    inputs = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        full_depth = before_model(input_ids=inputs).logits
    trainer = make_trainer(
        tmp_path,
        before_model,
        trainable="exits",
        exit_heads=exit_heads,
        save_strategy="steps",
        save_steps=2,
        eval_dataset=make_data(),
    )
    untrained = trainer.evaluate()
    trainer.train()
    model = trainer.model.eval()
    assert changed(model, before) == owned(exit_heads)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == owned(exit_heads)
    assert torch.equal(model(input_ids=inputs).logits, full_depth)
    trained = trainer.evaluate()
    assert trained["eval_exit_4_loss"] == untrained["eval_exit_4_loss"]
    assert trained["eval_exit_1_loss"] < untrained["eval_exit_1_loss"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert reloaded.config.exit_heads == exit_heads
    assert_equal_weights(reloaded, model, 0.0)


@pytest.mark.parametrize("exit_heads", ["separate", "layer"])
def test_a_frozen_backbone_runs_no_backward(tmp_path, exit_heads):
    """Also where gradient checkpointing is asked for, TRL's default: there is nothing of it to keep."""
    options = {"trainable": "exits", "exit_heads": exit_heads, "gradient_checkpointing": True, "max_steps": 1}
    trainer, needed = make_trainer(tmp_path, **options), []
    for layer in trainer.model.model.layers:
        layer.register_forward_hook(lambda _, args, states: needed.append(states.requires_grad))
    trainer.train()
    assert needed == [False] * 4


def test_separate_heads_follow_the_exits_of_the_trainer(tmp_path):
    """The heads of exits that stay are kept, new exits get copies of the shared one."""
    model = SortedLlamaForCausalLM.from_llama(tiny_llama(), exit_layers=[1, 2, 4], exit_heads="separate")
    model.exit_lm_heads["2"].weight.data += 1
    trainer = make_trainer(tmp_path, model, exit_layers=[2, 3, 4])
    assert list(trainer.model.exit_lm_heads) == list(trainer.model.model.exit_norms) == ["2", "3"]
    assert trainer.model.exit_lm_heads["2"].weight is model.exit_lm_heads["2"].weight
    assert torch.equal(trainer.model.exit_lm_heads["3"].weight, model.lm_head.weight)


@pytest.mark.parametrize("wrapped", [True, False])
def test_adapters_exclude_training_the_exits_alone(tmp_path, wrapped):
    model = get_peft_model(tiny_sorted(), LoraConfig(r=2, task_type="CAUSAL_LM")) if wrapped else tiny_sorted()
    options = {} if wrapped else {"peft_config": LoraConfig(r=2)}
    with pytest.raises(ValueError, match="`trainable='exits'`"):
        make_trainer(tmp_path, model, trainable="exits", **options)
    if wrapped:
        with pytest.raises(ValueError, match="`exit_heads='separate'`"):
            make_trainer(tmp_path, model, exit_heads="separate")
