"""
Claim: SoFT costs what arithmetic demands over SFT, in time and in memory, and less than the naive sum.

Peer: TRL's `SFTTrainer` on the same weights and batch. A step is `Trainer.training_step`: forward, loss, backward (the
optimizer's step, the same for all, is left out of the time and left in the memory). All take turns in one process;
memory is the peak of one process a row that trains two real steps, AdamW included. "naive" sums the cross-entropies
of full logits, all exits at once. "TRL" is `SFTTrainer`'s own fused head, called once an exit. The rows behind a "+"
are options of `SortedSFTConfig`, on the number of exits that is named; "+random" draws one of eight exits beside the
full depth.

The prediction multiplies SFT's time by the ratio of floating point operations: backbone once (forward, recomputation,
backward), head once an exit (three products). Held to: time at most 1.10 x the prediction and below the naive sum's,
peak memory at 8 exits at most 1.10 x SFT's; "+random" at most 1.15 x SFT's time, "+distilled" at most 1.35 x that of
the same exits without, and no option more than 1.10 x SoFT's peak memory.

```shell
python benchmarks/soft_step.py                        # SmolLM2's head, 49,152 entries
python benchmarks/soft_step.py --vocab_size 128256    # a Llama 3 sized head
```
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from _common import DEVICE, SMOLLM2, in_turns, load_llama, print_head, print_row, ratio, tokenizer_without_words, where
from datasets import Dataset, disable_progress_bars
from torch import nn
from transformers import LlamaForCausalLM
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from sorted_llama import SortedLlamaForCausalLM
from sorted_llama.trainer import SortedSFTConfig, SortedSFTTrainer


warnings.filterwarnings("ignore")
logging.set_verbosity_error()
disable_progress_bars()


class PeerTrainer(SortedSFTTrainer):
    """Another loss, in the same autocast: Trainer's is around the forward of the model, which a peer goes past."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():
            return self.peer_loss(inputs, num_items_in_batch)


class NaiveSoFTTrainer(PeerTrainer):
    """The sum written down: the logits of every exit, all alive at once, and a cross-entropy each."""

    def peer_loss(self, inputs, num_items_in_batch):
        base = self.model.model
        inputs = {key: value for key, value in inputs.items() if key != "labels"} | {"use_cache": False}
        labels = self.labels[:, 1:].flatten()
        states = base(**inputs, exit_layers=self.exit_layers).exit_hidden_states
        logits = [self.model.lm_head(base.norm(state))[:, :-1].flatten(0, 1).float() for state in states]
        return sum(nn.functional.cross_entropy(each, labels, reduction="sum") for each in logits) / num_items_in_batch


class TRLHeadTrainer(PeerTrainer):
    """TRL's fused head once an exit."""

    def peer_loss(self, inputs, num_items_in_batch):
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

        base, weight = self.model.model, self.model.lm_head.weight
        inputs = {key: value for key, value in inputs.items() if key != "labels"} | {"use_cache": False}
        labels = self.labels[:, 1:].flatten()
        total = 0.0
        for state in base(**inputs, exit_layers=self.exit_layers).exit_hidden_states:
            normed = base.norm(state)[:, :-1].flatten(0, 1)
            outputs = ("log_probs", "entropy", "is_top1")
            total -= _ChunkedLogProbFunction.apply(
                normed, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
            )[0].sum()
        return total / num_items_in_batch


PEERS = {"naive": NaiveSoFTTrainer, "TRL": TRLHeadTrainer}
OPTIONS = {
    "+random": {"exit_schedule": "random"},
    "+distilled": {"self_distillation_weight": 1.0},
    "+lenses": {"exit_heads": "lens", "detach_exits": True},
    "+ICT": {"trainable": "exits"},
    "+heads": {"trainable": "exits", "exit_heads": "separate"},
}


