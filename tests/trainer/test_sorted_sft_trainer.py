"""`SortedSFTTrainer` against TRL's `SFTTrainer`, and against naive losses of transformers' own Llama."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.trainer import SortedSFTConfig, SortedSFTTrainer
from tests.tiny import reference_llama, save_tiny, tiny_fields, tiny_llama, tiny_sorted, tiny_tokenizer
from tests.trainer.runs import (
    BEST_IS_NOT_LAST,
    EXITS,
    assert_equal_weights,
    logged,
    make_args,
    make_data,
    make_rows,
    make_trainer,
    naive_means,
    naive_sums,
)


pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's deprecations of options that it still has
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


# What it takes for a model


def test_llama_becomes_sorted_without_a_copy(tmp_path):
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


def test_sorted_model_is_taken_as_it_is(tmp_path):
    model = tiny_sorted()
    trainer = make_trainer(tmp_path, model, exit_layers=None)
    assert trainer.model is model
    assert trainer.exit_layers == EXITS
    trainer.train()


@pytest.mark.parametrize("make", [tiny_llama, tiny_sorted])
@pytest.mark.parametrize("path_type", [str, str.__add__], ids=["folder", "trailing_slash"])
def test_model_path(tmp_path, make, path_type):
    """A folder of a plain Llama (`model_type` that TRL knows) and of a sorted one (which it does not)."""
    saved = make()
    folder = save_tiny(tmp_path / "model", saved)
    folder = folder + "/" if path_type is not str else folder
    trainer = make_trainer(tmp_path / "out", folder, processing_class=None)
    assert isinstance(trainer.model, SortedLlamaForCausalLM)
    assert trainer.model.config.model_type == "sorted_llama"
    assert trainer.model.dtype == torch.float32
    assert trainer.model.config.exit_layers == EXITS
    assert trainer.processing_class.get_vocab() == tiny_tokenizer().get_vocab()
    assert_equal_weights(trainer.model, saved, 0.0)
    trainer.train()


def test_model_init_kwargs(tmp_path):
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
def test_peft_model(tmp_path, make):
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
        lambda: Qwen2ForCausalLM(Qwen2Config(**tiny_fields())),
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=259)),
        lambda: get_peft_model(Qwen2ForCausalLM(Qwen2Config(**tiny_fields())), LoraConfig()),
        lambda: tiny_llama().model,
    ],
    ids=["qwen2", "gpt2", "peft_qwen2", "headless_llama"],
)
def test_wrong_model(tmp_path, make):
    with pytest.raises(TypeError, match="`model` must be .*Llama"):
        make_trainer(tmp_path, make())


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Gemma"])
def test_path_of_another_architecture(tmp_path, name):
    """Another architecture's weights must not be read as a Llama's, with what is missing made up."""
    config = getattr(transformers, f"{name}Config")(**tiny_fields())
    folder = save_tiny(tmp_path / "model", getattr(transformers, f"{name}ForCausalLM")(config))
    with pytest.raises((TypeError, ValueError), match="(?i)llama"):
        make_trainer(tmp_path / "out", folder, processing_class=None)


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


def test_no_exits(tmp_path):
    with pytest.raises(ValueError, match="`exit_layers` is not set"):
        make_trainer(tmp_path, exit_layers=None)


@pytest.mark.parametrize("exits", [[1, 2], [1, 8]])
def test_exits_that_do_not_fit(tmp_path, exits):
    with pytest.raises(ValueError, match="`exit_layers`.*4"):
        make_trainer(tmp_path, exit_layers=exits)


@pytest.mark.parametrize("exits", [EXITS, "every:2", None], ids=str)
def test_weights_that_do_not_fit(tmp_path, exits):
    with pytest.raises(ValueError, match="`exit_loss_weights` must be"):
        make_trainer(tmp_path, tiny_sorted(), exit_layers=exits, exit_loss_weights=[1.0] * 4)


def test_compute_loss_func_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func"):
        SortedSFTTrainer(tiny_sorted(), make_args(tmp_path), compute_loss_func=lambda *_, **__: 0)


@pytest.mark.parametrize("config_class", [SFTConfig, TrainingArguments])
def test_other_arguments(tmp_path, config_class):
    """With exits in the model's config, TRL's and transformers' own arguments do."""
    kwargs = {"max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no"}
    args = config_class(str(tmp_path), hub_token="secret", learning_rate=0.125, **kwargs)
    trainer = SortedSFTTrainer(tiny_sorted(), args, train_dataset=make_data(), processing_class=tiny_tokenizer())
    assert isinstance(trainer.args, SortedSFTConfig)
    assert trainer.args.hub_token == "secret"
    assert trainer.args.learning_rate == 0.125
    assert trainer.exit_layers == EXITS
    trainer.train()


