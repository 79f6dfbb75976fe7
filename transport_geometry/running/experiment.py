"""One experiment from its command to its printed answer: measured, judged, written, said."""

import pathlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transport_geometry.records import store
from transport_geometry.records.results import rows_hash
from transport_geometry.records.tables import Content, as_json, plain
from transport_geometry.reporting.console import Answer, coloured, print_result, quiet_output
from transport_geometry.reporting.page import with_page
from transport_geometry.running.grid import Command
from transport_geometry.running.run import Experiment, run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Findings:
    """What an experiment makes of its rows."""

    answer: Answer
    verdict: Mapping[str, Any]  # verdict.json, but for the answer and the settings
    short_verdict: str  # the leaf, in a word
    report: str  # report.md; ![...](NAME.png) shows figures[NAME.png]
    figures: Mapping[str, "Figure"]
    table: Callable[[bool], str]  # for a terminal of 80 columns, in colour or not
    tables: Mapping[str, Content | None] = field(default_factory=dict)  # its CSV files


def write(out: pathlib.Path, settings: dict, found: Findings) -> None:
    """verdict.json, report.md, report.html, the figures and the tables, as one change."""
    record: dict[str, Any] = {"answer": vars(found.answer), "settings": settings}
    if "rows_sha256" not in found.verdict:
        record["rows_sha256"] = rows_hash(out)
    verdict = plain({**found.verdict, **record})
    files = {**found.tables, "verdict.json": as_json(verdict), "report.md": found.report.encode()}
    store.put(out / store.RUN, with_page(out, files, found.figures))


def run_and_report(
    command: Command, experiment: Experiment, analyse: Callable[[pathlib.Path, dict], Findings]
) -> None:
    """The whole of a script. analyse(results folder, settings): a pure function of the folder's rows."""
    with quiet_output(command):
        if (done := run(command, experiment)) is None:
            return
        out, settings = done
        found = analyse(out, settings)
        write(out, settings, found)
    print_result(command, out, found.answer, found.table(coloured(sys.stdout)), found.short_verdict)
