"""`SortedSFTConfig`: ranges, spacings, command lines and YAML files."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, TrlParser

from sorted_llama.trainer import SortedSFTConfig
from tests.trainer.runs import make_trainer


def make(**kwargs):
    return SortedSFTConfig("unused", bf16=False, **kwargs)


def test_defaults_are_the_papers_objective():
    config = make()
    assert config.exit_layers is None
    assert config.exit_loss_weights is None
    assert config.exit_loss_reduction == "sum"
    assert config.exits_of(4) is None


def test_every_default_of_sft_is_kept():
    ours, theirs = make().to_dict(), SFTConfig("unused", bf16=False).to_dict()
    added = {"exit_layers", "exit_loss_weights", "exit_loss_reduction", "exit_schedule", "exits_per_step", "trainable"}
    added |= {"exit_heads", "detach_exits", "exit_learning_rate", "self_distillation_weight"}
    assert ours.keys() - theirs.keys() == added
    differing = {name for name in theirs if ours[name] != theirs[name]}
    assert differing <= {"logging_dir"}  # holds the time


@pytest.mark.parametrize(
    "exits", [[4], [1, 4], [1, 2, 3, 4], (2, 4), ["1", "4"], np.array([2, 4]), torch.tensor([4])], ids=str
)
def test_exits_are_lists_of_any_kind(exits):
    config = make(exit_layers=exits)
    assert config.exits_of(4) == [int(k) for k in exits]


@pytest.mark.parametrize(
    "spacing, depth, exits",
    [
        ("every:4", 12, [4, 8, 12]),
        ("every:4", 10, [4, 8, 10]),
        ("every:1", 3, [1, 2, 3]),
        ("every:3", 3, [3]),
        ("every:9", 4, [4]),
        (["every:2"], 5, [2, 4, 5]),
    ],
    ids=str,
)
def test_a_spacing_makes_exits_of_a_depth(spacing, depth, exits):
    assert make(exit_layers=spacing).exits_of(depth) == exits


@pytest.mark.parametrize(
    "exits",
    [
        [],
        [0, 4],
        [-1, 4],
        [4, 2],
        [2, 2, 4],
        [True, 4],
        [1.5, 4],
        [1.0, 4],
        [None],
        ["a", "4"],
        ["1.5"],
        [""],
        ["every:2", "4"],
        5,
        1.5,
        True,
        {1: 2},
        "",
        "4",
        "all",
        "every",
        "every:",
        "every:0",
        "every:-1",
        "every:1.5",
        "every:x",
        "every: 2",
        ["every:0"],
        ["every:"],
        [10**400, 4],
        ["9" * 5000],
        [math.nan],
    ],
    ids=lambda exits: str(exits)[:30],
)
def test_wrong_exit_layers_are_refused(exits):
    with pytest.raises(ValueError, match="`exit_layers` must be"):
        make(exit_layers=exits)


@pytest.mark.parametrize(
    "exits, said",
    [
        ("10,20,30", "got '10,20,30'"),
        (["10,20,30"], "got '10,20,30'"),  # `--exit_layers 10,20,30`
        ("[10, 20]", r"got '\[10, 20\]'"),
        ([], r"got \[\]"),
        ([20, 10, 30], r"ascending.*got \[20, 10, 30\]"),
        ([10, 10], r"ascending.*got \[10, 10\]"),
        ([0, 4], r"from 1 .*got \[0, 4\]"),
    ],
    ids=str,
)
def test_wrong_exit_layers_are_told_as_what_they_are(exits, said):
    with pytest.raises(ValueError, match=f"`exit_layers` must be.*{said}"):
        make(exit_layers=exits)


def test_exit_that_is_too_deep_is_told():
    with pytest.raises(ValueError, match=r"from 1 to 4, .* got \[1, 5\]"):
        make(exit_layers=[1, 5]).exits_of(4)


@pytest.mark.parametrize("exits", [[1, 2], [1, 5], [8]], ids=str)
def test_exits_that_do_not_fit_the_depth_are_refused(exits):
    config = make(exit_layers=exits)
    with pytest.raises(ValueError, match="`exit_layers`.*4"):
        config.exits_of(4)


@pytest.mark.parametrize("weights", [[1.0, 0.0, 2], [1, 1, 1], (0.5, 0.25, 0.25)], ids=str)
def test_a_list_of_weights_is_taken_as_floats(weights):
    config = make(exit_layers=[1, 2, 4], exit_loss_weights=weights)
    assert config.exit_loss_weights == [float(w) for w in weights]


@pytest.mark.parametrize(
    "weights",
    [[], [1.0], [1.0] * 4, [0, 0, 0], [-1, 1, 1], [float("nan"), 1, 1], [float("inf"), 1, 1], [True, 1, 1], "111"]
    + [["1", 1, 1], 1.0, [10**400, 1, 1], ["1", "1", "x"]],
    ids=str,
)
def test_wrong_weights_are_refused(weights):
    with pytest.raises(ValueError, match="`exit_loss_weights` must be a list of"):
        make(exit_layers=[1, 2, 4], exit_loss_weights=weights)


@pytest.mark.parametrize("weights", [[-1.0], [], [0.0], [float("nan")], 1.0, "1"], ids=str)
def test_wrong_weights_without_exits_are_refused(weights):
    """The number of exits is not known yet; the range is."""
    with pytest.raises(ValueError, match="`exit_loss_weights` must be"):
        make(exit_loss_weights=weights)


@pytest.mark.parametrize("reduction", ["none", "", None, 1, "SUM"], ids=str)
def test_a_wrong_reduction_is_refused(reduction):
    with pytest.raises(ValueError, match="`exit_loss_reduction` must be"):
        make(exit_layers=[4], exit_loss_reduction=reduction)


def parse(*flags):
    (config,) = TrlParser((SortedSFTConfig,)).parse_args_and_config(
        ["--output_dir", "unused", "--bf16", "false", *flags], fail_with_unknown_args=True
    )
    return config


@pytest.mark.parametrize(
    "flags, exits",
    [
        (["1", "2", "4"], [1, 2, 4]),
        (["4"], [4]),
        (["every:2"], [2, 4]),
    ],
    ids=str,
)
def test_exits_and_weights_are_flags(flags, exits):
    config = parse("--exit_layers", *flags, "--exit_loss_weights", *["0.5"] * len(exits))
    assert config.exits_of(4) == exits
    assert config.exit_loss_weights == [0.5] * len(exits)


def test_the_reduction_is_a_flag_of_two_choices():
    assert parse("--exit_loss_reduction", "mean").exit_loss_reduction == "mean"
    assert parse().exit_layers is None
    with pytest.raises(SystemExit):
        parse("--exit_loss_reduction", "median")


def test_wrong_exits_of_a_flag_are_refused():
    with pytest.raises(ValueError, match="`exit_layers` must be"):
        parse("--exit_layers", "4", "2")


@pytest.mark.parametrize(
    "line, exits",
    [("[1, 2, 4]", [1, 2, 4]), ("every:2", [2, 4]), ("['every:3']", [3, 4]), ("\n  - 2\n  - 4", [2, 4])],
)
def test_exits_and_weights_stand_in_yaml(tmp_path, line, exits):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"output_dir: unused\nbf16: false\nexit_layers: {line}\nexit_loss_weights: {[1] * len(exits)}\n"
        "exit_loss_reduction: mean\n"
    )
    (config,) = TrlParser((SortedSFTConfig,)).parse_args_and_config(["--config", str(path)])
    assert config.exits_of(4) == exits
    assert config.exit_loss_weights == [1.0] * len(exits)
    assert config.exit_loss_reduction == "mean"
    (overridden,) = TrlParser((SortedSFTConfig,)).parse_args_and_config(
        ["--config", str(path), "--exit_layers", *["1", "4", "9"][: len(exits)]]
    )
    assert overridden.exit_layers == [1, 4, 9][: len(exits)]


@pytest.mark.parametrize("exits", [[1, 4], "every:2", None], ids=str)
def test_a_configuration_is_made_again_from_its_dict(exits):
    """`Trainer` saves its arguments in every checkpoint and others rebuild them from the dict."""
    config = make(exit_layers=exits, exit_loss_reduction="mean")
    again = SortedSFTConfig(**config.to_dict())
    assert again.exits_of(4) == config.exits_of(4)
    assert again.exit_loss_reduction == "mean"


@pytest.mark.parametrize("name", ["exit_learning_rate", "self_distillation_weight"])
@pytest.mark.parametrize("value", [10**400, math.nan, -math.inf, True, "1", [1.0], 1j], ids=lambda v: str(v)[:30])
def test_numbers_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number"):
        make(**{name: value})


@pytest.mark.parametrize("value", [10**400, math.nan, 1.5, True, "1", None], ids=lambda v: str(v)[:30])
def test_exits_per_step_that_are_no_integers_are_refused(value):
    with pytest.raises(ValueError, match="`exits_per_step"):
        make(exits_per_step=value)


def test_exits_per_step_without_a_choice_of_exits_is_refused():
    with pytest.raises(ValueError, match="`exits_per_step=2` has no effect with `exit_schedule='all'`"):
        make(exits_per_step=2)
    assert make(exits_per_step=np.int64(2), exit_schedule="random").exits_per_step == 2


@pytest.mark.parametrize(
    "option", [{"full_depth_weight": 2.0}, {"self_distillation_temperature": 2.0}, {"log_exit_grad_norms": True}]
)
def test_options_that_were_taken_out_are_named_in_the_error(option):
    with pytest.raises(TypeError, match=f"'{next(iter(option))}'"):
        make(**option)


@pytest.mark.parametrize(
    "option, allowed",
    [
        ({"exit_schedule": "rotate"}, "`exit_schedule` must be 'all' or 'random', got 'rotate'"),
        ({"exit_schedule": "grow"}, "`exit_schedule` must be 'all' or 'random', got 'grow'"),
        ({"exit_loss_weights": "uniform"}, "must be a list of numbers, 'linear' or 'budget:B' .* got 'uniform'"),
    ],
    ids=str,
)
def test_values_that_were_taken_out_get_an_error_with_those_that_are_allowed(option, allowed):
    with pytest.raises(ValueError, match=allowed):
        make(**option)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exit_schedule": "random", "exits_per_step": 2},
        {"self_distillation_weight": 1.0},
        {"exit_layers": "every:2", "exit_loss_weights": "budget:0.3", "exit_heads": "lens", "detach_exits": True},
    ],
    ids=str,
)
def test_every_option_survives_dict_and_yaml(tmp_path, options):
    import yaml

    config = SortedSFTConfig("unused", **options)
    ours = {name: value for name, value in config.to_dict().items() if name not in vars(SFTConfig("x", bf16=False))}
    assert SortedSFTConfig(**config.to_dict()).to_dict() == config.to_dict()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"output_dir": "unused", **ours}))
    (again,) = TrlParser((SortedSFTConfig,)).parse_args_and_config(["--config", str(tmp_path / "config.yaml")])
    assert {name: getattr(again, name) for name in ours} == ours


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bfloat16_is_what_the_machine_can_do_unless_it_is_said(monkeypatch, has_bf16):
    """Nothing that is said is overridden, and where `SFTConfig` takes the defaults, they are its."""
    for module in ("sorted_llama.trainer.sorted_sft_config", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: has_bf16)
    assert SortedSFTConfig("unused").bf16 is has_bf16
    assert SortedSFTConfig("unused", fp16=True).bf16 is False
    assert SortedSFTConfig("unused", bf16=False).bf16 is False
    assert SortedSFTConfig("unused", use_cpu=True).bf16 is SFTConfig("unused", use_cpu=True).bf16 is True
    if has_bf16:
        assert SortedSFTConfig("unused", bf16=True).bf16 is SFTConfig("unused").bf16 is True
    else:
        for config_class in (SFTConfig, SortedSFTConfig):
            with pytest.raises(ValueError, match="doesn't support bf16"):
                config_class("unused", bf16=True)


def test_defaults_train_on_this_machine(tmp_path):
    trainer = make_trainer(tmp_path, use_cpu=False, bf16=None)
    trainer.train()
    assert trainer.args.bf16 is is_torch_bf16_gpu_available()
    assert trainer.state.global_step == 2


# Schedules and weights

DEEP_EXITS = [3, 6, 9, 12, 16]


def exits_of_steps(steps=60, exits=DEEP_EXITS, **kwargs):
    options = make(**kwargs)
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
def test_weights_of_exits_follow_the_list_or_the_rule(options, weights):
    assert make(**options).weights_of(DEEP_EXITS) == (weights and pytest.approx(weights))
    if weights is not None:
        again = SortedSFTConfig(**make(**options).to_dict())
        assert again.weights_of(DEEP_EXITS) == pytest.approx(weights)


def test_weights_of_the_model_are_the_default():
    assert make().weights_of([1, 2], [0.5, 2.0]) == [0.5, 2.0]
    assert make(exit_loss_weights="linear").weights_of([1, 2], [0.5, 2.0]) == [0.5, 1.0]
    assert make(exit_loss_weights="budget:1").weights_of([4]) == [1.0]


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
def test_wrong_values_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        make(**{name: value})
