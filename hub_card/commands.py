"""
```shell
sorted-llama evaluate PATH --data qa=questions.jsonl gsm8k=test.jsonl --tasks arc_easy   # every exit, one JSON
sorted-llama certify PATH --data completions=FILE --risk 0.05  # a depth as good as full depth, with a guarantee
sorted-llama card PATH                                                                  # README.md and plot
sorted-llama push PATH user/name                                                        # to the Hub
sorted-llama extract PATH --exit 10 FOLDER                                              # a plain Llama
sorted-llama convert Qwen/Qwen2.5-0.5B FOLDER                                           # another family as a Llama
sorted-llama judge PATH --data completions=FILE --exits 10 30 --judge MODEL --base_url URL   # exit against exit
```
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from sorted_llama.trainer.escaping import one_line
from sorted_llama.trainer.sorted_sft_config import read_exit_layers

from . import card, certificate, certify, evaluation, extract, judging, push
from .judge import JudgeError
from .tasks import KINDS


_DATA = f"KIND=FILE with a kind of {', '.join(KINDS)}"


def main(arguments: list[str] | None = None) -> None:
    run, options = parse(arguments)
    logging.set_verbosity_error()
    try:
        run(**options)
    except (ValueError, OSError, JudgeError) as error:  # of what was asked for, and of files, the Hub and the line
        sys.exit(one_line(error))
    except ModuleNotFoundError as error:
        sys.exit(f'{error}: the commands need pip install "sorted-llama[eval]".')


def parse(arguments: list[str] | None = None) -> tuple[Callable[..., None], dict[str, Any]]:
    """What to run, and its arguments."""
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "sorted-llama",
        description=__doc__.replace("```shell\n", "").replace("```\n", ""),
        formatter_class=as_it_stands,
    )
    commands = parser.add_subparsers(required=True)
    for name, (add_arguments, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        command.set_defaults(run=add_arguments(command))
    options = vars(parser.parse_args(arguments))
    return options.pop("run"), options


def evaluate_command(parser: argparse.ArgumentParser) -> Callable[..., None]:
    parser.add_argument("path", help="model id or path")
    parser.add_argument("--data", nargs="+", default=[], metavar="KIND=FILE", help=f"kinds: {', '.join(KINDS)}")
    parser.add_argument("--tasks", nargs="+", default=[], help="of lm-evaluation-harness: names or YAML files")
    parser.add_argument("--exit_layers", nargs="+", help="numbers, or every:N; default: the checkpoint's")
    parser.add_argument("--exit_thresholds", type=float, nargs="*", default=[0.5, 0.8, 0.9, 0.97])
    parser.add_argument("--drafts", type=int, nargs="*", help="exits to let draft; default: all below full depth")
    parser.add_argument("--num_timed", type=int, default=4, help="prompts to time")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="length of their timed answers, at most")
    parser.add_argument("--runs", type=int, default=5, help="times to repeat it")
    parser.add_argument("--batch_size", type=int, default=32, help="where no time is taken")
    _add_arguments_of_answers(parser)
    parser.add_argument("--output", help="default: evaluation.json in the folder of the checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace results of other settings")

    def run(path: str, data: list[str], tasks: list[str], exit_layers: list[str] | None, **options: Any) -> None:
        exits = None if exit_layers is None else read_exit_layers(exit_layers)
        sources = [_split("--data", _DATA, argument) for argument in data]
        record = evaluation.evaluate(path, sources, tasks, exits, **options)
        print(card.exits_block(record, record["request"]["exit_layers"], pictured=False))

    return run


def certify_command(parser: argparse.ArgumentParser) -> Callable[..., None]:
    parser.add_argument("path", help="model id or path")
    parser.add_argument("--data", required=True, metavar="KIND=FILE", help="prompts, a sample of those to come")
    parser.add_argument("--risk", type=float, default=0.05, help="share of answers that may fail, default 0.05")
    parser.add_argument("--delta", type=float, default=0.05, help="probability of being wrong, default 0.05")
    losses = f"{certificate.DIFFERS}, or a score of the kind (exact_match, f1, final_answer)"
    parser.add_argument("--loss", default=certificate.DIFFERS, help=f"what fails: {losses} below full depth's")
    parser.add_argument("--thresholds", nargs="+", metavar="T[,T...]", help="to try: for all exits, or one an exit")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn to choose, and what to test")
    parser.add_argument("--num_timed", type=int, default=8, help="prompts to time")
    _add_arguments_of_answers(parser, dtype=None)
    parser.add_argument("--output", help="default: evaluation.json in the folder of the checkpoint")
    parser.add_argument("--apply", action="store_true", help="write the setting into generation_config.json")

    def run(path: str, data: str, thresholds: list[str] | None, **options: Any) -> None:
        tried = None if thresholds is None else [_numbers("--thresholds", argument) for argument in thresholds]
        found = certify.certify(path, _split("--data", _DATA, data), thresholds=tried, **options)
        print(certificate.certificate_line(found))

    return run


def card_command(parser: argparse.ArgumentParser) -> Callable[..., None]:
    parser.add_argument("path", help="folder of the checkpoint")
    parser.add_argument("--evaluation", help="default: the folder's evaluation.json")
    parser.add_argument("--name", help="id on the Hub, for the calls to paste")
    parser.add_argument("--base_model")
    parser.add_argument("--license")
    parser.add_argument("--peers", nargs="+", default=[], metavar="NAME=PATH", help="evaluations of other models")

    def run(path: str, peers: list[str], **options: Any) -> None:
        card.write_card(path, **options, peers=[_split("--peers", "NAME=PATH", argument) for argument in peers])
        print(f"The page is {one_line(Path(path) / 'README.md')}.")

    return run


def push_command(parser: argparse.ArgumentParser) -> Callable[..., None]:
    parser.add_argument("path", help="folder of the checkpoint")
    parser.add_argument("name", help="id on the Hub: user/name")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--revision", help="branch")
    parser.add_argument("--create_pr", action="store_true", help="as a pull request")
    parser.add_argument("--include", action="append", default=[], metavar="PATTERN", help="other files; repeatable")

    def run(path: str, include: list[str], **options: Any) -> None:
        address = push.push(path, include=include, **options)
        left = push.files_left(path, push.files_to_push(path, include))
        if left:
            print(f"Not pushed, for want of --include: {one_line(', '.join(left))}.")
        print(address)

    return run


def judge_command(parser: argparse.ArgumentParser) -> Callable[..., None]:
    parser.add_argument("path", help="model id or path")
    parser.add_argument("--against", help="id or path of another model; default: the same")
    parser.add_argument("--exits", type=int, nargs=2, required=True, help="of the model, and of what it is against")
    parser.add_argument("--data", required=True, metavar="KIND=FILE", help="what to answer")
    parser.add_argument("--judge", required=True, help="name of the judge at the endpoint")
    parser.add_argument("--base_url", help="OpenAI-compatible; default: OPENAI_BASE_URL (its key: OPENAI_API_KEY)")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    _add_arguments_of_answers(parser)
    parser.add_argument("--output", default="judging.json", help="result; answers and replies are kept beside it")

    def run(data: str, **options: Any) -> None:
        result = judging.judge_exits(data=_split("--data", _DATA, data), **options)
        print(f"{result.wins} wins, {result.ties} ties, {result.losses} losses, {result.malformed} malformed")
        if result.interval is not None:
            low, high = result.interval
            print(f"score {result.score:+.3f}, {result.confidence:.0%} interval {low:+.3f} to {high:+.3f}")

    return run


def extract_command(parser: argparse.ArgumentParser) -> Callable[..., None]:
    parser.add_argument("path", help="model id or path")
    parser.add_argument("output", help="folder to make")
    parser.add_argument("--exit", dest="exit_layer", type=int, required=True, help="number of layers")
    return _extracting(parser, "--as", lambda exit_layer: f"Exit {exit_layer}")


def convert_command(parser: argparse.ArgumentParser) -> Callable[..., None]:
    parser.add_argument(
        "path", metavar="source", help="model id or path, of a family that is a Llama, or of an adapter of one"
    )
    parser.add_argument("output", help="folder to make")
    parser.set_defaults(exit_layer=None)
    return _extracting(parser, "--to", lambda exit_layer: "All layers")


def _extracting(parser: argparse.ArgumentParser, option: str, which: Callable[[int], str]) -> Callable[..., None]:
    """What both have in common: the result is pushed too, where an id is given."""
    types = extract.MODEL_TYPES
    parser.add_argument(option, dest="model_type", choices=types, default="llama", help="what to write; default llama")
    parser.add_argument("--revision", help="of the model on the Hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="for a tokenizer that has code of its own")
    length = "length of text to allow, for a model with a sliding window"
    parser.add_argument("--max_position_embeddings", type=int, metavar="N", help=length)
    parser.add_argument("--push", dest="name", metavar="NAME", help="id on the Hub to push it to: user/name")
    parser.add_argument("--private", action="store_true")

    def run(path: str, exit_layer: int, output: str, name: str | None, private: bool, **options: Any) -> None:
        extract.extract(path, exit_layer, output, name=name, **options)
        print(f"{which(exit_layer)}, as a model of type {options['model_type']}: {one_line(output)}")
        if name is not None:
            print(push.upload(output, name, f"{which(exit_layer)} of {one_line(path)}", private))

    return run


COMMANDS = {
    "evaluate": (evaluate_command, "evaluate every exit; a stopped run goes on"),
    "certify": (certify_command, "find the cheapest depth that is as good as full depth, with a guarantee"),
    "card": (card_command, "write the page of a checkpoint"),
    "push": (push_command, "push a checkpoint with its page to the Hub, as one commit"),
    "judge": (judge_command, "let a chat model compare the answers of two exits, or of two models"),
    "extract": (extract_command, "write the sub-model of an exit as a plain Llama, for any engine"),
    "convert": (convert_command, "write a model of another family (Mistral, Qwen2, ...) as a plain Llama, or back"),
}


def _add_arguments_of_answers(parser: argparse.ArgumentParser, dtype: str | None = "bfloat16") -> None:
    parser.add_argument("--limit", type=int, help="rows of each task")
    own = "default: the checkpoint's own" if dtype is None else f"default: {dtype}"
    parser.add_argument("--dtype", default=dtype, choices=["bfloat16", "float16", "float32"], help=own)
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--chat", action="store_true", help="ask questions through the chat template")


def _split(option: str, form: str, argument: str) -> tuple[str, str]:
    name, _, path = argument.partition("=")
    if not path:
        raise ValueError(f"`{option}` takes {form}, got {argument!r}.")
    return name, path


def _numbers(option: str, argument: str) -> float | list[float]:
    """One number, or several with commas between them."""
    try:
        numbers = [float(number) for number in argument.split(",")]
    except ValueError:
        raise ValueError(f"`{option}` takes numbers, or lists such as 2,0.9,2, got {argument!r}.") from None
    return numbers if len(numbers) > 1 else numbers[0]
