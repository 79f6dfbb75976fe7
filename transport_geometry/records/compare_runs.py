"""Are two results folders the same run? One of four words, and the numbers behind it.

    python common.py diff A B    # exit 0 for the first three words, 1 for the last, 2: nothing to compare

*identical*: every file but run.json has the same bytes. *same SAEs*: no number differs by more than
evaluating one SAE on another processor changes it. *reproduced*: the SAEs were trained anew, every column is
within what another seed changes (z-scores against measured seed SDs, `bench/seed_sd.py`), and the verdict is
the same. *different*: what differs, where and by how much.

A condition is one row of conditions.csv; a cell is a condition without its seed. Where the two runs have
other seeds, cells are compared, else conditions. P pairs: what both runs have of one of them.
"""

import json
import math
import pathlib
from dataclasses import dataclass
from typing import Any

from transport_geometry import ROOT
from transport_geometry.errors import UserError, reading
from transport_geometry.records import store
from transport_geometry.records.results import TELLING, difference
from transport_geometry.records.store import RUN
from transport_geometry.records.tables import cell, grouped, markdown, read_table

import numpy as np
import scipy

SEED_SD = ROOT / "outputs/reference/seed_sd.csv"
LABELS = ("model", "layer", "sae", "recipe", "d_sae", "k", "seed", "tokens")
EXACT = {"n_seq", "n_tok", "n_sink"}  # counts, which nothing may change
# settings; `rows` is the version of the columns, of which the folder of an older one lacks some
MAY_DIFFER = {"seeds", "device", "python", "instructions", "save_tokens", "rows"}

# By how much evaluating one SAE elsewhere may change a column: (share of the value, plus so much). Measured
# with one cache on AMD's and on Intel's code, with AVX-512, AVX2 and neither, and with KERNELS=ref: at most a
# sixth of what is allowed here. Columns with labels drawn from the model move more: the last bit of p decides
# some draws.
EVALUATION = {
    "swd_sampled": (0.05, 1e-6),
    "gd_mean": (2e-3, 2e-4),
    **dict.fromkeys(["rho", "swd_seq"], (5e-3, 1e-6)),
    **dict.fromkeys(["alive", "dense"], (0.0, 5e-3)),
    **dict.fromkeys(["fed", "fed_nosink", "fed_iso_nosink", "fed_excess", "kl_excess"], (1e-4, 5e-3)),
}
ANY_OTHER_COLUMN = (3e-4, 1e-6)

# Bounds of *reproduced*
FAR, TOO_FAR = 3.0, 6.0  # |z| that is counted, and |z| that no seed gives
RARE = 1e-3  # chance that seeds alone put more pairs beyond FAR than are allowed
SHIFT = 3.5  # standard errors by which the mean of a column may be off


@dataclass(frozen=True)
class Run:
    """A results folder."""

    folder: pathlib.Path
    record: dict  # run.json; {} without one
    settings: dict
    rows: list[dict]  # of conditions.csv
    leaf: str  # of the verdict, with those of Exp-A's other arms and Exp-F's other pairs
    files: dict[str, str]  # {name: SHA-256} of what the run wrote and is there


@dataclass(frozen=True)
class Outcome:
    word: str  # identical, same SAEs, reproduced, different
    summary: str  # one line
    lines: list[str]  # the numbers behind it


@dataclass(frozen=True)
class Pair:
    """The rows that two runs have of one condition (one each) or of one cell (one a seed)."""

    label: str
    a: list[dict]
    b: list[dict]

    def values(self, column: str) -> tuple[list, list]:
        return [row[column] for row in self.a], [row[column] for row in self.b]


