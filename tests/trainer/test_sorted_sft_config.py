"""`SortedSFTConfig`: ranges, spacings, command lines and YAML files."""

import pytest
from trl import SFTConfig, TrlParser

from trainer import SortedSFTConfig


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
    added = {"exit_layers", "exit_loss_weights", "full_depth_weight", "exit_loss_reduction", "exit_schedule"}
    added |= {
        "exits_per_step",
        "trainable",
        "exit_heads",
        "detach_exits",
        "exit_learning_rate",
        "self_distillation_weight",
        "self_distillation_temperature",
    }
    added |= {"log_exit_grad_norms"}
    assert ours.keys() - theirs.keys() == added
    differing = {name for name in theirs if ours[name] != theirs[name]}
    assert differing <= {"logging_dir"}  # holds the time


@pytest.mark.parametrize("exits", [[4], [1, 4], [1, 2, 3, 4], (2, 4), ["1", "4"]], ids=str)
def test_lists(exits):
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
def test_spacing(spacing, depth, exits):
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
    ],
    ids=str,
)
def test_wrong_exit_layers(exits):
    with pytest.raises(ValueError, match="`exit_layers` must be"):
        make(exit_layers=exits)


@pytest.mark.parametrize("exits", [[1, 2], [1, 5], [8]], ids=str)
def test_exits_that_do_not_fit_the_depth(exits):
    config = make(exit_layers=exits)
    with pytest.raises(ValueError, match="`exit_layers`.*4"):
        config.exits_of(4)


@pytest.mark.parametrize("weights", [[1.0, 0.0, 2], [1, 1, 1], (0.5, 0.25, 0.25)], ids=str)
def test_weights(weights):
    config = make(exit_layers=[1, 2, 4], exit_loss_weights=weights)
    assert config.exit_loss_weights == [float(w) for w in weights]


@pytest.mark.parametrize(
    "weights",
    [[], [1.0], [1.0] * 4, [0, 0, 0], [-1, 1, 1], [float("nan"), 1, 1], [float("inf"), 1, 1], [True, 1, 1], "111"]
    + [["1", 1, 1], 1.0],
    ids=str,
)
def test_wrong_weights(weights):
    with pytest.raises(ValueError, match="`exit_loss_weights` must be a list of"):
        make(exit_layers=[1, 2, 4], exit_loss_weights=weights)


@pytest.mark.parametrize("weights", [[-1.0], [], [0.0], [float("nan")], 1.0, "1"], ids=str)
def test_wrong_weights_without_exits(weights):
    """The number of exits is not known yet; the range is."""
    with pytest.raises(ValueError, match="`exit_loss_weights` must be"):
        make(exit_loss_weights=weights)


@pytest.mark.parametrize("reduction", ["none", "", None, 1, "SUM"], ids=str)
def test_wrong_reduction(reduction):
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
def test_command_line(flags, exits):
    config = parse("--exit_layers", *flags, "--exit_loss_weights", *["0.5"] * len(exits))
    assert config.exits_of(4) == exits
    assert config.exit_loss_weights == [0.5] * len(exits)


def test_command_line_reduction():
    assert parse("--exit_loss_reduction", "mean").exit_loss_reduction == "mean"
    assert parse().exit_layers is None
    with pytest.raises(SystemExit):
        parse("--exit_loss_reduction", "median")


def test_command_line_wrong_exits():
    with pytest.raises(ValueError, match="`exit_layers` must be"):
        parse("--exit_layers", "4", "2")


@pytest.mark.parametrize(
    "line, exits",
    [("[1, 2, 4]", [1, 2, 4]), ("every:2", [2, 4]), ("['every:3']", [3, 4]), ("\n  - 2\n  - 4", [2, 4])],
)
def test_yaml(tmp_path, line, exits):
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
def test_dict_round_trip(exits):
    """`Trainer` saves its arguments in every checkpoint and others rebuild them from the dict."""
    config = make(exit_layers=exits, exit_loss_reduction="mean")
    again = SortedSFTConfig(**config.to_dict())
    assert again.exits_of(4) == config.exits_of(4)
    assert again.exit_loss_reduction == "mean"