def test_no_arguments(tmp_path, monkeypatch):
    # TRL's default precision is bf16, for which transformers wants a GPU or to be told that there is none
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    folder = save_tiny(tmp_path / "base-model", tiny_sorted())
    trainer = SortedSFTTrainer(folder, train_dataset=make_data())
    assert trainer.args.output_dir == "base-model-SoFT"
    assert trainer.exit_layers == EXITS


# One exit at full depth is SFT

SFT_MODES = {
    "text": ("text", {}),
    "text_accumulated": ("text", {"gradient_accumulation_steps": 2}),
    "untied": ("text", {"tie_word_embeddings": False}),
    "messages": ("messages", {}),
    "assistant_only": ("messages", {"assistant_only_loss": True}),
    "completion_only": ("prompt_completion", {}),
    "prompt_too": ("prompt_completion", {"completion_only_loss": False}),
    "conversational_prompt_completion": ("conversational_prompt_completion", {}),
    "tokenized": ("tokenized", {}),
    "labelled": ("labelled", {}),
    "bfd": ("messages", {"packing": True, "packing_strategy": "bfd"}),
    "bfd_split": ("prompt_completion", {"packing": True, "packing_strategy": "bfd_split", "max_length": 24}),
    "wrapped": ("text", {"packing": True, "packing_strategy": "wrapped", "max_length": 24}),
    "padding_free": ("text", {"padding_free": True, "max_length": None}),
    "dft": ("prompt_completion", {"loss_type": "dft"}),
    "label_smoothing": ("text", {"label_smoothing_factor": 0.1}),
    "no_checkpointing": ("text", {"gradient_checkpointing": False}),
    "lora": ("text", {"peft_config": True, "learning_rate": 1e-2}),
}


@pytest.mark.parametrize("mode", SFT_MODES)
def test_full_depth_alone_is_sft(tmp_path, mode):
    """With `exit_layers=[L]`: losses, accuracies and weights of 20 steps are `SFTTrainer`'s."""
    data, options = SFT_MODES[mode]
    options = dict(options)
    overrides = {"tie_word_embeddings": options.pop("tie_word_embeddings", True)}
    trainers = []
    for trainer_class in (SFTTrainer, SortedSFTTrainer):
        if "peft_config" in options:
            options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
        exits = {"exit_layers": [4]} if trainer_class is SortedSFTTrainer else {}
        trainer = make_trainer(
            tmp_path,
            tiny_llama(initializer_range=0.05, **overrides),
            data,
            trainer_class,
            eval_dataset=make_data(data),
            max_steps=20,
            **{**options, **exits},
        )
        trainer.train()
        trainer.evaluate()
        trainers.append(trainer)
    sft, soft = trainers
    assert len(logged(soft, "loss")) == 20
    assert logged(soft, "loss")[-1] != pytest.approx(logged(soft, "loss")[0], rel=1e-2)
    for key in ("loss", "grad_norm", "mean_token_accuracy", "eval_loss"):
        if key == "mean_token_accuracy" and mode == "text_accumulated":
            continue  # SFT's is the mean of its micro-batches', whatever their numbers of tokens
        assert logged(soft, key) == pytest.approx(logged(sft, key), rel=1e-4, abs=1e-6), key
    for key in ("num_tokens", "epoch", "learning_rate"):
        assert logged(soft, key) == logged(sft, key), key
    if mode not in ("dft", "label_smoothing"):
        assert logged(soft, "exit_4_loss") == pytest.approx(logged(soft, "loss"), rel=1e-4)
    assert logged(soft, "exit_4_mean_token_accuracy") == logged(soft, "mean_token_accuracy")
    assert logged(soft, "eval_exit_4_agreement") == [1.0]
    assert_equal_weights(soft.model, sft.model, 3e-4)  # Adam makes much of how a tiny gradient is rounded


