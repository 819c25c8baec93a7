"""`examples/merge.py`: adapters and checkpoints become one sorted model."""

import sys

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel

from sorted_llama import SortedLlamaForCausalLM
from tests.tiny import prompts, reference_llama, save_tiny, tiny_sorted
from tests.trainer.runs import EXITS, make_trainer


@pytest.fixture(scope="module")
def trained_adapters(tmp_path_factory):
    """The folder of a base, and those of two adapters trained on different data by SoFT."""
    folder = tmp_path_factory.mktemp("adapters")
    base = save_tiny(folder / "base", tiny_sorted())
    adapters = []
    for seed, kind in enumerate(("text", "prompt_completion")):
        adapters.append(folder / f"adapter-{seed}")
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(seed)
        trainer = make_trainer(folder, base, kind, peft_config=lora, seed=seed, max_steps=3, learning_rate=1e-2)
        trainer.train()
        trainer.save_model(adapters[-1])
    return base, adapters


@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties", "dare_linear", "dare_ties"])
def test_adapters_are_merged(merge, trained_adapters, tmp_path, combination):
    """One sorted model, whose every exit is that of a plain Llama with the merged weights."""
    base, adapters = trained_adapters
    torch.manual_seed(0)
    density = {"density": 0.5} if combination in merge.PRUNING else {}
    merged = merge.merge_adapters(base, adapters, weights=[0.7, 0.3], combination_type=combination, **density)
    merged.save_pretrained(tmp_path)
    loaded = SortedLlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.exit_layers == EXITS
    for k in EXITS:
        logits = loaded(**prompts(), exit_layer=k).logits
        torch.testing.assert_close(logits, reference_llama(merged, k)(**prompts()).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, tiny_sorted()(**prompts(), exit_layer=k).logits, atol=1e-2)


def test_merged_adapters_are_the_weighted_sum(merge, trained_adapters):
    """`"cat"` keeps what each adapter adds: the merged weights are the base's plus the weighted sum of both."""
    base, adapters = trained_adapters
    merged = merge.merge_adapters(base, adapters, weights=[0.7, 0.3], combination_type="cat")
    before = SortedLlamaForCausalLM.from_pretrained(base)
    alone = [
        PeftModel.from_pretrained(SortedLlamaForCausalLM.from_pretrained(base), folder).merge_and_unload()
        for folder in adapters
    ]
    for name, weight in merged.state_dict().items():
        first, second = (model.state_dict()[name] - before.state_dict()[name] for model in alone)
        expected = before.state_dict()[name] + 0.7 * first + 0.3 * second
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)


def test_the_base_of_adapters_may_be_a_plain_llama(merge, trained_adapters, tmp_path):
    base, adapters = trained_adapters
    plain = save_tiny(tmp_path / "plain", reference_llama(SortedLlamaForCausalLM.from_pretrained(base), 4))
    with pytest.raises(ValueError, match="names no exits: pass the adapters' `exit_layers`"):
        merge.merge_adapters(plain, adapters)
    merged, expected = merge.merge_adapters(plain, adapters, exit_layers=EXITS), merge.merge_adapters(base, adapters)
    assert merged.config.exit_layers == EXITS
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight)


def test_checkpoints_of_other_heads_are_refused(merge, tmp_path):
    for kind in ("shared", "lens"):
        tiny_sorted(exit_layers=EXITS, exit_heads=kind).save_pretrained(tmp_path / kind)
    for first, second in (("shared", "lens"), ("lens", "shared")):
        with pytest.raises(ValueError, match=f"the same `exit_heads`, got '{first}' .* and '{second}'"):
            merge.average_checkpoints([tmp_path / first, tmp_path / second])


def test_checkpoints_are_averaged(merge, tmp_path):
    """Weight by weight, in float32, and the exits stay."""
    models = [tiny_sorted(seed=seed) for seed in range(3)]
    folders = [save_tiny(tmp_path / str(seed), model) for seed, model in enumerate(models)]
    merge.average_checkpoints(folders, weights=[1, 2, 1]).save_pretrained(tmp_path / "merged")
    merged = SortedLlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.exit_layers == EXITS
    for name, weight in merged.state_dict().items():
        a, b, c = (model.state_dict()[name] for model in models)
        torch.testing.assert_close(weight, a / 4 + b / 2 + c / 4)
    torch.testing.assert_close(
        merged(**prompts(), exit_layer=2).logits, reference_llama(merged, 2)(**prompts()).logits, rtol=1e-4, atol=1e-4
    )


