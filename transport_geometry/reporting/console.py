"""What a run came to in three sentences that a colleague could repeat, and how a terminal shows them.

A script makes its `Answer` from its verdict and its rows; its report begins with it, its console does, and
whoever else shows it takes it from there.
"""

import contextlib
import os
import pathlib
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from transport_geometry.records.tables import UNDEFINED, estimate

WIDTH = 80  # columns of a terminal
LABELS = ("Question", "Answer", "Limits")


@dataclass(frozen=True)
class Answer:
    """question: what was asked; found: what came out, with its interval; limits: what it does not show. A
    sentence or two each, on one line, without Markdown.
    """

    question: str
    found: str
    limits: str

    def markdown(self) -> str:
        """The first paragraphs of a report, under its title; what was found is its first bold line."""
        return f"Question: {self.question}\n\n**{self.found}**\n\nLimits: {self.limits}\n"

    def lines(self, colour: bool = False) -> list[str]:
        """For a terminal, at most WIDTH wide."""
        indent = max(map(len, LABELS)) + 2
        out = []
        for label, text in zip(LABELS, (self.question, self.found, self.limits)):
            first, *more = textwrap.wrap(
                f"{label:<{indent}}{text}",
                WIDTH,
                subsequent_indent=" " * indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
            out += [painted(first[:indent], BOLD, colour) + first[indent:], *more]
        return out


def number(row: Mapping[str, Any], name: str, digits: int = 2) -> str:
    """`estimate` in a sentence.

    >>> number({"dce": 0.12, "dce_lo": 0.1, "dce_hi": 0.14}, "dce")
    '+0.12 [+0.10, +0.14]'
    >>> number({"dce": 0.12, "dce_lo": None, "dce_hi": None}, "dce")
    '+0.12 (no interval)'
    """
    return estimate(row, name, digits).replace(f"[{UNDEFINED}]", "(no interval)")


def hooks_in_words(a: str, word: str, b: str) -> str:
    """Two hooks with a word between them.

    >>> hooks_in_words("s@11", "minus", "s@10"), hooks_in_words("s@3", "minus", "l@5")
    ('block 11 minus block 10 of s', 'block 3 of s minus block 5 of l')
    """
    (model, _, layer), (other, _, layer_b) = a.rpartition("@"), b.rpartition("@")
    of_a = f" of {model}" if model != other else ""
    return f"block {layer}{of_a} {word} block {layer_b} of {other}"


def models_in_words(models: Sequence[str]) -> str:
    """Names in a sentence.

    >>> models_in_words(["a", "b", "c"]), models_in_words(["a"])
    ('a, b and c', 'a')
    """
    *most, last = models
    return f"{', '.join(most)} and {last}" if most else last


def as_sentence(text: str) -> str:
    """A reason as a sentence of its own.

    >>> as_sentence("too few hooks"), as_sentence("R² does.")
    ('Too few hooks.', 'R² does.')
    """
    return f"{sentence_case(text).removesuffix('.')}."


def sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


# ------------------------------------------------------------------------------------------------- a terminal
BOLD, DIM, BLUE, ORANGE = "1", "2", "34", "33"  # of ANSI's: none of them red beside green


def coloured(stream: TextIO) -> bool:
    """Only on a terminal, and where NO_COLOR is not set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour and code and text.strip() else text


def columns(rows: Sequence[Mapping[str, str]], codes: Sequence[str] = (), colour: bool = False) -> str:
    """A table without rules, the columns of the first row two spaces apart. codes: of each row's colour.

    >>> print(columns([{"proxy": "r2", "by": "0"}, {"proxy": "cosine", "by": "+1"}]))
    proxy   by
    r2      0
    cosine  +1
    """
    names = list(rows[0])
    table = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(f"{text:<{w}}" for text, w in zip(line, widths)).rstrip() for line in table]
    painting = [BOLD, *(codes or [""] * len(rows))]
    return "\n".join(painted(line, code, colour) for line, code in zip(lines, painting))


@contextlib.contextmanager
def quiet_output(command: Any) -> Iterator[None]:
    """Within, a run prints to stderr under --json, which keeps stdout for the verdict, and nothing under
    --quiet. Errors are printed later, and always.
    """
    with contextlib.ExitStack() as stack:
        if command.quiet:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        elif command.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def print_result(command: Any, out: pathlib.Path, answer: Answer, table: str, verdict: str) -> None:
    """Print the final answer. table: at most WIDTH wide; verdict: the leaf, in short."""
    if command.json:
        print((out / "verdict.json").read_text(encoding="utf-8"), end="")
        return
    if not command.quiet:
        lines = [*answer.lines(coloured(sys.stdout)), "", table, "---", f"verdict: {verdict}"]
        print("\n".join(lines))
    print(f"report: {out / 'report.md'}")