def test_iterable_dataset(tmp_path):
    """A streamed dataset gives the losses of the same rows at rest."""
    streamed = IterableDataset.from_generator(make_rows, gen_kwargs={"kind": "text"})
    losses = []
    for data in (streamed, make_data()):
        trainer = make_trainer(tmp_path, data=data, max_steps=3, train_sampling_strategy="sequential")
        trainer.train()
        losses.append(logged(trainer, "exit_1_loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# The SoFT step

STEP_OPTIONS = {
    "sum": {},
    "mean": {"exit_loss_reduction": "mean"},
    "weights": {"exit_loss_weights": [0.5, 0.0, 2.0]},
    "dft": {"loss_type": "dft"},
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "padding_free": {"padding_free": True, "max_length": None},
    "untied": {},
}


@pytest.mark.parametrize("name", STEP_OPTIONS)
@pytest.mark.parametrize("data", ["prompt_completion", "messages"])
def test_step_equals_the_naive_sum(tmp_path, name, data):
    """Three SGD steps on all rows at once, against a loop of a few lines around transformers' own Llama."""
    options = {"per_device_train_batch_size": 8, **STEP_OPTIONS[name]}
    data = make_data(data).select(range(8))
    model = tiny_llama(initializer_range=0.1, tie_word_embeddings=name != "untied")
    llama = copy.deepcopy(model)
    trainer = make_trainer(
        tmp_path, model, data, optim="sgd", lr_scheduler_type="constant", learning_rate=0.05, max_grad_norm=0,
        max_steps=3, **options,
    )  # fmt: skip
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.train()

    weights = torch.tensor(options.get("exit_loss_weights", [1.0] * 3))
    if name == "mean":
        weights = weights / 3
    optimizer = torch.optim.SGD(llama.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        sums, *_, count = naive_sums(
            llama,
            batch,
            loss_type=options.get("loss_type", "nll"),
            label_smoothing=options.get("label_smoothing_factor", 0.0),
        )
        loss = (weights * sums).sum() / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), *(sums / count).tolist()))
    assert losses[-1][0] != pytest.approx(losses[0][0], rel=1e-3)
    for i, key in enumerate(("loss", "exit_1_loss", "exit_2_loss", "exit_4_loss")):
        assert logged(trainer, key) == pytest.approx([step[i] for step in losses], rel=2e-5), key
    assert_equal_weights(trainer.model, llama, 2e-5)


def plain_trainer(folder, model, prepared, **kwargs):
    """`transformers.Trainer` on the data that an `SFTTrainer` prepared."""
    args = make_args(folder, TrainingArguments, **kwargs)
    return transformers.Trainer(
        model, args, train_dataset=prepared.train_dataset, data_collator=prepared.data_collator
    )


@pytest.mark.parametrize("accumulated", [1, 2])
def test_transformers_trainer_trains_the_same(tmp_path, accumulated):
    """Plain `transformers.Trainer` on the sorted model: same losses, same weights."""
    options = {"max_steps": 5, "gradient_accumulation_steps": accumulated}
    soft = make_trainer(tmp_path, tiny_sorted(), **options)
    soft.train()
    plain = plain_trainer(tmp_path, tiny_sorted(), soft, **options)
    plain.train()
    assert logged(plain, "loss") == pytest.approx(logged(soft, "loss"), rel=1e-5)
    assert_equal_weights(plain.model, soft.model, 1e-5)


