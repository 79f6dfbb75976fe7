"""Is it the same run? Two results folders, one of four words, and the numbers behind it.

    python common.py diff A B        # exit 0 for the first three words, 1 for the last, 2 where nothing can be compared

*identical*: every file but run.json, to the byte. *same SAEs*: no more than what another processor changes in
evaluating one and the same SAE. *reproduced*: SAEs trained anew, every column within what another seed does
(z-scores against seed SDs that were measured, `bench/seed_sd.py`), the same verdict, the same ranks,
estimates inside each other's intervals. *different*: what, where and how much.

A condition is one row of conditions.csv; a cell is a condition without its seed. P pairs of conditions (or of
cells) compared.
"""

import json
import math
import pathlib
import re
from dataclasses import dataclass

from transport_geometry import ROOT, store
from transport_geometry.errors import UserError, reading
from transport_geometry.store import RUN
from transport_geometry.tables import cell, read_table

import numpy as np
import scipy.stats

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
    tables: dict  # {name: rows} of KEYS
    verdict: dict
    files: dict  # {name: SHA-256} of what the run wrote and is there


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
    sd: dict  # {(tokens, k): SD}
    df: dict  # {(tokens, k): degrees of freedom of the SD}
    # variance of the mean z of n cells between two seeds, times n: 1 where cells are independent
    together: float

    def on_scale(self, x: float) -> float:
        """nan where the scale has no such value."""
        x = 1 - x if self.scale == "log of 1 - x" else x
        return x if self.scale == "plain" else math.log(x) if x > 0 else math.nan

    def at(self, tokens: int, k: int) -> tuple[int, int]:
        """(budget, k) nearest among those measured: the budget first. Null rows, without either: the middle
        ones.
        """

        def nearest(value, there):
            return (
                there[len(there) // 2]
                if value <= 0
                else min(there, key=lambda t: abs(math.log(max(t, 1) / value)))
            )

        budget = nearest(tokens, sorted({t for t, _ in self.sd}))
        return budget, nearest(k, sorted(k for t, k in self.sd if t == budget))

    def z(self, apart: float, place: tuple[int, int], wide: float = math.sqrt(2)) -> float:
        """The normal deviate as rare as a difference of `apart` on the scale, whose SD is `wide` of the
        seeds'.

        By Student's t, as the SD was measured too: what looks like 7 SDs of an SD from 12 degrees of freedom
        is 4.2.
        """
        tail = scipy.stats.t.sf(abs(apart) / (wide * self.sd[place]), self.df[place])
        return float(np.copysign(scipy.stats.norm.isf(max(tail, 1e-300)), apart))


@dataclass(frozen=True)
class Column:
    """One column of P pairs. z [P]: nan where its scale has no such value."""

    name: str
    z: np.ndarray
    trained: np.ndarray  # [P] bool: not a null row
    se: float  # of the mean z of the trained ones
    labels: list[str]
    values: list[tuple]

    @property
    def mean(self) -> float:
        z = self.z[self.trained & np.isfinite(self.z)]
        return float(z.mean()) if len(z) else 0.0

    @property
    def size(self) -> np.ndarray:
        return np.where(np.isfinite(self.z), np.abs(self.z), np.inf)

    def shifted(self) -> bool:
        return abs(self.mean) > SHIFT * self.se

    def line(self) -> list[str]:
        worst = int(self.size.argmax())
        return [
            self.name,
            f"{self.z[worst]:+.1f}",
            f"{self.mean:+.2f} ± {self.se:.2f}",
            str(int((self.size > FAR).sum())),
            *map(cell, self.values[worst]),
            self.labels[worst],
        ]


# --------------------------------------------------------------------------------------------------- reading
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
        folder,
        record,
        record.get("settings") or verdict.get("settings", {}),
        rows,
        tables,
        verdict,
        {name: store.sha256(folder / name) for name in names if (folder / name).is_file()},
    )


