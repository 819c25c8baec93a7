"""`examples/space`, served for real and used over its API, against `generate` of every mode."""

import html
import importlib.util
import itertools
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from huggingface_hub import SpaceCard

from tests.tiny import STRANGER, save_tiny, tiny_llama, tiny_sorted, tiny_tokenizer


FOLDER = Path(__file__).parents[2] / "examples" / "space"
PROMPT = "Tell <script>alert(1)</script> & ${1+1} {{value}} something"
NEW_TOKENS, LONG = 24, 150
MODES = {
    "depth": {"exit_layer": 2},
    "confidence": {"exit_threshold": 0.2},
    "drafting": {"assistant_early_exit": 2, "num_assistant_tokens": 3},
}


@pytest.fixture(scope="module")
def app():
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        spec = importlib.util.spec_from_file_location("space_app", FOLDER / "app.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "space_app", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def model():
    return tiny_sorted()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def url(app, model, tokenizer):
    page, server = app.build(model, tokenizer), {"server_name": "127.0.0.1", "server_port": free_port()}
    _, url, _ = page.launch(**server, **app.LOOK, prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


@pytest.fixture
def client(url):
    return Client(url, verbose=False)


def free_port() -> int:
    with socket.socket() as a_socket:
        a_socket.bind(("127.0.0.1", 0))
        return a_socket.getsockname()[1]


def arguments(mode="depth", prompt=PROMPT, chat=False, depth=2, threshold=0.2, drafts=3, max_new_tokens=NEW_TOKENS):
    return (prompt, chat, mode, depth, threshold, drafts, max_new_tokens)


def expect(model, tokenizer, options, prompt=PROMPT, max_new_tokens=NEW_TOKENS):
    """What `generate` gives: new tokens and their depths."""
    inputs = tokenizer(prompt, return_tensors="pt")
    outputs = model.generate(
        **inputs, **options, do_sample=False, max_new_tokens=max_new_tokens, return_dict_in_generate=True
    )
    tokens = outputs.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    used = getattr(outputs, "exit_layers_used", None)  # where all tokens have one depth, nobody says so
    return tokens, [options.get("exit_layer", 4)] * len(tokens) if used is None else used[0].tolist()


def pieces(tokenizer, tokens: list[int], depths: list[int]) -> list[tuple[str, int]]:
    """Pieces of text, each with the depth of the token that completes it: by decoding every prefix as a whole."""
    found, text = [], ""
    for n, depth in enumerate(depths, start=1):
        now = tokenizer.decode(tokens[:n], skip_special_tokens=True)
        if now != text and (not now.endswith("\ufffd") or n == len(depths)):
            found.append((now[len(text) :], depth))
            text = now
    return found


class Panel(HTMLParser):
    """A drawn answer, read as a browser reads it: its prompt, pieces with depths, bar, figures, and all elements."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.prompt, self.pieces, self.bar, self.figures = [], set(), "", [], {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag != "br":
            self.open.append((tag, dict(attributes)))
        if tag == "mark":
            self.pieces.append(["", int(dict(attributes)["title"].split()[0])])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, attributes = self.open[-1]
        if tag == "i":
            self.prompt += data
        elif tag == "mark":
            self.pieces[-1][0] += data
        elif tag == "b":
            self.bar[int(data)] = int(attributes["title"].split()[0])
        else:
            self.figures += data + " "


@contextmanager
def slow(model, seconds=0.05):
    """Each pass takes `seconds`; yields the passes so far."""
    passes = []

    def hook(*_):
        passes.append(time.perf_counter())
        time.sleep(seconds)

    handle = model.model.register_forward_pre_hook(hook)
    try:
        yield passes
    finally:
        handle.remove()


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_shown_beside_full_depth(client, model, tokenizer, mode):
    chosen, full = map(Panel, client.predict(*arguments(mode), api_name="/generate"))
    tokens, depths = expect(model, tokenizer, MODES[mode])
    full_tokens, full_depths = expect(model, tokenizer, {})
    assert len(set(depths)) == (1 if mode == "depth" else 2 if mode == "drafting" else 3)
    for panel, ids, used in ((chosen, tokens, depths), (full, full_tokens, full_depths)):
        assert [tuple(piece) for piece in panel.pieces] == pieces(tokenizer, ids, used)
        assert panel.bar == {k: used.count(k) for k in sorted(set(used))}
        assert f"{len(ids)} tokens, mean depth {sum(used) / len(used):.1f}" in panel.figures
        assert re.search(r"\d+\.\d tokens/s", panel.figures)
        assert panel.prompt == PROMPT and panel.tags <= {"div", "b", "i", "mark", "strong", "br"}
    if mode == "drafting":
        assert chosen.pieces != full.pieces and [p[0] for p in chosen.pieces] == [p[0] for p in full.pieces]
        accepted, drafted = map(int, re.search(r"(\d+) of (\d+) drafts accepted", chosen.figures).groups())
        assert accepted >= depths.count(2) > 0 and drafted >= accepted
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, full_tokens)))
    told = "full depth's text" if tokens == full_tokens else f"parts from full depth at token {same + 1}"
    assert told in chosen.figures and "x)" in chosen.figures
    assert "full depth" not in full.figures


@pytest.mark.parametrize("mode", MODES)
def test_depths_are_those_that_generate_reports(app, model, tokenizer, mode):
    options = {**MODES[mode], "max_new_tokens": NEW_TOKENS}
    lengths = [len(answer.tokens) for answer in app.decode(model, tokenizer, PROMPT, options)]
    *_, answer = app.decode(model, tokenizer, PROMPT, options)
    assert ([token.id for token in answer.tokens], [token.depth for token in answer.tokens]) == expect(
        model, tokenizer, MODES[mode]
    )
    assert lengths == [*range(1, len(answer.tokens) + 1), len(answer.tokens)]  # it grows token by token
    assert all((token.confidence is not None) == (mode == "confidence") for token in answer.tokens)
    assert (answer.drafting is not None) == (mode == "drafting") and answer.state == "done"


def test_the_chat_template_is_applied_where_asked_for(app, client, model, tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    tokens, depths = expect(model, tokenizer, MODES["depth"], text)
    chosen, _ = map(Panel, client.predict(*arguments(chat=True), api_name="/generate"))
    assert [tuple(piece) for piece in chosen.pieces] == pieces(tokenizer, tokens, depths)
    assert chosen.prompt == "" and [*map(tuple, chosen.pieces)] != pieces(
        tokenizer, *expect(model, tokenizer, MODES["depth"])
    )


@pytest.mark.parametrize("mode", MODES)
def test_stop_on_the_page_ends_generating(client, model, mode):
    with slow(model) as passes:
        job = client.submit(*arguments(mode, max_new_tokens=LONG), api_name="/generate")
        wait_until(lambda: len(passes) > 8)
        before = len(passes)
        client.predict(api_name="/stop")
        after = len(passes)
        chosen, full = map(Panel, job.result(timeout=10))
        time.sleep(0.3)
        # A token, and a cycle of three drafts, take up to four passes, each of them one of 0.05 s
        assert len(passes) == after and after - before <= (2 if mode == "depth" else 8)
    assert "stopped" in chosen.figures and 0 < len(chosen.pieces) < 100
    assert full.pieces == [] and full.figures == ""


def test_stop_ends_an_answer_within_two_tokens(app, model, tokenizer):
    for mode in MODES.values():
        stop = Event()
        with slow(model, 0.02):
            answers = app.decode(model, tokenizer, PROMPT, {**mode, "max_new_tokens": LONG}, stop=stop)
            before = next(len(answer.tokens) for answer in answers if len(answer.tokens) >= 5)
            stop.set()
            *_, answer = answers
        assert answer.state == "stopped" and len(answer.tokens) <= before + 2
        assert app.WORKER.submit(int).result(timeout=5) == 0  # the thread is free


def test_who_leaves_takes_the_model_along(app, client, model, tokenizer):
    with slow(model) as passes:
        answers = app.decode(model, tokenizer, PROMPT, {"max_new_tokens": LONG})
        next(answers)
        answers.close()
        assert app.WORKER.submit(int).result(timeout=5) == 0 and len(passes) < 5

        job = client.submit(*arguments(max_new_tokens=LONG), api_name="/generate")
        wait_until(lambda: len(passes) > 8)
        job.cancel()
        assert app.WORKER.submit(int).result(timeout=5) == 0 and len(passes) < 30
        wait_until(lambda: not app.RUNS)


def test_stop_is_for_the_own_run_only(url, model, tokenizer):
    mine, other = Client(url, verbose=False), Client(url, verbose=False)
    with slow(model, 0.02) as passes:
        job = mine.submit(*arguments(), api_name="/generate")
        wait_until(lambda: len(passes) > 3)
        other.predict(api_name="/stop")
        chosen, full = map(Panel, job.result(timeout=20))
    assert [*map(tuple, full.pieces)] == pieces(tokenizer, *expect(model, tokenizer, {}))
    assert "stopped" not in chosen.figures


def test_two_at_once_are_served_in_turn(url, model, tokenizer, monkeypatch):
    calls, generate = [], model.generate

    def record(**kwargs):
        calls.append(kwargs["input_ids"].shape[1])
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", record)
    asked = {"A first prompt": "depth", "Another one, which is longer": "confidence"}
    with slow(model, 0.01):
        jobs = [
            Client(url, verbose=False).submit(*arguments(mode, prompt), api_name="/generate")
            for prompt, mode in asked.items()
        ]
        results = [job.result(timeout=30) for job in jobs]
    monkeypatch.undo()
    for (prompt, mode), result in zip(asked.items(), results, strict=True):
        for panel, options in zip(map(Panel, result), (MODES[mode], {}), strict=True):
            assert [*map(tuple, panel.pieces)] == pieces(tokenizer, *expect(model, tokenizer, options, prompt))
    assert len(calls) == 4 and calls[0] == calls[1] != calls[2] == calls[3]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"depth": 0}, "0 (type: <class 'int'>) is not in the list of choices: [1, 2, 4]"),
        ({"depth": 3}, "3 (type: <class 'int'>) is not in the list of choices: [1, 2, 4]"),
        ({"depth": None}, "Choose a mode, and a depth"),
        ({"mode": None}, "Choose a mode, and a depth"),
        ({"max_new_tokens": 257}, "greater than maximum value 256"),
        ({"threshold": 1.5}, "greater than maximum value 1"),
        ({"mode": "drafting", "depth": 4}, "below the 4 layers that verify"),
        ({"prompt": " \n"}, "The prompt is empty"),
        ({"prompt": "x" * 300}, "has 300 tokens, and there is room for 232"),
        ({"prompt": "x" * 20_000}, "has 20000 tokens, and there is room for 232"),
        ({"mode": "beams"}, "beams"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(client, given, message):
    with pytest.raises(AppError, match=re.escape(message)):
        client.predict(*arguments(**given), api_name="/generate")


def test_0_drafts_find_out_what_pays(app):
    options = {"mode": "drafting", "depth": 2, "threshold": 0.5, "num_layers": 4}
    assert app.choose_options(drafts=0, **options) == {"assistant_early_exit": 2, "num_assistant_tokens": "auto"}
    assert app.choose_options(drafts=3, **options) == MODES["drafting"]


def test_what_a_model_writes_is_text(app, tokenizer):
    token, evil = app.Token(5, 2, 0.5, 0.0), "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
    answer = app.Answer(tokenizer, [token], [(evil, token)])
    drawn = app.render(answer, answer, evil, [1, 2, 4])
    panel = Panel(drawn)
    assert panel.pieces == [[evil, 2]] and panel.prompt == evil and panel.tags == {"div", "i", "b", "mark", "br"}
    assert drawn.count(html.escape(evil)) == 2


def test_one_token_has_no_speed(app, tokenizer):
    token = app.Token(5, 2, None, 1.0)
    answer = app.Answer(tokenizer, [token], [("a", token)])
    assert "too short" in app.describe(answer, answer)


def test_colors_are_readable_and_ordered(app):
    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for exits in ([10, 15, 20, 30], list(range(4, 33, 4)), [1, 2]):
        values = [luminance(app.color(k, exits)) for k in exits]
        assert min((v + 0.05) / (luminance("#111111") + 0.05) for v in values) >= 4.5  # WCAG's contrast of text
        # Lightness alone tells neighbours apart, also without any colour vision
        assert all(a - b > 0.04 for a, b in zip(values, values[1:]))


def test_a_model_that_is_no_sorted_llama_is_refused_in_one_line(app, tmp_path, monkeypatch, offline):
    """Others are refused in one line, before weights are loaded."""
    broken = tmp_path / "broken"
    tiny_sorted().config.save_pretrained(broken)  # neither tokenizer nor weights
    (tmp_path / "empty").mkdir()
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    refused = {
        str(tmp_path / "nowhere"): "",
        str(tmp_path / "empty"): "config.json",
        str(tmp_path / "list"): "",
        str(broken): "tokenizer",
        "user/nothing": "Hub|connect|offline",
        save_tiny(tmp_path / "plain", tiny_llama()): "no `exit_layers` in its config",
    }
    monkeypatch.setattr(app.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for path, message in refused.items():
        with pytest.raises(SystemExit, match=f"^{path} does not load .*make demo.*MODEL_ID.*: [^\n]*{message}[^\n]*$"):
            app.load(path)


def test_a_page_that_cannot_be_served_ends_in_one_line(app, model, tokenizer, monkeypatch):
    monkeypatch.setattr(app, "load", lambda path: (model, tokenizer))
    monkeypatch.setattr(sys, "argv", ["app.py"])
    with socket.create_server(("127.0.0.1", 0)) as other:
        # As GRADIO_SERVER_PORT, which gradio reads when it is imported
        monkeypatch.setattr(app, "LOOK", {**app.LOOK, "server_port": other.getsockname()[1]})
        with pytest.raises(SystemExit, match="^Cannot find empty port[^\n]*$"):
            app.main()
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="^The page needs gradio: pip install [^\n]*$"):
        runpy.run_path(str(FOLDER / "app.py"))


def test_a_depth_of_the_checkpoint_is_no_mode(app, tokenizer, monkeypatch):
    """`exit_layer` in a config would hold in every mode, full depth included."""
    model = tiny_sorted()
    expected = expect(model, tokenizer, {})
    model.config.exit_layer = model.generation_config.exit_layer = 1
    monkeypatch.setattr(app, "AutoConfig", SimpleNamespace(from_pretrained=lambda *_, **__: model.config))
    monkeypatch.setattr(app, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=lambda *_, **__: model))
    monkeypatch.setattr(app, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer))
    model, _ = app.load("anywhere")
    *_, answer = app.decode(model, tokenizer, PROMPT, {"max_new_tokens": NEW_TOKENS})
    assert ([token.id for token in answer.tokens], [token.depth for token in answer.tokens]) == expected


def test_the_files_that_the_hub_reads_fit_the_project():
    card = SpaceCard.load(FOLDER / "README.md").data
    requirements = dict(re.findall(r"^(\w+)[>=]=(.+)$", (FOLDER / "requirements.txt").read_text(), re.M))
    assert requirements.keys() == {"torch", "transformers", "gradio"}  # and nothing of this project
    project = (FOLDER.parents[1] / "pyproject.toml").read_text()
    for name in ("torch", "transformers"):
        assert f'"{name}>={requirements[name]}"' in project
    assert card.sdk == "gradio" and card.sdk_version == requirements["gradio"]
    assert (FOLDER / card.app_file).is_file() and card.license == "apache-2.0" and card.models
    assert card.title and card.emoji and len(card.short_description) <= 60


@contextmanager
def served(folder, port, tmp_path):
    """The script by its one command, in a process that has never heard of this project."""
    script = f"{STRANGER}\nimport runpy\nsys.argv = {['app.py', '--model', str(folder)]!r}\n"
    script += f"runpy.run_path({str(FOLDER / 'app.py')!r}, run_name='__main__')\n"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "GRADIO"))}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "GRADIO_SERVER_PORT": str(port)}
    environment |= {"GRADIO_ANALYTICS_ENABLED": "False"}
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-I", "-u", "-c", script], cwd=tmp_path, env=environment, stdout=file, stderr=file
        )
    try:
        wait_until(lambda: "Running on" in log.read_text() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def test_the_one_command_serves_the_page_without_this_project(model, tokenizer, tmp_path):
    folder = save_tiny(tmp_path / "model", model)
    with served(folder, free_port(), tmp_path) as url:
        chosen, full = map(Panel, Client(url, verbose=False).predict(*arguments("drafting"), api_name="/generate"))
    assert [*map(tuple, chosen.pieces)] == pieces(tokenizer, *expect(model, tokenizer, MODES["drafting"]))
    assert [*map(tuple, full.pieces)] == pieces(tokenizer, *expect(model, tokenizer, {}))


@contextmanager
def browsing(tmp_path, **options):
    """A Chromium with a profile of its own; Playwright's package drives the system's, and downloads none."""
    from playwright import sync_api

    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=chromium, args=flags.split(), headless=True, **options
        )
        yield browser
        browser.close()


def test_the_page_works_in_a_browser(url, model, tokenizer, tmp_path):
    """Type, choose, slide, generate, stop; nothing but text comes of what was typed."""
    from playwright import sync_api

    with browsing(tmp_path) as browser:
        page, dialogs, foreign = browser.new_page(), [], []
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: None if request.url.startswith(url) else foreign.append(request.url))
        page.goto(url)
        generate, stop = (page.get_by_role("button", name=name) for name in ("Generate", "Stop"))
        figures = page.locator(".figures")
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_label("number input for Max tokens").fill(str(NEW_TOKENS))
        full, depth = (page.get_by_role("radio", name=name, exact=True) for name in ("4", "2"))
        threshold = page.get_by_label("range slider for Confidence")
        for mode in ("Confidence", "Fixed depth", "Self-drafting"):
            page.get_by_label(mode, exact=True).first.check()
            sync_api.expect(threshold if mode == "Confidence" else depth).to_be_visible()
            sync_api.expect(depth if mode == "Confidence" else threshold).not_to_be_visible()
            if mode == "Fixed depth":
                offered = page.get_by_role("radio").evaluate_all("all => all.map(one => one.value)")
                assert [value for value in offered if value.isdigit()] == ["1", "2", "4"]
                full.check()
        sync_api.expect(full).to_have_count(0)  # it cannot draft for itself
        sync_api.expect(page.get_by_role("radio", name="1", exact=True)).to_be_checked()
        depth.check()
        page.get_by_label("number input for Drafts a cycle").fill("3")
        generate.click()
        sync_api.expect(figures.first).to_contain_text("full depth's text", timeout=20_000)
        for panel, options in enumerate((MODES["drafting"], {})):
            marks = page.locator(".text").nth(panel).locator("mark")
            texts = [text for text, _ in pieces(tokenizer, *expect(model, tokenizer, options))]
            assert [mark.evaluate("element => element.textContent") for mark in marks.all()] == texts
        assert page.locator(".text i").first.text_content() == PROMPT

        page.get_by_label("number input for Max tokens").fill(str(LONG))
        running = page.get_by_role("button", name="Running")
        sync_api.expect(generate).to_be_enabled()
        with slow(model) as passes:
            generate.click()
            wait_until(lambda: len(passes) > 8 or page.wait_for_timeout(10))
            sync_api.expect(running).to_be_disabled()
            stop.click()
            sync_api.expect(figures.first).to_contain_text("stopped", timeout=5_000)
            sync_api.expect(generate).to_be_enabled()
            count = len(passes)
            page.wait_for_timeout(300)
            assert len(passes) == count

            # One who waits may leave the queue, and does not disturb
            generate.click()
            wait_until(lambda: len(passes) > count or page.wait_for_timeout(10))
            other = browser.new_page()
            other.goto(url)
            other.get_by_role("button", name="Generate").click()
            sync_api.expect(other.get_by_text("queue").first).to_be_visible()
            with other.expect_request("**/cancel"):
                other.get_by_role("button", name="Stop").click()
            other.wait_for_timeout(300)
            assert not any(badge.is_visible() for badge in other.get_by_text("Error").all())
            sync_api.expect(other.get_by_role("button", name="Generate")).to_be_enabled()
            stop.click()
            sync_api.expect(figures.first).to_contain_text("stopped", timeout=5_000)
            count = len(passes)
            page.wait_for_timeout(300)
            assert len(passes) == count
        page.get_by_label("Prompt").fill("")
        generate.click()
        sync_api.expect(page.get_by_text("The prompt is empty: type one")).to_be_visible()
        sync_api.expect(generate).to_be_enabled()
        # Nothing is cut off: what is too long is told
        page.get_by_label("Prompt").fill("x" * 20_000)
        generate.click()
        sync_api.expect(page.get_by_text("The prompt has 20000 tokens")).to_be_visible()
        assert dialogs == [] and foreign == []


SHOWN = "token => [getComputedStyle(token, '::after').content, token === document.activeElement]"


def test_the_page_works_on_a_phone(url, model, tokenizer, tmp_path):
    """A tap, and a keyboard, show the depth of a token; nothing is wider than the screen."""
    from playwright import sync_api

    with browsing(tmp_path, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True) as browser:
        page = browser.new_page()
        page.goto(url)
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_label("Confidence", exact=True).first.check()
        page.get_by_label("number input for Confidence").fill("0.2")
        page.get_by_label("number input for Max tokens").fill(str(NEW_TOKENS))
        page.get_by_role("button", name="Generate").tap()
        sync_api.expect(page.locator(".figures").first).to_contain_text("full depth", timeout=20_000)
        tokens = page.locator(".text").first.locator("mark")
        depths = [depth for _, depth in pieces(tokenizer, *expect(model, tokenizer, MODES["confidence"]))]
        assert tokens.count() == len(depths) and len(set(depths)) > 1

        def shows(token, depth):
            text, is_active = token.evaluate(SHOWN)
            assert re.fullmatch(rf'"{depth} layers, \d+% sure"', text) and is_active

        for token, depth in zip(tokens.all(), depths, strict=True):
            assert token.evaluate(SHOWN)[0] == "none"
            token.scroll_into_view_if_needed()
            x, y, width, height = token.evaluate("one => Object.values(one.getClientRects()[0].toJSON()).slice(0, 4)")
            page.touchscreen.tap(x + width / 2, y + height / 2)
            shows(token, depth)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tokens.first.focus()
        page.keyboard.press("Tab")
        shows(tokens.nth(1), depths[1])
        segment = page.locator(".bar").first.locator("b").first
        segment.tap()
        count = expect(model, tokenizer, MODES["confidence"])[1].count(min(depths))
        assert segment.evaluate(SHOWN) == [f'"{count} of the tokens"', True]
