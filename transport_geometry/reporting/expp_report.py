"""Exp-P's report: tables and figures of what was planted, and of what Exp-A and Exp-B say of it."""

import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transport_geometry.measuring.gauges import gauges_of, stays
from transport_geometry.measuring.metrics import BY_NAME, PROXIES
from transport_geometry.records.condition import without_sinks
from transport_geometry.records.tables import estimate, markdown, percent, readable_count, signed, span
from transport_geometry.reporting import console, published
from transport_geometry.reporting.figures import (
    BLUE,
    GREEN,
    ORANGE,
    SKY,
    joined_points,
    label_ends,
    points,
    pyplot,
)
from transport_geometry.statistics.hook_pair import mismatch

import numpy as np

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the parts left behind, read again. Nothing of a part is computed a second time."""

    verdicts: dict[str, dict]  # {part: verdict.json}
    deltas: dict[str, list[dict]]  # {part of Exp-A: deltas.csv}
    saes: dict[str, list[dict]]  # {part: rows of conditions.csv, without null rows}
    pointing: dict[str, tuple[float, float]]  # {part of Exp-B: share of fed_excess that points right, wrong}
    partials: dict[str, dict[str, float]]  # {part of Exp-B: {proxy: partial Spearman with CE_rec}}
    joined: dict[str, str]  # {part of Exp-B: what `common.py report` says of H2}
    canyon: list[dict]  # rows of canyon.csv, the plain model first
    gauges: list[dict]  # rows of gauges.csv

    def model(self, twin: str = "") -> str:
        """The plain model's name, or a twin's."""
        return self.canyon[0]["model"] + f"+{twin}" * bool(twin)

    def at_hook(self, twin: str = "") -> dict:
        """The row of canyon.csv of the plain model, or of a twin."""
        return next(row for row in self.canyon if row["model"] == self.model(twin))

    def arms(self, part: str) -> list[dict]:
        """All verdicts of a part of Exp-A."""
        return [self.verdicts[part], *self.verdicts[part]["other_arms"]]

    def leaf(self, part: str, twin: str, sinks: str = "keep") -> str:
        """Exp-A's leaf on the plain model against a twin."""
        arm = self.model(twin), sinks
        return next(v["leaf"] for v in self.arms(part) if (v["large"], v["sinks"]) == arm)

    def budgets(self, part: str, twin: str, sinks: str = "keep") -> list[dict]:
        """Rows of deltas.csv, plain model against twin, the smallest budget first."""
        arm = {"small": self.model(), "large": self.model(twin), "sinks": sinks}
        here = [row for row in self.deltas[part] if arm.items() <= row.items()]
        return sorted(here, key=lambda row: row["tokens"])

    def delta(self, part: str, twin: str, sinks: str = "keep") -> dict:
        """The row of deltas.csv at the largest budget."""
        return self.budgets(part, twin, sinks)[-1]

    def last_saes(self, part: str, twin: str = "") -> list[dict]:
        """The SAEs of the largest budget, with sinks kept in training, by seed."""
        here = [
            row
            for row in self.saes[part]
            if row["model"] == self.model(twin) and not without_sinks(row["sae"])
        ]
        return [row for row in here if row["tokens"] == max(other["tokens"] for other in here)]

    def mean(self, part: str, twin: str, metric: str) -> float:
        """Over the seeds of `last_saes`."""
        return float(np.mean([row[metric] for row in self.last_saes(part, twin)]))


# --------------------------------------------------------------------------------------------------- checks
def check_table(checks: Sequence[dict]) -> str:
    """checks: as verdict.json has them."""
    rows = [
        {
            "planted": check["planted"],
            "must come out": check["must"],
            "says": check["says"],
            "": "found" if check["found"] else "NOT FOUND",
        }
        for check in checks
    ]
    return markdown(rows)


def in_short(checks: Sequence[dict], colour: bool) -> str:
    """For a terminal of 80 columns, without what was said of each."""
    words = ["found" if check["found"] else "NOT FOUND" for check in checks]
    room = console.WIDTH - 4 - max(map(len, words)) - max(len(check["planted"]) for check in checks)
    rows = [
        {
            "": word,
            "planted": check["planted"],
            "must come out": textwrap.shorten(check["must"], room, placeholder=" …"),
        }
        for word, check in zip(words, checks)
    ]
    return console.columns(rows, ["" if check["found"] else console.ORANGE for check in checks], colour)


# ---------------------------------------------------------------------------------------------------- sinks
SMALL, LARGE, K = published.S, published.L, 8  # the published gap that a sink is held against
GAP, CE_REC_ENDS = published.DELTAS[SMALL, LARGE, K, published.TOKENS], (-0.117, -0.082)
PUBLISHED = {
    "": "published",
    "PR": "3.96 → 1.18",
    "SST ×": 18.2,
    "ΔR²": signed(GAP.delta_r2, 3),
    "ΔR² no sink": "not published",
    "Δcosine": signed(published.SAES[LARGE, K].cosine - published.SAES[SMALL, K].cosine, 3),
    "ΔCE_rec": span(GAP.delta_ce_rec, *CE_REC_ENDS, 3),
    "mismatch": percent(GAP.mismatch_published),
    "leaf": "",
}


