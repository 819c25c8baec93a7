"""Models that people use: what their `config.json` says, and how many parameters the Hub counts, where known."""

from typing import Any


def facts(hidden_size, intermediate_size, layers, heads, kv_heads, vocab_size, **others: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    values = (hidden_size, intermediate_size, layers, heads, kv_heads)
    return {**dict(zip(names, values, strict=True)), "vocab_size": vocab_size, **others}


def length(max_position_embeddings: int) -> dict[str, int]:
    return {"max_position_embeddings": max_position_embeddings}


def dynamic(factor: float) -> dict[str, Any]:
    return {"rope_scaling": {"type": "dynamic", "factor": factor}}


TIED = {"tie_word_embeddings": True}
FINE, COARSE = {"rms_norm_eps": 1e-6}, {"rms_norm_eps": 1e-5}
QWEN = {"model_type": "qwen2", "use_sliding_window": False, "rope_theta": 1e6, "sliding_window": 32768}
QWEN_32K, QWEN_128K = {**QWEN, **FINE, **length(32768)}, {**QWEN, **FINE, **length(131072)}
QWEN_LARGE = {**QWEN, **COARSE, **length(131072)}
MISTRAL = {"model_type": "mistral", "rope_theta": 1e6, **length(32768), "sliding_window": None, **COARSE}
PHI3 = {"model_type": "phi3", "sliding_window": None, "rope_scaling": None, **COARSE}
PHI4 = (5120, 17920, 40, 40, 10, 100352)
INTERNLM2 = {"model_type": "internlm2", "bias": False, "rope_theta": 1e6, **length(32768), **COARSE}
BAICHUAN = {"model_type": "baichuan", **FINE, **length(4096)}
GEMMA = {"model_type": "gemma", "head_dim": 256, **FINE, **length(8192)}
# With what is known of the activation, which their files spell in several ways; what is meant is "gelu_pytorch_tanh"
GELU = {"hidden_act": "gelu"}
GEMMA_2B = {"gemma-2b": GELU, "gemma-2b-it": {}, "codegemma-1.1-2b": {}}
GEMMA_2B |= {"gemma-1.1-2b-it": {"hidden_act": "gelu_pytorch_tanh"}}
GEMMA_2B |= {"codegemma-2b": {**GELU, "hidden_activation": None}}
GEMMA_7B = {"gemma-7b": {}, "gemma-7b-it": GELU, "gemma-1.1-7b-it": {}}
GEMMA_7B |= {"codegemma-7b": {}, "codegemma-7b-it": {}, "codegemma-1.1-7b-it": {}}
SEED_OSS = {"model_type": "seed_oss", "head_dim": 128, "rope_theta": 1e7, **FINE, **length(524288)}
LLAMA = {"model_type": "llama"}
DEEPSEEK_CODER = {**LLAMA, "rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}, **length(16384)}
FALCON3 = {**LLAMA, "head_dim": 256, "rope_theta": 1000042}

REAL = {
    "Qwen1.5-0.5B": (None, facts(1024, 2816, 24, 16, 16, 151936, **QWEN_32K, **TIED)),
    "Qwen1.5-1.8B": (1836828672, facts(2048, 5504, 24, 16, 16, 151936, **QWEN_32K)),
    "Qwen1.5-4B": (3950369280, facts(2560, 6912, 40, 20, 20, 151936, **QWEN, **length(32768))),
    "Qwen1.5-7B": (7721324544, facts(4096, 11008, 32, 32, 32, 151936, **QWEN, **length(32768))),
    "Qwen1.5-14B": (14167290880, facts(5120, 13696, 40, 40, 40, 152064, **QWEN, **length(32768))),
    "Qwen1.5-32B": (32512218112, facts(5120, 27392, 64, 40, 8, 152064, **QWEN, **length(32768))),
    "Qwen1.5-110B": (111209914368, facts(8192, 49152, 80, 64, 8, 152064, **QWEN, **length(32768))),
    "Qwen2-0.5B": (494032768, facts(896, 4864, 24, 14, 2, 151936, **QWEN_128K, **TIED)),
    "Qwen2-7B": (7615616512, facts(3584, 18944, 28, 28, 4, 152064, **QWEN_128K)),
    "Qwen2.5-0.5B": (494032768, facts(896, 4864, 24, 14, 2, 151936, **QWEN_32K, **TIED)),
    "Qwen2.5-1.5B": (1543714304, facts(1536, 8960, 28, 12, 2, 151936, **QWEN_128K, **TIED)),
    "Qwen2.5-3B": (3085938688, facts(2048, 11008, 36, 16, 2, 151936, **QWEN_32K, **TIED)),
    "Qwen2.5-7B": (7615616512, facts(3584, 18944, 28, 28, 4, 152064, **QWEN_128K)),
    "Qwen2.5-14B": (14770033664, facts(5120, 13824, 48, 40, 8, 152064, **QWEN_LARGE)),
    "Qwen2.5-32B": (32763876352, facts(5120, 27648, 64, 40, 8, 152064, **QWEN_LARGE)),
    "Qwen2.5-72B": (72706203648, facts(8192, 29568, 80, 64, 8, 152064, **QWEN_LARGE)),
    "Mistral-7B-v0.2": (7241732096, facts(4096, 14336, 32, 32, 8, 32000, **MISTRAL)),
    "Mistral-7B-v0.3": (7248023552, facts(4096, 14336, 32, 32, 8, 32768, **MISTRAL)),
    "Mathstral-7B-v0.1": (7248023552, facts(4096, 14336, 32, 32, 8, 32768, **MISTRAL)),
    "Mistral-Nemo-2407": (12247782400, facts(5120, 14336, 40, 32, 8, 131072, **MISTRAL, head_dim=128)),
    "Mistral-Small-24B-2501": (23572403200, facts(5120, 32768, 40, 32, 8, 131072, **MISTRAL, head_dim=128)),
    "Mistral-Small-2409": (22247282688, facts(6144, 16384, 56, 48, 8, 32768, **MISTRAL, head_dim=128)),
    "Codestral-22B-v0.1": (22247282688, facts(6144, 16384, 56, 48, 8, 32768, **MISTRAL)),
    "Mistral-Large-2407": (122610069504, facts(12288, 28672, 88, 96, 8, 32768, **MISTRAL)),
    "Ministral-8B-2410": (
        8019808256,
        facts(4096, 12288, 36, 32, 8, 131072, **{**MISTRAL, "sliding_window": 32768, "rope_theta": 1e8}, head_dim=128),
    ),
    "phi-4": (14659507200, facts(*PHI4, **PHI3, rope_theta=250000, **length(16384))),
    **dict.fromkeys(
        ("Phi-4-reasoning", "Phi-4-reasoning-plus"),
        (14659507200, facts(*PHI4, **PHI3, rope_theta=5e5, **length(32768))),
    ),
    "internlm2-1_8b": (1889110016, facts(2048, 8192, 24, 16, 8, 92544, **INTERNLM2, **dynamic(2.0))),
    "internlm2-7b": (7737708544, facts(4096, 14336, 32, 32, 8, 92544, **INTERNLM2, **dynamic(2.0))),
    "internlm2-20b": (19861149696, facts(6144, 16384, 48, 48, 8, 92544, **INTERNLM2)),
    "internlm2_5-1_8b": (1889110016, facts(2048, 8192, 24, 16, 8, 92544, **INTERNLM2)),
    "internlm2_5-7b": (7737708544, facts(4096, 14336, 32, 32, 8, 92544, **INTERNLM2)),
    "internlm2_5-20b": (19861149696, facts(6144, 16384, 48, 48, 8, 92544, **INTERNLM2)),
    "Baichuan2-7B": (7505973248, facts(4096, 11008, 32, 32, None, 125696, **BAICHUAN)),
    **{name: (2506172416, facts(2048, 16384, 18, 8, 1, 256000, **GEMMA, **act)) for name, act in GEMMA_2B.items()},
    **{name: (8537680896, facts(3072, 24576, 28, 16, 16, 256000, **GEMMA, **act)) for name, act in GEMMA_7B.items()},
    "Seed-OSS-36B": (36151104512, facts(5120, 27648, 64, 80, 8, 155136, **SEED_OSS)),
    "Yi-6B": (6061035520, facts(4096, 11008, 32, 32, 4, 64000, **LLAMA, rope_theta=5e6)),
    "Yi-9B": (8829407232, facts(4096, 11008, 48, 32, 4, 64000, **LLAMA)),
    "Yi-34B": (34388917248, facts(7168, 20480, 60, 56, 8, 64000, **LLAMA, rope_theta=5e6)),
    "deepseek-llm-7b": (6910365696, facts(4096, 11008, 30, 32, 32, 102400, **LLAMA, **length(4096))),
    "deepseek-llm-67b": (None, facts(8192, 22016, 95, 64, 8, 102400, **LLAMA, **length(4096))),
    "deepseek-coder-1.3b": (1346471936, facts(2048, 5504, 24, 16, 16, 32256, **DEEPSEEK_CODER)),
    "deepseek-coder-6.7b": (6740512768, facts(4096, 11008, 32, 32, 32, 32256, **DEEPSEEK_CODER)),
    "deepseek-coder-33b": (33342991360, facts(7168, 19200, 62, 56, 8, 32256, **DEEPSEEK_CODER)),
    "TinyLlama-1.1B": (1100048384, facts(2048, 5632, 22, 32, 4, 32000, **LLAMA, **COARSE, **length(2048))),
    "SmolLM-1.7B": (1711376384, facts(2048, 8192, 24, 32, 32, 49152, **LLAMA, **TIED, **length(2048))),
    "SmolLM2-135M": (134515008, facts(576, 1536, 30, 9, 3, 49152, **LLAMA, **TIED, **COARSE, rope_theta=1e5)),
    "SmolLM2-360M": (361821120, facts(960, 2560, 32, 15, 5, 49152, **LLAMA, **TIED, **COARSE, rope_theta=1e5)),
    "SmolLM2-1.7B": (1711376384, facts(2048, 8192, 24, 32, 32, 49152, **LLAMA, **TIED, **COARSE, rope_theta=130000)),
    "vicuna-7b": (6738415616, facts(4096, 11008, 32, 32, 32, 32000, **LLAMA)),
    "vicuna-13b": (13015864320, facts(5120, 13824, 40, 40, 40, 32000, **LLAMA)),
    "Falcon3-1B": (1669408768, facts(2048, 8192, 18, 8, 4, 131072, **FALCON3)),
    "Falcon3-3B": (3227655168, facts(3072, 9216, 22, 12, 4, 131072, **FALCON3)),
    "Falcon3-7B": (7455550464, facts(3072, 23040, 28, 12, 4, 131072, **FALCON3)),
    "Falcon3-10B": (10305653760, facts(3072, 23040, 40, 12, 4, 131072, **FALCON3)),
}


def longrope(frequencies: int, sliding_window: int, kind: str = "longrope") -> dict[str, Any]:
    factors = {"short_factor": [1.0] * frequencies, "long_factor": [2.0] * frequencies}
    lengths = {**length(131072), "original_max_position_embeddings": 4096, "sliding_window": sliding_window}
    return {**PHI3, "attention_bias": False, **lengths, "rope_scaling": {"type": kind, **factors}}


PHI3_4K = {**PHI3, "sliding_window": 2047, **length(4096), "original_max_position_embeddings": 4096}
PHI3_MINI, PHI3_MEDIUM = (3072, 8192, 32, 32, 32, 32064), (5120, 17920, 40, 40, 10, 32064)
PHI4_MINI = facts(3072, 8192, 32, 24, 8, 200064, **longrope(48, 262144), partial_rotary_factor=0.75, **TIED)
BAICHUAN_13B = (5120, 13696, 40, 40, None)

# With a part of the reason
REFUSED = {
    "Mistral-7B-v0.1": (
        "`sliding_window=4096`",
        facts(4096, 14336, 32, 32, 8, 32000, **{**MISTRAL, "sliding_window": 4096, "rope_theta": 1e4}),
    ),
    "Phi-3-mini-4k": ("`sliding_window=2047`", facts(*PHI3_MINI, **PHI3_4K)),
    "Phi-3-medium-4k": ("`sliding_window=2047`", facts(*PHI3_MEDIUM, **PHI3_4K)),
    "Phi-3-mini-128k": ("'longrope'", facts(*PHI3_MINI, **longrope(48, 262144, "su"))),
    "Phi-3-medium-128k": ("'longrope'", facts(*PHI3_MEDIUM, **longrope(64, 131072, "su"))),
    "Phi-3.5-mini": ("'longrope'", facts(*PHI3_MINI, **longrope(48, 262144))),
    **dict.fromkeys(("Phi-4-mini", "Phi-4-mini-reasoning"), ("`partial_rotary_factor=0.75`", PHI4_MINI)),
    "Baichuan-7B": ("only Baichuan 2", facts(4096, 11008, 32, 32, None, 64000, **BAICHUAN)),
    "Baichuan-13B": ("ALiBi", facts(*BAICHUAN_13B, 64000, **BAICHUAN)),
    "Baichuan2-13B": ("ALiBi", facts(*BAICHUAN_13B, 125696, model_type="baichuan", model_max_length=4096)),
}
