"""The table of settings: names that can be read again, arguments that `generate` knows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sorted_llama.hub_card.settings import MODES, Setting
from tests.tiny import prompts, tiny_sorted


VALUES = {"exit": 2, "threshold": 0.5, "draft": 1}


@given(st.one_of(st.integers(0, 10**6), st.floats(0, 1e300)))
def test_the_name_of_a_threshold_can_be_read_again(value):
    assert Setting.read(str(Setting("threshold", value))) == Setting("threshold", value)


@given(st.lists(st.one_of(st.integers(0, 10**6), st.floats(0, 1e300)), min_size=1))
def test_thresholds_of_the_exits_can_be_read_again(values):
    assert Setting.read(str(Setting("threshold", values))) == Setting("threshold", values)
    assert Setting("threshold", values).call == f"exit_threshold={values}"


@pytest.mark.parametrize("kind", MODES)
def test_a_setting_is_a_call_of_generate(kind):
    setting = Setting(kind, VALUES[kind])
    assert Setting.read(f"{kind} {VALUES[kind]}") == setting and setting.call == "{}={}".format(
        *setting.arguments.popitem()
    )
    model = tiny_sorted(exit_layers=[1, 2, 4])
    full, found = (
        model.generate(**prompts(), max_new_tokens=8, do_sample=False, **arguments).tolist()
        for arguments in ({}, setting.arguments)
    )
    assert (found == full) == setting.mode.lossless


NO_NAMES = [
    "",
    "exit",
    "exit ",
    "exit 0",
    "exit one",
    "exit 1.5",
    "exit 1 2",
    "exit -1",
    "draft 1\n",
    "threshold inf",
    "threshold []",
    "threshold [0.5, inf]",
    "threshold [[0.5]]",
    "threshold 0.5, 0.5",
    "exit [1]",
    "x 1",
]


@pytest.mark.parametrize("name", NO_NAMES, ids=ascii)
def test_a_name_of_something_else_is_no_setting(name):
    with pytest.raises(ValueError, match="A setting must be one of exit, threshold, draft and a value, got "):
        Setting.read(name)