def sink_table(f: Evidence, sinks: Sequence[str]) -> str:
    """What each sink moves, in each arm of training; the published numbers last."""
    arms = [("sinks", twin, how) for how in ("keep", "drop") for twin in sinks]
    arms += [("saelens", twin, "keep") for twin in sinks[:2]]
    rows = []
    for part, twin, how in arms:
        delta, here = f.delta(part, twin, how), f.at_hook(twin)
        rows.append(
            {
                "": f"{twin}, {part if part == 'saelens' else 'base'}{', dropped' * (how == 'drop')}",
                "PR": f"{f.at_hook()['pr']:.1f} → {here['pr']:.2f}",
                "SST ×": here["sst_ratio"],
                "ΔR²": estimate(delta, "delta_r2", 3),
                "ΔR² no sink": estimate(delta, "delta_r2_nosink", 3),
                "Δcosine": estimate(delta, "delta_cosine", 3),
                "ΔCE_rec": estimate(delta, "delta_ce_rec", 3),
                "mismatch": percent(delta["mismatch"]),
                "leaf": f.leaf(part, twin, how),
            }
        )
    return markdown([*rows, PUBLISHED])


def budget_table(f: Evidence, twin: str) -> str:
    rows = [
        {
            "tokens": readable_count(row["tokens"]),
            "ΔR²": estimate(row, "delta_r2", 3),
            "ΔCE_rec": estimate(row, "delta_ce_rec", 3),
            "mismatch": percent(row["mismatch"]),
        }
        for row in f.budgets("sinks", twin)
    ]
    return markdown(rows)


def norm_rows(f: Evidence, norms: Sequence[int]) -> list[dict]:
    """Means over seeds by norm of the null sink, the plain model (norm 0) first."""
    shown = ("r2", "r2_nosink", "r2_defl1", "r2_ln", "nmse_tok", "cosine", "swd_tok", "ce_rec")
    rows = []
    for norm in (0, *norms):
        twin = f"null{norm}" if norm else ""
        here = f.at_hook(twin)
        means = {metric: f.mean("norms", twin, metric) for metric in shown}
        rows.append({"norm": norm, "SST ×": here["sst_ratio"], "PR": here["pr"]} | means)
    return rows


def proxy_table(f: Evidence, sinks: Sequence[str]) -> str:
    """How often every score disagrees with CE_rec about which of plain model and twin is better."""

    def column(twin: str, name: str) -> np.ndarray:
        return np.array([sae[name] for sae in f.last_saes("sinks", twin)])

    rows = []
    for proxy in (*PROXIES, BY_NAME["kl"]):
        row: dict[str, Any] = {"score": proxy.name}
        for twin in sinks:
            scores = [proxy.score(column(model, proxy.name)) for model in ("", twin)]
            row[twin] = percent(mismatch(scores, [column(model, "ce_rec") for model in ("", twin)])[0])
        rows.append(row)
    return markdown(rows)


# ----------------------------------------------------------------------------- turned errors, leaves, gauges
def geometry_table(f: Evidence, amounts: Sequence[float]) -> str:
    rows = []
    for amount in amounts:
        part = f"turned-{amount:g}"
        verdict, (right, wrong) = f.verdicts[part], f.pointing[part]
        gammas = (signed(verdict[f"gamma_{name}"], 3) for name in ("proxy", "control"))
        rows.append(
            {
                "turned by": f"{amount:g}",
                "SWD": signed(verdict["partial"]),
                "minus R²": estimate(verdict, "diff_r2"),
                "p_r2": verdict["p_r2"],
                "minus best control": estimate(verdict, "diff_control"),
                "p_ctl": verdict["p_control"],
                "loho gain": signed(verdict["diff_loho_control"], 3),
                "p_loho": verdict["p_loho"],
                "Γ, SWD / control": " / ".join(gammas),
                "H2 here": verdict["here"]["leaf"],
                "in general": verdict["leaf"],
                "excess right": percent(right),
                "excess wrong": percent(wrong),
            }
        )
    return markdown(rows)


SHOWN_TOO = ("ce_rec", "kl", "ce_recon", "fed", "fed_excess", "rho")  # beside the proxies


def gauge_table(f: Evidence) -> str:
    rows = []
    for row in f.gauges:
        known = BY_NAME.get(row["metric"])
        if known and (known.family or known.name in SHOWN_TOO):
            moved = {g: "stays" if stays(row, g) else signed(row[g], 3) for g in gauges_of(f.gauges)}
            rows.append({"metric": row["metric"], "as it is": row["as it is"]} | moved)
    return markdown(rows)


# -------------------------------------------------------------------------------------------------- figures
TITLES = {
    True: "One sink at position 0 makes R² rise and CE_rec fall, as in what was published",
    False: "What a sink at position 0 does to R² and CE_rec, beside what was published",
}
KINDS = {  # of sinks, as a reader may call them
    "null": "LayerNorm does\nnot see it",
    "visible": "a patch has to\nrebuild it",
    "relative": "an error beside it\ncounts less",
}


