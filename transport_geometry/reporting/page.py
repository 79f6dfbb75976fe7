"""report.html: the report as one page without other files.

Its text is report.md's, by markdown-it; its figures are in it as SVG. A short script sorts tables by their
columns; without it everything is still there to read. The page loads nothing from a network, and its
Content-Security-Policy forbids it, because names in it come from other people's files. The same files give
the same bytes.
"""

import base64
import hashlib
import pathlib
import typing
import urllib.parse
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from transport_geometry.records.tables import Content
from transport_geometry.reporting.figures import as_png, as_svg, close
from transport_geometry.reporting.glossary import TERMS, with_glossary
from transport_geometry.reporting.templates import text_of

if typing.TYPE_CHECKING:
    from markdown_it.token import Token
    from matplotlib.figure import Figure

REPORT, PAGE = "report.md", "report.html"
SENTENCE = 36  # letters in a cell

STYLE, SCRIPT = (text_of(name) for name in ("page.css", "page.js"))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


FRAME = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src {policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}</main>
<script>{script}</script>
</body>
</html>
"""


# ------------------------------------------------------------------------------------------------- the page
def with_page(
    folder: pathlib.Path, files: Mapping[str, Content | None], figures: Mapping[str, "Figure"] | None = None
) -> dict[str, Content | None]:
    """The files that are to be put into a folder: `files`, of which report.md gets its glossary; report.html,
    made of it; and of each of the figures {NAME.png: figure} its PNG. Closes them.
    """
    text = files[REPORT]
    assert isinstance(text, bytes)
    report, figures = with_glossary(text.decode()), figures or {}
    drawn = {name: as_svg(figure, name) for name, figure in figures.items()}
    pictures = {name: as_png(figure) for name, figure in figures.items()}
    for figure in figures.values():
        close(figure)
    return {**files, **pictures, REPORT: report.encode(), PAGE: page(report, drawn, folder)}


def page(report: str, figures: Mapping[str, str], folder: pathlib.Path | None = None) -> bytes:
    """A report in Markdown as a page. figures {name: SVG}: those that it may show. folder: where it will lie;
    a link to a report that has a page there leads to the page.
    """
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    for rule, how in RULES.items():
        markdown.add_render_rule(rule, how)
    env = {"figures": figures, "folder": folder}
    tokens = markdown.parse(report, env)
    sections = [i for i, token in enumerate(tokens) if token.type == "heading_open" and token.tag == "h2"]
    names = [plain_text(tokens[i + 1]) for i in sections]
    for number, i in enumerate(sections):
        tokens[i].attrSet("id", f"s{number + 1}")
    # what the box of a table is called
    here = ""
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            here = plain_text(tokens[i + 1])
        token.meta["section"] = here
    title = next((plain_text(tokens[i + 1]) for i, t in enumerate(tokens) if t.tag == "h1"), "Report")
    first = sections[0] if sections else len(tokens)

    def render(part: Sequence["Token"]) -> str:
        return markdown.renderer.render(part, markdown.options, env)

    body = [render(tokens[:first]), contents(names), render(tokens[first:])]
    return FRAME.format(
        policy=_hash(SCRIPT), title=escape(title), style=STYLE, body="".join(body), script=SCRIPT
    ).encode()


def contents(names: Sequence[str]) -> str:
    """The sections, to go to."""
    if len(names) < 3:
        return ""
    entries = "".join(f'<li><a href="#s{i + 1}">{escape(name)}</a></li>\n' for i, name in enumerate(names))
    listed = f"<details><summary>Sections</summary><ul>\n{entries}</ul></details>"
    return f'<nav aria-label="Sections">{listed}</nav>\n'


def plain_text(inline: "Token") -> str:
    return "".join(token.content for token in inline.children or [])


# ---------------------------------------------------------------------- where Markdown's own HTML will not do
def table_open(renderer: Any, tokens: Sequence["Token"], i: int, options: Any, env: Any) -> str:
    """A table scrolls in its own box."""
    name = escape(f"Table: {tokens[i].meta['section']}")
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table>\n'


def table_close(renderer: Any, tokens: Sequence["Token"], i: int, options: Any, env: Any) -> str:
    return "</table></div>\n"


def th_open(renderer: Any, tokens: Sequence["Token"], i: int, options: Any, env: Any) -> str:
    """Of a column, with what it means as a tooltip."""
    meaning = TERMS.get(plain_text(tokens[i + 1]), "")
    return f'<th scope="col" title="{escape(meaning)}">' if meaning else '<th scope="col">'


def td_open(renderer: Any, tokens: Sequence["Token"], i: int, options: Any, env: Any) -> str:
    """Numbers stay on one line; what is as long as a sentence does not."""
    return '<td class="prose">' if len(plain_text(tokens[i + 1])) > SENTENCE else "<td>"


def image(renderer: Any, tokens: Sequence["Token"], i: int, options: Any, env: Any) -> str:
    """A figure of ours is in the page; of whatever else is called one, its text."""
    source, alt = str(tokens[i].attrGet("src") or ""), escape(plain_text(tokens[i]))
    svg = env["figures"].get(urllib.parse.unquote(source))
    if svg is None:
        return alt
    labelled = svg.replace("<svg ", f'<svg class="figure" role="img" aria-label="{alt}" ', 1)
    return f'<span class="scroll picture">{labelled}</span>'


def link_open(renderer: Any, tokens: Sequence["Token"], i: int, options: Any, env: Any) -> str:
    href = str(tokens[i].attrGet("href") or "")
    named = tokens[i + 1].content == REPORT  # who asks for that file by its name gets it
    if env["folder"] is not None and not named and (href == REPORT or href.endswith(f"/{REPORT}")):
        there = href.removesuffix(REPORT) + PAGE
        if (env["folder"] / urllib.parse.unquote(there)).exists():
            href = there
    return f'<a href="{escape(href)}">'


RULES = {
    "table_open": table_open,
    "table_close": table_close,
    "th_open": th_open,
    "td_open": td_open,
    "image": image,
    "link_open": link_open,
}
