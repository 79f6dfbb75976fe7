"""The words of a report: one Markdown file per experiment in reports/, in blocks, with fields in braces; and
the style and script of report.html.

A block begins at a line `<!-- its name -->` and ends at the next one. One wording of each leaf serves the
console, the report and whoever quotes them.
"""

import pathlib
import re

REPORTS = pathlib.Path(__file__).parent / "reports"


def text_of(file: str) -> str:
    return (REPORTS / file).read_text(encoding="utf-8")


def blocks(name: str) -> dict[str, str]:
    """{block: its text} of reports/NAME.md; `text.format(...)` fills its fields."""
    _, *parts = re.split(r"^<!-- (.+) -->$", text_of(f"{name}.md"), flags=re.MULTILINE)
    return {title: body.strip("\n") for title, body in zip(parts[::2], parts[1::2])}
