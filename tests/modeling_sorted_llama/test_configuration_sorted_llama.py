"""The configuration: its fields, what it refuses, and how it travels to and from a plain Llama's."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig

from sorted_llama.modeling_sorted_llama import SortedLlamaConfig
from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import check_choice, check_int, check_number
from tests.tiny import tiny_fields


NAN, INF = float("nan"), float("inf")
# With 4 layers, each of these is wrong, and the range that the message must name follows from the depth
BAD_EXIT_LAYER = [0, -1, 5, True, False, 1.0, NAN, "2", [1], (), {"k": 1}]
BAD_EXIT_LAYERS = [[], (), "1,4", 4, {1, 4}, 2.0, True, [0, 4], [-1, 4], [1, 5], [1, 2], [4, 2], [2, 1, 4], [1, 1, 4]]
BAD_EXIT_LAYERS += [[True, 4], [1.0, 4], ["1", "4"], [None, 4], [[1], 4], [NAN, 4]]
# With exits [1, 2, 4]
BAD_WEIGHTS = [[], [1.0], [1.0] * 4, [1, 1, NAN], [1, 1, INF], [1, -1, 1], [0, 0, 0], [1, True, 1], [1, "1", 1]]
BAD_WEIGHTS += ["111", 1.0, {1.0, 2.0, 3.0}, [1, None, 1]]


def sorted_config(**fields):
    return SortedLlamaConfig(**tiny_fields(**fields))


def assert_names(error: pytest.ExceptionInfo, field: str, value: object, limit: int):
    message = str(error.value)
    assert f"`{field}`" in message and str(limit) in message
    # The value itself, or the one of its entries that is wrong
    entries = list(value) if isinstance(value, (list, tuple)) else []
    assert repr(value) in message or any(repr(entry) in message for entry in entries)


def test_an_integer_of_any_library_within_its_bounds_is_returned_as_pythons():
    for value in (3, np.int64(3), torch.tensor(3)):
        number = check_int(value, "k", 3, 3)
        assert number == 3 and type(number) is int
    assert check_int(-(10**400), "k", most=0) == -(10**400)


def test_a_finite_number_within_its_bounds_is_returned_as_a_float():
    for value in (1, 1.0, np.float32(1), np.int8(1)):
        number = check_number(value, "t", 1, 1)
        assert number == 1.0 and type(number) is float
    assert check_number(-5, "t") == -5.0 and check_number(0.5, "t", 0, exclusive=True) == 0.5


@pytest.mark.parametrize(
    "check, bounds, wrong, allowed",
    [
        (check_int, {}, [None, "1", 1.0, True, np.True_, torch.tensor([1])], "an integer"),
        (check_int, {"least": 1}, [0, True], "an integer of at least 1"),
        (check_int, {"most": 4}, [5], "an integer of at most 4"),
        (check_int, {"least": 1, "most": 4}, [0, 5, NAN], "an integer from 1 to 4"),
        (check_number, {}, [None, "1", True, NAN, INF, 10**400], "a finite number"),
        (check_number, {"least": 0}, [-1e-9, False], "a finite number of at least 0"),
        (check_number, {"least": 0, "exclusive": True}, [0, -1], "a finite number above 0"),
        (check_number, {"most": 1}, [1.1], "a finite number of at most 1"),
        (check_number, {"least": 0, "most": 1}, [-0.1, 1.1], "a finite number from 0 to 1"),
        (check_number, {"least": 0, "most": 1, "exclusive": True}, [0, 2], "a finite number above 0 and of at most 1"),
        (check_choice, {"allowed": ["sum", "mean"]}, ["max", None, ["sum"], np.ones(2)], "'sum' or 'mean'"),
        (check_choice, {"allowed": {"a": 1, "b": 2, None: 3}}, ["c"], "'a', 'b' or None"),
        (check_choice, {"allowed": ["a"]}, ["b"], "'a'"),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_a_value_out_of_range_is_refused_by_name_with_what_is_allowed(check, bounds, wrong, allowed):
    for value in wrong:
        with pytest.raises(ValueError) as error:
            check(value, "option", **bounds)
        assert str(error.value) == f"`option` must be {allowed}, got {value!r}."


def test_one_of_the_allowed_values_is_returned():
    assert (
        check_choice("mean", "reduction", ("sum", "mean")) == "mean" and check_choice(None, "x", ["a", None]) is None
    )


@pytest.mark.parametrize("value", BAD_EXIT_LAYER, ids=repr)
def test_a_bad_exit_layer_is_refused_by_name(value):
    with pytest.raises(ValueError) as error:
        sorted_config(exit_layer=value)
    assert_names(error, "exit_layer", value, 4)


@pytest.mark.parametrize("value", BAD_EXIT_LAYERS, ids=repr)
def test_bad_exit_layers_are_refused_by_name(value):
    with pytest.raises(ValueError) as error:
        sorted_config(exit_layers=value)
    assert_names(error, "exit_layers", value, 4)


@pytest.mark.parametrize(
    "value", [[2, 1, 4], [1, 1, 4], "1, 2, 4", "[1, 2, 4]", [], [1, 2, 5], "every:0", "every:²"], ids=repr
)
def test_wrong_exit_layers_are_told_beside_what_is_allowed(value):
    with pytest.raises(ValueError) as error:
        sorted_config(exit_layers=value)
    assert str(error.value) == (
        "`exit_layers` must be a list of integers from 1 to 4, ascending and ending in the full depth, or 'every:N', "
        f"got {value!r}."
    )


def test_exits_that_end_before_full_depth_are_told_with_it():
    with pytest.raises(ValueError, match=r"got \[1, 2\]: pass \[1, 2, 4\]"):
        sorted_config(exit_layers=[1, 2])


@pytest.mark.parametrize("depth, n, exits", [(4, 2, [2, 4]), (5, 2, [2, 4, 5]), (4, 9, [4]), (3, 1, [1, 2, 3])])
def test_a_spacing_works_wherever_exit_layers_does(tmp_path, depth, n, exits):
    assert sorted_config(num_hidden_layers=depth, exit_layers=f"every:{n}").exit_layers == exits
    config = LlamaConfig(**tiny_fields(num_hidden_layers=depth))
    config.save_pretrained(tmp_path)
    assert SortedLlamaConfig.from_llama(config, exit_layers=f"every:{n}").exit_layers == exits
    assert SortedLlamaConfig.from_pretrained(tmp_path, exit_layers=f"every:{n}").exit_layers == exits


def test_integers_of_other_libraries_are_depths():
    config = sorted_config(exit_layers=[np.int32(1), torch.tensor(2), 4], exit_layer=np.int64(2))
    assert config.exit_layers == [1, 2, 4] and config.exit_layer == 2
    assert {type(k) for k in [*config.exit_layers, config.exit_layer]} == {int}
    assert sorted_config(exit_layers=torch.tensor([2, 4])).exit_layers == [2, 4]
    for no_depth in (torch.tensor([2]), torch.tensor(True), torch.tensor(2.0), np.float32(2), np.True_):
        with pytest.raises(ValueError, match="`exit_layer` must be an integer from 1 to 4"):
            sorted_config(exit_layer=no_depth)


@pytest.mark.parametrize(
    "edited, overrides, field",
    [
        ({"exit_layers": [1, 8]}, {}, "exit_layers"),
        ({"exit_layers": [1, 8]}, {"num_hidden_layers": 1}, "exit_layers"),
        ({"exit_layers": 5}, {"num_hidden_layers": 1}, "exit_layers"),
        ({"exit_layers": [1, 10**400]}, {}, "exit_layers"),
        ({"num_hidden_layers": 2}, {}, "exit_layers"),
        ({"num_hidden_layers": 2}, {"num_hidden_layers": 1}, "exit_layers"),
        ({"exit_layer": 9}, {"num_hidden_layers": 2}, "exit_layer"),
        ({"exit_layer": "2"}, {"num_hidden_layers": 2}, "exit_layer"),
        ({"exit_loss_weights": [10**400, 1]}, {}, "exit_loss_weights"),
        ({"exit_loss_weights": 5}, {"num_hidden_layers": 1}, "exit_loss_weights"),
        ({"exit_heads": ["lens"]}, {}, "exit_heads"),
        ({}, {"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"num_hidden_layers": "4"}, {"num_hidden_layers": 1}, "num_hidden_layers"),
        ({}, {"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_config_file_with_wrong_values_names_the_field(tmp_path, edited, overrides, field):
    sorted_config(exit_layers=[1, 4]).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | edited))
    with pytest.raises(ValueError, match=f"`{field}`"):
        SortedLlamaConfig.from_pretrained(tmp_path, **overrides)


@pytest.mark.parametrize("value", BAD_WEIGHTS, ids=repr)
def test_bad_exit_loss_weights_are_refused_by_name(value):
    with pytest.raises(ValueError) as error:
        sorted_config(exit_layers=[1, 2, 4], exit_loss_weights=value)
    assert_names(error, "exit_loss_weights", value, 3)


def test_loss_weights_without_exits_are_refused():
    with pytest.raises(ValueError, match="`exit_loss_weights`.*`exit_layers`"):
        sorted_config(exit_loss_weights=[1.0])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"exit_layers": [4]},
        {"exit_layers": (1, 2, 4), "exit_loss_weights": (0, 0.5, 2)},
        {"exit_layers": [1, 2, 3, 4], "exit_layer": 3},
        {"exit_layer": 4},
    ],
    ids=repr,
)
def test_depth_fields_survive_saving_and_copying(tmp_path, fields):
    config = sorted_config(**fields)
    config.save_pretrained(tmp_path)
    for loaded in (
        SortedLlamaConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        SortedLlamaConfig.from_dict(config.to_dict()),
        SortedLlamaConfig(**config.to_dict()),
        copy.deepcopy(config),
    ):
        assert type(loaded) is SortedLlamaConfig and loaded.model_type == "sorted_llama"
        for name in ("exit_layers", "exit_layer", "exit_loss_weights"):
            value = fields.get(name)
            assert getattr(loaded, name) == (list(value) if isinstance(value, tuple) else value)


@given(depth=st.integers(1, 12), data=st.data())
def test_any_valid_exits_are_kept(depth, data):
    exits = sorted(data.draw(st.sets(st.integers(1, depth))) | {depth})
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(exits), max_size=len(exits)))
    exit_layer = data.draw(st.none() | st.integers(1, depth))
    config = sorted_config(
        num_hidden_layers=depth, exit_layers=exits, exit_loss_weights=weights, exit_layer=exit_layer
    )
    assert (config.exit_layers, config.exit_loss_weights, config.exit_layer) == (exits, weights, exit_layer)


def test_the_config_file_of_a_plain_llama_loads_as_a_sorted_one(tmp_path):
    """A Llama's config, which has none of the fields, loads as a sorted one without exits; overrides are taken."""
    plain = LlamaConfig(**tiny_fields(rope_parameters={"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0}))
    plain.save_pretrained(tmp_path)
    config = SortedLlamaConfig.from_pretrained(tmp_path)
    assert config.model_type == "sorted_llama"
    assert (config.exit_layers, config.exit_layer, config.exit_loss_weights) == (None, None, None)
    for name in set(plain.to_dict()) - {"model_type", "architectures", "transformers_version"}:
        assert getattr(config, name) == getattr(plain, name)

    config = SortedLlamaConfig.from_pretrained(tmp_path, exit_layers=[1, 4], exit_loss_weights=[2, 1], exit_layer=1)
    assert (config.exit_layers, config.exit_loss_weights, config.exit_layer) == ([1, 4], [2.0, 1.0], 1)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_an_old_config_file_without_the_fields_loads(tmp_path):
    fields = sorted_config(exit_layers=[1, 4]).to_dict()
    for name in ("exit_layers", "exit_layer", "exit_loss_weights", "auto_map"):
        del fields[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is SortedLlamaConfig
    assert (config.exit_layers, config.exit_layer, config.exit_loss_weights) == (None, None, None)


@pytest.mark.parametrize(
    "overrides, field",
    [
        ({"exit_layer": 5}, "exit_layer"),
        ({"exit_layers": [1, 2]}, "exit_layers"),
        ({"exit_layers": [1, 4], "exit_loss_weights": [1.0]}, "exit_loss_weights"),
        ({"num_hidden_layers": 2, "exit_layers": [1, 4]}, "exit_layers"),
        ({"num_hidden_layers": 2, "exit_layer": 3}, "exit_layer"),
    ],
    ids=repr,
)
def test_overrides_of_from_pretrained_are_checked(tmp_path, overrides, field):
    sorted_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`{field}`"):
        SortedLlamaConfig.from_pretrained(tmp_path, **overrides)


@pytest.mark.parametrize(
    "depth, exits, weights, exit_layer",
    [
        (4, [1, 2, 4], [3.0, 2.0, 1.0], 2),
        (2, [1, 2], [3.0, 2.0], 2),
        (1, [1], [3.0], None),
        (3, None, None, 2),  # 3 is no trained exit
    ],
)
def test_fewer_layers_cut_the_exits(tmp_path, depth, exits, weights, exit_layer):
    sorted_config(exit_layers=[1, 2, 4], exit_loss_weights=[3, 2, 1], exit_layer=2).save_pretrained(tmp_path)
    config = SortedLlamaConfig.from_pretrained(tmp_path, num_hidden_layers=depth)
    assert (config.exit_layers, config.exit_loss_weights, config.exit_layer) == (exits, weights, exit_layer)
    assert config.num_hidden_layers == depth


def test_a_config_becomes_a_plain_llamas_and_back():
    fields = tiny_fields(attention_bias=True, mlp_bias=True, num_key_value_heads=1, tie_word_embeddings=False)
    plain = LlamaConfig(**fields, attn_implementation="eager")
    before = plain.to_dict()
    config = SortedLlamaConfig.from_llama(plain, exit_layers=[2, 4])
    assert plain.to_dict() == before
    assert config.exit_layers == [2, 4] and config._attn_implementation == "eager"

    back = config.to_llama(2)
    assert type(back) is LlamaConfig and back._attn_implementation == "eager"
    assert back.to_dict() == {**before, "num_hidden_layers": 2}
    for bad in (0, 5, True, "2"):
        with pytest.raises(ValueError, match="`num_hidden_layers`.*1 to 4"):
            config.to_llama(bad)


def test_the_auto_map_of_a_new_config_is_complete():
    """Also before anything is saved: TRL reads it from every config whose class it does not know."""
    auto_map = sorted_config().auto_map
    assert auto_map["AutoConfig"] == "configuration_sorted_llama.SortedLlamaConfig"
    assert auto_map["AutoModel"] == "modeling_sorted_llama.SortedLlamaModel"
    assert auto_map["AutoModelForCausalLM"] == "modeling_sorted_llama.SortedLlamaForCausalLM"


def test_an_update_of_the_config_is_checked():
    """vLLM's overrides come in through it."""
    config = SortedLlamaConfig(num_hidden_layers=4, exit_layers=[1, 2, 4], exit_loss_weights=[1.0, 2.0, 3.0])
    for fields, message in (
        ({"exit_layer": 9}, "`exit_layer` must be an integer from 1 to 4, got 9"),
        ({"exit_layers": [1, 2]}, r"`exit_layers` must be .* ending in the full depth, .* got \[1, 2\]"),
        ({"exit_heads": "own"}, "`exit_heads` must be"),
    ):
        with pytest.raises(ValueError, match=message):
            copy.deepcopy(config).update(fields)
    for name, value in (("exit_layers", [4, 1]), ("exit_layers", 5), ("exit_layer", "2"), ("exit_loss_weights", 5)):
        assigned = copy.deepcopy(config)
        setattr(assigned, name, value)
        with pytest.raises(ValueError, match=f"`{name}` must be"):  # before it is cut, too
            assigned.update({"num_hidden_layers": 2})
    config.update({"num_hidden_layers": 2})
    assert (config.num_hidden_layers, config.exit_layers, config.exit_loss_weights) == (2, [1, 2], [1.0, 2.0])
    own = SortedLlamaConfig(num_hidden_layers=4, exit_layers=[1, 2, 4], exit_heads="lens")
    own.update({"exit_layer": 2})
    assert own.exit_layer == 2
    with pytest.raises(ValueError, match="`num_hidden_layers=2` cuts off"):
        own.update({"num_hidden_layers": 2})
