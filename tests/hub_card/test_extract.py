"""The extracted checkpoint: bit by bit the exit, in transformers' own Llama and through GGUF."""

import json

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

import sorted_llama.hub_card.extract as extract_module
from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card import evaluate
from sorted_llama.hub_card.commands import main
from sorted_llama.hub_card.extract import extract
from tests.tiny import CHAT_TEMPLATE, prompts, save_gguf, save_tiny, tiny_sorted


EXITS = [1, 2, 4]


def make(folder, shards=False, **fields):
    model = tiny_sorted(exit_layers=EXITS, **fields)
    own = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "exit_" in name:  # trained: no longer what full depth has
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=own)
    model.generation_config.exit_threshold = 0.5
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if shards else {}))
    save_tiny(folder.parent / "tokenizer")
    AutoTokenizer.from_pretrained(folder.parent / "tokenizer").save_pretrained(folder)
    return model


@pytest.mark.parametrize("exit_layer, shards", [(1, False), (2, False), (4, False), (2, True)])
@pytest.mark.parametrize("exit_heads", ["shared", "separate", "lens", "layer"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_extracted_model_is_the_exit_bit_by_bit(tmp_path, exit_layer, exit_heads, tied, shards):
    fields = {"exit_heads": exit_heads, "tie_word_embeddings": tied, "dtype": torch.float32}
    model = make(tmp_path / "model", shards, **fields)
    out = extract(tmp_path / "model", exit_layer, tmp_path / "out", max_shard_size="20KB" if shards else "5GB")
    assert len(list(out.glob("*.safetensors"))) > 2 if shards else (out / "model.safetensors").is_file()

    llama, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(llama) is LlamaForCausalLM and not any(info.values())
    shared = model.extract_submodel(exit_layer)
    expected = shared.state_dict()
    assert llama.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in llama.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(llama(**prompts()).logits, model(**prompts(), exit_layer=exit_layer).logits)

    shared.save_pretrained(tmp_path / "saved")
    assert json.loads((out / "config.json").read_text()) == json.loads((tmp_path / "saved/config.json").read_text())
    assert (
        GenerationConfig.from_pretrained(out).to_dict()
        == GenerationConfig.from_pretrained(tmp_path / "saved").to_dict()
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == CHAT_TEMPLATE and tokenizer("a b")["input_ids"]


def test_an_extraction_reads_only_what_it_needs(tmp_path):
    """Files that hold nothing but deeper layers may be missing, or unreadable."""
    model = make(tmp_path / "model", shards=True)
    weight_map = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())["weight_map"]
    deep = {f"model.layers.{i}." for i in (2, 3)}
    needed = {file for name, file in weight_map.items() if not name.startswith(tuple(deep))}
    missing = {*weight_map.values()} - needed
    assert missing
    for file in missing:
        (tmp_path / "model" / file).write_text("no tensors")
    llama = LlamaForCausalLM.from_pretrained(extract(tmp_path / "model", 2, tmp_path / "out"))
    expected = model.extract_submodel(2)(**prompts()).logits
    torch.testing.assert_close(llama(**prompts()).logits, expected)


def test_a_tied_head_that_a_checkpoint_holds_twice_is_left_out(tmp_path):
    make(tmp_path / "model", tie_word_embeddings=True)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    with safe_open(extract(tmp_path / "model", 2, tmp_path / "out") / "model.safetensors", "pt") as extracted:
        assert "model.embed_tokens.weight" in extracted.keys() and "lm_head.weight" not in extracted.keys()


def test_an_extraction_keeps_the_dtype(tmp_path):
    make(tmp_path / "model").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    out = extract(tmp_path / "model", 2, tmp_path / "out")
    with safe_open(out / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    assert LlamaForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_the_page_of_an_extracted_model_shows_its_scores(tmp_path):
    make(tmp_path / "model")
    (tmp_path / "model/README.md").write_text("---\nlicense: mit\nbase_model: base/llama\n---\n# Mine\n")
    page = extract(tmp_path / "model", 1, tmp_path / "one") / "README.md"
    assert "not evaluated" in page.read_text() and "license: mit" in page.read_text()
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "say 1:", "completion": " 1"}')
    record = evaluate(
        str(tmp_path / "model"), [("completions", str(tmp_path / "held_out.jsonl"))], dtype="float32", runs=1
    )
    page = (extract(tmp_path / "model", 2, tmp_path / "two") / "README.md").read_text()
    score = record["tasks"]["held_out"]["settings"]["exit 2"]["exact_match"]
    assert f"| held_out | exact match | {100 * score:.1f} % |" in page
    assert "The first 2 of 4 layers of model" in page and "base_model: base/llama" in page


def test_a_file_that_could_not_be_looked_up_is_not_taken_for_missing(monkeypatch):
    """A folder would lack its tokenizer, say."""

    def download(path, name, revision=None):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(extract_module, "hf_hub_download", download)
    with pytest.raises(
        ValueError, match="the Hub could not be asked for tokenizer_config.json of 'user/name': offline"
    ):
        extract_module._find("user/name", None, "tokenizer_config.json")


def test_wrong_arguments_of_an_extraction_leave_nothing_behind(tmp_path):
    make(tmp_path / "model")
    for exit_layer in (0, 5):
        with pytest.raises(ValueError, match=f"`exit_layer` must be an integer from 1 to 4, got {exit_layer}"):
            extract(tmp_path / "model", exit_layer, tmp_path / "out")
    with pytest.raises(ValueError, match="`output` must be a folder that is not there yet"):
        extract(tmp_path / "model", 2, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(ValueError, match="`path` must hold its weights as safetensors"):
        extract(tmp_path / "model", 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_exit_that_was_not_trained_is_extracted_with_a_warning(tmp_path):
    make(tmp_path / "model")
    with pytest.warns(UserWarning, match=r"Exit 3 is none that .* was trained for, \[1, 2, 4\]"):
        assert extract(tmp_path / "model", 3, tmp_path / "out").is_dir()


def test_the_command_extracts(tmp_path, capsys):
    make(tmp_path / "model")
    main(["extract", str(tmp_path / "model"), "--exit", "2", str(tmp_path / "out")])
    assert f"Exit 2, as a model of type llama: {tmp_path / 'out'}" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2
    with pytest.raises(SystemExit, match="`exit_layer` must be an integer from 1 to 4, got 9"):
        main(["extract", str(tmp_path / "model"), "--exit", "9", str(tmp_path / "nine")])


@pytest.mark.parametrize("exit_heads", ["shared", "lens", "layer"])
def test_an_extracted_model_survives_gguf(tmp_path, exit_heads):
    model = make(tmp_path / "model", exit_heads=exit_heads)
    llama = LlamaForCausalLM.from_pretrained(extract(tmp_path / "model", 2, tmp_path / "out"))
    save_gguf(llama, tmp_path / "two.gguf")
    back = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="two.gguf", dtype=torch.float32)
    layers = 3 if exit_heads == "layer" else 2  # the exit's own
    assert back.config.num_hidden_layers == layers
    with torch.no_grad():
        torch.testing.assert_close(back(**prompts()).logits, model(**prompts(), exit_layer=2).logits)
    sorted_back = SortedLlamaForCausalLM.from_pretrained(tmp_path, gguf_file="two.gguf", exit_layers=[1, layers])
    assert sorted_back.config.exit_layers == [1, layers]
