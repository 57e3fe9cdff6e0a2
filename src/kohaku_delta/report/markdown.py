"""Markdown to HTML that refers to no other file: a link becomes its text; images and HTML stay as they were written."""

import re

from markdown_it import MarkdownIt
from markupsafe import Markup


def parser() -> MarkdownIt:
    """CommonMark and tables."""
    made = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    for rule in ("link_open", "link_close"):
        made.add_render_rule(rule, lambda self, tokens, index, options, env: "")
    return made


def to_html(text: str, lower: int) -> Markup:
    """`text` as HTML, its headings `lower` levels lower."""
    made = parser()
    tokens = made.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + lower, 6)}"
    return Markup(made.renderer.render(tokens, made.options, {}))


def to_plain(text: str) -> str:
    """`text` escaped for a line or a table cell of Markdown."""
    return re.sub(r"([\\`*_\[\]<|~&])", r"\\\1", " ".join(text.split()))


def code_block(text: str, language: str = "") -> str:
    """`text` as a fenced block of code; its fence is longer than any run of backticks in it."""
    fence = "`" * max([3] + [len(run) + 1 for run in re.findall("`+", text)])
    return f"{fence}{language}\n{text}\n{fence}"
