"""The words of a report: one Markdown file per experiment in reports/, in blocks, with fields in braces.

A block begins at a line `<!-- its name -->` and ends at the next one. One wording of each leaf serves the
console, the report and whoever quotes them.
"""

import pathlib
import re

REPORTS = pathlib.Path(__file__).parent / "reports"


def blocks(name: str) -> dict[str, str]:
    """{block: its text} of reports/NAME.md; `text.format(...)` fills its fields."""
    text = (REPORTS / f"{name}.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^<!-- (.+) -->$", text, flags=re.MULTILINE)
    return {title: body.strip("\n") for title, body in zip(parts[::2], parts[1::2])}
