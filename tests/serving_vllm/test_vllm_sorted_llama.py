"""
The checkpoint in vLLM, against this package's own model. `make test-vllm` runs it, in an environment that has vLLM.
"""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.hub_card.extract import extract
from tests.tiny import run_as_stranger, tiny_sorted


EXITS = [1, 2, 4]
NEW_TOKENS = 12
PROMPTS = [[5, 40, 7, 100], [200, 3, 9], [30] * 20 + [11, 12], [77]]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # tests ask workers about their models
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def make(folder, **fields):
    """A checkpoint with heads of a width that vLLM's kernels know, whose exits, where they own weights, differ."""
    fields = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, **fields}
    model = tiny_sorted(exit_layers=EXITS, **fields)
    own = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "exit_norms" in name or "exit_lm_heads" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=own)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def start():
    """Starts engines, one at a time: the next one, or the end of the test, stops the one before."""
    running = []

    def stop():
        for llm in running:
            llm.llm_engine.engine_core.shutdown()
        running.clear()

    def start(path, **options) -> LLM:
        stop()
        options = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 4, "enforce_eager": True, **options}
        running.append(LLM(str(path), skip_tokenizer_init=True, **options))
        return running[0]

    yield start
    stop()


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


def cached_tokens(llm) -> int:
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size


@pytest.mark.parametrize(
    "exit_layer, fields",
    [
        (1, {}),
        (4, {"tie_word_embeddings": False}),
        (2, {"exit_heads": "separate"}),
        (2, {"exit_heads": "lens"}),
        (1, {"exit_heads": "lens", "tie_word_embeddings": False}),
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
    model.config.exit_layer = 1
    model.save_pretrained(tmp_path / "one")
    one = start(tmp_path / "one")
    assert_is_exit(generated(one), model, 1)
    assert cached_tokens(one) == 4 * cached_tokens(full)


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


@pytest.mark.parametrize("exit_heads", ["shared", "lens"])
def test_drafts_for_itself_through_its_own_weights(start, tmp_path, exit_heads):
    model = make(tmp_path / "model", exit_heads=exit_heads, initializer_range=0.1)
    llm = start(
        tmp_path / "model",
        hf_overrides={"assistant_early_exit": 2},
        speculative_config={
            "method": "draft_model",
            "model": f"{tmp_path / 'model'}/",  # the same folder, written otherwise
            "num_speculative_tokens": 2,
        },
        disable_log_stats=False,
    )
    assert_is_exit(generated(llm), model, 4)
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    assert counts["vllm:spec_decode_num_draft_tokens"] > 0
    assert counts["vllm:spec_decode_num_accepted_tokens"] > 0
    (own,) = llm.collective_rpc(own_parameters)
    # A lens's norm and folded head are its own, everything else is the target's
    assert own == (["lm_head.weight", "model.norm.weight"] if exit_heads == "lens" else [])


@pytest.mark.parametrize("overrides, message", [({}, "needs a depth"), ({"assistant_early_exit": 4}, "from 1 to 3")])
def test_a_draft_of_its_own_checkpoint_needs_a_depth(start, tmp_path, capfd, overrides, message):
    make(tmp_path / "model")
    draft = {"method": "draft_model", "model": str(tmp_path / "model"), "num_speculative_tokens": 2}
    with pytest.raises(RuntimeError):
        start(tmp_path / "model", hf_overrides=overrides, speculative_config=draft)
    printed = capfd.readouterr()
    assert message in printed.out + printed.err


def own_parameters(worker) -> list[str]:
    return sorted(name for name, _ in worker.model_runner.drafter.model.named_parameters())


@pytest.mark.parametrize("override", [9, 0, "two"])
def test_a_bad_depth_is_refused_at_start(start, tmp_path, override):
    make(tmp_path / "model")
    with pytest.raises(ValueError, match=f"`exit_layer` must be an integer from 1 to 4, got {override!r}"):
        start(tmp_path / "model", hf_overrides={"exit_layer": override})


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


def quantize(folder):
    """Weights in 8 bits, a scale a row, as compressed-tensors has them."""
    from safetensors.torch import load_file, save_file

    state, quantized = load_file(folder / "model.safetensors"), {}
    for name, tensor in state.items():
        if name.split(".")[-2] in LINEARS:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            quantized[name] = (tensor / scale).round().to(torch.int8)
            quantized[f"{name}_scale"] = scale
        else:
            quantized[name] = tensor
    save_file(quantized, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_a_quantized_checkpoint(start, tmp_path):
    """An exit of it is the extracted plain Llama in vLLM."""
    make(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "quantized")
    quantize(tmp_path / "quantized")
    tokens, logprobs = generated(start(tmp_path / "quantized", hf_overrides={"exit_layer": 2}, dtype="bfloat16"))
    plain = extract(tmp_path / "quantized", 2, tmp_path / "plain")
    expected = generated(start(plain, dtype="bfloat16"))
    assert (tokens, logprobs) == expected
