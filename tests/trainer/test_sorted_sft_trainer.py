"""`SortedSFTTrainer` against TRL's `SFTTrainer`, and its steps against naive losses of transformers' own Llama."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import IterableDataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.trainer import SortedSFTConfig, SortedSFTTrainer
from tests.tiny import save_tiny, tiny_llama, tiny_sorted, tiny_tokenizer
from tests.trainer.runs import (
    BEST_IS_NOT_LAST,
    EXITS,
    SGD,
    assert_equal_weights,
    exit_logits,
    logged,
    make_args,
    make_data,
    make_rows,
    make_trainer,
    naive_step,
    naive_sums,
    owned,
)


pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's deprecations of options that it still has
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def test_compute_loss_func_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func"):
        SortedSFTTrainer(tiny_sorted(), make_args(tmp_path), compute_loss_func=lambda *_, **__: 0)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    """They would return the losses of the exits once each, one behind the other."""
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    with pytest.raises(ValueError, match="2 GPUs in one process .*accelerate launch"):
        make_trainer(tmp_path, exit_layers=[2, 4])


def test_the_tokenizer_is_missed_before_the_weights_are_loaded(tmp_path, monkeypatch):
    tiny_sorted().save_pretrained(tmp_path / "model")  # and no tokenizer
    monkeypatch.setattr("sorted_llama.trainer.sorted_sft_trainer.load_sorted", None)
    with pytest.raises((OSError, ValueError)):
        SortedSFTTrainer(str(tmp_path / "model"), SortedSFTConfig(str(tmp_path), exit_layers=[2, 4], use_cpu=True))


@pytest.mark.parametrize("config_class", [SFTConfig, TrainingArguments])
def test_arguments_of_trl_and_transformers_do_where_the_model_has_exits(tmp_path, config_class):
    """With exits in the model's config, TRL's and transformers' own arguments do."""
    kwargs = {"max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no"}
    args = config_class(str(tmp_path), hub_token="secret", learning_rate=0.125, **kwargs)
    trainer = SortedSFTTrainer(tiny_sorted(), args, train_dataset=make_data(), processing_class=tiny_tokenizer())
    assert isinstance(trainer.args, SortedSFTConfig)
    assert trainer.args.hub_token == "secret"
    assert trainer.args.learning_rate == 0.125
    assert trainer.exit_layers == EXITS
    trainer.train()


def test_the_output_folder_is_named_after_the_model_by_default(tmp_path, monkeypatch):
    # TRL's default precision is bf16, for which transformers wants a GPU or to be told that there is none
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    folder = save_tiny(tmp_path / "base-model", tiny_sorted())
    trainer = SortedSFTTrainer(folder, train_dataset=make_data())
    assert trainer.args.output_dir == "base-model-SoFT"
    assert trainer.exit_layers == EXITS


def test_the_configurations_of_the_caller_stay_as_they_are(tmp_path):
    folder = save_tiny(tmp_path / "model")
    options = {"exit_layers": EXITS, "exit_heads": "lens", "exit_schedule": "random"}
    args = make_args(tmp_path / "out", model_init_kwargs={"dtype": "float32"}, **options)
    before, peft_config = copy.deepcopy(args.to_dict()), LoraConfig(r=2)
    trainer = SortedSFTTrainer(folder, args, train_dataset=make_data(), peft_config=peft_config)
    assert args.to_dict() == before
    assert peft_config.task_type is None
    assert trainer.args.ddp_find_unused_parameters
    assert trainer.args.model_init_kwargs == args.model_init_kwargs
    assert trainer.model.peft_config["default"].task_type == "CAUSAL_LM"


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
    """With `exit_layers=[L]`: losses, accuracies and weights of 6 steps, into a second epoch, are `SFTTrainer`'s."""
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
            max_steps=6,
            **{**options, **exits},
        )
        trainer.train()
        trainer.evaluate()
        trainers.append(trainer)
    sft, soft = trainers
    assert len(logged(soft, "loss")) == 6
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


