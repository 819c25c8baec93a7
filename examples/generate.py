"""
One prompt, every way to decode: full depth, each exit, exit by confidence, drafting.

```shell
python examples/generate.py                                         # the checkpoint of `make demo`
python examples/generate.py --model user/sorted-llama --chat --prompt "Why is the sky blue?" --exit_threshold 0.8
```

Each token is coloured by the layers that it came from; without colours, `[10]` stands before what 10 layers said.
"""

import argparse
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import BatchEncoding, GenerationConfig, PreTrainedTokenizerBase, set_seed
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from sorted_llama import SortedLlamaConfig, SortedLlamaForCausalLM
from sorted_llama.hub_card.checkpoint import check_device, load_config, load_model, load_tokenizer
from sorted_llama.modeling_sorted_llama.configuration_sorted_llama import check_exit_layer, check_exit_layers
from sorted_llama.modeling_sorted_llama.modes_sorted_llama import choose_decoding, make_plain, read_decoding_fields
from sorted_llama.trainer.escaping import one_line
from sorted_llama.trainer.sorted_sft_config import read_exit_layers


DEMO = "out/demo/final"
PROMPT = "Fyodor Dostoevsky wrote Crime and Punishment.\nQuestion: Who wrote Crime and Punishment?\nAnswer:"
# Blue over grey to orange, of the 256 colours: alike in brightness, and apart for every kind of colour vision
RAMP = (33, 69, 68, 104, 103, 139, 138, 174, 173, 209, 208)


class DepthPrinter(BaseStreamer):
    """
    Prints tokens as they come, in the colour of the depth that each came from, `depth` unless decoding says otherwise;
    without `colors`, `[depth]` stands where it changes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, depth: int, colors: dict[int, int] | None):
        self.tokenizer, self.depth, self.colors = tokenizer, depth, colors
        self.depths: list[int] = []  # of all tokens
        self.marked: int | None = None
        self.shown: list[int] | None = None  # tokens of the newest printed piece; None before the prompt
        self.waiting: list[int] = []

    def put_exits(self, exit_layers: list[int], confidences: list[float] | None) -> None:
        """The depth of the token that `put` is called with next; not called where all tokens have the same."""
        (self.depth,) = exit_layers

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then token after token."""
        if self.shown is None:
            self.shown = []
            return
        self.waiting += value.tolist()
        self.depths.append(self.depth)
        self._print()

    def end(self) -> None:
        self._print(final=True)
        print()

    def _print(self, final: bool = False) -> None:
        # Decoded together with the last piece: some tokenizers drop the space that a text begins with
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before, whole = self.tokenizer.batch_decode([self.shown, self.shown + self.waiting], **plain)
        text = whole[len(before) :]
        if text and (final or not text.endswith("\ufffd")):  # else more bytes of the character are to come
            mark = f"[{self.depth}]" if self.colors is None and self.depth != self.marked else ""
            print(mark + paint(text, self.depth, self.colors), end="", flush=True)
            self.shown, self.waiting, self.marked = self.waiting, [], self.depth


def paint(text: str, depth: int, colors: dict[int, int] | None) -> str:
    return text if colors is None else f"\033[38;5;{colors.get(depth, RAMP[0])}m{text}\033[0m"


def number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def choose_modes(config: SortedLlamaConfig, args: argparse.Namespace) -> list[dict]:
    """What `generate` is called with, mode by mode; `ValueError` where it would refuse, found without weights."""
    exits, full = config.exit_layers or [], config.num_hidden_layers
    depths = read_exit_layers(args.exit_layers or exits)
    if isinstance(depths, str):
        depths = check_exit_layers(depths, full)
    depths = list(dict.fromkeys(check_exit_layer(k, full, "exit_layers") for k in depths))
    modes: list[dict] = [{}, *({"exit_layer": k} for k in depths if k != full)]
    if len(exits) > 1 or args.exit_threshold:
        thresholds = args.exit_threshold or [0.9]
        modes.append({"exit_threshold": thresholds if len(thresholds) > 1 else thresholds[0]})
    for draft in args.assistant_early_exit or [*exits[:-1][:1], "auto"]:
        fixed = {"num_assistant_tokens": args.num_assistant_tokens} if draft != "auto" else {}
        modes.append({"assistant_early_exit": draft, **fixed})

    with torch.device("meta"):
        model = SortedLlamaForCausalLM(config)
    for mode in modes:
        asked = GenerationConfig(**mode, max_new_tokens=args.max_new_tokens, do_sample=args.do_sample)
        choose_decoding(model, asked, read_decoding_fields(model, asked, {}))
    return modes


