"""
Claim: what self-speculation gains grows with the model, because what it pays beside the layers, the head and the loop
around them, shrinks.

Llamas of several shapes with random weights, whose layers above the exit add nothing: every draft is accepted, so
that the figures are those of the loop and not of a training. Measured: plain decoding against drafting at a third of
the depth, as a multiple, beside the ideal of the same cycles (see `self_speculation.py`). Then, for every shape, what
the ideal is where only 60, 70, 80 or 90 % of the drafts are accepted, with the best draft length. For shapes that do
not fit here it is computed from the bytes that a token reads: one row, decoding bound by memory, a verification of a
few tokens as dear as one token, keys and values left out.

```shell
python benchmarks/scaling.py
```
"""

import argparse
import statistics
from functools import partial

import torch
from _common import DEVICE, SMALL, Bare, endless, in_turns, print_head, print_row, ratio, where
from transformers import LlamaConfig, LlamaForCausalLM

from sorted_llama import SortedLlamaForCausalLM


def shape(layers, hidden, intermediate, heads, kv_heads, vocabulary, tied=False) -> dict:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


MEASURED = {
    "135M (SmolLM2)": shape(30, 576, 1536, 9, 3, 49152, tied=True),
    "360M (SmolLM2)": shape(32, 960, 2560, 15, 5, 49152, tied=True),
    "1.1B (TinyLlama)": shape(22, 2048, 5632, 32, 4, 32000),
}
ON_PAPER = {
    "7B (Llama 2)": shape(32, 4096, 11008, 32, 32, 32000),
    "13B (Llama 2)": shape(40, 5120, 13824, 40, 40, 32000),
}
ACCEPTANCES = (0.6, 0.7, 0.8, 0.9)
LENGTHS = range(1, 9)


def best_gain(acceptance: float, plain: float, draft: float, verify: dict[int, float]) -> tuple[float, int]:
    """The largest multiple of plain decoding, and its draft length; `verify[n]` is a cycle's cost beside drafts."""
    tokens = {n: (1 - acceptance ** (n + 1)) / (1 - acceptance) for n in verify}
    return max((tokens[n] * plain / (n * draft + verify[n]), n) for n in verify)


def weights(fields: dict) -> tuple[float, float]:
    """Weights of one layer and of the head."""
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    attention = 2 * hidden * hidden * (1 + fields["num_key_value_heads"] / heads)
    return attention + 3 * hidden * fields["intermediate_size"], hidden * fields["vocab_size"]


def made_for_drafts(fields: dict, k: int) -> LlamaForCausalLM:
    """A random Llama whose layers above the first `k` add nothing: whatever these draft is accepted."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        llama = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16).eval()
    for layer in llama.model.layers[k:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return llama


def measure(fields: dict, n: int, new_tokens: int, runs: int) -> tuple[float, float, list[tuple[float, int]]]:
    """Gain of `n` drafts a cycle, its ideal, and the best gains by acceptance."""
    layers, k = fields["num_hidden_layers"], max(1, fields["num_hidden_layers"] // 3)
    llama = made_for_drafts(fields, k)
    model = SortedLlamaForCausalLM.from_llama(llama, exit_layers=[k, layers])
    prompt = torch.randint(3, fields["vocab_size"], (1, 32), device=DEVICE)
    options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
    calls = {
        "plain": partial(llama.generate, prompt, **options),
        "draft": partial(model.generate, prompt, assistant_early_exit=k, num_assistant_tokens=n, **options),
        "first": partial(llama.generate, prompt, **{**options, "max_new_tokens": 1}),
    }
    with endless(llama, model):
        cycles = calls["draft"](return_dict_in_generate=True).draft_statistics.cycles - 1
        seconds = in_turns(calls, runs)
    cost = partial(Bare(llama, 1, 32 + new_tokens // 2).seconds, runs=3 * runs)
    plain, draft, lower = cost(0, layers, 1, 1), cost(0, k, 1, 1), cost(0, k, 1, 0)
    verify = {m: lower + cost(k, layers, m + 1, m + 1) for m in LENGTHS}
    first = statistics.median(seconds["first"])
    ideal = (first + (new_tokens - 1) * plain) / (first + cycles * (n * draft + verify[n]))
    gains = [best_gain(a, plain, draft, verify) for a in ACCEPTANCES]
    return ratio(seconds["plain"], seconds["draft"]), ideal, gains


def compute(fields: dict, n: int) -> tuple[float, list[tuple[float, int]]]:
    """The ideal and the best gains by acceptance, from the weights that a token reads."""
    layer, head = weights(fields)
    layers, k = fields["num_hidden_layers"], fields["num_hidden_layers"] // 3
    plain, draft = layers * layer + head, k * layer + head
    gains = [best_gain(a, plain, draft, dict.fromkeys(LENGTHS, plain)) for a in ACCEPTANCES]
    return (n + 1) * plain / (n * draft + plain), gains


def print_shape(name: str, fields: dict, measured: float | None, ideal: float, gains: list[tuple[float, int]]) -> None:
    layer, head = weights(fields)
    share = f"{head / (fields['num_hidden_layers'] * layer + head):.0%}"
    of_ideal = ["", f"{ideal:.2f}", ""]
    if measured is not None:
        of_ideal = [f"{measured:.2f}", f"{ideal:.2f}", f"{measured / ideal:.2f}"]
    print_row(name, share, *of_ideal, *(f"{gain:.2f} / {length}" for gain, length in gains))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft_tokens", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=40)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a tiny model: only checks that it runs")
    args = parser.parse_args()
    n, measured_shapes, on_paper = args.draft_tokens, MEASURED, {**MEASURED, **ON_PAPER}
    if args.small:
        args.new_tokens, args.runs, measured_shapes, on_paper = 10, 1, {"tiny": SMALL}, {}

    print(
        f"{where()}, bfloat16, one row, {n} draft tokens at a third of the depth, {args.runs} runs; then the ideal "
        "with the\nbest length (behind the slash) by acceptance"
    )
    print_head("shape", "head / weights read", "all accepted: measured", "ideal", "of ideal", *ACCEPTANCES)
    for name, fields in measured_shapes.items():
        print_shape(name, fields, *measure(fields, n, args.new_tokens, args.runs))
    for name, fields in on_paper.items():
        print_shape(f"{name}, on paper", fields, None, *compute(fields, n))


if __name__ == "__main__":
    main()