def test_a_streamed_dataset_is_trained_as_the_same_rows_at_rest(tmp_path):
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


@pytest.mark.parametrize("name, data", [("sum", "messages"), *((name, "prompt_completion") for name in STEP_OPTIONS)])
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


def test_random_steps_equal_the_naive_sums(tmp_path):
    """Each step is the sum over its exits, with their weights; the other exits are not evaluated."""
    data, weights = make_data("prompt_completion").select(range(8)), dict(zip(EXITS, [0.5, 2.0, 1.0], strict=True))
    model = tiny_llama(initializer_range=0.1)
    llama = copy.deepcopy(model)
    options = {"max_steps": 6, "per_device_train_batch_size": 8, **SGD}
    trainer = make_trainer(
        tmp_path, model, data, exit_schedule="random", exit_loss_weights=list(weights.values()), **options
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.train()

    optimizer = torch.optim.SGD(llama.parameters(), lr=0.05)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, entry in enumerate(entries):
        exits = trainer.args.exits_at_step(EXITS, step)
        loss, losses = naive_step(llama, batch, exits, [weights[k] for k in exits])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert entry["loss"] == pytest.approx(loss.item(), rel=2e-5)
        found = {k: entry[f"exit_{k}_loss"] for k in EXITS if f"exit_{k}_loss" in entry}
        assert found == pytest.approx(dict(zip(exits, losses.tolist(), strict=True)), rel=2e-5)
    assert_equal_weights(trainer.model, llama, 2e-5)


def test_weights_reach_the_loss_and_the_config(tmp_path):
    trainer = make_trainer(tmp_path, tiny_sorted(), exit_loss_weights="budget:0.5", max_steps=1)
    trainer.train()
    assert trainer.model.config.exit_loss_weights == [0.25, 0.25, 1.0]
    (loss,), losses = logged(trainer, "loss"), [logged(trainer, f"exit_{k}_loss")[0] for k in EXITS]
    assert loss == pytest.approx(0.25 * losses[0] + 0.25 * losses[1] + losses[2], rel=1e-5)


def test_self_distillation_equals_the_naive_divergence(tmp_path):
    data = make_data("prompt_completion").select(range(8))
    model = tiny_llama(initializer_range=0.1)
    llama = copy.deepcopy(model)
    trainer = make_trainer(
        tmp_path,
        model,
        data,
        per_device_train_batch_size=8,
        self_distillation_weight=0.7,
        **SGD,
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.train()

    labels = batch["labels"][:, 1:]
    kept = labels != -100
    optimizer = torch.optim.SGD(llama.parameters(), lr=0.05)
    for step in range(2):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = [x[:, :-1][kept] for x in exit_logits(llama, inputs)]
        loss, divergences = 0.0, []
        for exit_logits_ in logits:
            loss = loss + F.cross_entropy(exit_logits_, labels[kept])
            student, teacher = (x.log_softmax(-1) for x in (exit_logits_, logits[-1].detach()))
            divergences.append((teacher.exp() * (teacher - student)).sum(-1).mean())
        loss = loss + 0.7 * sum(divergences[:-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert logged(trainer, "loss")[step] == pytest.approx(loss.item(), rel=2e-5)
        for k, divergence in zip(EXITS, divergences, strict=True):
            assert logged(trainer, f"exit_{k}_divergence")[step] == pytest.approx(
                divergence.item(), rel=1e-4, abs=1e-7
            )
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


@pytest.mark.parametrize("lora", [False, True])
def test_the_trained_share_is_printed(tmp_path, capsys, lora):
    options = {"peft_config": LoraConfig(r=2)} if lora else {}
    trainer = make_trainer(tmp_path, tiny_sorted(), disable_tqdm=False, max_steps=1, **options)
    trainer.train()
    printed = capsys.readouterr().out
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    assert "exits 1, 2, 4" in printed
    assert f"({trained / total:.1%})" in printed
    assert (trained < total) == lora


# Exits that leave full depth alone


@pytest.mark.parametrize(
    "tied, exit_heads, schedule",
    [
        (True, "lens", "all"),
        (False, "lens", "random"),
        (True, "separate", "random"),
        (False, "separate", "all"),
        (True, "layer", "all"),
        (False, "layer", "random"),
    ],
)
def test_detached_exits_leave_full_depth_to_sft(tmp_path, tied, exit_heads, schedule):
    """Full depth's weights are those of training without the exits; the exits learn all the same."""
    llama = tiny_llama(tie_word_embeddings=tied)
    options = {"max_steps": 6, "max_grad_norm": 0, "learning_rate": 3e-3}
    alone = make_trainer(tmp_path, copy.deepcopy(llama), exit_layers=[4], **options)
    alone.train()
    options |= {"exit_heads": exit_heads, "detach_exits": True, "exit_schedule": schedule}
    trainer = make_trainer(tmp_path, llama, exit_learning_rate=0.03, eval_dataset=make_data(), **options)
    untrained = trainer.evaluate()
    trainer.train()
    model = trainer.model
    for name, param in alone.model.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), param, rtol=1e-5, atol=1e-7)
    assert {name for name, _ in model.named_parameters()} - {n for n, _ in alone.model.named_parameters()} == owned(
        exit_heads
    )
    evaluated = trainer.evaluate()
    for k in EXITS[:-1]:
        assert evaluated[f"eval_exit_{k}_loss"] < untrained[f"eval_exit_{k}_loss"]
    trainer.save_model()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.config.exit_heads == exit_heads
    assert_equal_weights(reloaded, model, 0.0)


def test_full_depth_beside_detached_layers_is_sfts_to_the_bit(tmp_path):
    """Where nothing is clipped: the norm of all gradients, by which they would be, counts those of the exits."""
    options = {"max_steps": 6, "max_grad_norm": 0, "learning_rate": 3e-3}
    alone = make_trainer(tmp_path, tiny_llama(), exit_layers=[4], **options)
    alone.train()
    detached = {"exit_heads": "layer", "detach_exits": True, "exit_learning_rate": 0.01}
    trainer = make_trainer(tmp_path, tiny_llama(), self_distillation_weight=1.0, **detached, **options)
    trainer.train()
    for name, param in alone.model.named_parameters():
        assert torch.equal(trainer.model.get_parameter(name), param), name
    assert not torch.equal(trainer.model.model.exit_norms["2"].weight, tiny_llama().model.norm.weight)


def test_what_exits_own_has_a_learning_rate_of_its_own(tmp_path):
    """SGD's first step is the learning rate times the gradient."""
    before = SortedLlamaForCausalLM.from_llama(tiny_llama(), exit_layers=EXITS, exit_heads="lens")
    trainer = make_trainer(
        tmp_path, tiny_llama(), exit_heads="lens", exit_learning_rate=0.5, max_steps=1, **{**SGD, "weight_decay": 0.1}
    )
    batch = trainer.data_collator(list(trainer.train_dataset)[:2])
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader([batch], batch_size=None)
    trainer.train()
    before(**batch, exit_layers=EXITS).loss.backward()
    decayed = set(trainer.get_decay_parameter_names(before))
    for name, param in before.named_parameters():
        rate = 0.5 if name in owned("lens") else 0.05
        step = param.grad + (0.1 * param if name in decayed else 0)
        torch.testing.assert_close(trainer.model.get_parameter(name), param - rate * step, rtol=1e-4, atol=1e-6)


def test_a_learning_rate_of_the_exits_excludes_a_given_optimizer(tmp_path):
    model = tiny_sorted(exit_layers=EXITS, exit_heads="lens")
    given = torch.optim.SGD(model.parameters(), lr=0.1), None
    with pytest.raises(ValueError, match="`exit_learning_rate=0.5` is for an optimizer that the trainer makes"):
        make_trainer(tmp_path, model, exit_learning_rate=0.5, optimizers=given)


# Checkpoints


def test_a_checkpoint_is_a_model_that_the_auto_classes_load(tmp_path):
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


def test_the_best_model_of_an_exit_is_loaded_at_the_end(tmp_path):
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
