"""
A page on which to watch a sorted Llama decode: each token in the colour of the depth that made it, beside full depth.

`python examples/space/app.py --model out/demo/final`; in a Space of the Hub, the variable `MODEL_ID` names the model.
"""

import argparse
import html
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer, StoppingCriteriaList


try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise SystemExit("The page needs gradio: pip install -r examples/space/requirements.txt") from error


MODES = {"Fixed depth": "depth", "Confidence": "confidence", "Self-drafting": "drafting"}
EXAMPLES = [
    "The capital of Mongolia is Ulaanbaatar.\nQuestion: What is the capital of Mongolia?\nAnswer:",
    "Fyodor Dostoevsky wrote Crime and Punishment.\nQuestion: Who wrote Crime and Punishment?\nAnswer:",
    "Question: What is the chemical symbol of gold?\nAnswer:",
]
# From shallow to deep, ever darker: told apart by every kind of colour vision, and easy to read black on
RAMP = ((255, 236, 143), (120, 200, 190), (120, 140, 235))
FRAME = 0.05  # seconds between two drawings, which take time from the model
LOOK = {"css_paths": Path(__file__).parent / "style.css", "theme": gr.themes.Default(font=["system-ui", "sans-serif"])}
NOTE = """\
Greedy decoding; full depth starts when the chosen mode has ended, so that neither slows the other. Tokens/s count from
the first token to the last: without the prompt, with the token that ends the answer. Hover over a token, tap it or go
to it by Tab: it tells its depth. In drafting that is the depth that proposed it: all were verified by full depth."""
WORKER = ThreadPoolExecutor(1, "generate")  # there is one model
RUNS: dict[str | None, tuple[Event, Event]] = {}  # by session: one asks the run to stop, one says that it is over


class Token(NamedTuple):
    """A new token, the number of layers that it came from, how sure they were, and when it came."""

    id: int
    depth: int
    confidence: float | None
    time: float


class TokenStream(BaseStreamer):
    """Hands tokens from the thread that generates to the one that shows them; `depth` is that of all, unless told."""

    def __init__(self, depth: int):
        self.queue: SimpleQueue[Token | None] = SimpleQueue()
        self.depth, self.confidence, self.has_prompt = depth, None, False

    def put_exits(self, exit_layers: list[int], confidences: list[float] | None) -> None:
        (self.depth,), self.confidence = exit_layers, confidences and confidences[0]

    def put(self, value: torch.Tensor) -> None:
        if self.has_prompt:
            self.queue.put(Token(int(value), self.depth, self.confidence, time.perf_counter()))
        self.has_prompt = True

    def end(self) -> None:
        pass


