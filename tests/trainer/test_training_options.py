"""What `SortedSFTConfig` adds to the paper's objective: schedules, weights, what is trained, distillation, reports."""

import copy
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, EarlyStoppingCallback

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.trainer import ExitTableCallback, SortedSFTConfig
from tests.tiny import tiny_llama, tiny_sorted, tiny_tokenizer
from tests.trainer.runs import (
    BEST_IS_NOT_LAST,
    EXITS,
    assert_equal_weights,
    exit_logits,
    logged,
    make_data,
    make_trainer,
    naive_sums,
)


pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's deprecations of options that it still has
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.05, "max_grad_norm": 0}
DEEP_EXITS = [3, 6, 9, 12, 16]


def config(**kwargs):
    return SortedSFTConfig("unused", bf16=False, **kwargs)


# Schedules


def exits_of_steps(steps=60, exits=DEEP_EXITS, **kwargs):
    options = config(**kwargs)
    return [options.exits_at_step(exits, step) for step in range(steps)]


@pytest.mark.parametrize("exits", [[4], [2, 4], DEEP_EXITS], ids=str)
@pytest.mark.parametrize("number", [1, 3, 9])
def test_random_steps_train_some_exits_and_the_full_depth(exits, number):
    for step_exits in exits_of_steps(exits=exits, exit_schedule="random", exits_per_step=number):
        assert step_exits == sorted(set(step_exits))
        assert set(step_exits) <= set(exits)
        assert step_exits[-1] == exits[-1]
        assert len(step_exits) == 1 + min(number, len(exits) - 1)
    assert exits_of_steps(exits=exits) == [exits] * 60


def test_random_exits_are_drawn_from_seed_and_step():
    drawn = exits_of_steps(2000, exit_schedule="random", exits_per_step=2)
    assert drawn == exits_of_steps(2000, exit_schedule="random", exits_per_step=2)
    assert drawn != exits_of_steps(2000, exit_schedule="random", exits_per_step=2, seed=1)
    pairs = Counter(tuple(step_exits[:-1]) for step_exits in drawn)
    assert len(pairs) == math.comb(4, 2)
    chi_square = sum((n - 2000 / 6) ** 2 / (2000 / 6) for n in pairs.values())
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


def naive_step(llama, batch, exits, weights=None):
    sums, *_, count = naive_sums(llama, batch, exits)
    return (sums * torch.tensor(weights or [1.0] * len(exits))).sum() / count, sums / count


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


def test_logs_average_over_the_steps_that_trained_an_exit(tmp_path):
    options = {"max_steps": 6, "exit_schedule": "random"}
    each = make_trainer(tmp_path, tiny_sorted(), **options)
    each.train()
    together = make_trainer(tmp_path, tiny_sorted(), logging_steps=6, **options)
    together.train()
    (entry,) = (entry for entry in together.state.log_history if "loss" in entry)
    low, high = (logged(each, f"exit_{k}_loss") for k in EXITS[:2])
    assert len(low) + len(high) == 6 and min(len(low), len(high)) > 1
    for k, losses in ((1, low), (2, high)):
        assert min(losses) < entry[f"exit_{k}_loss"] < max(losses)


def test_evaluation_looks_at_every_exit(tmp_path):
    trainer = make_trainer(tmp_path, tiny_sorted(), eval_dataset=make_data(), exit_schedule="random")
    assert {f"eval_exit_{k}_loss" for k in EXITS} <= trainer.evaluate().keys()


