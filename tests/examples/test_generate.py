"""`examples/generate.py` as its users run it, against `generate` of every mode."""

import io
import re
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast, set_seed

from sorted_llama import SortedLlamaForCausalLM
from tests.tiny import save_tiny, tiny_llama, tiny_sorted, tiny_tokenizer


FULL = {"full depth": {}}
FIXED = FULL | {f"exit_layer={k}": {"exit_layer": k} for k in (1, 2)}
BY_TOKEN = {
    "exit_threshold=[0.2, 0.1]": {"exit_threshold": [0.2, 0.1]},
    "assistant_early_exit=2, num_assistant_tokens=3": {"assistant_early_exit": 2, "num_assistant_tokens": 3},
}
FLAGS = ["--exit_threshold", "0.2", "0.1", "--assistant_early_exit", "2", "auto"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), tiny_sorted())


@pytest.fixture
def run(generate, folder, monkeypatch):
    """Run the script; returns what it prints."""

    def run(*flags, model=folder, stdout=None):
        stdout = io.StringIO() if stdout is None else stdout
        command = ["generate.py", "--model", str(model), "--dtype", "float32", "--device", "cpu", *map(str, flags)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command)
            patch.setattr(sys, "stdout", stdout)
            generate.main()
        return stdout.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    return run


def pieces(tokenizer, tokens: list[int], depths: list[int]) -> list[tuple[str, int]]:
    """Pieces of text, each with the depth of the token that completes it: by decoding every prefix as a whole."""
    found, text = [], ""
    for n, depth in enumerate(depths, start=1):
        now = tokenizer.decode(tokens[:n], skip_special_tokens=True)
        if now != text and (not now.endswith("\ufffd") or n == len(depths)):
            found.append((now[len(text) :], depth))
            text = now
    assert text == tokenizer.decode(tokens, skip_special_tokens=True)
    return found


def marked(found: list[tuple[str, int]]) -> str:
    text, before = "", None
    for piece, depth in found:
        text += piece if depth == before else f"[{depth}]{piece}"
        before = depth
    return text


def reference(folder, prompt: str, mode: dict, max_new_tokens: int, **options):
    """Tokenizer, new tokens, their depths, and drafting's statistics."""
    model, tokenizer = SortedLlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": max_new_tokens, **options}
    outputs = model.generate(**inputs, **mode, **options)
    tokens = outputs.sequences[0, inputs.input_ids.shape[1] :].tolist()
    depths = [mode.get("exit_layer", 4)] * len(tokens)
    if "exit_layers_used" in outputs:
        depths = outputs.exit_layers_used[0].tolist()
    return tokenizer, tokens, depths, getattr(outputs, "draft_statistics", None)


def test_every_mode_shows_its_tokens_with_their_depths(run, folder):
    prompts = ["the first", "a second one"]
    output = run("--prompt", *prompts, "--max_new_tokens", 20, *FLAGS)
    assert "4 layers, exits [1, 2, 4]; cpu, float32" in output
    assert "\033" not in output
    answers = output.split(f"\n{prompts[1]}\n")
    assert len(answers) == 2
    for prompt, answer in zip(prompts, answers):
        for name, mode in (FIXED | BY_TOKEN).items():
            tokenizer, tokens, depths, drafting = reference(folder, prompt, mode, 20)
            if name in BY_TOKEN:
                assert len(set(depths)) > 1
            shown = marked(pieces(tokenizer, tokens, depths))
            statistics = rf"    {len(tokens)} tokens, \d+\.\d\d s, \d+\.\d tokens/s, mean depth "
            statistics += re.escape(f"{sum(depths) / len(depths):.1f}")
            if drafting is not None:
                assert drafting.accepted > 0
                statistics += rf"; drafted {drafting.drafted}, accepted {drafting.accepted} \(\d+%\), "
                statistics += rf"{drafting.cycles} cycles, {len(tokens) / drafting.cycles:.1f} tokens a cycle"
            assert re.search(rf"\n{re.escape(name)}\n{re.escape(shown)}\n{statistics}\n", answer), name
        # What it learns depends on the clock, its tokens do not
        learned = re.search(r"\nassistant_early_exit='auto'\n(.*?)\n    20 tokens, .* cycle\n", answer, re.DOTALL)
        tokenizer, tokens, _, _ = reference(folder, prompt, {}, 20)
        assert re.sub(r"\[[124]\]", "", learned[1]) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_colors_only_where_asked_for(run, folder, monkeypatch, generate):
    flags = ["--prompt", "the first", "--max_new_tokens", 20, *FLAGS]
    output = run(*flags, stdout=Terminal())
    colors = {k: f"\033[38;5;{generate.RAMP[i]}m" for k, i in ((1, 0), (2, 5), (4, 10))}
    assert " ".join(f"{color}{k}\033[0m" for k, color in colors.items()) in output
    for name, mode in (FIXED | BY_TOKEN).items():
        tokenizer, tokens, depths, _ = reference(folder, "the first", mode, 20)
        found = pieces(tokenizer, tokens, depths)
        assert f"\n{name}\n" + "".join(f"{colors[k]}{piece}\033[0m" for piece, k in found) + "\n    20 " in output

    assert "\033" not in run(*flags, "--no_color", stdout=Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in run(*flags, stdout=Terminal())


def test_sampling_repeats_with_its_seed(run, folder):
    output = run("--prompt", "the first", "--max_new_tokens", 12, "--do_sample", "--seed", 7)
    for name, mode in FIXED.items():
        set_seed(7)
        tokenizer, tokens, depths, _ = reference(folder, "the first", mode, 12, do_sample=True)
        assert f"\n{name}\n{marked(pieces(tokenizer, tokens, depths))}\n    {len(tokens)} tokens" in output


def test_a_prompt_from_stdin_as_a_chat_at_a_depth_asked_for(run, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    output = run("--prompt", "-", "--chat", "--exit_layers", 3, "--max_new_tokens", 8)
    assert "\ntwo\nlines\n\nfull depth\n" in output
    assert "exit_layer=2\n" not in output
    tokenizer, tokens, depths, _ = reference(folder, "<s>user\ntwo\nlines</s><s>assistant\n", {"exit_layer": 3}, 8)
    assert f"\nexit_layer=3\n{marked(pieces(tokenizer, tokens, depths))}\n    {len(tokens)} tokens" in output


def test_depths_of_the_checkpoint_do_not_count(run, folder, tmp_path):
    model = tiny_sorted()
    model.config.exit_layer = 1
    model.generation_config.exit_threshold = 0.0
    output = run("--prompt", "the first", "--max_new_tokens", 8, model=save_tiny(tmp_path, model))
    tokenizer, tokens, depths, _ = reference(folder, "the first", {}, 8)
    assert f"\nfull depth\n{marked(pieces(tokenizer, tokens, depths))}\n    8 tokens" in output


def test_a_model_without_exits_runs_at_full_depth_and_drafts(run, tmp_path):
    output = run("--prompt", "the first", "--max_new_tokens", 8, model=save_tiny(tmp_path, tiny_llama()))
    assert output.count(" tokens/s, ") == 2
    assert "\nfull depth\n[4]" in output and "\nassistant_early_exit='auto'\n[" in output


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--exit_layers", "5"], "`exit_layers` must be an integer from 1 to 4, got 5"),
        (["--exit_layers", "1,2"], "`exit_layers` must be a list of integers from 1 to 4, .* got '1,2'"),
        (["--exit_layers", "every:0"], "`exit_layers` must be .* got 'every:0'"),
        (["--exit_threshold", "0.5", "0.6", "0.7"], "`exit_threshold` must be a number of at least 0, or a list of 2"),
        (["--exit_threshold", "nan"], "`exit_threshold` must be a number"),
        (["--exit_threshold", "-0.5"], "`exit_threshold` must be a number of at least 0"),
        (["--assistant_early_exit", "4"], "`assistant_early_exit` must be .*an integer from 1 to 3"),
        (["--num_assistant_tokens", "0"], "`num_assistant_tokens` must be a positive integer"),
        (["--max_new_tokens", "0"], "`max_new_tokens` must be greater than 0"),
        (["--device", "abacus"], "abacus"),
        (["--prompt", "a", " "], "prompt is empty"),
    ],
)
def test_wrong_values_are_told_before_the_model_is_loaded(run, generate, monkeypatch, flags, message):
    monkeypatch.setattr(
        generate.SortedLlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the model is loaded")
    )
    with pytest.raises(SystemExit, match=f"^[^\n]*{message}[^\n]*$"):
        run("--prompt", "the first", *flags)