def test_checkpoints_of_other_exits_or_shapes_are_refused(merge, tmp_path):
    folders = [save_tiny(tmp_path / "a", tiny_sorted()), save_tiny(tmp_path / "b", tiny_sorted(exit_layers=[3, 4]))]
    with pytest.raises(ValueError, match=r"exit_layers.*\[1, 2, 4\].*\[3, 4\]"):
        merge.average_checkpoints(folders)
    other = save_tiny(tmp_path / "c", tiny_sorted(vocab_size=300))
    with pytest.raises(ValueError, match=r"vocab_size.*259.*300"):
        merge.average_checkpoints([folders[0], other])


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """Models are not loaded for arguments that cannot be right."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(SortedLlamaForCausalLM, "from_pretrained", refuse)


@pytest.mark.parametrize(
    "weights, named",
    [
        ([1.0], r"one number for each of the 2 parts, got 1: \[1.0\]"),
        ([1.0, 2.0, 3.0], "each of the 2 parts, got 3"),
        ([], "each of the 2 parts, got 0"),
        ([1.0, float("nan")], "finite numbers, got .*nan"),
        ([float("inf"), 1.0], "finite numbers, got .*inf"),
    ],
)
def test_weights_other_than_a_finite_number_a_part_are_refused(
    merge, trained_adapters, nothing_is_loaded, weights, named
):
    base, adapters = trained_adapters
    for call in (
        lambda: merge.merge_adapters(base, adapters, weights),
        lambda: merge.average_checkpoints([base] * 2, weights),
    ):
        with pytest.raises(ValueError, match=f"`weights` must .*{named}"):
            call()


def test_weights_of_checkpoints_that_sum_to_nothing_are_refused(merge, trained_adapters, nothing_is_loaded):
    with pytest.raises(ValueError, match=r"`weights` must not sum to 0.*\[1.0, -1.0\]"):
        merge.average_checkpoints([trained_adapters[0]] * 2, [1.0, -1.0])


@pytest.mark.parametrize(
    "options, named",
    [
        ({"combination_type": "mean"}, "`combination_type` must be one of linear, .*'mean'"),
        ({"density": 0.5}, "`density=0.5` has no effect with `combination_type='linear'`"),
        ({"combination_type": "ties"}, "`density`.*got None"),
        ({"combination_type": "dare_ties_svd", "density": 0.0}, "`density`.*got 0.0"),
        ({"combination_type": "ties", "density": float("nan")}, "`density`.*got nan"),
        ({"exit_layers": [2, 3]}, r"`exit_layers` must be.*got \[2, 3\]"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_combined_so_are_refused(merge, trained_adapters, nothing_is_loaded, options, named):
    base, adapters = trained_adapters
    with pytest.raises(ValueError, match=named):
        merge.merge_adapters(base, adapters, **options)


def test_adapters_of_other_ranks_and_kinds_are_refused(merge, trained_adapters, nothing_is_loaded, tmp_path):
    base, adapters = trained_adapters
    LoraConfig(r=8, target_modules=["q_proj"]).save_pretrained(tmp_path / "wide")
    IA3Config(target_modules=["q_proj"], feedforward_modules=[]).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match=r"needs adapters of one rank, got \[4, 8\]"):
        merge.merge_adapters(base, [adapters[0], tmp_path / "wide"])
    with pytest.raises(ValueError, match="LoRA adapters, got .*IA3"):
        merge.merge_adapters(base, [adapters[0], tmp_path / "ia3"])


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--adapters", "A", "B", "--base", "BASE", "--weights", "1"], "merge.py: `weights` must .* 2 parts, got 1"),
        (["--adapters", "A", "nowhere", "--base", "BASE"], "merge.py: .*nowhere"),
        (["--adapters", "A", "B", "--base", "nowhere"], "merge.py: .*nowhere"),
        (["--checkpoints", "BASE", "nowhere"], "merge.py: .*nowhere"),
        (["--checkpoints", "BASE", "A"], "merge.py: .*"),
        (["--checkpoints", "BASE", "types"], "merge.py: .*hidden_size"),
        (["--adapters", "A", "B", "--base", "types"], "merge.py: .*hidden_size"),
        (["--adapters", "A", "B", "--base", "BASE", "--exit_layers", "every:x"], "merge.py: .*got 'every:x'"),
    ],
    ids=str,
)
def test_errors_of_the_command_are_one_line(
    merge, trained_adapters, nothing_is_loaded, tmp_path, monkeypatch, arguments, named
):
    base, (first, second) = trained_adapters
    paths = {"A": str(first), "B": str(second), "BASE": base, "nowhere": str(tmp_path / "nowhere")}
    paths["types"] = str(tmp_path / "types")
    (tmp_path / "types").mkdir()
    (tmp_path / "types" / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    command = ["merge.py", *(paths.get(argument, argument) for argument in arguments)]
    monkeypatch.setattr(sys, "argv", [*command, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=named) as error:
        merge.main()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_exits_of_adapters_are_named_by_numbers_or_their_spacing(merge, trained_adapters, tmp_path, monkeypatch):
    base, adapters = trained_adapters
    output = str(tmp_path / "out")
    command = ["merge.py", "--base", base, "--adapters", *map(str, adapters), "--output_dir", output]
    monkeypatch.setattr(sys, "argv", [*command, "--exit_layers", "every:2"])
    merge.main()
    exits = [2, 4]
    assert SortedLlamaForCausalLM.from_pretrained(output).config.exit_layers == exits
    assert merge.merge_adapters(base, adapters, exit_layers="every:2").config.exit_layers == exits
    monkeypatch.setattr(sys, "argv", [*command, "--exit_layers", "1", "4"])
    merge.main()
    assert SortedLlamaForCausalLM.from_pretrained(output).config.exit_layers == [1, 4]


@pytest.mark.parametrize("option", [["--density", "0.5"], ["--base", "x"], ["--exit_layers", "1", "4"]], ids=str)
def test_options_of_adapters_are_refused_for_checkpoints(merge, monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["merge.py", "--checkpoints", "a", "b", "--output_dir", "out", *option])
    with pytest.raises(SystemExit):
        merge.main()
    assert f"{option[0]}: for --adapters" in capsys.readouterr().err


def test_the_command_averages_checkpoints(merge, tmp_path, monkeypatch, capsys):
    folders = [save_tiny(tmp_path / str(seed), tiny_sorted(seed=seed)) for seed in range(2)]
    output = str(tmp_path / "merged")
    monkeypatch.setattr(sys, "argv", ["merge.py", "--checkpoints", *folders, "--output_dir", output])
    merge.main()
    assert output in capsys.readouterr().out
    model = SortedLlamaForCausalLM.from_pretrained(output)
    expected = merge.average_checkpoints(folders)
    assert torch.equal(model(**prompts()).logits, expected(**prompts()).logits)
