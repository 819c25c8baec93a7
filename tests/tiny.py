"""Tiny models and a byte-level tokenizer: real code paths in milliseconds, without a download."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sorted_llama.modeling_sorted_llama import SortedLlamaConfig, SortedLlamaForCausalLM


CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@functools.cache
def _bytes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [],
        trainers.BpeTrainer(
            special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 259 tokens, with a chat template that marks what the assistant says."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=_bytes(), padding_side="left", **special)  # of a copy
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_fields(**overrides: Any) -> dict[str, Any]:
    """Fields of a Llama configuration: 4 layers, grouped-query attention, tied head, room for `tiny_tokenizer`."""
    return {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,  # decisive logits: greedy decoding does not hang on rounding
        **overrides,
    }


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A plain Llama with random float32 weights, in evaluation mode."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**tiny_fields(**overrides))).eval()


def tiny_sorted(seed: int = 0, exit_layers: list[int] | None = (1, 2, 4), **overrides: Any) -> SortedLlamaForCausalLM:
    """A sorted model with random float32 weights, in evaluation mode."""
    torch.manual_seed(seed)
    exits = None if exit_layers is None else list(exit_layers)
    return SortedLlamaForCausalLM(SortedLlamaConfig(**tiny_fields(**overrides), exit_layers=exits)).eval()


def reference_llama(model: SortedLlamaForCausalLM, num_layers: int) -> LlamaForCausalLM:
    """transformers' own Llama of the first layers, its weights copied: what an exit must equal."""
    fields = model.config.to_dict()
    sorted_fields = ("exit_layers", "exit_layer", "exit_loss_weights", "exit_heads")
    for name in ("model_type", "auto_map", "architectures", *sorted_fields):
        fields.pop(name, None)
    config = LlamaConfig(**{**fields, "num_hidden_layers": num_layers})
    config._attn_implementation = model.config._attn_implementation
    reference = LlamaForCausalLM(config).to(model.dtype)
    kept = reference.state_dict().keys()
    reference.load_state_dict({name: t.clone() for name, t in model.state_dict().items() if name in kept})
    return reference.train(model.training)


def save_tiny(folder: Path | str, model: Any = None) -> str:
    """Save a model (a tiny plain Llama by default) with the tokenizer; returns the folder."""
    (tiny_llama() if model is None else model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def save_gguf(model: Any, file: Path) -> None:
    """
    Write a Llama, a Qwen2 or a Phi-3 as llama.cpp's converter does: its names, and a Llama's order of the rotated
    pairs of queries and keys.
    """
    import gguf

    config, kind = model.config, model.config.model_type
    writer = gguf.GGUFWriter(file, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads and kind == "llama":
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prompts(lengths=(6, 4, 1), seed=0) -> dict[str, torch.Tensor]:
    """Left-padded random prompts."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = torch.tensor([[int(i >= width - length) for i in range(width)] for length in lengths])
    return {"input_ids": torch.randint(3, 259, mask.shape, generator=generator) * mask, "attention_mask": mask}


class Pieces:
    """A streamer that keeps what it is handed."""

    def __init__(self):
        self.pieces, self.ended = [], 0

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.ended += 1


STRANGER = '''
import sys


class Refuse:
    """This process has never heard of the project."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sorted_llama", "modeling_sorted_llama", "trainer", "tests"):
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, Refuse())
for name in ("sorted_llama", "modeling_sorted_llama"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is importable")

'''


def run_as_stranger(script: str, *arguments: Any, folder: Path) -> str:
    """Run `script` in a process that cannot import the project, in a new folder below `folder`; returns its output."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_MODULES_CACHE": str(folder / "hf" / "modules")}
    run = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER + script, *arguments],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
