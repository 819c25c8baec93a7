"""
One depth of a checkpoint in vLLM, against this package's own model.
`make test-vllm` runs it, in an environment that has vLLM.
"""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card.extract import extract
from tests.serving_vllm.engines import LINEARS, ask, cached_tokens, make, quantize
from tests.tiny import run_as_stranger


NEW_TOKENS = 12
PROMPTS = [[5, 40, 7, 100], [200, 3, 9], [30] * 20 + [11, 12], [77]]


def generated(llm, lora=None):
    """Greedy tokens and their log-probabilities."""
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=1, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, lora_request=lora, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    logprobs = [
        [step[token].logprob for token, step in zip(row, output.outputs[0].logprobs, strict=True)]
        for row, output in zip(tokens, outputs, strict=True)
    ]
    return tokens, logprobs


def assert_is_exit(found, model, exit_layer):
    for prompt, tokens, logprobs in zip(PROMPTS, *found, strict=True):
        inputs = torch.tensor([prompt])
        plain = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": 0, "eos_token_id": None}
        expected = model.generate(inputs, exit_layer=exit_layer, **plain)
        assert tokens == expected[0, len(prompt) :].tolist()
        with torch.no_grad():
            scores = model(expected, exit_layer=exit_layer).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        chosen = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), chosen, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "exit_layer, fields",
    [
        (1, {}),
        (4, {"tie_word_embeddings": False}),
        (2, {"exit_heads": "separate"}),
        (2, {"exit_heads": "lens"}),
        (1, {"exit_heads": "lens", "tie_word_embeddings": False}),
        (2, {"exit_heads": "layer"}),
        (1, {"exit_heads": "layer", "tie_word_embeddings": False}),
    ],
    ids=str,
)
def test_an_exit_is_the_exit(start, tmp_path, exit_layer, fields):
    model = make(tmp_path / "model", **fields)
    llm = start(tmp_path / "model", hf_overrides={"exit_layer": exit_layer})
    assert_is_exit(generated(llm), model, exit_layer)


def test_the_exit_of_the_config_and_its_cache(start, tmp_path):
    model = make(tmp_path / "model")
    full = start(tmp_path / "model")
    assert_is_exit(generated(full), model, 4)
    of_full = cached_tokens(full)
    model.config.exit_layer = 1
    model.save_pretrained(tmp_path / "one")
    one = start(tmp_path / "one")
    assert_is_exit(generated(one), model, 1)
    assert cached_tokens(one) == 4 * of_full


@pytest.mark.parametrize("asked", [1, 4, 0, "2", True])
def test_a_request_of_another_depth_is_refused(start, checkpoint, asked):
    path, model = checkpoint()
    llm = start(path, hf_overrides={"exit_layer": 2})
    message = "`exit_layer` must be 2, the only depth of this server: one that is started with "
    with pytest.raises(VLLMValidationError) as refused:
        ask(llm, [([5], asked)])
    assert str(refused.value).startswith(message) and str(refused.value).endswith(f", got {asked!r}.")
    found = [list(output.outputs[0].token_ids) for output in ask(llm, [([5, 6], 2), ([5, 6], None)])]
    assert (
        found[0]
        == found[1]
        == model.generate(torch.tensor([[5, 6]]), exit_layer=2, max_new_tokens=12, do_sample=False, eos_token_id=None)[
            0, 2:
        ].tolist()
    )


WITHOUT_THE_PLUGIN = """
import json

from vllm import LLM, SamplingParams

path, overrides, prompts, new_tokens = sys.argv[1:]
options = {"trust_remote_code": True, "model_impl": "transformers", "skip_tokenizer_init": True}
options |= {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 4, "enforce_eager": True}
llm = LLM(path, hf_overrides=json.loads(overrides), **options)
sampling = SamplingParams(temperature=0, max_tokens=int(new_tokens), logprobs=1, ignore_eos=True, detokenize=False)
rows = [{"prompt_token_ids": prompt} for prompt in json.loads(prompts)]
outputs = [output.outputs[0] for output in llm.generate(rows, sampling, use_tqdm=False)]
tokens = [list(output.token_ids) for output in outputs]
logprobs = [[step[t].logprob for t, step in zip(o.token_ids, o.logprobs)] for o in outputs]
(modules,) = llm.apply_model(lambda model: {type(m).__name__: type(m).__module__ for m in model.modules()})
print(json.dumps({"generated": [tokens, logprobs], "modules": modules}))
"""


@pytest.mark.parametrize("overrides", [{}, {"exit_layer": 2}, {"num_hidden_layers": 2}], ids=str)
def test_without_the_plugin(tmp_path, monkeypatch, overrides):
    """Through vLLM's backend for transformers, by the code that the checkpoint carries."""
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # all of it in the process without the package
    model = make(tmp_path / "model")
    arguments = [str(tmp_path / "model"), json.dumps(overrides), json.dumps(PROMPTS), str(NEW_TOKENS)]
    found = json.loads(run_as_stranger(WITHOUT_THE_PLUGIN, *arguments, folder=tmp_path).splitlines()[-1])
    assert_is_exit(found["generated"], model, 2 if overrides else 4)
    assert "SortedLlamaModel" in found["modules"]
    assert found["modules"]["SortedLlamaModel"].startswith("transformers_modules.")


def test_adapters(start, tmp_path):
    """Of an adapter for all layers, those that run are used."""
    base = make(tmp_path / "model")
    torch.manual_seed(2)
    config = LoraConfig(r=8, target_modules=LINEARS, init_lora_weights=False)
    get_peft_model(SortedLlamaForCausalLM.from_pretrained(tmp_path / "model"), config).save_pretrained(
        tmp_path / "lora"
    )
    llm = start(tmp_path / "model", hf_overrides={"exit_layer": 2}, enable_lora=True)
    assert_is_exit(generated(llm), base, 2)
    adapted = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload()
    assert_is_exit(generated(llm, LoRARequest("lora", 1, str(tmp_path / "lora"))), adapted, 2)


def test_two_processes(start, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # a core each, also where there is one NUMA node
    model = make(tmp_path / "model", num_key_value_heads=2)
    assert_is_exit(
        generated(start(tmp_path / "model", hf_overrides={"exit_layer": 2}, tensor_parallel_size=2)), model, 2
    )


def test_prefixes_and_chunks(start, tmp_path):
    model = make(tmp_path / "model")
    options = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 8}
    llm = start(tmp_path / "model", hf_overrides={"exit_layer": 2}, **options)
    for _ in range(2):
        assert_is_exit(generated(llm), model, 2)


def test_a_quantized_checkpoint(start, tmp_path):
    """An exit of it is the extracted plain Llama in vLLM."""
    make(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "quantized")
    quantize(tmp_path / "quantized")
    tokens, logprobs = generated(start(tmp_path / "quantized", hf_overrides={"exit_layer": 2}, dtype="bfloat16"))
    plain = extract(tmp_path / "quantized", 2, tmp_path / "plain")
    expected = generated(start(plain, dtype="bfloat16"))
    assert (tokens, logprobs) == expected