@dataclass
class Answer:
    """An answer as far as it has come; `pieces` are its characters, each with the token that completes it."""

    tokenizer: PreTrainedTokenizerBase
    tokens: list[Token] = field(default_factory=list)
    pieces: list[tuple[str, Token]] = field(default_factory=list)
    drafting: Any = None
    state: str = "running"  # "done", "stopped"
    _shown: list[int] = field(default_factory=list)
    _waiting: list[int] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Tokens a second behind the first; 0 where there are none."""
        return (len(self.tokens) - 1) / (self.tokens[-1].time - self.tokens[0].time) if len(self.tokens) > 1 else 0.0

    def add(self, token: Token) -> None:
        self.tokens.append(token)
        self._waiting.append(token.id)
        self._show()

    def finish(self, drafting: Any, state: str) -> None:
        self.drafting, self.state = drafting, state
        self._show()

    def _show(self) -> None:
        # Decoded together with the last piece: some tokenizers drop the space that a text begins with
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before, whole = self.tokenizer.batch_decode([self._shown, self._shown + self._waiting], **plain)
        text = whole[len(before) :]
        if text and (self.state != "running" or not text.endswith("\ufffd")):  # else more bytes of it are to come
            self.pieces.append((text, self.tokens[-1]))
            self._shown, self._waiting = self._waiting, []


def load(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, warmed up, and its tokenizer."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        if len(getattr(config, "exit_layers", None) or ()) < 2:
            raise ValueError("it has no `exit_layers` in its config, as models trained as a sorted Llama have.")
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(path, config=config, trust_remote_code=True, dtype="auto")
    except Exception as error:  # whatever the code of a checkpoint raises
        told = " ".join(str(error).split()) or type(error).__name__
        advice = "run `make demo`, pass --model or set MODEL_ID"
        raise SystemExit(f"{path} does not load ({advice}): {told}") from error
    model.config.exit_layer = None  # a depth that the checkpoint asks for would count in every mode
    for name in ("exit_layer", "exit_threshold", "assistant_early_exit"):
        setattr(model.generation_config, name, None)
    model = model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu").eval()
    list(decode(model, tokenizer, "Hello", {"exit_threshold": 0.9, "max_new_tokens": 4}))
    return model, tokenizer


def choose_options(mode: str, depth: int, threshold: float, drafts: int, num_layers: int) -> dict[str, Any]:
    """What `generate` is called with in a mode."""
    if mode is None or (depth is None and mode != "confidence"):  # a page always sends them, a program may not
        raise ValueError("Choose a mode, and a depth.")
    if mode == "drafting" and depth >= num_layers:
        raise ValueError(f"Drafting needs a depth below the {num_layers} layers that verify.")
    options = {"depth": {"exit_layer": depth}, "confidence": {"exit_threshold": threshold}}
    options["drafting"] = {"assistant_early_exit": depth, "num_assistant_tokens": drafts or "auto"}
    return options[mode]


def decode(
    model, tokenizer, prompt: str, options: dict[str, Any], chat: bool = False, stop: Event | None = None
) -> Iterator[Answer]:
    """
    Decode one prompt; yields the same growing [`Answer`] with each token, and once more when it is over. The model
    stops within a token or two of `stop`, and of the caller's leaving.
    """
    if not prompt.strip():
        raise ValueError("The prompt is empty: type one, or choose an example.")
    if chat:
        message = {"role": "user", "content": prompt}
        prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    size, room = inputs["input_ids"].shape[1], model.config.max_position_embeddings - options["max_new_tokens"]
    if size > room:
        raise ValueError(f"The prompt has {size} tokens, and there is room for {room}: shorten it or the answer.")

    stop, answer = stop or Event(), Answer(tokenizer)
    stream = TokenStream(options.get("exit_layer", model.config.num_hidden_layers))
    stopping = StoppingCriteriaList([lambda ids, _: torch.full(ids.shape[:1], stop.is_set(), device=ids.device)])
    options = {**options, "do_sample": False, "return_dict_in_generate": True, "stopping_criteria": stopping}
    outputs = WORKER.submit(model.generate, **inputs, **options, streamer=stream)
    outputs.add_done_callback(lambda _: stream.queue.put(None))
    try:
        for token in iter(stream.queue.get, None):
            answer.add(token)
            yield answer
        drafting = getattr(outputs.result(), "draft_statistics", None)
        answer.finish(drafting, "stopped" if stop.is_set() else "done")
        yield answer
    finally:
        if not outputs.done():  # the caller has left
            stop.set()


def color(depth: int, exits: list[int]) -> str:
    """Background of a depth: a point of the ramp from the first exit to the last."""
    at = (len(RAMP) - 1) * (depth - exits[0]) / (exits[-1] - exits[0])
    i = min(int(at), len(RAMP) - 2)
    return "#" + "".join(f"{round(a + (b - a) * (at - i)):02x}" for a, b in zip(RAMP[i], RAMP[i + 1]))


def describe(answer: Answer, full: Answer) -> str:
    """Speed and depth of an answer, and how it compares with full depth's once both are there."""
    if not answer.tokens:
        return ""
    depths, ids = [token.depth for token in answer.tokens], [token.id for token in answer.tokens]
    speed = f"<strong>{answer.speed:.1f} tokens/s</strong>" if answer.speed else "too short for a speed"
    text = f"{len(ids)} tokens, mean depth {sum(depths) / len(depths):.1f}"
    if counts := answer.drafting:
        text += f", {counts.accepted} of {counts.drafted} drafts accepted ({counts.acceptance_rate:.0%})"
    if answer.state == "stopped":
        text += ", stopped"
    if full is not answer and full.state == "done":
        if answer.speed and full.speed:
            speed += f" ({answer.speed / full.speed:.2f}x)"
        full_ids = [token.id for token in full.tokens]
        same = len(os.path.commonprefix([ids, full_ids]))
        text += ", full depth's text" if ids == full_ids else f", parts from full depth at token {same + 1}"
    return f"{speed}<br>{text}"


def render(answer: Answer, full: Answer, prompt: str, exits: list[int]) -> str:
    """An answer behind its prompt: a bar of the depths used, its figures, and each piece in its depth's colour."""
    bar, text = "", f"<i>{html.escape(prompt)}</i>"
    for depth, count in sorted(Counter(token.depth for token in answer.tokens).items()):
        style = f"background:{color(depth, exits)};flex:{count}"
        bar += f'<b style="{style}" title="{count} of the tokens" tabindex="0">{depth}</b>'
    for piece, token in answer.pieces:
        sure = "" if token.confidence is None else f", {token.confidence:.0%} sure"
        style = f"background:{color(token.depth, exits)}"
        text += f'<mark style="{style}" title="{token.depth} layers{sure}" tabindex="0">{html.escape(piece)}</mark>'
    figures = describe(answer, full)
    return f'<div class="bar">{bar}</div><div class="figures">{figures}</div><div class="text">{text}</div>'


