"""What all finished experiments of a folder say together, in one summary.

    python common.py report outputs/     # outputs/report.md

Each statement is the answer and the leaf of an experiment's own verdict.json; nothing is computed here. An
experiment reads no other one's verdict: which claim has to be settled first is applied here, where they meet.
Only files that are as their run wrote them are shown. Same folders, same bytes.

A *run* is a folder with a run.json, directly in the folder or one below; its name is its path from there. A
*claim* is a hypothesis, or the question of an experiment that has none.
"""

import json
import pathlib
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transport_geometry.errors import Damaged, UserError, printable, reading
from transport_geometry.records import store
from transport_geometry.records.store import RUN
from transport_geometry.records.tables import readable_count
from transport_geometry.reporting.console import Answer
from transport_geometry.reporting.page import with_page
from transport_geometry.reporting.templates import blocks

from tqdm import tqdm

REPORT, RECORD = "report.md", "report.json"  # of the outline, in the folder that it is about
NOT_YET = "not to be interpreted"


@dataclass(frozen=True)
class Claim:
    """A hypothesis, or a question, that one script decides."""

    label: str
    words: str  # what a verdict that says *supported* supports, or the question that it answers
    script: str
    after: str  # what has to be settled before it, on the same models and text; H2 comes after Exp-A


TEXT = blocks("summary")
# in the order in which they may be interpreted, then what is in no order
CLAIMS = tuple(
    Claim(label, TEXT[f"claim: {label}"], script, after)
    for label, script, after in (
        ("H0", "expa", ""),
        ("H1", "expa", ""),
        ("N", "expa", ""),
        ("H2", "expb", "Exp-A"),
        ("H2′", "expc_fisher", "H2"),
        ("H3", "expd_mi", "H2"),
        ("planted control", "expp_planted", ""),
        ("attention plan", "expe_attention", "H2"),
        ("rate", "expf_rate", ""),
    )
)
SCRIPTS = tuple(dict.fromkeys(claim.script for claim in CLAIMS))
ORDER = " → ".join(claim.label for claim in CLAIMS[:6])
TITLES = {
    "expa": "Exp-A",
    "expb": "Exp-B",
    "expc_fisher": "Exp-C",
    "expd_mi": "Exp-D",
    "expe_attention": "Exp-E",
    "expf_rate": "Exp-F",
}


@dataclass(frozen=True)
class Run:
    """A run's folder. missing: why it makes no statement, "" where it makes one."""

    name: str
    script: str  # "" where its run.json cannot be read
    missing: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    tables: tuple[str, ...] = ()  # file names

    @property
    def leaf(self) -> str:
        return str(self.verdict["leaf"])

    @property
    def answer(self) -> Answer:
        return Answer(**self.verdict["answer"])


