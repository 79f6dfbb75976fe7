"""Is it the same run? Two results folders, one of four words, and the numbers behind it.

    python common.py diff A B    # exit 0 for the first three words, 1 for the last, 2: nothing to compare

*identical*: every file but run.json, to the byte. *same SAEs*: no more than what another processor changes in
evaluating one and the same SAE. *reproduced*: SAEs trained anew, every column within what another seed does
(z-scores against seed SDs that were measured, `bench/seed_sd.py`), the same verdict, the same ranks,
estimates inside each other's intervals. *different*: what, where and how much.

A condition is one row of conditions.csv; a cell is a condition without its seed. P pairs of conditions (or of
cells) are compared. What makes two runs different ones is a *reason*; what is only printed is a line.
"""

import json
import math
import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transport_geometry import ROOT
from transport_geometry.errors import UserError, reading
from transport_geometry.records import store
from transport_geometry.records.results import without_shared
from transport_geometry.records.store import RUN
from transport_geometry.records.tables import cell, read_table

import numpy as np
import scipy

SEED_SD = ROOT / "outputs/reference/seed_sd.csv"
LABELS = ("model", "layer", "sae", "recipe", "d_sae", "k", "seed", "tokens")
EXACT = {"n_seq", "n_tok", "n_sink", "n_cells", "n_clusters"}
KEYS = {
    "leaderboard.csv": ("proxy", "target", "stratum"),
    "deltas.csv": ("small", "large", "depth", "recipe", "sinks", "k", "tokens"),
}
# settings of two runs that may still be called one
MAY_DIFFER = {"seeds", "device", "python", "instructions", "save_tokens"}
WORDS = {
    "text_sha256": "other text",
    "data_content": "other text",
    "weights": "other weights",
    "tokenizers": "other tokenizers",
    "models": "other models",
    "saes": "other SAEs",
    "script": "another script",
}

# What evaluating one SAE elsewhere changes, as (share of the value, and so much more). Measured with one
# cache on AMD's and on Intel's code, with AVX-512, AVX2 and neither, and with KERNELS=ref: a sixth of what is
# allowed here at most. Columns with labels drawn from the model move more: the last bit of p decides some
# draws.
ROUNDING = {
    "swd_sampled": (0.05, 1e-6),
    "rho": (5e-3, 1e-6),
    "fed": (1e-4, 5e-3),
    "fed_nosink": (1e-4, 5e-3),
    "fed_iso_nosink": (1e-4, 5e-3),
    "fed_excess": (1e-4, 5e-3),
    "swd_seq": (5e-3, 1e-6),
    "gd_mean": (2e-3, 2e-4),
    "alive": (0.0, 5e-3),
    "dense": (0.0, 5e-3),
    "kl_excess": (1e-4, 5e-3),
}
LITTLE = (3e-4, 1e-6)  # every other column
TABLES = (1e-5, 1e-9)  # numbers of two tables made from the same rows

# Bounds of *reproduced*
FAR, TOO_FAR = 3.0, 6.0  # |z| that is counted, and that is never a seed's doing
RARE = 1e-3  # chance that seeds alone give more conditions beyond FAR than are allowed
SHIFT = 3.5  # standard errors by which a whole column may be off
# share of estimates outside the other run's 95% interval: between seeds up to .12 on 4 hooks
# (bench/RESULTS.md)
OUTSIDE = 0.2
# rank correlation of the proxies' partial correlations, where there are hooks enough to ask
SAME_RANKS, FEW_HOOKS = 0.5, 6


@dataclass(frozen=True)
class Run:
    """A results folder as it lies there."""

    folder: pathlib.Path
    record: dict  # run.json; {} without one
    settings: dict
    rows: list[dict]
    tables: dict[str, list[dict]]  # {name: rows} of KEYS
    verdict: dict
    files: dict[str, str]  # {name: SHA-256} of what the run wrote and is there


@dataclass(frozen=True)
class Outcome:
    word: str  # identical, same SAEs, reproduced, different
    summary: str  # one line
    lines: list[str]  # the numbers behind it