def test_transformers_label_smoothing_shifts_the_labels(tmp_path):
    """`Trainer` shifts labels for the models in its tables only: without exits the loss is a plain Llama's."""
    prepared = make_trainer(tmp_path)
    losses = []
    for model in (tiny_llama(), tiny_sorted(exit_layers=None)):
        plain = plain_trainer(tmp_path, model, prepared, label_smoothing_factor=0.1)
        plain.train()
        losses.append(logged(plain, "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


# What it logs


@pytest.mark.parametrize("data", ["text", "prompt_completion"])
def test_training_logs(tmp_path, data):
    """Averages over the labelled tokens since the last log, with accumulation and a smaller last batch."""
    model = tiny_llama()
    llama = copy.deepcopy(model)
    trainer = make_trainer(
        tmp_path, model, data, learning_rate=0.0, gradient_accumulation_steps=2, num_train_epochs=2, max_steps=-1,
        logging_strategy="epoch",
    )  # fmt: skip
    rows = list(trainer.train_dataset)
    trainer.train()
    losses, accuracies, _ = naive_means(llama, [trainer.data_collator([row]) for row in rows])
    for entry in trainer.state.log_history[:2]:
        for i, k in enumerate(EXITS):
            assert entry[f"exit_{k}_loss"] == pytest.approx(losses[i], rel=1e-5)
            assert entry[f"exit_{k}_mean_token_accuracy"] == pytest.approx(accuracies[i], rel=1e-5)
        assert entry["mean_token_accuracy"] == entry["exit_4_mean_token_accuracy"]
        assert not any("agreement" in key or "entropy" in key for key in entry)
    present = sum(len(row["input_ids"]) for row in rows)
    assert logged(trainer, "num_tokens") == [present, 2 * present]
    summary = trainer.state.log_history[-1]
    assert "train_loss" in summary and not any(key.startswith("exit_") for key in summary)


def test_training_logs_are_of_one_run(tmp_path):
    """A window that the training ends in is logged with its end, and not in the first log of the next `train()`."""
    model = tiny_llama()
    llama = copy.deepcopy(model)
    trainer = make_trainer(
        tmp_path, model, learning_rate=0.0, max_steps=3, logging_steps=2, train_sampling_strategy="sequential"
    )
    trainer.train()
    trainer.train()
    rows = list(trainer.train_dataset)
    windows = [naive_means(llama, [trainer.data_collator(part)]) for part in (rows[:4], rows[4:6])]
    for i, k in enumerate(EXITS):
        assert logged(trainer, f"exit_{k}_loss") == pytest.approx([losses[i] for losses, *_ in windows], rel=1e-5)
        accuracies = [accuracies[i] for _, accuracies, _ in windows]
        assert logged(trainer, f"exit_{k}_mean_token_accuracy") == pytest.approx(accuracies, rel=1e-5)
    assert {"train_loss", "mean_token_accuracy", "num_tokens"} <= trainer.state.log_history[-1].keys()


def expected_evaluation(llama, trainer, dataset, prefix="eval"):
    losses, accuracies, agreements = naive_means(llama, [trainer.data_collator([row]) for row in dataset])
    metrics = {}
    for i, k in enumerate(EXITS):
        metrics[f"{prefix}_exit_{k}_loss"] = losses[i]
        metrics[f"{prefix}_exit_{k}_mean_token_accuracy"] = accuracies[i]
        metrics[f"{prefix}_exit_{k}_agreement"] = agreements[i]
    return metrics


@pytest.mark.parametrize("data", ["text", "prompt_completion", "messages"])
@pytest.mark.parametrize("options", [{}, {"padding_free": True, "max_length": None}], ids=str)
def test_evaluation(tmp_path, data, options):
    """Token-weighted over batches of different sizes; all exits in one pass."""
    model = tiny_llama()
    llama = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, model, data, eval_dataset=make_data(data), **options)
    calls = []
    trainer.model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    metrics = trainer.evaluate()
    assert len(calls) == 5
    expected = expected_evaluation(llama, trainer, trainer.eval_dataset)
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key
    assert metrics["eval_exit_4_agreement"] == 1.0
    assert 0 < metrics["eval_exit_1_agreement"] < 1
    exit_keys = {key for key in metrics if key.startswith("eval_exit")}
    assert exit_keys == expected.keys()
    assert not any(key.startswith("exit") for key in metrics)
    assert trainer.state.log_history[-1].keys() >= exit_keys


def test_evaluation_loss_is_the_objective(tmp_path):
    trainer = make_trainer(
        tmp_path, eval_dataset=make_data(), per_device_eval_batch_size=9, exit_loss_weights=[1.0, 0.5, 2.0]
    )
    metrics = trainer.evaluate()
    weighted = metrics["eval_exit_1_loss"] + 0.5 * metrics["eval_exit_2_loss"] + 2 * metrics["eval_exit_4_loss"]
    assert metrics["eval_loss"] == pytest.approx(weighted, rel=1e-5)


def test_evaluation_during_training(tmp_path):
    """Neither do training's averages leak into an evaluation's nor the other way round."""
    runs = []
    for options in ({"eval_strategy": "steps", "eval_steps": 1}, {}):
        trainer = make_trainer(tmp_path, max_steps=4, logging_steps=2, eval_dataset=make_data(), **options)
        trainer.train()
        runs.append(trainer)
    assert len(logged(runs[0], "eval_exit_1_loss")) == 4
    for key in ("loss", "exit_1_loss", "exit_2_mean_token_accuracy", "num_tokens"):
        assert logged(runs[0], key) == pytest.approx(logged(runs[1], key), rel=1e-6), key
    assert logged(runs[0], "eval_exit_1_loss")[-1] == pytest.approx(runs[1].evaluate()["eval_exit_1_loss"], rel=1e-6)


def test_evaluation_of_several_datasets(tmp_path):
    model = tiny_llama()
    llama = copy.deepcopy(model)
    datasets = {"short": make_data().select([0, 2, 4]), "long": make_data().select([1, 3, 5])}
    trainer = make_trainer(tmp_path, model, eval_dataset=datasets)
    metrics = trainer.evaluate()
    for name in datasets:
        for key, value in expected_evaluation(llama, trainer, trainer.eval_dataset[name], f"eval_{name}").items():
            assert metrics[key] == pytest.approx(value, rel=1e-5), key
    assert not any(key.startswith("eval_exit") for key in metrics)


@pytest.mark.parametrize("as_dict", [False, True])
def test_evaluation_of_a_dataset_passed(tmp_path, as_dict):
    model = tiny_llama()
    llama = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, model)
    prepared = make_trainer(tmp_path, eval_dataset=make_data().select([1, 2, 3])).eval_dataset
    dataset = make_data().select([1, 2, 3])
    metrics = trainer.evaluate({"x": dataset} if as_dict else dataset, metric_key_prefix="test")
    expected = expected_evaluation(llama, trainer, prepared, "test_x" if as_dict else "test")
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key