def seed_spreads(path: pathlib.Path = SEED_SD) -> tuple[dict[str, Spread], dict]:
    """({column: Spread}, what `bench/seed_sd.py` says about the measurement). Raises UserError where there is
    none.
    """
    about = path.with_suffix(".json")
    if not (path.is_file() and about.is_file()):
        raise UserError(
            f"{path}: not there, so *reproduced* and *different* cannot be told apart (python bench/seed_sd.py makes it)"
        )
    found = {}
    with reading(path):
        for row in read_table(path):
            there = found.setdefault(row["column"], Spread(row["scale"], {}, {}, row["together"]))
            there.sd[row["tokens"], row["k"]], there.df[row["tokens"], row["k"]] = row["sd"], row["df"]
    with reading(about):
        return found, json.loads(about.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------- comparing
def not_as_written(run: Run) -> list[str]:
    """Files that are not what the folder's run.json says."""
    return [
        f"{run.folder / name} is not as its run wrote it (SHA-256 {run.files[name][:12]}, run.json says {digest[:12]})"
        for name, digest in run.record.get("files", {}).items()
        if run.files.get(name, digest) != digest
    ]


def other_settings(a: dict, b: dict) -> tuple[list[str], list[str]]:
    """(what makes two runs different ones, what does not)."""
    reasons, notes = [], []
    first = list(WORDS)
    for key in sorted({*a, *b}, key=lambda key: (first.index(key) if key in WORDS else len(first), key)):
        x, y = a.get(key), b.get(key)
        if x == y:
            continue
        if isinstance(x, dict) and isinstance(y, dict):
            x, y = ({k: v for k, v in one.items() if other.get(k) != v} for one, other in ((x, y), (y, x)))
        said = [
            text[:12]
            if re.fullmatch("[0-9a-f]{40,}", text)
            else text
            if len(text) < 70
            else text[:60] + "..."
            for text in (str(x), str(y))
        ]
        (notes if key in MAY_DIFFER else reasons).append(
            f"{WORDS.get(key, f'other {key}')} ({key}: {said[0]} | {said[1]})"
        )
    return reasons, notes


def paired(a: list[dict], b: list[dict]) -> tuple[list[tuple], list[str], bool]:
    """([(label, rows of a, rows of b)], labels of what only one has, by condition?). By cell where the seeds
    are others.
    """

    def sorted_by(rows, names):
        groups = {}
        for row in rows:
            groups.setdefault(tuple(row.get(c) for c in names), []).append(row)
        return groups

    by_condition = {row.get("seed") for row in a} == {row.get("seed") for row in b}
    names = [c for c in LABELS if c in a[0] and (by_condition or c != "seed")]
    left, right = sorted_by(a, names), sorted_by(b, names)
    label = lambda key: " ".join(map(str, key))
    return (
        [(label(key), left[key], right[key]) for key in left if key in right],
        [label(key) for key in [*left, *right] if not (key in left and key in right)],
        by_condition,
    )


def differ(x, y, allowed: tuple[float, float]) -> float:
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


def moved(pairs: list[tuple], columns: list[str]) -> list[tuple]:
    """[(share of what rounding may do, column, label, x, y)] above 1, each column's worst, the worst column
    first.
    """
    found = []
    for column in columns:
        allowed = (0.0, 0.0) if column in EXACT else ROUNDING.get(column, LITTLE)
        shares = [
            (differ(x[0][column], y[0][column], allowed), label, x[0][column], y[0][column])
            for label, x, y in pairs
        ]
        worst = max(shares, key=lambda item: item[0])
        if worst[0] > 1:
            found.append((worst[0], column, *worst[1:]))
    return sorted(found, key=lambda item: -item[0])


def edited_rows(pairs: list[tuple], columns: list[str]) -> list[str]:
    """Rows in which a number moved by more than evaluation moves it while most did not move at all: no
    training does that.
    """
    found = []
    for label, (x, *_), (y, *_) in pairs:
        here = [c for c in columns if x.get("recipe") != "null" and x[c] == x[c]]
        apart = [c for c in here if differ(x[c], y[c], ROUNDING.get(c, LITTLE)) > 1]
        if apart and 2 * sum(x[c] == y[c] for c in here) > len(here):
            found.append(
                f"{apart[0]} of {label} is {cell(x[apart[0]])} | {cell(y[apart[0]])} while most of its row is the same to the last digit"
            )
    return found


def z_scores(
    pairs: list[tuple], columns: list[str], spreads: dict[str, Spread], by_condition: bool
) -> list[Column]:
    """How far each pair is apart, in units of what two seeds are, for each of the columns whose SD is known
    and not 0.
    """
    out, trained = [], np.array([x[0].get("recipe") != "null" for _, x, _ in pairs])
    # one column's own is known from few pairs of seeds
    usual = np.median([spreads[name].together for name in columns]) if columns else 1.0
    for name in columns:
        spread, z = spreads[name], []
        for _, xs, ys in pairs:
            here = [row[name] for row in xs], [row[name] for row in ys]
            if here[0] == here[1] or all(v != v for v in here[0] + here[1]):
                z.append(0.0)
                continue
            p, q = (np.mean([spread.on_scale(v) for v in values]) for values in here)
            z.append(
                spread.z(
                    float(q - p),
                    spread.at(xs[0].get("tokens", 0), xs[0].get("k", 0)),
                    math.sqrt(1 / len(xs) + 1 / len(ys)),
                )
            )
        # with the seeds alike, the start and the order of the tokens are too, and what is left moves every
        # SAE by itself
        se = math.sqrt(
            (1.0 if by_condition else max(1.0, usual, spread.together)) / max(int(trained.sum()), 1)
        )
        out.append(
            Column(
                name,
                np.array(z),
                trained,
                se,
                [label for label, *_ in pairs],
                [(np.mean([r[name] for r in xs]), np.mean([r[name] for r in ys])) for _, xs, ys in pairs],
            )
        )
    return out


def estimates(run: Run) -> dict[str, tuple]:
    """{what: (value, lo, hi)}: everything in the tables and the verdict that has an interval."""
    found = {}

    def walk(where, content):
        if isinstance(content, list):
            for i, item in enumerate(content):
                walk(f"{where}[{i}]", item)
        if not isinstance(content, dict):
            return
        for key, value in content.items():
            walk(f"{where}.{key}", value)
            ends = (f"{key}_lo", f"{key}_hi") if key != "value" else ("lo", "hi")
            if isinstance(value, (int, float)) and all(
                isinstance(content.get(end), (int, float)) for end in ends
            ):
                found[f"{where}.{key}"] = (value, *(content[end] for end in ends))

    for name, rows in run.tables.items():
        for row in rows:
            walk(f"{name} {' '.join(str(row.get(c)) for c in KEYS[name])}", row)
    walk("verdict.json", {key: value for key, value in run.verdict.items() if key != "settings"})
    return {what: value for what, value in found.items() if all(map(math.isfinite, value))}


def outside(a: Run, b: Run) -> tuple[list[tuple], int]:
    """([(how far outside in half-widths, what, value, lo, hi)] of estimates outside the other run's interval,
    estimates compared).

    An interval is taken to hold its own estimate, which bootstrap percentiles need not; one without width is
    of a proxy and itself. Of runs with unequally many seeds only the wider intervals are asked: more seeds
    know more than fewer can.
    """
    mine, theirs = estimates(a), estimates(b)
    more = len(a.settings.get("seeds") or []) - len(b.settings.get("seeds") or [])
    ways = [(mine, theirs)] * (more >= 0) + [(theirs, mine)] * (more <= 0)
    found, both = (
        [],
        [
            what
            for what in mine
            if what in theirs and mine[what][1] < mine[what][2] and theirs[what][1] < theirs[what][2]
        ],
    )
    for what in both:
        far = []
        for left, right in ways:
            value, (own, lo, hi) = left[what][0], right[what]
            lo, hi, room = min(lo, own), max(hi, own), 1e-6 + 1e-4 * max(abs(lo), abs(hi))
            if not lo - room <= value <= hi + room:
                far.append((max(lo - value, value - hi) / ((hi - lo) / 2), what, value, lo, hi))
        found += [max(far)] if far else []
    return sorted(found, reverse=True), len(both)


def rank_correlation(a: Run, b: Run) -> tuple[float, int]:
    """(Spearman correlation of the proxies' partial correlations with CE_rec over all conditions, hooks or
    cells behind it).
    """

    def pooled(run):
        return {
            row["proxy"]: row
            for row in run.tables.get("leaderboard.csv", [])
            if (row["target"], row["stratum"]) == ("ce_rec", "pooled")
        }

    left, right = pooled(a), pooled(b)
    both = [
        proxy
        for proxy in left
        if proxy in right
        and left[proxy]["partial"] == left[proxy]["partial"]
        and right[proxy]["partial"] == right[proxy]["partial"]
    ]
    if len(both) < 3:
        return math.nan, 0
    rho = scipy.stats.spearmanr(
        [left[p]["partial"] for p in both], [right[p]["partial"] for p in both]
    ).statistic
    return float(rho), min(int(left[both[0]]["n_clusters"]), int(right[both[0]]["n_clusters"]))


def verdict_of(run: Run) -> str:
    """The leaf of the tree, without the gate."""
    return run.verdict.get("leaf_if_ungated", run.verdict.get("leaf"))


def other_leaf(a: Run, b: Run) -> tuple[list[str], list[str]]:
    """(reasons, notes). What the tree says of the rows; the gate is another run's."""
    reasons = (
        [f"another verdict ({verdict_of(a)} | {verdict_of(b)})"]
        if a.verdict and b.verdict and verdict_of(a) != verdict_of(b)
        else []
    )
    gates = [run.verdict.get("leaf") if "leaf_if_ungated" in run.verdict else None for run in (a, b)]
    notes = [f"the gate: {gates[0]} | {gates[1]}"] if gates[0] != gates[1] and not reasons else []
    return reasons, notes


def other_tables(a: Run, b: Run) -> list[str]:
    """Reasons: tables that were not made alike from the same rows."""

    def flat(where, content):
        if isinstance(content, dict):
            for key, value in content.items():
                if key not in ("settings", "gate", "gate_text", "leaf", "rows_sha256"):
                    yield from flat(f"{where}.{key}", value)
        elif isinstance(content, list):
            for i, item in enumerate(content):
                yield from flat(f"{where}[{i}]", item)
        else:
            yield where, math.nan if content is None else content

    reasons = []
    for name in [n for n in KEYS if n in a.tables and n in b.tables] + ["verdict.json"] * bool(
        a.verdict and b.verdict
    ):
        left, right = (
            dict(flat(name, run.verdict if name == "verdict.json" else run.tables[name])) for run in (a, b)
        )
        worst = [what for what in left if what in right and differ(left[what], right[what], TABLES) > 1] + [
            w for w in left.keys() ^ right.keys()
        ]
        if worst:
            reasons.append(
                f"the same rows, another {name} ({len(worst)} numbers, the first {worst[0]}: {cell(left.get(worst[0]))} | {cell(right.get(worst[0]))})"
            )
    return reasons


# --------------------------------------------------------------------------------------------------- the word
def aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  " + "  ".join(text.ljust(w) for text, w in zip(line, widths)).rstrip() for line in lines]


def some(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def compare(a: Run, b: Run, spreads: tuple | None = None) -> Outcome:
    """The word for two results folders; `spreads` as `seed_spreads` gives them (None: the committed ones).
    Raises UserError.
    """
    lines = [
        f"{run.folder}: no run.json, so nobody knows whether its files are as they were written"
        for run in (a, b)
        if not run.record
    ]
    if edited := not_as_written(a) + not_as_written(b):
        return Outcome("different", some(edited, 1), lines + edited)
    if a.files == b.files and len(a.files) > 1:
        return Outcome("identical", f"{len(a.files)} files, to the byte", lines)
    reasons, notes = other_settings(a.settings, b.settings)
    lines += [f"settings: {note}" for note in notes]
    pairs, alone, by_condition = paired(a.rows, b.rows)
    if alone:
        reasons.append(
            f"{len(alone)} {'conditions' if by_condition else 'cells'} in one folder only ({some(alone)})"
        )
    if not pairs:
        return Outcome("different", "; ".join(reasons), lines)
    columns = number_columns(a.rows, b.rows)
    if only := [c for c in {*a.rows[0], *b.rows[0]} if not (c in a.rows[0] and c in b.rows[0])]:
        lines.append(f"columns in one folder only: {some(sorted(only), 8)}")
    lines += [f"{name} in one folder only" for name in KEYS if (name in a.tables) != (name in b.tables)]
    leaf, notes = other_leaf(a, b)
    lines += notes
    out, n_estimates = outside(a, b)
    tables = []
    if n_estimates:
        lines.append(
            f"estimates outside the other run's 95% interval: {len(out)} of {n_estimates} (allowed {math.floor(OUTSIDE * n_estimates)})"
        )
        lines += (
            aligned([[what, cell(value), f"[{cell(lo)}, {cell(hi)}]"] for _, what, value, lo, hi in out[:3]])
            if out
            else []
        )
        if len(out) > OUTSIDE * n_estimates:
            tables = [f"{len(out)} of {n_estimates} estimates outside the other run's interval"]
    same_rows = all(
        a.files.get(name) == b.files.get(name) != None for name in ("conditions.csv", "sequences.npz")
    )  # noqa: E711
    if same_rows:
        reasons += other_tables(a, b)
    above = moved(pairs, columns) if by_condition else []
    if by_condition and not (above or alone or reasons or leaf or tables):
        return Outcome(
            "same SAEs",
            f"{len(pairs)} conditions, {len(columns)} columns, no further apart than evaluation on another processor",
            lines,
        )
    if a.settings.get("saes"):  # files that exist: nothing was trained anew
        reasons += (
            [f"{len(above)} columns of the same SAE files further apart than evaluation makes them"]
            if above
            else []
        )
    elif not reasons:
        about, why = trained_anew(a, b, pairs, columns, by_condition, spreads or seed_spreads())
        if not (why or leaf or tables):
            return Outcome(
                "reproduced",
                about[0] + (f"; verdict {verdict_of(a)}" if a.verdict else ""),
                lines + about[1:],
            )
        return Outcome("different", "; ".join(why + leaf + tables), lines + about[1:])
    if above:
        lines += [
            "further apart than evaluation on another processor:",
            *aligned(
                [["column", "times", "", "", "worst at"]]
                + [[column, f"{share:.3g}", cell(x), cell(y), label] for share, column, label, x, y in above]
            ),
        ]
    return Outcome("different", "; ".join(reasons + leaf + tables), lines)


def trained_anew(
    a: Run, b: Run, pairs: list[tuple], columns: list[str], by_condition: bool, spreads: tuple
) -> tuple[list[str], list[str]]:
    """([summary, lines ...], reasons why it is not reproduced) of P pairs in all columns."""
    known, about = spreads
    reasons, lines = [], [f"seed SDs: {about['said']}"]
    fixed = [c for c in columns if c not in EXACT and c in known and not any(known[c].sd.values())]
    free = [c for c in columns if c in known and c not in EXACT and c not in fixed]
    if unknown := [c for c in columns if c not in EXACT and c not in known]:
        lines.append(f"no seed SD was measured of, and nothing compared in: {some(unknown, 12)}")
    strange = sorted({x[0].get("model") for _, x, _ in pairs} - set(about["models"]))
    if strange:
        lines.append(
            f"the SDs were measured on {', '.join(about['models'])}, not on {some(strange)}: take the z-scores as a guide"
        )
    budgets = {x[0].get("tokens", 0) for _, x, _ in pairs} - {0}
    if elsewhere := sorted(
        t
        for t in budgets
        if not any(0.5 <= t / there <= 2 for there in {t for c in free for t, _ in known[c].sd})
    ):
        lines.append(
            f"the SDs were measured at other budgets than {', '.join(map(str, elsewhere))} tokens: take the z-scores as a guide"
        )
    one_each = [(label, x[:1], y[:1]) for label, x, y in pairs]
    if by_condition and (edited := edited_rows(pairs, free)):
        reasons.append(some(edited, 1))
    for share, column, label, x, y in moved(one_each, [c for c in columns if c in EXACT] + fixed):
        reasons.append(f"{column}, which no seed changes ({cell(x)} | {cell(y)} at {label})")
    scores = z_scores(pairs, free, known, by_condition)
    if not scores:
        return ["nothing compared", *lines], reasons + ["no column with a measured seed SD"]
    size = np.array([column.size for column in scores])  # [columns, P]
    far, per_pair = int((size > FAR).sum()), int((size > FAR).any(0).sum())
    share = about["conditions_beyond_3"]
    allowed = int(scipy.stats.binom.ppf(1 - RARE, len(pairs), share))
    normal = 2 * scipy.stats.norm.sf(FAR) * size.size
    kind = "conditions" if by_condition else "cells"
    lines.append(
        f"|z| > {FAR:.0f}: {far} of {size.size} numbers (normal: {normal:.1f}), in {per_pair} of {len(pairs)} {kind} "
        f"(between seeds {share * len(pairs):.1f}, allowed {allowed}); largest {size.max():.1f}"
    )
    if per_pair > allowed:
        reasons.append(f"{per_pair} of {len(pairs)} {kind} beyond 3 seed SDs")
    if bad := [c for c in scores if (c.size > TOO_FAR).any()]:
        worst = max(bad, key=lambda c: c.size.max())
        reasons.append(
            f"{len(bad)} columns beyond {TOO_FAR:.0f} seed SDs ({some([c.name for c in bad], 5)}; "
            f"{worst.name} {worst.z[worst.size.argmax()]:+.1f} at {worst.labels[worst.size.argmax()]})"
        )
    if off := [c for c in scores if c.shifted()]:
        worst = max(off, key=lambda c: abs(c.mean) / c.se)
        reasons.append(
            f"{len(off)} columns off as a whole ({some([c.name for c in off], 5)}; {worst.name} mean z {worst.mean:+.2f} ± {worst.se:.2f})"
        )
    seen = SHIFT * np.median([c.se for c in scores]) * math.sqrt(2)
    lines.append(
        f"mean z of a column: within {SHIFT} standard errors in {len(scores) - len(off)} of {len(scores)}; a shift of {seen:.2g} seed SDs would be seen"
    )
    rho, hooks = rank_correlation(a, b)
    if math.isfinite(rho):
        asked = hooks >= FEW_HOOKS
        lines.append(
            f"rank correlation of the proxies: {rho:.2f}"
            + (f" (at least {SAME_RANKS})" if asked else f" (not asked for: {hooks} clusters)")
        )
        if asked and rho < SAME_RANKS:
            reasons.append(f"other ranks of the proxies (rank correlation {rho:.2f})")
    shown = sorted(scores, key=lambda c: (-c.shifted(), -c.size.max()))
    shown = [c for i, c in enumerate(shown) if i < 5 or c.shifted() or c.size.max() > FAR]
    lines += aligned(
        [["column", "worst z", "mean z", f"> {FAR:.0f}", "", "", "worst at"]] + [c.line() for c in shown]
    )
    summary = (
        f"{len(pairs)} {kind}, {len(scores)} columns within what another seed does: largest |z| {size.max():.1f}, beyond {FAR:.0f} "
        f"in {per_pair} (allowed {allowed})"
        + (f", rank correlation of the proxies {rho:.2f}" if math.isfinite(rho) else "")
    )
    return [summary, *lines], reasons


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
