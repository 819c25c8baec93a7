"""What comes from outside shows as it is, read by a Markdown parser and by Python."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sorted_llama.trainer.escaping import code_span, hub_links, markdown, one_line, python_literal, without_marks


PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
MARK = "<!-- /sorted-llama: exits -->"
AWKWARD = ["a|b", "a\\|b", f"x{MARK}y", "a\n\n# Hacked", "_a_ *b* ~~c~~ [d](e)", "`a``", "1. x", "12)", "- x", "---"]
AWKWARD += ["+ x", "> x", "C#", "# x", "&amp; <b>", "$x$", "![a](b)", "\x1b[31mred", "\u202eabc", "a\u2028b", "\ud800"]


def with_examples(test):
    for text in AWKWARD:
        test = example(text)(test)
    return given(st.text())(test)


def inline(source):
    """The runs of text in what a parser makes of Markdown, one list a block."""
    return [token.children for token in PARSER.parse(source) if token.type == "inline"]


def shown(children):
    assert {child.type for child in children} <= {"text", "text_special"}, children
    return "".join(child.content for child in children)


@with_examples
def test_text_shows_as_it_is_in_a_cell_a_headline_a_list_and_a_line(text):
    expected, escaped = one_line(text), markdown(text)
    cell, neighbour, *rest = inline(f"| {escaped} | b |\n|---|---|\n| c | d |\n")
    assert shown(cell) == expected and shown(neighbour) == "b" and len(rest) == 2
    if expected:
        for begin in ("# ", "- ", ""):
            (block,) = inline(f"{begin}{escaped}\n")
            assert shown(block) == expected


@with_examples
def test_code_shows_as_it_is(text):
    expected = one_line(text)
    if expected:
        (children,) = inline(f"by {code_span(text)}; all")
        assert [(child.type, child.content) for child in children][1] == ("code_inline", expected)
        assert len(children) == 3


@with_examples
def test_a_literal_is_the_text_on_one_line(text):
    literal = python_literal(text)
    assert eval(literal) == text
    assert len(literal.splitlines()) == 1 and "<" not in literal and literal.startswith('"')
    literal.encode()


@with_examples
def test_one_line_steers_no_terminal(text):
    line = one_line(text)
    assert len(line.splitlines()) <= 1 and not re.search(r"[\x00-\x1f\x7f-\x9f\u202e]", line)
    line.encode()


def test_one_line_of_an_exception_without_text_is_its_class():
    assert one_line(StopIteration()) == "StopIteration" and one_line(ValueError(" \n")) == "ValueError"
    assert one_line(ValueError("a\n\x1b[31mb")) == "a [31mb" and one_line("") == ""


@given(st.text(), st.sampled_from([MARK, "<!-- sorted-llama: use -->"]), st.text())
def test_no_mark_is_left_in_content(before, mark, after):
    content = without_marks(before + mark + after)
    assert mark not in content and content.replace("&lt;!--", "<!--") == (before + mark + after).replace(
        "&lt;!--", "<!--"
    )


@pytest.mark.parametrize(
    "ids, links",
    [
        ("base/llama_1", "[base/llama_1](https://huggingface.co/base/llama_1)"),
        (["a/b", "c/d"], "[a/b](https://huggingface.co/a/b), [c/d](https://huggingface.co/c/d)"),
        ("a](x) b", "[a\\](x) b](https://huggingface.co/a%5D%28x%29%20b)"),
        ([], ""),
    ],
)
def test_links_show_their_ids(ids, links):
    assert hub_links(ids) == links