@dataclass(frozen=True)
class Spread:
    """What another seed does to one column, on a scale where the SD hardly depends on the value."""

    scale: str  # log, log of 1 - x, plain
    sd: dict[tuple[int, int], float]  # {(tokens, k): SD}
    df: dict[tuple[int, int], float]  # {(tokens, k): degrees of freedom of the SD}
    # variance of the mean z of n cells between two seeds, times n: 1 where cells are independent
    together: float

    def on_scale(self, x: float) -> float:
        """nan where the scale has no such value."""
        if self.scale == "plain":
            return x
        if self.scale == "log of 1 - x":
            x = 1 - x
        return math.log(x) if x > 0 else math.nan

    def at(self, tokens: int, k: int) -> tuple[int, int]:
        """The nearest (budget, k) that was measured, the budget first; the middle ones for null rows."""
        budget = _nearest(tokens, sorted({t for t, _ in self.sd}))
        return budget, _nearest(k, sorted(k for t, k in self.sd if t == budget))

    def z(self, apart: float, place: tuple[int, int], wide: float = math.sqrt(2)) -> float:
        """The normal deviate as rare as a difference of `apart` on the scale, whose SD is `wide` seed SDs.

        By Student's t, since the SD was measured too: 7 SDs of one with 12 degrees of freedom are z = 4.2.
        """
        tail = scipy.stats.t.sf(abs(apart) / (wide * self.sd[place]), self.df[place])
        return float(np.copysign(scipy.stats.norm.isf(max(tail, 1e-300)), apart))


