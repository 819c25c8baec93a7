"""
Claim: an exit decodes as fast as the extracted sub-model, and as fast as what it runs predicts.

Peer: transformers' plain `LlamaForCausalLM` of the same layers and tensors. Greedy decoding of one row, the pairs in
turns in one process, medians. The prediction is the ratio of the weights that a token reads: layers, final norm and
head (decoding one row is bound by that). Held to: ratio to the peer at least 0.98 at every depth, speed-up over full
depth at least 0.95 of the prediction.

```shell
python benchmarks/exit_speed.py
python benchmarks/exit_speed.py --model meta-llama/Llama-2-7b-hf --random_weights --exit_layers 12 16 20 32
```
"""

import argparse
import statistics
from functools import partial

import torch
from _common import DEVICE, SMOLLM2, in_turns, load_llama, print_head, print_row, ratio, where

from sorted_llama import SortedLlamaForCausalLM


COLUMNS = ["dtype", "layers", "plain Llama, tokens/s", "exit, tokens/s", "ratio", "speed-up", "predicted"]
COLUMNS += ["of predicted"]


def weights_read(llama) -> int:
    """Weights that a token of one row reads: layers, final norm and head."""
    layers = sum(p.numel() for p in llama.model.layers.parameters())
    return layers + llama.lm_head.weight.numel() + llama.model.norm.weight.numel()


def measure(args, dtype: torch.dtype) -> tuple[dict[tuple[str, int], list[float]], dict[int, int]]:
    """Seconds of the plain Llama and of the exit, by kind and depth; and the weights that a token reads, by depth."""
    llama = load_llama(args.small, dtype, args.model, random_weights=args.random_weights)
    model = SortedLlamaForCausalLM.from_llama(llama, exit_layers=args.exit_layers)
    torch.manual_seed(0)
    prompt = torch.randint(3, llama.config.vocab_size, (1, args.prompt_tokens), device=DEVICE)
    options = {
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "min_new_tokens": args.new_tokens,
        "max_new_tokens": args.new_tokens,
        "pad_token_id": 0,
    }
    calls, read = {}, {}
    for k in args.exit_layers:
        peer = model.extract_submodel(k)
        calls["plain", k] = partial(peer.generate, prompt, **options)
        calls["exit", k] = partial(model.generate, prompt, exit_layer=k, **options)
        read[k] = weights_read(peer)
    return in_turns(calls, args.runs), read


def print_rows(dtype: torch.dtype, new_tokens: int, seconds: dict, read: dict[int, int]) -> None:
    full = max(read)
    for k in read:
        speed_up = ratio(seconds["exit", full], seconds["exit", k])
        predicted = read[full] / read[k]
        plain, at_exit = (f"{new_tokens / statistics.median(seconds[kind, k]):.1f}" for kind in ("plain", "exit"))
        to_peer = f"{ratio(seconds['plain', k], seconds['exit', k]):.3f}"
        speed_ups = [f"{value:.2f}" for value in (speed_up, predicted, speed_up / predicted)]
        print_row(str(dtype).removeprefix("torch."), k, plain, at_exit, to_peer, *speed_ups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--random_weights", action="store_true", help="of the shape in the model's config.json")
    parser.add_argument("--exit_layers", type=int, nargs="+", default=[10, 15, 20, 30])
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--small", action="store_true", help="a tiny random model: only checks that it runs")
    args = parser.parse_args()
    if args.small:
        args.exit_layers, args.new_tokens, args.runs = [2, 6], 4, 1

    print(f"{where()}; {args.prompt_tokens} prompt tokens, {args.new_tokens} new tokens, 1 row, {args.runs} runs")
    print_head(*COLUMNS)
    for dtype in (torch.bfloat16, torch.float32):
        print_rows(dtype, args.new_tokens, *measure(args, dtype))


if __name__ == "__main__":
    main()
