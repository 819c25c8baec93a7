"""
```shell
sorted-llama evaluate PATH --data qa=questions.jsonl gsm8k=test.jsonl --tasks arc_easy   # every exit, one JSON
sorted-llama card PATH                                                                  # README.md and plot
sorted-llama push PATH user/name                                                        # to the Hub
sorted-llama extract PATH --exit 10 FOLDER                                              # a plain Llama
sorted-llama judge PATH --data completions=FILE --exits 10 30 --judge MODEL --base_url URL   # exit against exit
```
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging

from sorted_llama.trainer.escaping import one_line
from sorted_llama.trainer.sorted_sft_config import read_exit_layers

from .tasks import KINDS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="sorted-llama", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("evaluate", help="evaluate every exit; a stopped run goes on")
    one.add_argument("path", help="model id or path")
    one.add_argument("--data", nargs="+", default=[], metavar="KIND=FILE", help=f"kinds: {', '.join(KINDS)}")
    one.add_argument("--tasks", nargs="+", default=[], help="of lm-evaluation-harness: names or YAML files")
    one.add_argument("--exit_layers", nargs="+", help="numbers, or every:N; default: the checkpoint's")
    one.add_argument("--exit_thresholds", type=float, nargs="*", default=[0.5, 0.8, 0.9, 0.97])
    one.add_argument("--drafts", type=int, nargs="*", help="exits to let draft; default: all below full depth")
    one.add_argument("--limit", type=int, help="rows a task")
    one.add_argument("--num_timed", type=int, default=4, help="prompts to time")
    one.add_argument("--max_new_tokens", type=int, default=64, help="length of their timed answers, at most")
    one.add_argument("--runs", type=int, default=5, help="times to repeat it")
    one.add_argument("--batch_size", type=int, default=32, help="where no time is taken")
    one.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    one.add_argument("--device", help="default: a GPU where there is one")
    one.add_argument("--chat", action="store_true", help="ask questions through the chat template")
    one.add_argument("--output", help="default: evaluation.json in the folder of the checkpoint")
    one.add_argument("--overwrite", action="store_true", help="replace results of other settings")

    two = commands.add_parser("card", help="write the page of a checkpoint")
    two.add_argument("path", help="folder of the checkpoint")
    two.add_argument("--evaluation", help="default: the folder's evaluation.json")
    two.add_argument("--name", help="id on the Hub, for the calls to paste")
    two.add_argument("--base_model")
    two.add_argument("--license")
    two.add_argument("--peers", nargs="+", default=[], metavar="NAME=PATH", help="evaluations of other models to show")

    three = commands.add_parser("push", help="push a checkpoint with its page to the Hub, as one commit")
    three.add_argument("path", help="folder of the checkpoint")
    three.add_argument("name", help="id on the Hub: user/name")
    three.add_argument("--private", action="store_true")
    three.add_argument("--revision", help="branch")
    three.add_argument("--create_pr", action="store_true", help="as a pull request")
    three.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="other files; may be repeated",
    )

    four = commands.add_parser("judge", help="let a chat model compare the answers of two exits, or of two models")
    four.add_argument("path", help="model id or path")
    four.add_argument("--against", help="id or path of another model; default: the same")
    four.add_argument("--exits", type=int, nargs=2, required=True, help="of the model, and of what it is against")
    four.add_argument("--data", required=True, metavar="KIND=FILE", help="what to answer")
    four.add_argument("--judge", required=True, help="name of the judge at the endpoint")
    four.add_argument(
        "--base_url", help="OpenAI-compatible endpoint; default: OPENAI_BASE_URL (its key: OPENAI_API_KEY)"
    )
    four.add_argument("--limit", type=int, help="rows")
    four.add_argument("--max_new_tokens", type=int, default=256)
    four.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    four.add_argument("--device", help="default: a GPU where there is one")
    four.add_argument("--chat", action="store_true", help="ask questions through the chat template")
    four.add_argument("--output", default="judging.json", help="result; answers and replies are kept beside it")

    five = commands.add_parser("extract", help="write the sub-model of an exit as a plain Llama, for any engine")
    five.add_argument("path", help="model id or path")
    five.add_argument("output", help="folder to make")
    five.add_argument("--exit", type=int, required=True, help="number of layers")
    five.add_argument("--revision", help="of the model on the Hub")
    five.add_argument("--push", metavar="NAME", help="id on the Hub to push it to: user/name")
    five.add_argument("--private", action="store_true")

    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    logging.set_verbosity_error()
    try:
        RUN[command](**options)
    except (ValueError, OSError) as error:  # of what was asked for, and of files, the Hub and the line
        sys.exit(one_line(error))
    except ModuleNotFoundError as error:
        sys.exit(f'{error}: the commands need pip install -e ".[eval]".')


def _evaluate(path: str, data: list[str], tasks: list[str], exit_layers: list[str] | None, **options) -> None:
    from .card import exits_block
    from .evaluation import evaluate

    exits = None if exit_layers is None else read_exit_layers(exit_layers)
    record = evaluate(path, [_kind_and_source(argument) for argument in data], tasks, exit_layers=exits, **options)
    print(exits_block(record, record["request"]["exit_layers"], pictured=False))


def _card(path: str, peers: list[str], **options) -> None:
    from .card import write_card

    write_card(path, **options, peers=[_split("--peers", "NAME=PATH", argument) for argument in peers])
    print(f"The page is {one_line(Path(path) / 'README.md')}.")


def _push(path: str, include: list[str], **options) -> None:
    from .push import files_left, files_to_push, push

    address = push(path, include=include, **options)
    left = files_left(path, files_to_push(path, include))
    if left:
        print(f"Not pushed, for want of --include: {one_line(', '.join(left))}.")
    print(address)


def _judge(data: str, **options) -> None:
    from .judge import JudgeError
    from .judging import judge_exits

    try:
        result = judge_exits(data=_kind_and_source(data), **options)
    except JudgeError as error:
        sys.exit(one_line(error))
    print(f"{result.wins} wins, {result.ties} ties, {result.losses} losses, {result.malformed} malformed")
    if result.interval is not None:
        low, high = result.interval
        print(f"score {result.score:+.3f}, {result.confidence:.0%} interval {low:+.3f} to {high:+.3f}")


def _extract(path: str, output: str, exit: int, revision: str | None, push: str | None, private: bool) -> None:
    from .extract import extract
    from .push import upload

    extract(path, exit, output, revision=revision, name=push)
    print(f"The plain Llama of {exit} layers is in {one_line(output)}.")
    if push is not None:
        print(upload(output, push, f"The first {exit} layers of {one_line(path)}", private))


RUN: dict[str, Callable] = {"evaluate": _evaluate, "card": _card, "push": _push, "judge": _judge, "extract": _extract}


def _kind_and_source(argument: str) -> tuple[str, str]:
    return _split("--data", f"KIND=FILE with a kind of {', '.join(KINDS)}", argument)


def _split(option: str, form: str, argument: str) -> tuple[str, str]:
    name, _, path = argument.partition("=")
    if not path:
        raise ValueError(f"`{option}` takes {form}, got {argument!r}.")
    return name, path