def choose_colors(config: SortedLlamaConfig, modes: list[dict], no_color: bool):
    """The depths that tokens may come from, shallow to deep, and a colour for each where colours are shown."""
    named = [mode.get(name) for mode in modes for name in ("exit_layer", "assistant_early_exit")]
    depths = sorted({*(config.exit_layers or []), config.num_hidden_layers, *(k for k in named if isinstance(k, int))})
    if no_color or os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return depths, None
    scale = (len(RAMP) - 1) / max(len(depths) - 1, 1)
    return depths, {k: RAMP[round(i * scale)] for i, k in enumerate(depths)}


def read_prompts(texts: list[str]) -> list[str]:
    prompts = [sys.stdin.read().rstrip("\n") if text == "-" else text for text in texts]
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("The prompt is empty.")
    return prompts


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> BatchEncoding:
    if chat:
        message = {"role": "user", "content": prompt}
        prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)


def print_answer(model: SortedLlamaForCausalLM, printer: DepthPrinter, **call: Any) -> None:
    """An answer as it comes, and a line of counts: the token that ends it counts, and the time to read the prompt."""
    start = time.perf_counter()
    outputs = model.generate(**call, streamer=printer)
    seconds, num_tokens = time.perf_counter() - start, len(printer.depths)
    line = f"{num_tokens} tokens, {seconds:.2f} s, {num_tokens / seconds:.1f} tokens/s"
    line += f", mean depth {sum(printer.depths) / num_tokens:.1f}"
    if "draft_statistics" in outputs:
        drafting = outputs.draft_statistics
        line += f"; drafted {drafting.drafted}, accepted {drafting.accepted} ({drafting.acceptance_rate:.0%})"
        line += f", {drafting.cycles} cycles, {drafting.new_tokens / drafting.cycles:.1f} tokens a cycle"
    print("   ", line)


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO, help="model id or path")
    parser.add_argument("--prompt", nargs="+", default=[PROMPT], help="one or several; - reads one from stdin")
    parser.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--exit_layers", nargs="+", help="numbers of layers, or every:N; default: the checkpoint's")
    parser.add_argument("--exit_threshold", type=float, nargs="+", help="one, or one an exit below full depth (0.9)")
    parser.add_argument("--assistant_early_exit", type=number_or_auto, nargs="+", help="default: first exit, and auto")
    parser.add_argument("--num_assistant_tokens", type=number_or_auto, default=3, help="of a named exit; or auto")
    parser.add_argument("--do_sample", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="auto", help="auto is the accelerator, if there is one")
    parser.add_argument("--no_color", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = read_flags()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.model == DEMO and not Path(DEMO).is_dir():
        raise SystemExit(f"{DEMO} does not exist: run `make demo` first, or pass --model.")
    accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = str(accelerator) if args.device == "auto" else args.device
    try:
        prompts, config = read_prompts(args.prompt), load_config(args.model)
        config.exit_layer = None  # a depth that the checkpoint asks for would count in every mode
        check_device(device)
        modes = choose_modes(config, args)
        tokenizer, model = load_tokenizer(args.model), load_model(args.model, args.dtype, device)
        model.config.exit_layer = None
        make_plain(model.generation_config)
        inputs = [encode(tokenizer, prompt, args.chat).to(device) for prompt in prompts]
        options = {"do_sample": args.do_sample, "return_dict_in_generate": True}
        for tokens, mode in itertools.product(inputs, modes):  # to warm up; what is not possible says so here
            model.generate(**tokens, **options, **mode, max_new_tokens=2)
    except ValueError as error:
        raise SystemExit(one_line(error)) from error

    depths, colors = choose_colors(config, modes, args.no_color)
    print(f"{args.model}: {config.num_hidden_layers} layers, exits {config.exit_layers or []}; {device}, {args.dtype}")
    legend = (f"[{k}]" if colors is None else paint(f"{k}", k, colors) for k in depths)
    print("Layers that a token came from; in drafting, that proposed it:", *legend)
    for prompt, tokens in zip(prompts, inputs, strict=True):
        print(f"\n{prompt}")
        for mode in modes:
            print(f"\n{', '.join(f'{name}={value!r}' for name, value in mode.items()) or 'full depth'}")
            set_seed(args.seed)
            printer = DepthPrinter(tokenizer, mode.get("exit_layer", config.num_hidden_layers), colors)
            print_answer(model, printer, **tokens, **options, **mode, max_new_tokens=args.max_new_tokens)


if __name__ == "__main__":
    main()
