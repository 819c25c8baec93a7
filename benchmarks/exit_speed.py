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
from _common import DEVICE, SMOLLM2, in_turns, load_llama, ratio, where

from sorted_llama import SortedLlamaForCausalLM


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
    exits = [2, 6] if args.small else args.exit_layers
    new_tokens, runs = (4, 1) if args.small else (args.new_tokens, args.runs)

    print(f"{where()}; {args.prompt_tokens} prompt tokens, {new_tokens} new tokens, 1 row, {runs} runs")
    print("| dtype | layers | plain Llama, tokens/s | exit, tokens/s | ratio | speed-up | predicted | of predicted |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        llama = load_llama(args.small, dtype, args.model, random_weights=args.random_weights)
        model = SortedLlamaForCausalLM.from_llama(llama, exit_layers=exits)
        torch.manual_seed(0)
        prompt = torch.randint(3, llama.config.vocab_size, (1, args.prompt_tokens), device=DEVICE)
        options = {
            "attention_mask": torch.ones_like(prompt),
            "do_sample": False,
            "min_new_tokens": new_tokens,
            "max_new_tokens": new_tokens,
            "pad_token_id": 0,
        }
        calls, read = {}, {}
        for k in exits:
            peer = model.extract_submodel(k)
            calls[f"plain {k}"] = partial(peer.generate, prompt, **options)
            calls[f"exit {k}"] = partial(model.generate, prompt, exit_layer=k, **options)
            layers = sum(p.numel() for p in peer.model.layers.parameters())
            read[k] = layers + peer.lm_head.weight.numel() + peer.model.norm.weight.numel()
        seconds = in_turns(calls, runs)
        full = exits[-1]
        for k in exits:
            speed_up = ratio(seconds[f"exit {full}"], seconds[f"exit {k}"])
            predicted = read[full] / read[k]
            plain, exit_ = (new_tokens / statistics.median(seconds[f"{name} {k}"]) for name in ("plain", "exit"))
            print(
                f"| {str(dtype).removeprefix('torch.')} | {k} | {plain:.1f} | {exit_:.1f} "
                f"| {ratio(seconds[f'plain {k}'], seconds[f'exit {k}']):.3f} | {speed_up:.2f} | {predicted:.2f} "
                f"| {speed_up / predicted:.2f} |"
            )


if __name__ == "__main__":
    main()