def _nearest(value: int, measured: list[int]) -> int:
    if value <= 0:
        return measured[len(measured) // 2]
    return min(measured, key=lambda t: abs(math.log(max(t, 1) / value)))


@dataclass(frozen=True)
class SeedSpreads:
    """What another seed does, as `bench/seed_sd.py` measured it."""

    columns: dict[str, Spread]
    said: str  # where the SDs come from
    models: list[str]
    beyond: float  # share of conditions that two seeds put further apart than FAR in some column


# ---------------------------------------------------------------------------------------------------- reading
def read(folder: pathlib.Path) -> Run:
    """Raises UserError: no results folder, an empty one, files that cannot be read."""
    if not (folder / "conditions.csv").is_file():
        raise UserError(f"{folder}: no conditions.csv, so not a results folder")
    record, verdict = store.load(folder / RUN), {}
    if (folder / "verdict.json").exists():
        with reading(folder / "verdict.json"):
            verdict = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
            dict(verdict["settings"])
    rows = read_table(folder / "conditions.csv")
    if not rows:
        raise UserError(f"{folder}: conditions.csv holds no conditions")
    names = record.get("files") or [path.name for path in folder.iterdir()]
    return Run(
        folder=folder,
        record=record,
        settings=record.get("settings") or verdict.get("settings", {}),
        rows=rows,
        leaf=leaves_of(verdict),
        files={name: store.sha256(folder / name) for name in names if (folder / name).is_file()},
    )


def leaves_of(verdict: dict) -> str:
    """Of Exp-A, too, those of the other arms and pairs; of Exp-F those of all pairs."""
    others = [arm["leaf"] for arm in verdict.get("other_arms", [])]
    by_pair = [pair["leaf"] for pair in verdict.get("by_pair", {}).values()]
    return "; ".join(leaf for leaf in (verdict.get("leaf"), *others, *by_pair[1:]) if leaf)


def seed_spreads(path: pathlib.Path = SEED_SD) -> SeedSpreads:
    """Raises UserError where there are none, or none that can be read."""
    described = path.with_suffix(".json")
    if not (path.is_file() and described.is_file()):
        raise UserError(
            f"{path}: not there, so *reproduced* and *different* cannot be told apart "
            "(python bench/seed_sd.py makes it)"
        )
    columns: dict[str, Spread] = {}
    with reading(path):
        for row in read_table(path):
            spread = columns.setdefault(row["column"], Spread(row["scale"], {}, {}, row["together"]))
            place = row["tokens"], row["k"]
            spread.sd[place], spread.df[place] = row["sd"], row["df"]
    with reading(described):
        facts = json.loads(described.read_text(encoding="utf-8"))
        return SeedSpreads(columns, facts["said"], facts["models"], facts["conditions_beyond_3"])


def not_as_written(run: Run) -> list[str]:
    """Files that are not what the folder's run.json says."""
    return [
        f"{run.folder / name} is not as its run wrote it (SHA-256 {run.files[name][:12]}, "
        f"run.json says {digest[:12]})"
        for name, digest in run.record.get("files", {}).items()
        if run.files.get(name, digest) != digest
    ]


def other_settings(a: dict, b: dict) -> tuple[list[str], list[str]]:
    """(those that make two runs different, those that do not), the telling ones first."""
    reasons: list[str] = []
    notes: list[str] = []
    differing = {key for key in {**a, **b} if a.get(key) != b.get(key)}
    for key in sorted(differing, key=lambda key: (key not in ("text_sha256", *TELLING), key)):
        text = f"other {difference(key, a.get(key), b.get(key), ('A', 'B'))}"
        (notes if key in MAY_DIFFER else reasons).append(text)
    return reasons, notes


def paired(a: list[dict], b: list[dict]) -> tuple[list[Pair], list[str], str]:
    """(pairs, labels of what only one run has, of what: conditions, or cells where the seeds are others)."""
    kind = "conditions" if {row.get("seed") for row in a} == {row.get("seed") for row in b} else "cells"
    names = [name for name in LABELS if {name} <= a[0].keys() & b[0].keys()]
    names = [name for name in names if kind == "conditions" or name != "seed"]
    left, right = grouped(a, names), grouped(b, names)
    label = {key: " ".join(map(str, key)) for key in [*left, *right]}
    pairs = [Pair(label[key], left[key], right[key]) for key in left if key in right]
    return pairs, [label[key] for key in label if not (key in left and key in right)], kind


# ------------------------------------------------------------------------------- one SAE, evaluated elsewhere
def share_of_allowed(column: str, x: Any, y: Any) -> float:
    """|x - y| as a share of what evaluation may change; 0 where both are undefined, infinite where one is, or
    has no number.
    """
    if x == y or (x != x and y != y):
        return 0.0
    if column in EXACT or isinstance(x, str) or isinstance(y, str) or x != x or y != y:
        return math.inf
    relative, more = EVALUATION.get(column, ANY_OTHER_COLUMN)
    return abs(x - y) / (relative * max(abs(x), abs(y)) + more)


def beyond_evaluation(pairs: list[Pair], columns: list[str]) -> list[dict]:
    """Rows of a table, the worst first: columns in which a number differs by more than evaluation changes it.
    Of the first rows of each pair.
    """
    found = []
    for column in columns:
        shares = [share_of_allowed(column, pair.a[0][column], pair.b[0][column]) for pair in pairs]
        worst = int(np.argmax(shares))
        if shares[worst] > 1:
            x, y = pairs[worst].a[0][column], pairs[worst].b[0][column]
            row = {"column": column, "times what is allowed": f"{shares[worst]:.3g}"}
            row |= {"A": cell(x), "B": cell(y), "worst at": pairs[worst].label}
            found.append((shares[worst], row))
    return [row for _, row in sorted(found, key=lambda one: -one[0])]


# ----------------------------------------------------------------------------------------- SAEs trained twice
def z_scores(pairs: list[Pair], column: str, spread: Spread) -> np.ndarray:
    """z [P]: how far each pair is apart, in units of what two seeds are; inf where one side has no number."""
    scores = []
    for pair in pairs:
        x, y = pair.values(column)
        if x == y or all(v != v for v in x + y):
            scores.append(0.0)
            continue
        p, q = (np.mean([spread.on_scale(v) for v in values]) for values in (x, y))
        place = spread.at(pair.a[0].get("tokens", 0), pair.a[0].get("k", 0))
        z = spread.z(float(q - p), place, math.sqrt(1 / len(x) + 1 / len(y)))
        scores.append(z if math.isfinite(z) else math.inf)
    return np.array(scores)


def trained_anew(
    pairs: list[Pair], kind: str, columns: list[str], spreads: SeedSpreads
) -> tuple[list[str], list[str], str]:
    """(reasons why it is not reproduced, lines, summary)."""
    known = [name for name in columns if name in spreads.columns]
    free = [name for name in known if any(spreads.columns[name].sd.values())]
    fixed = [name for name in columns if name in EXACT or name in known and name not in free]
    reasons = [
        f"{row['column']}, which no seed changes ({row['A']} | {row['B']} at {row['worst at']})"
        for row in beyond_evaluation(pairs, fixed)
    ]
    lines = [f"seed SDs: {spreads.said}"]
    if unknown := [name for name in columns if name not in {*free, *fixed}]:
        lines.append(f"not compared, as no seed SD was measured: {some(unknown, 12)}")
    if elsewhere := not_measured_on(pairs, spreads):
        lines.append(f"no seed SD was measured on {some(elsewhere)}: take the z-scores as a guide")
    if not free:
        return [*reasons, "no column with a measured seed SD"], lines, ""
    far, more, summary = against_seeds(pairs, kind, free, spreads)
    return reasons + far, lines + more, summary


def not_measured_on(pairs: list[Pair], spreads: SeedSpreads) -> list[str]:
    """Models and budgets that the seed SDs are not about."""
    models = {pair.a[0].get("model", "") for pair in pairs} - {*spreads.models}
    budgets = {pair.a[0].get("tokens", 0) for pair in pairs} - {0}
    known = {tokens for spread in spreads.columns.values() for tokens, _ in spread.sd}
    far = [tokens for tokens in sorted(budgets) if not any(0.5 <= tokens / there <= 2 for there in known)]
    return [*sorted(models), *(f"{tokens} tokens" for tokens in far)]


def against_seeds(
    pairs: list[Pair], kind: str, columns: list[str], spreads: SeedSpreads
) -> tuple[list[str], list[str], str]:
    """(reasons why it is not reproduced, lines, summary), of columns that a seed changes."""
    z = np.array([z_scores(pairs, name, spreads.columns[name]) for name in columns])  # [columns, P]
    size, n = np.abs(z), len(pairs)
    trained = np.array([pair.a[0].get("recipe") != "null" for pair in pairs])
    mean = np.array([np.mean(row[ok] if (ok := trained & np.isfinite(row)).any() else 0.0) for row in z])
    together = np.ones(len(columns))  # with the same seeds every SAE moves by itself
    if kind == "cells":
        # With other seeds the cells of a column move together. How much is badly known from one column's few
        # pairs of seeds, so the median of all columns is the least.
        together = np.array([spreads.columns[name].together for name in columns])
        together = np.maximum(together, max(1.0, np.median(together)))
    se = np.sqrt(together / max(trained.sum(), 1))

    reasons = []
    beyond = int((size > FAR).any(0).sum())
    allowed = int(scipy.stats.binom.ppf(1 - RARE, n, spreads.beyond))
    if beyond > allowed:
        reasons.append(f"{beyond} of {n} {kind} beyond {FAR:.0f} seed SDs")
    if bad := [name for name, largest in zip(columns, size.max(1)) if largest > TOO_FAR]:
        reasons.append(f"columns beyond {TOO_FAR:.0f} seed SDs: {some(bad, 5)}")
    if off := [name for name, shift in zip(columns, np.abs(mean) / se) if shift > SHIFT]:
        reasons.append(f"columns off as a whole: {some(off, 5)}")

    # columns that are off as a whole, then the others by their largest |z|: five, and all out of the ordinary
    table = []
    for rank, i in enumerate(np.lexsort((-size.max(1), np.abs(mean) <= SHIFT * se))):
        if rank < 5 or columns[i] in off or size[i].max() > FAR:
            worst = int(size[i].argmax())
            x, y = (cell(float(np.mean(values))) for values in pairs[worst].values(columns[i]))
            row = {"column": columns[i], "worst z": f"{z[i, worst]:+.1f}"}
            row |= {"mean z": f"{mean[i]:+.2f} ± {se[i]:.2f}", f"> {FAR:.0f}": int((size[i] > FAR).sum())}
            table.append(row | {"A": x, "B": y, "worst at": pairs[worst].label})
    normal, seen = 2 * scipy.stats.norm.sf(FAR) * z.size, SHIFT * np.median(se) * math.sqrt(2)
    lines = [
        f"|z| > {FAR:.0f}: {(size > FAR).sum()} of {z.size} numbers (normal: {normal:.1f}), in {beyond} of "
        f"{n} {kind} (between seeds {spreads.beyond * n:.1f}, allowed {allowed}); largest {size.max():.1f}",
        f"mean z of a column: within {SHIFT} standard errors in {len(columns) - len(off)} of {len(columns)}; "
        f"a shift of {seen:.2g} seed SDs would be seen",
    ]
    summary = (
        f"{n} {kind}, {len(columns)} columns within what another seed does: largest |z| {size.max():.1f}, "
        f"beyond {FAR:.0f} in {beyond} (allowed {allowed})"
    )
    return reasons, lines + markdown(table).splitlines(), summary


# --------------------------------------------------------------------------------------------------- the word
def some(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def compare(a: Run, b: Run, spreads: SeedSpreads | None = None) -> Outcome:
    """The word for two results folders; `spreads`: the committed ones if None. Raises UserError."""
    lines = [
        f"{run.folder}: no run.json, so it cannot be checked that its files are as they were written"
        for run in (a, b)
        if not run.record
    ]
    if edited := not_as_written(a) + not_as_written(b):
        return Outcome("different", some(edited, 1), lines + edited)
    if a.files == b.files:
        return Outcome("identical", f"{len(a.files)} files, to the byte", lines)
    if others := sorted(name for name in {**a.files, **b.files} if a.files.get(name) != b.files.get(name)):
        lines.append(f"files that differ: {', '.join(others)}")

    # were they runs of the same thing?
    reasons, notes = other_settings(a.settings, b.settings)
    lines += [f"settings: {note}" for note in notes]
    pairs, alone, kind = paired(a.rows, b.rows)
    if alone:
        reasons.append(f"{len(alone)} {kind} in one folder only ({some(alone)})")
    if not pairs:
        return Outcome("different", "; ".join(reasons), lines)
    columns = [name for name in a.rows[0] if name in b.rows[0] and name not in LABELS]
    if one_sided := sorted({*a.rows[0]} ^ {*b.rows[0]}):
        lines.append(f"columns in one folder only, not compared: {some(one_sided, 8)}")
    other_leaf = []
    if a.leaf and b.leaf and a.leaf != b.leaf:
        other_leaf = [f"another verdict ({a.leaf} | {b.leaf})"]

    # are the numbers those of the same SAEs?
    above = beyond_evaluation(pairs, columns) if kind == "conditions" else []
    if kind == "conditions" and not (reasons or other_leaf or above):
        return Outcome(
            "same SAEs",
            f"{len(pairs)} conditions, {len(columns)} columns, no further apart than evaluation on another "
            "processor",
            lines,
        )
    from_files = bool(a.settings.get("saes"))  # SAEs that exist: nothing was trained anew
    if from_files and above:
        reasons.append(f"{len(above)} columns of the same SAE files further apart than evaluation makes them")
    if above and reasons:
        lines += ["further apart than evaluation on another processor:", *markdown(above).splitlines()]
    if reasons or from_files:
        return Outcome("different", "; ".join(reasons + other_leaf), lines)

    # are they those of another seed?
    reasons, more, summary = trained_anew(pairs, kind, columns, spreads or seed_spreads())
    if reasons or other_leaf:
        return Outcome("different", "; ".join(reasons + other_leaf), lines + more)
    return Outcome("reproduced", summary + (f"; verdict {a.leaf}" if a.leaf else ""), lines + more)


def diff(a: pathlib.Path, b: pathlib.Path) -> int:
    """Print the word for two results folders and what is behind it; 1 for *different*, else 0. Raises
    UserError.
    """
    left, right = read(a), read(b)
    outcome = compare(left, right)
    processors = [run.record.get("processor") for run in (left, right)]
    if outcome.word != "identical" and all(processors):
        print(f"processors: {processors[0]} | {processors[1]}")
    print("\n".join([*outcome.lines, f"{outcome.word}: {outcome.summary}"]))
    return int(outcome.word == "different")