def test_resumed_schedule(tmp_path):
    """Stopped after three of six steps and resumed: the exits that were to come, and the same weights."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "exit_schedule": "random"}
    whole = make_trainer(tmp_path / "whole", tiny_sorted(), **options)
    whole.train()
    resumed = make_trainer(tmp_path / "whole", tiny_sorted(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_equal_weights(resumed.model, whole.model, 1e-6)


# Weights


@pytest.mark.parametrize(
    "options, weights",
    [
        ({}, None),
        ({"exit_loss_weights": "linear"}, [3 / 16, 6 / 16, 9 / 16, 12 / 16, 1.0]),
        ({"exit_loss_weights": "budget:0.4"}, [0.1, 0.1, 0.1, 0.1, 1.0]),
        ({"exit_loss_weights": ["budget:0"]}, [0.0, 0.0, 0.0, 0.0, 1.0]),
        ({"exit_loss_weights": ["1", "2", ".5", "4", "1e0"]}, [1.0, 2.0, 0.5, 4.0, 1.0]),
    ],
    ids=str,
)
def test_weights_of_exits(options, weights):
    assert config(**options).weights_of(DEEP_EXITS) == (weights and pytest.approx(weights))
    if weights is not None:
        again = SortedSFTConfig(**config(**options).to_dict())
        assert again.weights_of(DEEP_EXITS) == pytest.approx(weights)


def test_weights_of_the_model_are_the_default():
    assert config().weights_of([1, 2], [0.5, 2.0]) == [0.5, 2.0]
    assert config(exit_loss_weights="linear").weights_of([1, 2], [0.5, 2.0]) == [0.5, 1.0]
    assert config(exit_loss_weights="budget:1").weights_of([4]) == [1.0]


def test_weights_reach_the_loss_and_the_config(tmp_path):
    trainer = make_trainer(tmp_path, tiny_sorted(), exit_loss_weights="budget:0.5", max_steps=1)
    trainer.train()
    assert trainer.model.config.exit_loss_weights == [0.25, 0.25, 1.0]
    (loss,), losses = logged(trainer, "loss"), [logged(trainer, f"exit_{k}_loss")[0] for k in EXITS]
    assert loss == pytest.approx(0.25 * losses[0] + 0.25 * losses[1] + losses[2], rel=1e-5)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("exit_loss_weights", rule) for rule in ("quadratic", "budget", "budget:", "budget:-1", "budget:nan")),
        *(("exit_schedule", value) for value in ("every", None, 1)),
        *(("exits_per_step", value) for value in (0, -1, 1.5, True, None)),
        *(("trainable", value) for value in ("heads", None, True)),
        *(("exit_heads", value) for value in ("block", 1)),
        *(("exit_learning_rate", value) for value in (0.0, -1e-3, math.inf, "fast")),
        *(("self_distillation_weight", value) for value in (-0.1, math.inf, None)),
    ],
    ids=str,
)
def test_wrong_values(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        config(**{name: value})


def test_all_weights_zero(tmp_path):
    with pytest.raises(ValueError, match="at least one above 0"):
        make_trainer(tmp_path, exit_loss_weights=[0.0, 0.0, 0.0])


# Trained parts


def changed(model, before):
    return {name for name, p in model.named_parameters() if name not in before or not torch.equal(p, before[name])}


OWN = {"lens": "model.exit_norms.{}.matrix", "separate": "exit_lm_heads.{}.weight"}


def owned(exit_heads):
    return {name.format(k) for name in ("model.exit_norms.{}.weight", OWN[exit_heads]) for k in EXITS[:-1]}


def snapshot(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_shared_exits_alone(tmp_path, tied):
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


def test_shared_exits_alone_train_as_the_naive_sum(tmp_path):
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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [tiny_llama, tiny_sorted])
@pytest.mark.parametrize("exit_heads", ["separate", "lens"])
def test_own_exits_alone_leave_full_depth(tmp_path, tied, make, exit_heads):
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


def test_separate_heads_follow_the_exits_of_the_trainer(tmp_path):
    """The heads of exits that stay are kept, new exits get copies of the shared one."""
    model = SortedLlamaForCausalLM.from_llama(tiny_llama(), exit_layers=[1, 2, 4], exit_heads="separate")
    model.exit_lm_heads["2"].weight.data += 1
    trainer = make_trainer(tmp_path, model, exit_layers=[2, 3, 4])
    assert list(trainer.model.exit_lm_heads) == list(trainer.model.model.exit_norms) == ["2", "3"]
    assert trainer.model.exit_lm_heads["2"].weight is model.exit_lm_heads["2"].weight
    assert torch.equal(trainer.model.exit_lm_heads["3"].weight, model.lm_head.weight)


# Exits that leave full depth alone


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("exit_heads", ["lens", "separate"])
@pytest.mark.parametrize("schedule", ["all", "random"])
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


def test_learning_rate_of_what_exits_own(tmp_path):
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


def test_resumed_with_a_learning_rate_of_the_exits(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "exit_heads": "lens", "detach_exits": True}
    options |= {"exit_learning_rate": 0.02, "exit_schedule": "random"}
    whole = make_trainer(tmp_path, tiny_llama(), **options)
    whole.train()
    resumed = make_trainer(tmp_path, tiny_llama(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal_weights(resumed.model, whole.model, 1e-6)
    assert resumed.optimizer.param_groups[-1]["initial_lr"] == 0.02


@pytest.mark.parametrize("options", [{"detach_exits": True}, {"exit_learning_rate": 1e-3}], ids=str)
@pytest.mark.parametrize("exit_heads", [None, "shared"])
def test_exits_that_own_nothing(tmp_path, options, exit_heads):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}=.*`exit_heads='shared'`"):
        make_trainer(tmp_path, exit_heads=exit_heads, **options)


def test_learning_rate_of_exits_and_a_given_optimizer(tmp_path):
    model = tiny_sorted(exit_layers=EXITS, exit_heads="lens")
    given = torch.optim.SGD(model.parameters(), lr=0.1), None
    with pytest.raises(ValueError, match="`exit_learning_rate=0.5` is for an optimizer that the trainer makes"):
        make_trainer(tmp_path, model, exit_learning_rate=0.5, optimizers=given)


def test_detached_exits_with_adapters(tmp_path):
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


@pytest.mark.parametrize("wrapped", [True, False])
def test_adapters_and_exits_alone(tmp_path, wrapped):
    model = get_peft_model(tiny_sorted(), LoraConfig(r=2, task_type="CAUSAL_LM")) if wrapped else tiny_sorted()
    with pytest.raises(ValueError, match="`trainable='exits'`"):
        options = {} if wrapped else {"peft_config": LoraConfig(r=2)}
        make_trainer(tmp_path, model, trainable="exits", **options)
    if wrapped:
        with pytest.raises(ValueError, match="`exit_heads='separate'`"):
            make_trainer(tmp_path, model, exit_heads="separate")


@pytest.mark.parametrize("lora", [False, True])
def test_trained_share_is_printed(tmp_path, capsys, lora):
    options = {"peft_config": LoraConfig(r=2)} if lora else {}
    trainer = make_trainer(tmp_path, tiny_sorted(), disable_tqdm=False, max_steps=1, **options)
    trainer.train()
    printed = capsys.readouterr().out
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    assert "exits 1, 2, 4" in printed
    assert f"({trained / total:.1%})" in printed
    assert (trained < total) == lora


# Self-distillation


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


def test_evaluation_with_distillation(tmp_path):
    """Logits, and nothing else, reach `compute_metrics`."""
    shapes = []

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {}

    trainer = make_trainer(
        tmp_path,
        tiny_sorted(),
        eval_dataset=make_data(),
        self_distillation_weight=0.5,
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    assert [len(shape) for shape in shapes] == [3]
    assert metrics["eval_exit_1_divergence"] > metrics["eval_exit_4_divergence"] == 0


def test_no_divergence_without_distillation(tmp_path):
    trainer = make_trainer(tmp_path, tiny_sorted(), max_steps=1)
    trainer.train()
    assert not logged(trainer, "exit_1_divergence")


# Reports


def test_table_of_exits(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path, tiny_sorted(), eval_dataset={"a": make_data(), "b": make_data()}, disable_tqdm=False,
        eval_strategy="steps", eval_steps=1, max_steps=1,
    )  # fmt: skip
    trainer.train()
    printed = capsys.readouterr().out
    for dataset in ("a", "b"):
        assert f"eval_{dataset}, step 1" in printed
        for k in EXITS:
            (loss,) = logged(trainer, f"eval_{dataset}_exit_{k}_loss")
            assert any(f" {k} " in line and f"{loss:.4g}" in line for line in printed.splitlines())
    trainer.remove_callback(ExitTableCallback)
    trainer.evaluate()
    assert "step 1" not in capsys.readouterr().out


def test_early_stopping_on_an_exit(tmp_path):
    trainer = make_trainer(
        tmp_path,
        tiny_llama(initializer_range=0.02),
        max_steps=20,
        metric_for_best_model="eval_exit_1_loss",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        **BEST_IS_NOT_LAST,
    )
    trainer.train()
    losses = logged(trainer, "eval_exit_1_loss")
    assert len(losses) < 20
    assert min(losses) == losses[-3]
    assert trainer.state.best_metric == losses[-3]


def test_reporting_integrations_get_every_exit(tmp_path):
    """Through `report_to`, as everything that `Trainer` logs."""
    trainer = make_trainer(
        tmp_path, tiny_sorted(), eval_dataset=make_data(), report_to="tensorboard", eval_strategy="steps",
        eval_steps=2, processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    for k in EXITS:
        assert {f"train/exit_{k}_loss", f"train/exit_{k}_mean_token_accuracy", f"eval/exit_{k}_agreement"} <= tags