def signature(f: Evidence, sinks: Sequence[str]) -> "Figure":
    """ΔR² and ΔCE_rec: as published on the left, as planted on the right."""
    nothing, (lo, hi) = np.nan, CE_REC_ENDS
    of_published = dict(delta_r2=GAP.delta_r2, delta_r2_lo=nothing, delta_r2_hi=nothing)
    of_published |= dict(delta_ce_rec=GAP.delta_ce_rec, delta_ce_rec_lo=lo, delta_ce_rec_hi=hi)
    planted = [(f"{twin}:\n{KINDS[twin.rstrip('0123456789')]}", f.delta("sinks", twin)) for twin in sinks]
    sides = [
        ("published: pythia-410m − pythia-70m", [("10M tokens, k = 8", of_published)]),
        ("planted: one model, with a sink − without", planted),
    ]
    widths = dict(figsize=(8, 3.6), width_ratios=(1.3, len(sinks)))
    figure, axes = pyplot().subplots(1, 2, sharey=True, layout="constrained", **widths)
    looks = (("delta_r2", "ΔR²", BLUE, "s", 0.75), ("delta_ce_rec", "ΔCE_rec", ORANGE, "o", 0.25))
    for axis, (title, rows) in zip(axes, sides):
        at = np.arange(len(rows))
        for name, what, colour, marker, _ in looks:
            value, lows, highs = (
                np.array([row[f"{name}{end}"] for _, row in rows]) for end in ("", "_lo", "_hi")
            )
            axis.vlines(at, lows, highs, color=colour, linewidth=2)
            says = [f"{what} of {label.split(':')[0]}: {estimate(row, name, 3)}" for label, row in rows]
            points(axis, at, value, says, color=colour, marker=marker, s=49, alpha=1, linewidth=0)
            for x, y in zip(at, value):
                beside = dict(xytext=(9, 0), textcoords="offset points", va="center", fontsize=8)
                axis.annotate(signed(y, 3), (x, y), color=colour, **beside)
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.set_xticks(at, [label for label, _ in rows], fontsize=8)
        axis.set(xlim=(-0.5, len(rows) - 0.3))
        axis.set_title(title, fontsize=9)
        axis.tick_params(axis="y", labelsize=8)
    for _, what, colour, _, y in looks:
        axes[0].annotate(what, (0.06, y), xycoords="axes fraction", color=colour, fontsize=10)
    as_published = all(row["delta_r2_lo"] > 0 > row["delta_ce_rec_hi"] for _, row in planted)
    figure.suptitle(TITLES[as_published], fontsize=10)
    return figure


def curves(
    x: Sequence[float],
    values: Mapping[str, Sequence[float]],
    looks: Mapping[str, tuple[str, str, float]],
    title: str,
    ticks: Sequence[str] = (),
    **axes: Any,
) -> "Figure":
    """Scores {name: values} over x, named at their ends. looks {name: (colour, marker, how far aside its
    marks are drawn)}; ticks: labels of x; axes: as Axes.set takes them.
    """
    figure, axis = pyplot().subplots(figsize=(6, 3.4), layout="constrained")
    for name, (colour, marker, aside) in looks.items():
        says = [f"{name} at {at:g}: {value:.3f}" for at, value in zip(x, values[name])]
        joined_points(axis, np.array(x) + aside, values[name], says, colour, marker=marker)
    if ticks:
        axis.set_xticks(x, ticks)
    axis.set(**axes)
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    label_ends(axis, [(values[name][-1], name, colour) for name, (colour, *_) in looks.items()])
    return figure


def by_norm(rows: Sequence[dict]) -> "Figure":
    """rows: `norm_rows`."""
    looks = {
        "r2": (BLUE, "s", 0.0),
        "r2_nosink": (SKY, "^", 0.0),
        "cosine": (GREEN, "v", 0.0),
        "ce_rec": (ORANGE, "o", 0.0),
    }
    values = {name: [row[name] for row in rows] for name in looks}
    title = "One position moves R² to where it says nothing"
    norms = [row["norm"] for row in rows]
    return curves(norms, values, looks, title, xlabel="norm of the sink", ylabel="score")


def power(f: Evidence, amounts: Sequence[float]) -> "Figure":
    looks = {
        "swd_tok": (ORANGE, "o", 0.0),
        "r2": (BLUE, "s", -0.015),  # side by side, as these three come out alike
        "nmse_tok": (SKY, "^", 0.0),
        "cosine": (GREEN, "v", 0.015),
    }
    parts = [f"turned-{amount:g}" for amount in amounts]
    values = {name: [f.partials[part][name] for part in parts] for name in looks}
    ticks = [f"{amount:g}\n{f.verdicts[part]['here']['leaf']}" for amount, part in zip(amounts, parts)]
    labels = ("how far errors are turned, and the verdict on H2 here", "partial Spearman with CE_rec")
    axes = dict(xlim=(-0.15, 1.05), xlabel=labels[0], ylabel=labels[1])
    title = "H2 is true by construction, the more to the right"
    return curves(amounts, values, looks, title, ticks, **axes)