def exits_of(depth: int, count: int) -> list[int]:
    return [depth * (i + 1) // count for i in range(count)]


def build(name: str, llama: LlamaForCausalLM, args: argparse.Namespace, tokens: torch.Tensor, output_dir: str):
    """The trainer of one row, on the weights of `llama`."""
    kind, _, count = name.partition(" ")
    cls, config_cls = SortedSFTTrainer, SortedSFTConfig
    if kind == "SFT":
        cls, config_cls = SFTTrainer, SFTConfig
    elif kind in PEERS:
        cls = PEERS[kind]
    exits = {} if kind == "SFT" else {"exit_layers": exits_of(llama.config.num_hidden_layers, int(count))}
    config = config_cls(
        output_dir=output_dir,
        bf16=args.dtype == "bfloat16",
        torch_compile=args.torch_compile,
        use_cpu=DEVICE == "cpu",
        per_device_train_batch_size=tokens.shape[0],
        max_steps=2,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1000,
        **exits,
        **OPTIONS.get(kind, {}),
    )
    # The tokens are made here: the tokenizer is only asked for its special ones
    tokenizer = tokenizer_without_words()
    rows = Dataset.from_dict({"input_ids": tokens.repeat(2, 1).tolist()})
    model = llama if kind == "SFT" else SortedLlamaForCausalLM.from_llama(llama)
    trainer = cls(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.labels = tokens.to(DEVICE)
    return trainer


def operations(llama: LlamaForCausalLM, num_exits: int, tokens: torch.Tensor) -> float:
    """Floating point operations of a step: 2 a weight and token forward, as many to recompute, 4 backward."""
    layers = sum(p.numel() for p in llama.model.layers.parameters())
    attention = llama.config.num_hidden_layers * llama.config.num_attention_heads * llama.config.head_dim
    backbone = 8 * (layers + 2 * attention * tokens.shape[1] / 2)  # a causal token sees half of the others
    head = 6 * llama.lm_head.weight.numel()
    return tokens.numel() * (backbone + num_exits * head)


def peak_memory(name: str) -> float:
    """Peak memory, while it trains two steps, of a process that does nothing else, in MB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def only(name: str, args: argparse.Namespace) -> None:
    llama, tokens = make(args)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = build(name, llama, args, tokens, output_dir)
        # What loading took at its peak does not count
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        trainer.train()
    if DEVICE == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        print(int(peak[1]) / 2**10)


def make(args: argparse.Namespace) -> tuple[LlamaForCausalLM, torch.Tensor]:
    llama = load_llama(args.small, torch.float32, args.model, args.vocab_size, args.random_weights)
    if args.num_layers:
        llama.config.num_hidden_layers = args.num_layers
        del llama.model.layers[args.num_layers :]
    torch.manual_seed(0)
    length = min(args.tokens, 512)
    return llama, torch.randint(3, llama.config.vocab_size, (args.tokens // length, length))


def rows_of(args: argparse.Namespace) -> list[str]:
    if args.small:
        return ["SFT", "SoFT 1", "SoFT 2", "naive 2", "TRL 2", *(f"{option} 2" for option in OPTIONS)]
    options = [f"{option} {8 if option == '+random' else 4}" for option in OPTIONS]
    return ["SFT", *(args.rows or ["SoFT 1", "SoFT 2", "SoFT 4", "SoFT 8", "naive 4", "TRL 4", *options])]


def measure_time(
    names: list[str], llama: LlamaForCausalLM, args: argparse.Namespace, tokens: torch.Tensor
) -> dict[str, list[float]]:
    """Seconds of a step of every row, in turns."""
    calls = {}
    with tempfile.TemporaryDirectory() as output_dir:
        for name in names:
            trainer = build(name, llama, args, tokens, output_dir)
            trainer.create_optimizer_and_scheduler(num_training_steps=1)
            model = trainer.accelerator.prepare(trainer.model)
            if trainer.args.gradient_checkpointing:
                trainer.model.gradient_checkpointing_enable()
            batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}

            def step(trainer=trainer, model=model, batch=batch):
                trainer.training_step(model, dict(batch), num_items_in_batch=tokens[:, 1:].numel())
                model.zero_grad()

            calls[name] = step
        return in_turns(calls, args.runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--random_weights", action="store_true", help="of the shape in the model's config.json")
    parser.add_argument("--vocab_size", type=int, help="replace the head by a random one of so many entries")
    parser.add_argument("--num_layers", type=int, help="only the first so many layers")
    parser.add_argument("--torch_compile", action="store_true", help="compile the model of every row")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", nargs="+", help="rows to measure, `SFT` is always among them")
    parser.add_argument("--small", action="store_true", help="a tiny random model: only checks that it runs")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        args.tokens, args.runs = 64, 1
    if args.only:
        only(args.only, args)
        return

    llama, tokens = make(args)
    names = rows_of(args)
    print(f"{where()}; {args.dtype}; {tokens.numel()} tokens, vocabulary {llama.config.vocab_size}, {args.runs} runs")
    seconds = measure_time(names, llama, args, tokens)
    base, memory = operations(llama, 1, tokens), {}
    print_head("step", "seconds", "ratio to SFT", "predicted", "of predicted", "peak memory, MB", "ratio to SFT")
    for name in names:
        memory[name] = peak_memory(name)
        measured = ratio(seconds[name], seconds["SFT"])
        predicted = operations(llama, int(name.partition(" ")[2] or 1), tokens) / base
        times = [f"{value:.2f}" for value in (measured, predicted, measured / predicted)]
        of_sft = f"{memory[name] / memory['SFT']:.2f}"
        print_row(name, f"{statistics.median(seconds[name]):.2f}", *times, f"{memory[name]:.0f}", of_sft)


if __name__ == "__main__":
    main()