# ------------------------------------------------------------------------------------------- reading the runs
def folders(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Those of runs, in the order of their names. Nothing below a run, and nothing hidden."""

    def below(folder: pathlib.Path) -> list[pathlib.Path]:
        with reading(folder):
            return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")

    for path in below(root):
        yield from [path] if (path / RUN).exists() else (one for one in below(path) if (one / RUN).exists())


def read(root: pathlib.Path) -> list[Run]:
    """Every run in the folder, as its script comes among SCRIPTS, then by name. Raises UserError: no finished
    run, or a run's own folder.
    """
    if (root / RUN).exists():
        raise UserError(f"report {root}: a run's own folder; name the folder above it")
    if not root.is_dir():
        raise UserError(f"report {root}: no such folder")
    shown = tqdm(list(folders(root)), desc="runs", leave=False, delay=2, disable=None)
    runs = [read_run(root, path) for path in shown]
    if all(run.missing for run in runs):
        there = "; ".join(f"{run.name}: {run.missing}" for run in runs)
        raise UserError(f"report {root}: no finished run in it" + (f" ({there})" if there else ""))
    order = {script: place for place, script in enumerate(SCRIPTS)}
    return sorted(runs, key=lambda run: (order.get(run.script, len(order)), run.script, run.name))


def read_run(root: pathlib.Path, folder: pathlib.Path) -> Run:
    """Raises UserError for a name that cannot stand on one line."""
    run, record = Run(printable(folder.relative_to(root).as_posix(), "the folder"), ""), folder / RUN
    try:
        with reading(record):  # where it belongs is said even of a record that was edited
            script = json.loads(record.read_text(encoding="utf-8"))["settings"]["script"]
            run = replace(run, script=printable(str(script), "the script"))
        facts = store.load(record)
        with reading(record):
            files = facts["files"]
            run = replace(run, settings=facts["settings"])
            about(run, set())  # settings that cannot be said are not a run's
        if facts.get("coming") or facts.get("seconds") is None:
            return replace(run, missing=TEXT["unfinished"])
        if not {"verdict.json", REPORT} <= files.keys():
            return replace(run, missing=TEXT["no verdict"].format(script=run.script))
        for file in files:
            store.checked(record, file)
        verdict = read_verdict(folder / "verdict.json")
    except UserError as why:
        return replace(run, missing=" ".join(str(why).replace(f"{folder}/", "").split()))
    tables = tuple(file for file in sorted(files) if file.endswith(".csv"))
    if "answer" not in verdict:
        return replace(run, missing=TEXT["earlier version"].format(script=run.script))
    return replace(run, verdict=verdict, tables=tables)


def read_verdict(path: pathlib.Path) -> dict[str, Any]:
    """Raises Damaged where it lacks what the outline takes from it."""
    with reading(path):
        verdict = json.loads(path.read_text(encoding="utf-8"))
        taken = [verdict["leaf"]]
        if "answer" in verdict:
            taken += vars(Answer(**verdict["answer"])).values()
        if not all(isinstance(text, str) for text in taken):
            raise Damaged(f"{path}: not a verdict")
    return verdict


# ------------------------------------------------------------------------------------------ what a run says
ADJUDICATED = ("H0", "H1", "H0+H1", "N")  # leaves of Exp-A that settle H0 and H1
SAME_RUN = ("models", "weights", "tokenizers", "data", "data_content", "split", "recipe")  # settings


def leaf_of(claim: Claim, run: Run) -> str:
    """The run's own verdict on the claim, in words. Exp-A's one leaf is about three claims: once it has
    judged, its verdict holds what each came to. Of several pairs of hooks it is the first one's.
    """
    of_pair = ""
    if pairs := run.settings.get("pairs"):
        small, large = pairs[0]
        of_pair = f" ({large} {'minus' if claim.script == 'expa' else 'over'} {small})"
    if claim.script != "expa" or run.leaf not in ADJUDICATED:
        return run.leaf.replace("-", " ").replace("r2", "R²") + of_pair
    came_to = {"H0": run.verdict.get("h0"), "H1": run.verdict.get("h1"), "N": run.leaf == "N"}[claim.label]
    shown = "not judged" if came_to is None else "shown" if came_to else "not shown"
    return shown + ", and N says how" * (claim.label == "H1" and run.leaf == "N") + of_pair


def differing(first: Run, run: Run) -> list[str]:
    """Settings that keep the verdict of `first`, of Exp-A or Exp-B, from counting for the run. Exp-A judges
    its first recipe.
    """
    judged = first.settings
    if first.script == "expa":
        judged = judged | {"recipe": (judged.get("recipe") or [])[:1]}
    return [key for key in SAME_RUN if judged.get(key) != run.settings.get(key)]


def comes_first(claim: Claim, run: Run, runs: Sequence[Run]) -> str:
    """The claim that has to be settled before the run's verdict on this one may be interpreted; "" where it
    is. runs: those that it is read together with.
    """
    if claim.label == "N":
        return "" if run.leaf in ADJUDICATED else "H0 and H1"
    if not claim.after:
        return ""
    if not any(one.leaf in ADJUDICATED for one in of_script("expa", run, runs)):
        return "Exp-A"
    supported = any(one.leaf == "supported" for one in of_script("expb", run, runs))
    return "H2" if claim.after == "H2" and not supported else ""


def of_script(script: str, run: Run, runs: Sequence[Run]) -> list[Run]:
    """The script's finished runs on the same models and text as `run`."""
    there = (one for one in runs if one.script == script and not one.missing)
    return [one for one in there if not differing(one, run)]


def short_verdict(claim: Claim, run: Run, runs: Sequence[Run]) -> str:
    """The run's verdict on the claim, and whether it may be interpreted."""
    first = comes_first(claim, run, runs)
    return leaf_of(claim, run) + (f"; {NOT_YET} before {first}" if first else "")


def order_line(claim: Claim, run: Run, runs: Sequence[Run]) -> str:
    """What comes before the run's claim, and what came of that; of Exp-A, the runs that wait for it."""
    if run.script == "expa":
        after = {one.script for one in CLAIMS if one.after}
        waiting = [one for one in runs if one.script in after and not (one.missing or differing(run, one))]
        return (
            f"It comes before {', '.join(map(of_name, waiting))}."
            if waiting
            else "No run here comes after it."
        )
    if not claim.after:
        return ""
    lines = []
    for script, first in (("expa", "Exp-A comes first"), ("expb", "Then H2")):
        every = [one for one in runs if one.script == script and not one.missing]
        same = [f"{of_name(one)} says {one.leaf}" for one in every if not differing(one, run)]
        other = [f"{of_name(one)} is about other {', '.join(differing(one, run))}" for one in every]
        lines.append(f"{first}: {'; '.join(same or other) or 'it is not in this folder'}.")
    return " ".join(lines if claim.after == "H2" else lines[:1])


def about(run: Run, several: set[str]) -> str:
    """Models, hooks, budgets and text. several: names of models that other runs give to other weights."""
    settings = run.settings
    layers: dict[str, list[str]] = {}
    for hook in settings.get("hooks") or {}:
        model, _, layer = hook.rpartition("@")
        layers.setdefault(model, []).append(layer)
    places: dict[str, list[str]] = {}
    for model in settings.get("models") or []:
        weights = str((settings.get("weights") or {}).get(model))
        name = f"{model} (weights {weights[:8]})" if model in several else model
        if stored := (settings.get("stored_as") or {}).get(model):
            name += f" with {stored}"
        places.setdefault(",".join(sorted(layers.get(model, []), key=lambda n: (len(n), n))), []).append(name)
    where = [", ".join(models) + (f" @ {at}" if at else "") for at, models in places.items()]
    parts = [" and ".join(where), f"{sum(map(len, layers.values()))} hooks"]
    if saes := settings.get("saes"):
        parts.append(f"{len(saes)} SAEs from files")
    if tokens := settings.get("tokens"):
        parts.append(f"trained on {', '.join(map(readable_count, tokens))} tokens")
    if texts := settings.get("text_sha256"):
        sizes = " or ".join(map(str, settings.get("documents") or []))
        hashes = ", ".join(text[:12] for text in texts.split(", "))
        parts.append(f"text {settings.get('data')}, {sizes} documents, SHA-256 {hashes}")
    return "; ".join(parts)


def of_several_weights(runs: Sequence[Run]) -> set[str]:
    """Names of models that are not one model in all runs."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for model, weights in (run.settings.get("weights") or {}).items():
            found.setdefault(model, set()).add(str(weights))
    return {model for model, weights in found.items() if len(weights) > 1}


# ------------------------------------------------------------------------------------------------ in Markdown
def of_name(run: Run) -> str:
    """The run's name as it is, also in a table."""
    return "`" + run.name.replace("|", "\\|") + "`"


def link(run: Run, file: str = REPORT, text: str = "") -> str:
    """To a run's file."""
    return f"[{text or file}]({urllib.parse.quote(f'{run.name}/{file}')})"


def verdicts(claim: Claim, runs: Sequence[Run], linked: bool = False) -> str:
    """The verdict of each of the claim's runs, or that there is none. linked: names lead to the reports."""
    said = []
    for run in (run for run in runs if run.script == claim.script):
        name = link(run, text=of_name(run)) if linked and not run.missing else of_name(run)
        said.append(f"{name}: {'no statement' if run.missing else short_verdict(claim, run, runs)}")
    return "; ".join(said) or f"not run: `python {claim.script}.py`"


def headline(runs: Sequence[Run]) -> str:
    """How far it may be read."""
    readable: dict[str, list[str]] = {}  # {verdicts: claims of which these are}
    not_yet: list[str] = []
    none: list[str] = []
    not_run: list[str] = []
    for claim in CLAIMS:
        here = [run for run in runs if run.script == claim.script]
        stated = [run for run in here if not run.missing]
        if any(not comes_first(claim, run, runs) for run in stated):
            readable.setdefault(verdicts(claim, runs), []).append(claim.label)
        else:
            (not_yet if stated else none if here else not_run).append(claim.label)
    none += [of_name(run) for run in runs if not run.script]
    parts = {
        "May be read": [f"{', '.join(labels)} ({said})" for said, labels in readable.items()],
        "Not to be interpreted yet": not_yet,
        "No statement": none,
        "Not run": not_run,
    }
    return " ".join(f"{what}: {', '.join(said)}." for what, said in parts.items() if said)


def outline(runs: Sequence[Run]) -> str:
    """The report, in Markdown. runs: as `read` gives them."""
    rows = [f"| {claim.label} | {claim.words} | {verdicts(claim, runs, linked=True)} |" for claim in CLAIMS]
    parts = [TEXT["report"].format(headline=headline(runs), order=ORDER, rows="\n".join(rows)) + "\n"]
    several = of_several_weights(runs)
    for script in dict.fromkeys(run.script for run in runs):
        here = [run for run in runs if run.script == script]
        lines = [line for run in here for line in statement(run, runs, several)]
        parts.append(f"## {section(script)}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def section(script: str) -> str:
    labels = ", ".join(claim.label for claim in CLAIMS if claim.script == script)
    if not script:
        return "Folders that could not be read"
    if script == "audit":
        return "SAEs that exist, `audit.py`"
    if not labels:
        return TEXT["unknown"].format(script=script)
    return f"{labels}: {TITLES[script]}, `{script}.py`" if script in TITLES else f"{labels}: `{script}.py`"


def statement(run: Run, runs: Sequence[Run], several: set[str]) -> list[str]:
    """A run's lines of its section."""
    if run.missing:
        return [f"- {of_name(run)}: **no statement** ({run.missing})"]
    claim = next((one for one in reversed(CLAIMS) if one.script == run.script), Claim("", "", run.script, ""))
    first = comes_first(claim, run, runs) if claim.after else ""
    not_yet = f", *{NOT_YET} before {first}*" if first else ""
    links = " · ".join(link(run, file) for file in (REPORT, "verdict.json", *run.tables))
    limits = f"Limits: {run.answer.limits}"
    lines = [limits, order_line(claim, run, runs), f"About {about(run, several)}.", links]
    return [f"- {of_name(run)}{not_yet}: {run.answer.found}", *(f"  - {line}" for line in lines if line)]


def in_short(runs: Sequence[Run]) -> list[str]:
    """The verdicts, for a terminal."""
    said = [(claim.label, verdicts(claim, runs)) for claim in CLAIMS]
    said += [("other", f"{run.name}: {run.missing or run.leaf}") for run in runs if run.script not in SCRIPTS]
    width = max(len(label) for label, _ in said)
    lines = [*(f"{label:<{width}}  {text}" for label, text in said), "---", headline(runs)]
    return [line.replace("`", "").replace("*", "") for line in lines]


# ------------------------------------------------------------------------------------------------ the command
def write(root: pathlib.Path) -> None:
    """report.md of the folder, and the same in short on the terminal. Raises UserError, Fault.

    A report.md that lies there and is not the one that was written last is kept under another name.
    """
    runs = read(root)
    store.writable(root, "report")
    store.claim(root)
    store.put(root / RECORD, with_page(root, {REPORT: outline(runs).encode()}))
    print("\n".join([*in_short(runs), f"report: {root / REPORT}"]))
