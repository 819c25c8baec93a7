"""What is logged of every exit, in training and in evaluations, against naive means."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    EarlyStoppingCallback,
)

from sorted_llama.trainer.exit_metrics import METRICS, ExitMetrics, Metric
from tests.tiny import tiny_llama, tiny_sorted, tiny_tokenizer
from tests.trainer.runs import (
    BEST_IS_NOT_LAST,
    EXITS,
    logged,
    make_data,
    make_trainer,
    naive_means,
)


pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's deprecations of options that it still has
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def batch_outputs(**means):
    """What a model returns of a batch, for the exits of the step."""
    names = ("exit_losses", "exit_token_accuracies", "exit_agreements", "exit_divergences")
    return SimpleNamespace(**dict.fromkeys(names) | {name: torch.tensor(values) for name, values in means.items()})


def test_sums_and_counts_are_those_of_the_steps_that_trained_an_exit():
    """A loss is divided by the items of the whole accumulated batch, the others by the batch's labelled tokens."""
    metrics = ExitMetrics(EXITS, training=True)
    batches = [
        ([1, 4], 2, {"exit_losses": [1.0, 2.0], "exit_token_accuracies": [0.5, 1.0], "exit_divergences": [0.5, 0.0]}),
        ([2, 4], 6, {"exit_losses": [3.0, 4.0], "exit_token_accuracies": [0.25, 0.5], "exit_divergences": [0.25, 0]}),
    ]
    for exits, labelled, means in batches:
        outputs = batch_outputs(**means, exit_agreements=[0.0, 1.0])
        metrics.add(exits, outputs, torch.tensor(labelled), num_items=8, num_present=torch.tensor(10))
    pairs, num_present = metrics.take(Accelerator(cpu=True))
    assert pairs == {
        "loss": {1: (8.0, 2.0), 2: (24.0, 6.0), 4: (16.0 + 32.0, 8.0)},
        "mean_token_accuracy": {1: (1.0, 2.0), 2: (1.5, 6.0), 4: (2.0 + 3.0, 8.0)},
        "divergence": {1: (4.0, 2.0), 2: (2.0, 6.0), 4: (0.0, 8.0)},
    }
    assert num_present == 20
    assert not metrics.pairs


def test_a_line_of_the_metrics_is_a_metric_in_the_logs_and_in_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METRICS, "again", Metric("exit_token_accuracies"))
    trainer = make_trainer(tmp_path, tiny_sorted(), eval_dataset=make_data(), disable_tqdm=False)
    trainer.train()
    metrics = trainer.evaluate()
    for k in EXITS:
        assert logged(trainer, f"exit_{k}_again") == logged(trainer, f"exit_{k}_mean_token_accuracy")
        assert metrics[f"eval_exit_{k}_again"] == metrics[f"eval_exit_{k}_mean_token_accuracy"]
    assert "again" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["text", "prompt_completion"])
def test_training_logs_are_means_over_labelled_tokens(tmp_path, data):
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


# Evaluation


def expected_evaluation(llama, trainer, dataset, prefix="eval"):
    losses, accuracies, agreements = naive_means(llama, [trainer.data_collator([row]) for row in dataset])
    metrics = {}
    for i, k in enumerate(EXITS):
        metrics[f"{prefix}_exit_{k}_loss"] = losses[i]
        metrics[f"{prefix}_exit_{k}_mean_token_accuracy"] = accuracies[i]
        metrics[f"{prefix}_exit_{k}_agreement"] = agreements[i]
    return metrics


PADDING_FREE = {"padding_free": True, "max_length": None}


@pytest.mark.parametrize(
    "data, options", [("text", {}), ("prompt_completion", {}), ("messages", {}), ("prompt_completion", PADDING_FREE)]
)
def test_evaluation_means_are_naive_in_one_pass(tmp_path, data, options):
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


def test_an_evaluation_during_training_leaves_the_training_logs_alone(tmp_path):
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


def test_several_evaluation_sets_have_metrics_each(tmp_path):
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
def test_a_dataset_passed_to_evaluate_is_evaluated(tmp_path, as_dict):
    model = tiny_llama()
    llama = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, model)
    prepared = make_trainer(tmp_path, eval_dataset=make_data().select([1, 2, 3])).eval_dataset
    dataset = make_data().select([1, 2, 3])
    metrics = trainer.evaluate({"x": dataset} if as_dict else dataset, metric_key_prefix="test")
    expected = expected_evaluation(llama, trainer, prepared, "test_x" if as_dict else "test")
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key


def test_predict_leaves_the_evaluation_alone(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=make_data())
    before = trainer.evaluate()
    trainer.predict(trainer.eval_dataset.select([3]))
    after = trainer.evaluate()
    for key in (k for k in before if k.startswith("eval_exit")):
        assert after[key] == before[key], key


def test_compute_metrics_sees_the_logits_of_full_depth(tmp_path):
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
def test_a_batch_without_labels_is_a_loss_of_zero(tmp_path, schedule):
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


def test_evaluation_looks_at_every_exit(tmp_path):
    trainer = make_trainer(tmp_path, tiny_sorted(), eval_dataset=make_data(), exit_schedule="random")
    assert {f"eval_exit_{k}_loss" for k in EXITS} <= trainer.evaluate().keys()


def test_evaluation_with_distillation_has_divergences(tmp_path):
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