@dataclass(frozen=True)
class Spread:
    """What another seed does to one column: SDs on a scale where they hardly depend on the value, at (tokens,
    k).
    """

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
        """(budget, k) nearest among those measured: the budget first. Null rows, without either: the middle
        ones.
        """
        budget = _nearest(tokens, sorted({t for t, _ in self.sd}))
        return budget, _nearest(k, sorted(k for t, k in self.sd if t == budget))

    def z(self, apart: float, place: tuple[int, int], wide: float = math.sqrt(2)) -> float:
        """The normal deviate as rare as a difference of `apart` on the scale, whose SD is `wide` of the
        seeds'.

        By Student's t, as the SD was measured too: what looks like 7 SDs of an SD from 12 degrees of freedom
        is 4.2.
        """
        tail = scipy.stats.t.sf(abs(apart) / (wide * self.sd[place]), self.df[place])
        return float(np.copysign(scipy.stats.norm.isf(max(tail, 1e-300)), apart))


def _nearest(value: int, there: list[int]) -> int:
    if value <= 0:
        return there[len(there) // 2]
    return min(there, key=lambda t: abs(math.log(max(t, 1) / value)))


@dataclass(frozen=True)
class SeedSpreads:
    """What another seed does, as `bench/seed_sd.py` measured it."""

    columns: dict[str, Spread]
    said: str  # where the SDs come from
    models: list[str]
    beyond: float  # share of conditions that two seeds put further apart than FAR in some column


@dataclass(frozen=True)
class Pair:
    """The rows that two runs have of one condition (one each) or of one cell (one a seed)."""

    label: str
    a: list[dict]
    b: list[dict]


@dataclass(frozen=True)
class Pairs:
    """What two runs have in common."""

    both: list[Pair]
    alone: list[str]  # labels of what only one has
    by_condition: bool  # else by cell, as the seeds are others

    @property
    def kind(self) -> str:
        return "conditions" if self.by_condition else "cells"


@dataclass(frozen=True)
class Moved:
    """The number of a column that moved most, x | y."""

    column: str
    share: float  # of what rounding may do
    label: str
    x: Any
    y: Any


@dataclass(frozen=True, order=True)
class Outside:
    """An estimate of one run outside the other's interval."""

    far: float  # half widths beyond its end
    what: str
    value: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Column:
    """One column of P pairs. z [P]: nan where its scale has no such value."""

    name: str
    z: np.ndarray
    trained: np.ndarray  # [P] bool: not a null row
    se: float  # of the mean z of the trained ones
    labels: list[str]
    values: list[tuple[float, float]]

    @property
    def mean(self) -> float:
        z = self.z[self.trained & np.isfinite(self.z)]
        return float(z.mean()) if len(z) else 0.0

    @property
    def size(self) -> np.ndarray:
        return np.where(np.isfinite(self.z), np.abs(self.z), np.inf)

    @property
    def worst(self) -> int:
        return int(self.size.argmax())

    def shifted(self) -> bool:
        return abs(self.mean) > SHIFT * self.se

    def line(self) -> list[str]:
        return [
            self.name,
            f"{self.z[self.worst]:+.1f}",
            f"{self.mean:+.2f} ± {self.se:.2f}",
            str(int((self.size > FAR).sum())),
            *map(cell, self.values[self.worst]),
            self.labels[self.worst],
        ]


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
    tables = {name: read_table(folder / name) for name in KEYS if (folder / name).is_file()}
    names = record.get("files") or ["conditions.csv", *tables, *(["verdict.json"] if verdict else [])]
    return Run(
        folder=folder,
        record=record,
        settings=record.get("settings") or verdict.get("settings", {}),
        rows=rows,
        tables=tables,
        verdict=verdict,
        files={name: store.sha256(folder / name) for name in names if (folder / name).is_file()},
    )


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


# ---------------------------------------------------------------------------------- what was run, and on what
def not_as_written(run: Run) -> list[str]:
    """Files that are not what the folder's run.json says."""
    return [
        f"{run.folder / name} is not as its run wrote it (SHA-256 {run.files[name][:12]}, "
        f"run.json says {digest[:12]})"
        for name, digest in run.record.get("files", {}).items()
        if run.files.get(name, digest) != digest
    ]


def other_settings(a: dict, b: dict) -> tuple[list[str], list[str]]:
    """(reasons, notes): settings that make two runs different ones, and those that do not."""
    reasons: list[str] = []
    notes: list[str] = []
    first = list(WORDS)
    for key in sorted({*a, *b}, key=lambda key: (first.index(key) if key in WORDS else len(first), key)):
        x, y = a.get(key), b.get(key)
        if x == y:
            continue
        if isinstance(x, dict) and isinstance(y, dict):
            x, y = without_shared(x, y), without_shared(y, x)
        text = f"{WORDS.get(key, f'other {key}')} ({key}: {_shortened(str(x))} | {_shortened(str(y))})"
        (notes if key in MAY_DIFFER else reasons).append(text)
    return reasons, notes


def _shortened(text: str) -> str:
    if re.fullmatch("[0-9a-f]{40,}", text):
        return text[:12]
    return text if len(text) < 70 else text[:60] + "..."


def paired(a: list[dict], b: list[dict]) -> Pairs:
    """By cell where the seeds are others."""
    by_condition = {row.get("seed") for row in a} == {row.get("seed") for row in b}
    names = [c for c in LABELS if c in a[0] and (by_condition or c != "seed")]

    def by_key(rows: list[dict]) -> dict[tuple, list[dict]]:
        groups: dict[tuple, list[dict]] = {}
        for row in rows:
            groups.setdefault(tuple(row.get(c) for c in names), []).append(row)
        return groups

    def label(key: tuple) -> str:
        return " ".join(map(str, key))

    left, right = by_key(a), by_key(b)
    return Pairs(
        both=[Pair(label(key), left[key], right[key]) for key in left if key in right],
        alone=[label(key) for key in in_one_of(left, right)],
        by_condition=by_condition,
    )


def in_one_of(a: dict, b: dict) -> list:
    """Keys that only one of the two has, in their order."""
    return [key for key in [*a, *b] if not (key in a and key in b)]


def in_one_only(a: Run, b: Run) -> list[str]:
    """Lines: columns and tables that cannot be compared."""
    lines = []
    if columns := sorted(in_one_of(a.rows[0], b.rows[0])):
        lines.append(f"columns in one folder only: {some(columns, 8)}")
    return lines + [f"{name} in one folder only" for name in KEYS if (name in a.tables) != (name in b.tables)]


# ----------------------------------------------------------------------------------- one SAE, evaluated twice
def differ(x: Any, y: Any, allowed: tuple[float, float]) -> float:
    """|x - y| as a share of what is allowed; 0 where both are undefined, infinite where one is, or two names
    differ.
    """
    if x == y or (x != x and y != y):
        return 0.0
    if isinstance(x, str) or isinstance(y, str) or x != x or y != y:
        return math.inf
    relative, more = allowed
    return abs(x - y) / (relative * max(abs(x), abs(y)) + more) if relative or more else math.inf


def number_columns(a: list[dict], b: list[dict]) -> list[str]:
    return [c for c in a[0] if c in b[0] and c not in LABELS]


def moved(pairs: list[Pair], columns: list[str]) -> list[Moved]:
    """Columns in which a number moved by more than rounding does, the worst first. Of the first rows of each
    pair.
    """
    found = []
    for column in columns:
        allowed = (0.0, 0.0) if column in EXACT else ROUNDING.get(column, LITTLE)
        shares = [differ(pair.a[0][column], pair.b[0][column], allowed) for pair in pairs]
        worst = max(range(len(pairs)), key=shares.__getitem__)
        if shares[worst] > 1:
            pair = pairs[worst]
            found.append(Moved(column, shares[worst], pair.label, pair.a[0][column], pair.b[0][column]))
    return sorted(found, key=lambda item: -item.share)


def edited_rows(pairs: list[Pair], columns: list[str]) -> list[str]:
    """Rows in which a number moved by more than evaluation moves it while most did not move at all: no
    training does that.
    """
    found = []
    for pair in pairs:
        x, y = pair.a[0], pair.b[0]
        known = [c for c in columns if x.get("recipe") != "null" and x[c] == x[c]]
        apart = [c for c in known if differ(x[c], y[c], ROUNDING.get(c, LITTLE)) > 1]
        if apart and 2 * sum(x[c] == y[c] for c in known) > len(known):
            found.append(
                f"{apart[0]} of {pair.label} is {cell(x[apart[0]])} | {cell(y[apart[0]])} while most of its "
                "row is the same to the last digit"
            )
    return found


# ---------------------------------------------------------------------------------------- tables and verdicts
def estimates(run: Run) -> dict[str, tuple[float, float, float]]:
    """{what: (value, lo, hi)}: everything in the tables and the verdict that has an interval."""
    found: dict[str, tuple[float, float, float]] = {}
    for name, rows in run.tables.items():
        for row in rows:
            found |= _with_interval(f"{name} {' '.join(str(row.get(c)) for c in KEYS[name])}", row)
    verdict = {key: value for key, value in run.verdict.items() if key != "settings"}
    found |= _with_interval("verdict.json", verdict)
    return {what: value for what, value in found.items() if all(map(math.isfinite, value))}


def _with_interval(name: str, content: Any) -> dict[str, tuple]:
    """{path of a key below `name`: (value, lo, hi)} wherever `key`, `key_lo` and `key_hi` are numbers; the
    ends of `value` are `lo` and `hi`.
    """
    found: dict[str, tuple] = {}
    if isinstance(content, list):
        for i, item in enumerate(content):
            found |= _with_interval(f"{name}[{i}]", item)
    elif isinstance(content, dict):
        for key, value in content.items():
            found |= _with_interval(f"{name}.{key}", value)
            ends = ("lo", "hi") if key == "value" else (f"{key}_lo", f"{key}_hi")
            numbers = (value, *(content.get(end) for end in ends))
            if all(isinstance(number, (int, float)) for number in numbers):
                found[f"{name}.{key}"] = numbers
    return found


def outside(a: Run, b: Run) -> tuple[list[Outside], int]:
    """(estimates outside the other run's interval, the furthest first; how many were compared).

    An interval is taken to hold its own estimate, which bootstrap percentiles need not; one without width is
    of a proxy and itself. Of runs with unequally many seeds only the wider intervals are asked: more seeds
    know more than fewer can.
    """
    mine, theirs = estimates(a), estimates(b)
    more = len(a.settings.get("seeds") or []) - len(b.settings.get("seeds") or [])
    ways = [(mine, theirs), (theirs, mine)]
    if more:
        ways = ways[:1] if more > 0 else ways[1:]
    found, compared = [], 0
    for what in mine:
        if what not in theirs or not all(lo < hi for _, lo, hi in (mine[what], theirs[what])):
            continue
        compared += 1
        far = []
        for left, right in ways:
            value, (own, lo, hi) = left[what][0], right[what]
            lo, hi = min(lo, own), max(hi, own)
            room = 1e-6 + 1e-4 * max(abs(lo), abs(hi))
            if not lo - room <= value <= hi + room:
                far.append(Outside(max(lo - value, value - hi) / ((hi - lo) / 2), what, value, lo, hi))
        if far:
            found.append(max(far))
    return sorted(found, reverse=True), compared


def other_estimates(a: Run, b: Run) -> tuple[list[str], list[str]]:
    """(reasons, lines)."""
    out, compared = outside(a, b)
    if not compared:
        return [], []
    lines = [
        f"estimates outside the other run's 95% interval: {len(out)} of {compared} "
        f"(allowed {math.floor(OUTSIDE * compared)})"
    ]
    if out:
        lines += aligned([[o.what, cell(o.value), f"[{cell(o.lo)}, {cell(o.hi)}]"] for o in out[:3]])
    if len(out) <= OUTSIDE * compared:
        return [], lines
    return [f"{len(out)} of {compared} estimates outside the other run's interval"], lines


def rank_correlation(a: Run, b: Run) -> tuple[float, int]:
    """(Spearman correlation of the proxies' partial correlations with CE_rec over all conditions, hooks or
    cells behind it). nan with fewer than 3 proxies.
    """
    left, right = _pooled(a), _pooled(b)
    both = [proxy for proxy in left if proxy in right]
    if len(both) < 3:
        return math.nan, 0
    partials = ([rows[proxy]["partial"] for proxy in both] for rows in (left, right))
    rho = scipy.stats.spearmanr(*partials).statistic
    return float(rho), min(int(rows[both[0]]["n_clusters"]) for rows in (left, right))


def _pooled(run: Run) -> dict[str, dict]:
    """{proxy: its row} over all conditions, for CE_rec, where the partial correlation is a number."""
    return {
        row["proxy"]: row
        for row in run.tables.get("leaderboard.csv", [])
        if (row["target"], row["stratum"]) == ("ce_rec", "pooled") and row["partial"] == row["partial"]
    }


def verdict_of(run: Run) -> str | None:
    """The leaf of the tree."""
    return run.verdict.get("leaf")


def other_leaf(a: Run, b: Run) -> list[str]:
    """Reasons: what the tree says of the rows."""
    if a.verdict and b.verdict and verdict_of(a) != verdict_of(b):
        return [f"another verdict ({verdict_of(a)} | {verdict_of(b)})"]
    return []


def same_rows(a: Run, b: Run) -> bool:
    """To the byte."""
    return all(
        name in a.files and a.files[name] == b.files.get(name) for name in ("conditions.csv", "sequences.npz")
    )


def other_tables(a: Run, b: Run) -> list[str]:
    """Reasons: tables that were not made alike from the same rows."""
    contents: dict[str, tuple] = {
        name: (a.tables[name], b.tables[name]) for name in KEYS if name in a.tables and name in b.tables
    }
    if a.verdict and b.verdict:
        contents["verdict.json"] = a.verdict, b.verdict
    reasons = []
    for name, content in contents.items():
        left, right = (dict(_leaves(name, one)) for one in content)
        apart = [what for what in left if what in right and differ(left[what], right[what], TABLES) > 1]
        apart += in_one_of(left, right)
        if apart:
            what = apart[0]
            reasons.append(
                f"the same rows, another {name} ({len(apart)} numbers, the first {what}: "
                f"{cell(left.get(what))} | {cell(right.get(what))})"
            )
    return reasons


def _leaves(name: str, content: Any) -> Iterator[tuple[str, Any]]:
    """(path below `name`, value) of everything in a table or a verdict that is made from the rows."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key not in ("settings", "answer", "leaf", "rows_sha256"):
                yield from _leaves(f"{name}.{key}", value)
    elif isinstance(content, list):
        for i, item in enumerate(content):
            yield from _leaves(f"{name}[{i}]", item)
    else:
        yield name, math.nan if content is None else content


# ----------------------------------------------------------------------------------------- SAEs trained twice
def z_scores(pairs: Pairs, columns: list[str], spreads: SeedSpreads) -> list[Column]:
    """How far each pair is apart, in units of what two seeds are, for each of the columns whose SD is known
    and not 0.
    """
    trained = np.array([pair.a[0].get("recipe") != "null" for pair in pairs.both])
    # one column's own is known from few pairs of seeds
    usual = float(np.median([spreads.columns[name].together for name in columns])) if columns else 1.0
    scores = []
    for name in columns:
        spread = spreads.columns[name]
        # with the seeds alike, the start and the order of the tokens are too, and what is left moves every
        # SAE by itself
        together = 1.0 if pairs.by_condition else max(1.0, usual, spread.together)
        scores.append(
            Column(
                name=name,
                z=np.array([_z(pair, name, spread) for pair in pairs.both]),
                trained=trained,
                se=math.sqrt(together / max(int(trained.sum()), 1)),
                labels=[pair.label for pair in pairs.both],
                values=[(_mean(pair.a, name), _mean(pair.b, name)) for pair in pairs.both],
            )
        )
    return scores


def _z(pair: Pair, name: str, spread: Spread) -> float:
    x, y = ([row[name] for row in rows] for rows in (pair.a, pair.b))
    if x == y or all(v != v for v in x + y):
        return 0.0
    p, q = (np.mean([spread.on_scale(v) for v in values]) for values in (x, y))
    first = pair.a[0]
    place = spread.at(first.get("tokens", 0), first.get("k", 0))
    return spread.z(float(q - p), place, math.sqrt(1 / len(x) + 1 / len(y)))


def _mean(rows: list[dict], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def trained_anew(
    a: Run, b: Run, pairs: Pairs, columns: list[str], spreads: SeedSpreads
) -> tuple[list[str], list[str], str]:
    """(reasons why it is not reproduced, lines, summary)."""
    measured = [c for c in columns if c not in EXACT and c in spreads.columns]
    free = [c for c in measured if any(spreads.columns[c].sd.values())]
    reasons = no_seeds_doing(pairs, columns, free, [c for c in measured if c not in free])
    lines = [f"seed SDs: {spreads.said}", *cautions(pairs, columns, free, spreads)]
    scores = z_scores(pairs, free, spreads)
    if not scores:
        return [*reasons, "no column with a measured seed SD"], lines, "nothing compared"
    far, far_lines, extremes = too_far(scores, pairs, spreads)
    shifted, shift_lines = off_as_a_whole(scores)
    rho, hooks = rank_correlation(a, b)
    ranks, rank_lines = other_ranks(rho, hooks)
    lines += [*far_lines, *shift_lines, *rank_lines, *worst_columns(scores)]
    summary = (
        f"{len(pairs.both)} {pairs.kind}, {len(scores)} columns within what another seed does: {extremes}"
    )
    if math.isfinite(rho):
        summary += f", rank correlation of the proxies {rho:.2f}"
    return reasons + far + shifted + ranks, lines, summary


def too_far(scores: list[Column], pairs: Pairs, spreads: SeedSpreads) -> tuple[list[str], list[str], str]:
    """(reasons, lines, summary): single numbers, and how many pairs have one beyond FAR."""
    size = np.array([column.size for column in scores])  # [columns, P]
    n, far, beyond = len(pairs.both), int((size > FAR).sum()), int((size > FAR).any(0).sum())
    normal = 2 * scipy.stats.norm.sf(FAR) * size.size
    allowed = int(scipy.stats.binom.ppf(1 - RARE, n, spreads.beyond))
    reasons = []
    if beyond > allowed:
        reasons.append(f"{beyond} of {n} {pairs.kind} beyond 3 seed SDs")
    if bad := [column for column in scores if (column.size > TOO_FAR).any()]:
        worst = max(bad, key=lambda column: column.size.max())
        reasons.append(
            f"{len(bad)} columns beyond {TOO_FAR:.0f} seed SDs ({some([c.name for c in bad], 5)}; "
            f"{worst.name} {worst.z[worst.worst]:+.1f} at {worst.labels[worst.worst]})"
        )
    line = (
        f"|z| > {FAR:.0f}: {far} of {size.size} numbers (normal: {normal:.1f}), in {beyond} of {n} "
        f"{pairs.kind} (between seeds {spreads.beyond * n:.1f}, allowed {allowed}); largest {size.max():.1f}"
    )
    return reasons, [line], f"largest |z| {size.max():.1f}, beyond {FAR:.0f} in {beyond} (allowed {allowed})"


def off_as_a_whole(scores: list[Column]) -> tuple[list[str], list[str]]:
    """(reasons, lines): columns whose mean is off where no single number need be."""
    reasons = []
    if off := [column for column in scores if column.shifted()]:
        worst = max(off, key=lambda column: abs(column.mean) / column.se)
        reasons.append(
            f"{len(off)} columns off as a whole ({some([c.name for c in off], 5)}; "
            f"{worst.name} mean z {worst.mean:+.2f} ± {worst.se:.2f})"
        )
    seen = SHIFT * np.median([column.se for column in scores]) * math.sqrt(2)
    line = (
        f"mean z of a column: within {SHIFT} standard errors in {len(scores) - len(off)} of {len(scores)}; "
        f"a shift of {seen:.2g} seed SDs would be seen"
    )
    return reasons, [line]


def other_ranks(rho: float, hooks: int) -> tuple[list[str], list[str]]:
    """(reasons, lines) from `rank_correlation`, where there are hooks enough to ask."""
    if not math.isfinite(rho):
        return [], []
    if hooks < FEW_HOOKS:
        return [], [f"rank correlation of the proxies: {rho:.2f} (not asked for: {hooks} clusters)"]
    line = f"rank correlation of the proxies: {rho:.2f} (at least {SAME_RANKS})"
    return [f"other ranks of the proxies (rank correlation {rho:.2f})"] if rho < SAME_RANKS else [], [line]


def no_seeds_doing(pairs: Pairs, columns: list[str], free: list[str], fixed: list[str]) -> list[str]:
    """Reasons: what no other seed can have changed. free, fixed: columns whose seed SD is not 0, and 0."""
    reasons = []
    if pairs.by_condition and (edited := edited_rows(pairs.both, free)):
        reasons.append(some(edited, 1))
    for one in moved(pairs.both, [c for c in columns if c in EXACT] + fixed):
        reasons.append(f"{one.column}, which no seed changes ({cell(one.x)} | {cell(one.y)} at {one.label})")
    return reasons


def cautions(pairs: Pairs, columns: list[str], free: list[str], spreads: SeedSpreads) -> list[str]:
    """Lines: where the measured SDs do not reach."""
    lines = []
    if unknown := [c for c in columns if c not in EXACT and c not in spreads.columns]:
        lines.append(f"no seed SD was measured of, and nothing compared in: {some(unknown, 12)}")
    models = {pair.a[0].get("model", "") for pair in pairs.both}
    if strange := sorted(models - set(spreads.models)):
        lines.append(
            f"the SDs were measured on {', '.join(spreads.models)}, not on {some(strange)}: "
            "take the z-scores as a guide"
        )
    budgets = {pair.a[0].get("tokens", 0) for pair in pairs.both} - {0}
    known = {tokens for column in free for tokens, _ in spreads.columns[column].sd}
    if elsewhere := sorted(t for t in budgets if not any(0.5 <= t / there <= 2 for there in known)):
        lines.append(
            f"the SDs were measured at other budgets than {', '.join(map(str, elsewhere))} tokens: "
            "take the z-scores as a guide"
        )
    return lines


def worst_columns(scores: list[Column]) -> list[str]:
    """Lines of a table: columns that are off as a whole first, then by their largest |z|; five, and all that
    are out of the ordinary.
    """
    ranked = sorted(scores, key=lambda column: (-column.shifted(), -column.size.max()))
    shown = ranked[:5] + [column for column in ranked[5:] if column.shifted() or column.size.max() > FAR]
    head = ["column", "worst z", "mean z", f"> {FAR:.0f}", "", "", "worst at"]
    return aligned([head, *(column.line() for column in shown)])


# --------------------------------------------------------------------------------------------------- the word
def aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  " + "  ".join(text.ljust(w) for text, w in zip(line, widths)).rstrip() for line in lines]


def some(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def compare(a: Run, b: Run, spreads: SeedSpreads | None = None) -> Outcome:
    """The word for two results folders; `spreads`: the committed ones if None. Raises UserError."""
    lines = [
        f"{run.folder}: no run.json, so nobody knows whether its files are as they were written"
        for run in (a, b)
        if not run.record
    ]
    if edited := not_as_written(a) + not_as_written(b):
        return Outcome("different", some(edited, 1), lines + edited)
    if a.files == b.files and len(a.files) > 1:
        return Outcome("identical", f"{len(a.files)} files, to the byte", lines)

    # are these runs of the same thing?
    other, notes = other_settings(a.settings, b.settings)
    lines += [f"settings: {note}" for note in notes]
    pairs = paired(a.rows, b.rows)
    if pairs.alone:
        other.append(f"{len(pairs.alone)} {pairs.kind} in one folder only ({some(pairs.alone)})")
    if not pairs.both:
        return Outcome("different", "; ".join(other), lines)
    lines += in_one_only(a, b)
    if same_rows(a, b):
        other += other_tables(a, b)

    # do they say the same?
    values, more = other_estimates(a, b)
    lines += more
    conclusions = other_leaf(a, b) + values

    # how far apart are the numbers?
    columns = number_columns(a.rows, b.rows)
    above = moved(pairs.both, columns) if pairs.by_condition else []
    if pairs.by_condition and not (other or conclusions or above):
        return Outcome(
            "same SAEs",
            f"{len(pairs.both)} conditions, {len(columns)} columns, no further apart than evaluation on "
            "another processor",
            lines,
        )
    files = bool(a.settings.get("saes"))  # SAEs that exist: nothing was trained anew
    if not (files or other):
        reasons, more, summary = trained_anew(a, b, pairs, columns, spreads or seed_spreads())
        if reasons or conclusions:
            return Outcome("different", "; ".join(reasons + conclusions), lines + more)
        verdict = f"; verdict {verdict_of(a)}" if a.verdict else ""
        return Outcome("reproduced", summary + verdict, lines + more)
    if files and above:
        other.append(f"{len(above)} columns of the same SAE files further apart than evaluation makes them")
    if above:
        head = ["column", "times", "", "", "worst at"]
        table = [[one.column, f"{one.share:.3g}", cell(one.x), cell(one.y), one.label] for one in above]
        lines += ["further apart than evaluation on another processor:", *aligned([head, *table])]
    return Outcome("different", "; ".join(other + conclusions), lines)


# ------------------------------------------------------------------------------------------------ the command
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
