"""What all finished experiments of a folder say together, as one outline.

    python common.py report outputs/     # outputs/report.md

Each statement is the answer of an experiment's own report and the leaf of its own verdict, behind the gate
that its verdict names; nothing is computed here. Only what lies there as its run wrote it is shown. The
outline is a pure function of those files: same folders, same bytes.

A *run* is a folder with a run.json, directly in the folder or one below; its name is its path from there. A
*claim* is a hypothesis, or the question of an experiment that has none.
"""

import json
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transport_geometry import answer, store
from transport_geometry.errors import Damaged, UserError, printable, reading
from transport_geometry.leaderboard import ADJUDICATED
from transport_geometry.page import with_page
from transport_geometry.store import RUN
from transport_geometry.tables import readable_count

from tqdm import tqdm

REPORT, RECORD = "report.md", "report.json"  # of the outline, in the folder that it is about
NOT_YET = "*not to be interpreted yet*"


@dataclass(frozen=True)
class Claim:
    """label: as the outline calls it; words: what a verdict that says *supported* supports, or the question
    that it answers; script: decides it; gated: it stands behind H2, or is H2 behind Exp-A.
    """

    label: str
    words: str
    script: str
    gated: bool = False


# in the order in which they may be interpreted, then what is in no order
CLAIMS = (
    Claim(
        "H0",
        "the cross-scale CE gap is an optimisation artefact: it goes to zero as the SAE token budget grows",
        "expa",
    ),
    Claim("H1", "a residual magnitude gap stays after convergence", "expa"),
    Claim(
        "N",
        "... and it is only how R² is normalised: a sink-free or deflated Euclidean score does not show it",
        "expa",
    ),
    Claim("H2", "a sensitivity-weighted proxy (SWD, ...) predicts CE better than R²", "expb", gated=True),
    Claim("H2′", "the pullback Fisher adds predictive value beyond SWD", "expc_fisher", gated=True),
    Claim(
        "H3",
        "MI-derived task-relevant dimension departs from geometric dimension (PR) exactly where the proxy "
        "fails worst",
        "expd_mi",
        gated=True,
    ),
    Claim("planted control", "does the instrument find what was put there?", "expp_planted"),
    Claim(
        "attention plan",
        "the divergence between attention rows before and after the patch predicts CE_rec beyond the best "
        "Euclidean control",
        "expe_attention",
        gated=True,
    ),
    Claim(
        "rate",
        "at equal bits, is what the larger model's SAE loses over the smaller one's the same in R² as in CE?",
        "expf_rate",
    ),
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
    answer: str = ""  # of its report, and what that may not be taken for
    limits: str = ""
    tables: tuple[str, ...] = ()  # file names
    sha256: str = ""  # of its verdict.json, as its run wrote it

    @property
    def leaf(self) -> str:
        return str(self.verdict["leaf"])

    @property
    def gate_of_h2(self) -> str:
        """What Exp-A's verdict did to this one: opened, left shut; "" where it stands behind no gate."""
        if "gate_text" not in self.verdict:
            return ""
        h2 = self.verdict.get("h2", self.verdict)  # Exp-C has an H2 of its own SAEs
        return "left shut" if h2["leaf"] == "gated" else "opened"


# ------------------------------------------------------------------------------------------- reading the runs
def folders(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Those of runs, in the order of their names. Nothing below a run, and nothing hidden."""
    for path in below(root):
        if (path / RUN).exists():
            yield path
        else:
            yield from (deeper for deeper in below(path) if (deeper / RUN).exists())


def below(folder: pathlib.Path) -> list[pathlib.Path]:
    with reading(folder):
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read(root: pathlib.Path) -> list[Run]:
    """Every run in the folder, as its script comes among SCRIPTS, then by name. Raises UserError: no finished
    run, or a run's own folder.
    """
    if (root / RUN).exists():
        raise UserError(f"report {root}: a run's own folder; name the folder above it")
    if not root.is_dir():
        raise UserError(f"report {root}: no such folder")
    runs = [
        read_run(root, path)
        for path in tqdm(list(folders(root)), desc="runs", leave=False, delay=2, disable=None)
    ]
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
            run = replace(run, settings=facts["settings"], sha256=files.get("verdict.json", ""))
            about(run, set())  # settings that cannot be said are not a run's
        if facts.get("coming") or facts.get("seconds") is None:
            return replace(run, missing="unfinished: the same command goes on from there")
        if not {"verdict.json", REPORT} <= files.keys():
            return replace(run, missing=f"measured, no verdict yet: `python {run.script}.py --from` makes it")
        for file in files:
            store.checked(record, file)
        with reading(folder / REPORT):
            found, limits = answer.read((folder / REPORT).read_text(encoding="utf-8"))
        verdict = read_verdict(folder / "verdict.json")
    except UserError as why:
        return replace(run, missing=" ".join(str(why).replace(f"{folder}/", "").split()))
    tables = tuple(file for file in sorted(files) if file.endswith(".csv"))
    return replace(run, verdict=verdict, answer=found, limits=limits, tables=tables)


def read_verdict(path: pathlib.Path) -> dict[str, Any]:
    """Raises Damaged where it lacks what the outline takes from it."""
    with reading(path):
        verdict = json.loads(path.read_text(encoding="utf-8"))
        taken = [verdict["leaf"], verdict.get("gate_text", ""), verdict.get("h2", verdict)["leaf"]]
        if not all(isinstance(text, str) for text in taken):
            raise Damaged(f"{path}: not a verdict")
    return verdict


# ------------------------------------------------------------------------------------------ what a run says
def word(claim: Claim, run: Run) -> tuple[str, bool]:
    """(the verdict's word on the claim, may it be interpreted).

    Exp-A's one leaf is about three claims: once it has adjudicated, its verdict holds what each came to. N is
    about a gap that stays, so it stands behind the other two.
    """
    if claim.script != "expa":
        return run.leaf, run.leaf != "gated"
    if run.leaf not in ADJUDICATED:
        return run.leaf, claim.label != "N"
    came_to = {"H0": run.verdict.get("h0"), "H1": run.verdict.get("h1"), "N": run.leaf == "N"}[claim.label]
    shown = "not judged" if came_to is None else "shown" if came_to else "not shown"
    return (f"{shown}, and N says how" if claim.label == "H1" and run.leaf == "N" else shown), True


def openers(run: Run, runs: Sequence[Run]) -> list[Run]:
    """Those whose verdict is the one that this run's gate was decided by: its verdict names the SHA-256."""
    found = re.search(r"\(sha256 ([0-9a-f]{12})\)", run.verdict.get("gate_text", ""))
    return [one for one in runs if found and one.script == "expa" and one.sha256.startswith(found[1])]


def gate_line(claim: Claim, run: Run, runs: Sequence[Run]) -> str:
    """The gate that the run stood behind, or those that it decided."""
    if run.script == "expa":
        decided = {
            state: [one for one in runs if one.gate_of_h2 == state and run in openers(one, runs)]
            for state in ("opened", "left shut")
        }
        said = "; ".join(f"{state} for {named(ones)}" for state, ones in decided.items() if ones)
        return f"The gate of H2: {said}." if said else "The gate of H2: read by no other run here."
    if not run.gate_of_h2:
        return "Its verdict names no gate." if claim.gated else ""
    text, by = run.verdict["gate_text"], openers(run, runs)
    if by:
        leaf = text.removeprefix("Exp-A says ").partition(" (sha256")[0]
        lost = "".join(f"; of {code(one.name)} itself no statement is shown" for one in by if one.missing)
        said = f"{run.gate_of_h2} by {named(by)}, which says {leaf}{lost}"
    elif "(sha256 " in text:
        said = f"{run.gate_of_h2} by a verdict that is not in this folder: {text}"
    else:
        said = f"{run.gate_of_h2}: {text}"
    return f"The gate of H2: {said}.{own_gate(run, runs)}"


def own_gate(run: Run, runs: Sequence[Run]) -> str:
    """What H2 came to on the run's own SAEs, where it stands behind that, and where Exp-B says otherwise."""
    if "h2" not in run.verdict:
        return ""
    own = run.verdict["h2"]["leaf"]
    others = [one for one in runs if one.script == "expb" and not one.missing and one.leaf != own]
    otherwise = "".join(f"; in {code(one.name)} it is {one.leaf}" for one in others)
    return f" Its own gate: H2 on its own SAEs is {own}{otherwise}."


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
def code(name: str) -> str:
    """A name as it is, also in a table."""
    return "`" + name.replace("|", "\\|") + "`"


def of_name(run: Run) -> str:
    return code(run.name)


def named(runs: Sequence[Run]) -> str:
    return ", ".join(map(of_name, runs))


def link(run: Run, file: str) -> str:
    return f"[{file}]({urllib.parse.quote(f'{run.name}/{file}')})"


def linked(run: Run) -> str:
    """The run's name, leading to its report."""
    return f"[{code(run.name)}]({urllib.parse.quote(f'{run.name}/{REPORT}')})"


def verdicts(claim: Claim, runs: Sequence[Run], call: Callable[[Run], str]) -> str:
    """The word of each of the claim's runs, or that there is none. call: gives a run its name."""
    said = []
    for run in (run for run in runs if run.script == claim.script):
        if run.missing:
            said.append(f"{code(run.name)}: no statement")
            continue
        text, may = word(claim, run)
        said.append(f"{call(run)}: {text if may else f'{NOT_YET} ({text})'}")
    return "; ".join(said) or f"not run: `python {claim.script}.py`"


def headline(runs: Sequence[Run]) -> str:
    """How far it may be read."""
    readable: dict[str, list[str]] = {}  # {verdicts: claims of which these are}
    shut: list[str] = []
    none: list[str] = []
    not_run: list[str] = []
    for claim in CLAIMS:
        here = [run for run in runs if run.script == claim.script]
        stated = [run for run in here if not run.missing]
        if any(word(claim, run)[1] for run in stated):
            readable.setdefault(verdicts(claim, stated, of_name), []).append(claim.label)
        else:
            (shut if stated else none if here else not_run).append(claim.label)
    none += [of_name(run) for run in runs if not run.script]
    parts = {
        "May be read": [f"{', '.join(labels)} ({said})" for said, labels in readable.items()],
        "Not to be interpreted yet": shut,
        "No statement": none,
        "Not run": not_run,
    }
    return " ".join(f"{what}: {', '.join(said)}." for what, said in parts.items() if said)


HEAD = """\
# What the experiments in this folder say, in the order in which it may be read

**{headline}**

Never skip a gate: {order}. What stands behind a gate that is shut is marked {not_yet}, whatever it would \
read without the gate. Each statement is its run's own, copied from its report and verdict and linked to its \
tables; nothing is computed here, and statements about different models, SAEs or texts do not add up.

|    | claim or question | verdict, by folder |
|----|-------------------|--------------------|
{rows}
"""


def outline(runs: Sequence[Run]) -> str:
    """The report, in Markdown. runs: as `read` gives them."""
    rows = [f"| {claim.label} | {claim.words} | {verdicts(claim, runs, linked)} |" for claim in CLAIMS]
    parts = [HEAD.format(headline=headline(runs), order=ORDER, not_yet=NOT_YET, rows="\n".join(rows))]
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
        return f"`{script}.py`, an experiment that this outline does not know"
    return f"{labels}: {TITLES[script]}, `{script}.py`" if script in TITLES else f"{labels}: `{script}.py`"


def statement(run: Run, runs: Sequence[Run], several: set[str]) -> list[str]:
    """A run's lines of its section."""
    if run.missing:
        return [f"- {code(run.name)}: **no statement** ({run.missing})"]
    claim = next((one for one in reversed(CLAIMS) if one.script == run.script), Claim("", "", run.script))
    shut = "" if run.leaf != "gated" else f", {NOT_YET}"
    found = run.answer or f"{run.leaf}: its report has no answer in bold."
    links = " · ".join(link(run, file) for file in (REPORT, "verdict.json", *run.tables))
    limits = f"{answer.LIMITS}{run.limits}" if run.limits else ""
    lines = [limits, gate_line(claim, run, runs), f"About {about(run, several)}.", links]
    return [f"- {code(run.name)}{shut}: {found}", *(f"  - {line}" for line in lines if line)]


def in_short(runs: Sequence[Run]) -> list[str]:
    """The verdicts, for a terminal."""
    said = [(claim.label, verdicts(claim, runs, of_name)) for claim in CLAIMS]
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