def page_functions(model, tokenizer, exits: list[int]) -> tuple[Callable, Callable]:
    """What the page calls: `generate` decodes a prompt and draws both answers, `show_controls` follows the mode."""

    def generate(
        prompt, chat, mode, depth, threshold, drafts, max_new_tokens, request: gr.Request
    ) -> Iterator[list[str]]:
        answers, shown = [Answer(tokenizer), Answer(tokenizer)], 0.0
        stop, over = RUNS[request.session_hash] = Event(), Event()
        try:
            chosen = choose_options(mode, depth, threshold, drafts, exits[-1])
            for i, options in enumerate((chosen, {})):
                options["max_new_tokens"] = max_new_tokens
                for answers[i] in decode(model, tokenizer, prompt, options, chat, stop):
                    if answers[i].state != "running" or time.perf_counter() - shown > FRAME:
                        yield [render(answer, answers[1], "" if chat else prompt, exits) for answer in answers]
                        shown = time.perf_counter()
                if stop.is_set():
                    break
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            over.set()
            RUNS.pop(request.session_hash, None)

    def show_controls(mode: str, depth: int) -> list[dict[str, Any]]:
        choices = exits[:-1] if mode == "drafting" else exits
        depth = depth if depth in choices else choices[0]
        return [
            gr.update(visible=mode != "confidence", choices=choices, value=depth),
            gr.update(visible=mode == "confidence"),
            gr.update(visible=mode == "drafting"),
        ]

    return generate, show_controls


def stop(stops: int, request: gr.Request) -> int:
    """Ask the session's run to stop, and wait until it has shown its last tokens."""
    if request.session_hash in RUNS:
        asked, over = RUNS[request.session_hash]
        asked.set()
        over.wait(5)
    return stops + 1


def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> gr.Blocks:
    """The page of a model; generating is queued, one run at a time."""
    exits = sorted({*model.config.exit_layers, model.config.num_hidden_layers})
    generate, show_controls = page_functions(model, tokenizer, exits)
    with gr.Blocks(title="Sorted LLaMA", analytics_enabled=False) as page:
        gr.Markdown(
            f"# Sorted LLaMA\nOne checkpoint of {exits[-1]} layers that is a model at each of its exits: "
            f"{', '.join(map(str, exits))}. Choose how deep tokens go, and compare with full depth."
        )
        prompt = gr.Textbox(EXAMPLES[0], label="Prompt", lines=4, max_lines=12)
        gr.Examples(EXAMPLES, prompt)
        with gr.Row():
            mode = gr.Radio(list(MODES.items()), value="depth", label="Mode", scale=3, min_width=340)
            chat = gr.Checkbox(False, label="Chat template", visible=bool(tokenizer.chat_template), min_width=120)
        with gr.Row():
            whole = {"step": 1, "precision": 0}
            depth = gr.Radio(exits, value=exits[0], label="Depth", info="Layers that answer, or that draft")
            info = "A token leaves at the first exit that is this sure of it"
            threshold = gr.Slider(0, 1, 0.9, step=0.01, label="Confidence", info=info, visible=False)
            info = "Tokens drafted before one pass verifies; 0 finds out what pays"
            drafts = gr.Slider(0, 8, 2, **whole, label="Drafts a cycle", info=info, visible=False)
            max_new_tokens = gr.Slider(1, 256, 64, **whole, label="Max tokens", info="Of each answer")
        with gr.Row():
            start, stop_button = gr.Button("Generate", variant="primary"), gr.Button("Stop", variant="stop")
        chips = "".join(f'<b style="background:{color(k, exits)}">{k}</b>' for k in exits)
        gr.HTML(f'<div class="legend">Layers that made a token {chips}</div>')
        with gr.Row():
            panels, empty = [], Answer(tokenizer)
            for title in ("Chosen mode", "Full depth"):
                with gr.Column(min_width=300):
                    gr.HTML(f"<h3>{title}</h3>")
                    panels.append(gr.HTML(render(empty, empty, "", exits), label=title, elem_classes="answer"))
        gr.Markdown(NOTE)

        quick = {"queue": False, "api_visibility": "private"}
        mode.change(show_controls, [mode, depth], [depth, threshold, drafts], **quick)
        running = start.click(lambda: gr.update(value="Running …", interactive=False), None, start, **quick)
        inputs = [prompt, chat, mode, depth, threshold, drafts, max_new_tokens]
        run = running.then(generate, inputs, panels, concurrency_limit=1, show_progress="minimal")
        ready = {"fn": lambda: gr.update(value="Generate", interactive=True), "outputs": start, **quick}
        for ended in (run.then, run.failure):  # in gradio 6.31 `then` does not follow upon an error
            ended(**ready)
        # A run that still waits is taken out of the queue. That comes last, at a change of what `stop` returns: a run
        # that is cancelled while it runs does not draw its last tokens
        stops = gr.Number(0, visible="hidden", precision=0)
        stop_button.click(stop, stops, stops, queue=False)
        stops.change(**ready, cancels=[run])
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL_ID", "out/demo/final"), help="model id or path")
    page = build(*load(parser.parse_args().model))
    try:
        page.launch(**LOOK)
    except OSError as error:  # the port is taken
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