def test_predict_leaves_evaluation_alone(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=make_data())
    before = trainer.evaluate()
    trainer.predict(trainer.eval_dataset.select([3]))
    after = trainer.evaluate()
    for key in (k for k in before if k.startswith("eval_exit")):
        assert after[key] == before[key], key


def test_compute_metrics(tmp_path):
    """`compute_metrics` sees the logits of the full depth and the labels."""
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"extra": 1.5, "head_loss": 2.5}

    model = tiny_llama()
    llama = copy.deepcopy(model)
    rows = make_data().select([1, 1])
    trainer = make_trainer(tmp_path, model, eval_dataset=rows, compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    assert metrics["eval_extra"] == 1.5
    batch = trainer.data_collator(list(trainer.eval_dataset))
    with torch.no_grad():
        expected = llama(input_ids=batch["input_ids"]).logits
    (prediction,) = seen
    np.testing.assert_allclose(prediction.predictions, expected.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(prediction.label_ids, batch["labels"].numpy())
    for key, value in expected_evaluation(llama, trainer, trainer.eval_dataset).items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("schedule", ["all", "random"])
def test_batch_without_labels(tmp_path, schedule):
    """A batch in which every label is masked is a loss of 0 among the others, never NaN."""
    ids = tiny_tokenizer()("a line of text")["input_ids"]
    data = Dataset.from_list(
        [{"input_ids": ids, "labels": [-100] * len(ids)}] * 2 + [{"input_ids": ids, "labels": ids}] * 2
    )
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(tmp_path, data=data, eval_dataset=data, exit_schedule=schedule, **options)
    trainer.train()
    keys = ("exit_1_loss", "exit_1_mean_token_accuracy") if schedule == "all" else ()
    for key in ("loss", "exit_4_loss", "exit_4_mean_token_accuracy", *keys):
        values = logged(trainer, key)
        assert values[0] == 0 and np.isfinite(values).all(), key
    assert logged(trainer, "loss")[1] > 0
    metrics = trainer.evaluate()
    assert np.isfinite([metrics["eval_loss"], metrics["eval_exit_1_loss"]]).all()


# Checkpoints


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("lora", [False, True])
def test_resume(tmp_path, lora):
    """Stopped after three of six steps and resumed: losses and weights as without the stop."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}

    def run(folder, callbacks=(), resume=None):
        peft_config = {"peft_config": LoraConfig(r=2)} if lora else {}
        trainer = make_trainer(folder, tiny_sorted(), callbacks=list(callbacks), **options, **peft_config)
        assert trainer.args.gradient_checkpointing
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    run(tmp_path / "stopped", [_StopAt(3)])
    resumed = run(tmp_path / "stopped", resume=True)
    for key in ("loss", *(f"exit_{k}_loss" for k in EXITS), "exit_1_mean_token_accuracy"):
        assert len(logged(resumed, key)) == 6
        assert logged(resumed, key) == pytest.approx(logged(whole, key), rel=1e-6), key
    assert_equal_weights(resumed.model, whole.model, 1e-6)


def test_checkpoint_folder(tmp_path):
    """A checkpoint is a model that the Auto classes load: weights, code, exits, tokenizer."""
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, exit_loss_weights=[1, 2, 3])
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "sorted_llama"
        assert config["architectures"] == ["SortedLlamaForCausalLM"]
        assert config["exit_layers"] == EXITS
        assert config["exit_loss_weights"] == [1.0, 2.0, 3.0]
        assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= config["auto_map"].keys()
        for target in config["auto_map"].values():
            assert (folder / f"{target.split('.')[0]}.py").is_file()
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny_tokenizer().get_vocab()
        assert_equal_weights(AutoModelForCausalLM.from_pretrained(folder), trainer.model, 0.0)
        assert_equal_weights(LlamaForCausalLM.from_pretrained(folder), trainer.model, 0.0)
    assert "2309.08968" in (tmp_path / "README.md").read_text()


def test_load_best_model_at_end(tmp_path):
    """The best is one exit's: the checkpoint whose `eval_exit_1_loss` is lowest is the model in the end."""
    trainer = make_trainer(
        tmp_path,
        tiny_llama(initializer_range=0.02),
        max_steps=4,
        metric_for_best_model="exit_1_loss",
        **BEST_IS_NOT_LAST,
    )
    trainer.train()
    losses = logged(trainer, "eval_exit_1_loss")
    best = int(np.argmin(losses))
    assert best != len(losses) - 1  # else there was nothing to load
    assert trainer.state.best_metric == losses[best]
    folder = tmp_path / f"checkpoint-{best + 1}"
    assert trainer.state.best_model_checkpoint == str(folder)
    assert_equal_weights(trainer.model, LlamaForCausalLM.from_pretrained(folder), 0.0)
    assert trainer.evaluate()["eval_exit_1_loss"] == pytest.approx(losses[best], rel=1e-6)


# LoRA

INPUT_IDS = torch.tensor([[1, 50, 60, 70, 80, 90]])


def assert_equal_exits(actual, expected):
    """Logits of every exit. Merged and unmerged adapters differ by rounding."""
    for k in EXITS:
        with torch.no_grad():
            logits = [model.eval()(input_ids=INPUT_IDS, exit_layer=k).logits for model in (actual, expected)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


REMOTE_SCRIPT = """
import sys

sys.modules["sorted_llama"] = None  # importing it fails, installed or not
import torch
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
input_ids = torch.load(sys.argv[2])
with torch.no_grad():
    logits = {k: model(input_ids=input_ids, exit_layer=k).logits for k in (1, 2, 4)}
torch.save(logits, sys.argv[3])
"""


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


def test_lora_adapter_generates_at_an_exit(lora):
    trainer, adapter = lora
    reloaded = AutoPeftModelForCausalLM.from_pretrained(adapter)
    reference = reference_llama(AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload(), 2)
    arguments = {"input_ids": INPUT_IDS, "max_new_tokens": 8, "do_sample": False}
    assert reloaded.generate(**arguments, exit_layer=2).tolist() == reference.generate(**arguments).tolist()


@pytest.mark.slow
def test_lora_adapter_without_this_project(lora, tmp_path):
    """In a process where neither package can be imported, the base folder's own code does."""
    trainer, adapter = lora
    torch.save(INPUT_IDS, tmp_path / "input_ids.pt")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", REMOTE_SCRIPT, str(adapter), "input_ids.pt", "logits.pt"],
        env={**env, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    for k, logits in torch.load(tmp_path / "logits.pt").items():
        with torch.no_grad():
            torch.testing.assert_close(logits, trainer.model(input_ids=INPUT_IDS, exit_layer=k).logits)


def test_lora_on_a_plain_llama_folder(tmp_path):
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


def test_peft_default_modules():
    model = get_peft_model(tiny_sorted(), LoraConfig())
    expected = get_peft_model(tiny_llama(), LoraConfig())
    assert model.peft_config["default"].target_modules == expected.peft_config["default"].target_modules
