"""
Claim: on a GPU, where uncompiled decoding waits for launches, every mode of `generate` decodes from graphs.

A Llama of Llama 2 7B's shape with random weights in bfloat16, exits 8, 12 and 16. As its drafts are worth nothing,
their acceptance is forced: what is measured is the loop, not a training. The columns are those of `compiled.py`, its
rows full depth and exit 8 as transformers compiles them, a threshold that no token reaches (every exit is looked
at, every token runs full depth), and drafting from each exit. gpt-fast's README tells 104.9 tokens/s for this shape
and dtype on an A100 of 80 GB, 1,397 GB/s of the 1,700 that it finds there: 0.82 of the limit. One command prints the
whole table, in under nine minutes on a GPU of 24 GB or more:

```shell
python benchmarks/gpu.py
```
"""

import torch
from _common import DEVICE, SMALL, where
from compiled import Table, arguments
from scaling import ON_PAPER

from sorted_llama import SortedLlamaConfig, SortedLlamaForCausalLM


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(depths=[8], drafts=[8, 12, 16], acceptance=[0.6, 0.8, 1.0], length=4, batches=1, runs=3)
    args = parser.parse_args()
    shape = ON_PAPER["7B (Llama 2)"]
    if args.small or DEVICE != "cuda":
        print("A tiny model: this needs a GPU, and only shows that it runs.")
        args.depths, args.drafts, args.length, args.new_tokens, args.runs, args.backend = (
            [2],
            [2],
            2,
            6,
            1,
            "aot_eager",
        )
        shape = SMALL
    exits = [*sorted({*args.depths, *args.drafts}), shape["num_hidden_layers"]]
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, args.dtype))
    with torch.device(DEVICE):
        model = SortedLlamaForCausalLM(SortedLlamaConfig(**shape, exit_layers=exits)).eval()
        inputs = [
            {"input_ids": torch.randint(3, shape["vocab_size"], (args.rows[0], 128))} for _ in range(args.batches)
        ]
    inputs = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in inputs]
    print(f"Llama 2 7B's shape, {args.dtype}, {args.rows[0]} row(s), {where()}; {args.new_tokens} new tokens\n")
    Table(args, model, inputs).print()


if __name__ == "__main__":
    main()