def test_a_threshold_for_a_model_without_exits_is_refused(run, tmp_path):
    with pytest.raises(SystemExit, match="^`exit_threshold=0.5` needs exits to leave at[^\n]*$"):
        run("--exit_threshold", 0.5, model=save_tiny(tmp_path, tiny_llama()))


def test_depths_are_named_by_their_spacing(run):
    output = run("--prompt", "the first", "--exit_layers", "every:3", "--max_new_tokens", 4)
    assert re.findall(r"^exit_layer=(\d)$", output, re.M) == ["3"]


def test_a_model_that_does_not_load_is_told_in_one_line(run, generate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="make demo.*--model"):
        run(model=generate.DEMO)
    with pytest.raises(SystemExit, match="nowhere.* is no folder here"):
        run(model=tmp_path / "nowhere")
    tiny_sorted().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="^[^\n]*tokenizer[^\n]*$"):
        run(model=tmp_path / "model")
    save_tiny(tmp_path / "model", tiny_sorted())
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="^[^\n]*weights of [^\n]*deserializing[^\n]*$"):
        run(model=tmp_path / "model")


def stream(generate, tokenizer, tokens: list[int], depths: list[int], capsys) -> str:
    printer = generate.DepthPrinter(tokenizer, 9, None)
    printer.put(torch.tensor([[3, 4, 5]]))  # a prompt, of which nothing is printed
    for token, depth in zip(tokens, depths, strict=True):
        printer.put_exits([depth], None)
        printer.put(torch.tensor([token]))
    printer.end()
    assert printer.depths == depths
    return capsys.readouterr().out


def test_characters_of_several_tokens_are_printed_whole(generate, capsys):
    tokenizer, text = tiny_tokenizer(), "né 日🙂\n!"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    depths = [1, 1, 2, 2, 1, 1, 3, 1, 1, 1, 4, 4, 4]
    assert len(tokens) == len(text.encode()) == len(depths)
    assert stream(generate, tokenizer, tokens, depths, capsys) == "[1]n[2]é [3]日[4]🙂\n!\n"
    # Cut off within a character: what there is, at the end
    assert stream(generate, tokenizer, tokens[:6], depths[:6], capsys) == "[1]n[2]é [1]\ufffd\n"


def test_a_space_that_a_token_begins_with_is_printed(generate, capsys):
    """A decoder as Llama 2's, which takes the first space away and spells other characters in bytes."""
    vocabulary = {name: i for i, name in enumerate(["<unk>", "</s>", "▁one", "▁two", "<0xC3>", "<0xA9>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    output = stream(generate, tokenizer, [2, 3, 4, 5, 3, 1], [1, 1, 1, 2, 2, 1], capsys)
    assert output == "[1]one two[2]é two\n"
