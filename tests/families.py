"""
Tiny models of other families, each with random weights in every tensor: of transformers' own classes where it has one.
InternLM2 and Baichuan 2 it has not: `Published` is written from what their published modelling code computes.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import nn

from tests.tiny import tiny_fields


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}

# A family's class, or model type, and the fields in which a model of it differs from `tiny_fields`
CASES = {
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_nemo": ("Mistral", {"sliding_window": None, "head_dim": 16, "tie_word_embeddings": False}),
    "mistral_window_of_the_context": ("Mistral", {"sliding_window": 256, "num_key_value_heads": 1}),
    "ministral": ("Ministral", {"sliding_window": 16, "head_dim": 16, "layer_types": ["full_attention"] * 4}),
    "qwen2": ("Qwen2", {}),
    "qwen2_untied": ("Qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": YARN}),
    "seed_oss": ("SeedOss", {"head_dim": 16, "tie_word_embeddings": False, "rope_parameters": LINEAR}),
    "seed_oss_no_bias": ("SeedOss", {"head_dim": 8, "attention_bias": False}),
    "phi3": ("Phi3", {}),
    "phi3_one_key_value_head": ("Phi3", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "phi3_ungrouped": ("Phi3", {"num_key_value_heads": 4}),
    "gemma": ("Gemma", {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma_bias": ("Gemma", {"head_dim": 8, "num_key_value_heads": 1, "attention_bias": True}),
    "internlm2": ("internlm2", {"bias": False}),
    "internlm2_bias": ("internlm2", {"bias": True, "num_key_value_heads": 1, "rope_theta": 1e6}),
    "internlm2_ungrouped": ("internlm2", {"bias": False, "num_key_value_heads": 4}),
    "baichuan": ("baichuan", {"vocab_size": 125696, "num_key_value_heads": 4}),
}


def tiny_family(case: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """The model of a case, in float32, in evaluation mode."""
    name, fields = CASES[case]
    fields = tiny_fields(**{**fields, **overrides})
    torch.manual_seed(seed)
    if name.islower():
        model = Published(name, {**fields, "tie_word_embeddings": False})
    else:
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases begin as ones and zeros, which hide what is left out
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def first_layers(case: str, num_layers: int) -> nn.Module:
    """The first layers of a case's model as a model of the family, which no test changes."""
    overrides = {"layer_types": ["full_attention"] * num_layers} if "layer_types" in CASES[case][1] else {}
    whole, cut = tiny_family(case), tiny_family(case, num_hidden_layers=num_layers, **overrides)
    kept = cut.state_dict().keys()
    cut.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if name in kept})
    return cut


class Published(nn.Module):
    """InternLM2, or Baichuan 2 of 7B: fused rows are taken apart behind the matrix product, as their own code does."""

    def __init__(self, model_type: str, fields: dict[str, Any]):
        super().__init__()
        self.fields, self.grouped = (
            {"model_type": model_type, "rms_norm_eps": 1e-6, **fields},
            model_type == "internlm2",
        )
        self.heads, self.kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        size, inner, vocab = (fields[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
        self.head_dim, bias = size // self.heads, fields.get("bias", False)
        q, o, gate, up, down, first, second, embeddings, head = (
            ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
            + ("attention_norm", "ffn_norm", "model.tok_embeddings", "output")
            if self.grouped
            else ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
            + ("input_layernorm", "post_attention_layernorm", "model.embed_tokens", "lm_head")
        )
        self.names = (q, o, gate, up, down, first, second)
        self.embeddings, self.head = f"{embeddings}.weight", f"{head}.weight"
        self.weights = {self.embeddings: (vocab, size), "model.norm.weight": (size,), self.head: (vocab, size)}
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        shapes = [(rows, size), (size, size), (inner, size), (inner, size), (size, inner), (size,), (size,)]
        for i in range(fields["num_hidden_layers"]):
            self.weights |= {f"model.layers.{i}.{n}.weight": s for n, s in zip(self.names, shapes, strict=True)}
            self.weights |= {f"model.layers.{i}.{n}.bias": s[:1] for n, s in zip((q, o), shapes, strict=False) if bias}
        for name, shape in self.weights.items():
            ones = torch.ones(shape) if len(shape) == 1 and name.endswith("weight") else torch.zeros(shape)
            weight = ones if len(shape) == 1 else 0.3 * torch.randn(shape)
            self.register_parameter(name.replace(".", "/"), nn.Parameter(weight))

    def weight(self, name: str) -> torch.Tensor | None:
        return getattr(self, name.replace(".", "/"), None)

    def linear(self, name: str, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))

    def norm(self, name: str, states: torch.Tensor) -> torch.Tensor:
        variance = states.pow(2).mean(-1, keepdim=True)
        return self.weight(f"{name}.weight") * (states * torch.rsqrt(variance + self.fields["rms_norm_eps"]))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The logits of every position; positions count all columns, as they do where none are passed."""
        states = F.embedding(input_ids, self.weight(self.embeddings))
        width = input_ids.shape[1]
        seen = torch.ones(width, width, dtype=torch.bool).tril() & attention_mask.bool()[:, None, None, :]
        seen |= torch.eye(width, dtype=torch.bool)
        frequencies = self.fields.get("rope_theta", 10000.0) ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = (torch.arange(width)[:, None] * frequencies).repeat(1, 2)
        for i in range(self.fields["num_hidden_layers"]):
            q, o, gate, up, down, first, second = (f"model.layers.{i}.{name}" for name in self.names)
            states = states + self.linear(o, self.attention(self.linear(q, self.norm(first, states)), angles, seen))
            normed = self.norm(second, states)
            states = states + self.linear(down, F.silu(self.linear(gate, normed)) * self.linear(up, normed))
        head = self.weight(self.head)
        return F.linear(self.norm("model.norm", states), head if self.grouped else F.normalize(head))

    def attention(self, fused: torch.Tensor, angles: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        batch, width, _ = fused.shape
        if self.grouped:  # "b q (h gs d) -> b q h gs d": its queries, its key, its value for each key-value head
            fused = fused.view(batch, width, self.kv_heads, -1, self.head_dim)
            q, k, v = fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :]
        else:
            q, k, v = fused.view(batch, width, 3, self.heads, self.head_dim).unbind(2)

        def turn(x: torch.Tensor) -> torch.Tensor:
            a, b = x.transpose(1, 2).chunk(2, dim=-1)
            return torch.cat((a, b), -1) * angles.cos() + torch.cat((-b, a), -1) * angles.sin()

        k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (turn(k), v.transpose(1, 2)))
        scores = (turn(q) @ k.transpose(2, 3) / self.head_dim**0.5).masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, width, -1)

    def save_pretrained(self, folder: Path | str, max_shard_size: str = "5GB") -> None:
        """One file, or one a tensor where the size is not the default, as their repositories have them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"dtype": "float32", **self.fields}))
        weights = {name: self.weight(name).detach().clone() for name in self.weights}
        if max_shard_size == "5GB":
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            return
        for i, (name, weight) in enumerate(weights.items()):
            save_file({name: weight}, folder / f"model-{i}.safetensors", metadata={"format": "pt"})
        index = {name: f"model-{i}.safetensors" for i, name in enumerate(weights)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@torch.no_grad()
def family_logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of every position of a case's model."""
    outputs = model(**inputs)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits
