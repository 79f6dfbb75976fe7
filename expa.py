"""Exp-A: does the gap between what R^2 says and what patched cross-entropy says survive the training of the
SAE?

    python expa.py                                          # embedded models, four CPU-minutes
    python expa.py --tokens 100k,300k,1M --out outputs/expa-long
    python expa.py --recipe base,saelens --sinks keep,drop  # is it the trainer, or the sink positions?
    python expa.py --plant null3700                         # and with a sink in the larger model?
    python expa.py --models smollm2-135m --pairs 10:11,10:16    # layers of one model
    python expa.py --preset phase2 --dry-run
    python expa.py --from outputs/expa                      # tables, verdict and plots again, without a model

H0: the larger model's SAE falls behind in CE_rec only because it is undertrained; the gap closes as the token
budget grows. H1: once trained, R^2 still does not mean the same in the two models. N: ... but a sink-free
Euclidean score does, so it is how R^2 is normalised. SAEs are trained over models x k x token budgets x
seeds, every budget with its own decay; Delta = larger model minus smaller, at equal depth, or with --pairs
the second hook of a pair minus the first. The tree below was fixed before any result; what its leaf leaves
open, Exp-B and Exp-C do not decide.
"""

import functools
import itertools
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import parse_args, run_script
from transport_geometry.errors import UserError
from transport_geometry.measuring.metrics import EUCLIDEAN_CONTROLS
from transport_geometry.records.results import about_the_run, load_measurements, of_one_processor, subset
from transport_geometry.records.tables import as_csv, percent, readable_count
from transport_geometry.reporting import expa_learning, expa_report, published
from transport_geometry.reporting.console import Answer, as_sentence, number
from transport_geometry.reporting.expa_report import in_words
from transport_geometry.reporting.templates import blocks
from transport_geometry.running.experiment import Findings, run_and_report
from transport_geometry.running.grid import sae_name
from transport_geometry.running.pairs_flag import FLAGS, compared, with_pairs
from transport_geometry.running.run import Experiment
from transport_geometry.saes.recipes import RECIPES
from transport_geometry.statistics import curves, deltas
from transport_geometry.statistics.hook_pair import PAIRED, Conditions, ModelPair
from transport_geometry.statistics.resampling import ALL, HALF_A, HALF_B
from transport_geometry.statistics.transfer import MIN_IN_RANGE

import numpy as np

GRID: dict[str, Any] = dict(
    models="stdlib-s,stdlib-m,stdlib-l",
    k="4,8,16,32",
    tokens="10k,30k,100k",
    seeds="0,1,2",
    expansion=4,
    eval_seqs=40,
    ctx=256,
)
N_RESAMPLES = 1000
TEXT = blocks("expa")


# ------------------------------------------------------------------------ the tree, fixed before any result
@dataclass(frozen=True)
class Thresholds:
    """The project's own, fixed beforehand."""

    min_seeds: int = 3  # B* is the largest budget with so many in both models
    improved: float = 0.5  # if more of the patches *improve* CE, nothing is lost that CE_rec could measure
    alive: float = 0.80  # G0: of the latents in both models, or no more than alive_gap between the two
    alive_gap: float = 0.10
    converged: float = 0.02  # G0: CE_rec moved less since the budget before
    se: float = 0.01  # G0: standard error of Delta CE_rec over evaluation documents
    margin: float = 0.02  # H0: 90% interval of Delta CE_rec inside +- this, for every k
    gamma: float = 0.03  # H1: |transfer gap of R^2| at least, and its 95% interval without 0
    same_sign: float = 0.75  # H1: of the k have its sign
    in_range: float = MIN_IN_RANGE  # a gap that is mostly outside the fitted range is not judged
    normalisation: float = 0.5  # N: a sink-free Euclidean score has less than this share of R^2's gap


THRESHOLDS = Thresholds()
# may decide N; r2_defl1 breaks where the top direction is badly rebuilt
SINK_FREE = ("r2_nosink", "r2_ln", "nmse_tok", "cosine")
LEAVES = {leaf: TEXT[leaf] for leaf in ("undertrained", "N", "H0+H1", "H0", "H1", "undecided")}


@dataclass(frozen=True)
class Evidence:
    """What the tree finds at B*."""

    previous_budget: int
    improved: float  # share of the patches
    cells: list[dict]  # rows of (depth, k), of `tree_cells`
    g0: dict[str, bool]  # {gate: open}
    equal: bool  # Delta CE_rec is within the margin in every cell, ...
    gap_before: bool  # ... and was not at a smaller budget
    h0: bool
    gamma_r2: float
    gamma_r2_lo: float
    gamma_r2_hi: float
    same_sign: float  # share of the cells
    in_range: float  # share of the values
    h1: bool | None  # None: not judged
    control: str | None  # the best sink-free score; None: none is in range
    gamma_control_half_b: float
    gamma_r2_half_b: float
    normalised_away: bool
    gamma_controls: dict[str, float]  # on all documents


@dataclass(frozen=True)
class Verdict:
    """The leaf of two models, or two hooks, in an arm, and why. budget: B*; it and `found` are None where the
    tree does not come to it.
    """

    small: str
    large: str
    depths: list[str]
    recipe: str
    sinks: str
    leaf: str
    reason: str
    budget: int | None = None
    found: Evidence | None = None

    @property
    def difference(self) -> str:
        return in_words(self.large, "minus", self.small, self.depths)

    def record(self) -> dict[str, Any]:
        """As verdict.json has it: flat, without what the tree did not come to."""
        own = {name: value for name, value in vars(self).items() if name != "found" and value is not None}
        return own | {"thresholds": vars(THRESHOLDS)} | (vars(self.found) if self.found else {})


def adjudicate(conditions: Conditions, recipe: str, sinks: str) -> Verdict:
    """The pre-registered verdict on H0 and H1 between the smallest and the largest model, or two hooks. The
    first leaf that applies:

      undecided     one model; no depth in common; no budget with 3 seeds in both; no budget before B*; most
                    patches improve CE
      undertrained  a gate of G0 is shut at B*: alive latents, CE_rec still moving, evaluation too noisy
      N             H1, but the best sink-free Euclidean score (chosen on half the documents) has under half
                    the gap on the other half
      H0+H1, H0, H1
      undecided     neither

    H0 is about a gap that goes: it is not given where no smaller budget shows one (|Delta CE_rec| of the
    margin or more, 95% interval without 0). Where most of the larger model's R^2 lie outside the smaller
    one's range, R^2 is not transferable: h1 is None, not judged.
    """
    small, large = conditions.models[0], conditions.models[-1]
    depths = [set(conditions.meta["depth"][conditions.mask(model=model)]) for model in (small, large)]
    shared = sorted(depths[0] & depths[1])
    verdict = functools.partial(Verdict, small, large, [str(depth) for depth in shared], recipe, sinks)
    if small == large:
        return verdict("undecided", "one model")
    if not shared:
        return verdict("undecided", "no layers of equal depth in the smallest and the largest model")

    pair = conditions.only(np.isin(conditions.meta["depth"], shared)).pair(small, large)
    budgets = np.unique(pair.meta["tokens"])
    n_seeds = {
        int(b): min(len(np.unique(pair.meta["seed"][pair.mask(model=m, tokens=b)])) for m in (small, large))
        for b in budgets
    }
    if not (enough := [b for b, n in n_seeds.items() if n >= THRESHOLDS.min_seeds]):
        return verdict("undecided", f"no budget has {THRESHOLDS.min_seeds} seeds in both")
    last = enough[-1]
    if not len(earlier := budgets[budgets < last]):
        so = "so nothing says whether training has converged"
        return verdict("undecided", f"no budget before {readable_count(last)}, {so}", last)

    cells = deltas.tree_cells(pair, last, earlier[-1])
    found = Evidence(
        previous_budget=int(earlier[-1]),
        improved=float(np.mean(pair.values["ce_rec"][ALL][pair.mask(tokens=last)] > 1)),
        cells=cells,
        g0=gates(cells),
        **equality(pair, cells, earlier),
        **transfer(pair, cells, last),
        **normalisation(pair, last),
    )
    return verdict(*leaf_of(found, n_seeds[last]), last, found)


def gates(cells: list[dict]) -> dict[str, bool]:
    """G0: is there anything to judge yet? {gate: open}; every cell must pass."""
    t = THRESHOLDS
    alive = [(row["alive_small"], row["alive_large"]) for row in cells]
    moved = [max(abs(row["moved_small"]), abs(row["moved_large"])) for row in cells]
    return {
        "alive": all(min(ab) >= t.alive or abs(ab[0] - ab[1]) <= t.alive_gap for ab in alive),
        "converged": all(distance < t.converged for distance in moved),
        "precise": all(row["se"] < t.se for row in cells),
    }


def equality(pair: ModelPair, cells: list[dict], earlier: np.ndarray) -> dict[str, Any]:
    """H0: Delta CE_rec is inside the margin in every cell, by two one-sided tests at 5%, which is a 90%
    interval (Schuirmann 1987), and a smaller budget, one of `earlier` [b], shows a gap that could go.
    """
    margin = THRESHOLDS.margin
    equal = all(-margin < row["lo90"] and row["hi90"] < margin for row in cells)
    gap_before = False
    for cell in pair.grid("tokens", "depth", "k"):
        if cell["tokens"] in earlier:
            delta = pair.delta("ce_rec", **cell)
            gap_before |= bool(abs(delta[0]) >= margin and without_zero(*pair.interval(delta)))
    return dict(equal=equal, gap_before=gap_before, h0=equal and gap_before)


def transfer(pair: ModelPair, cells: list[dict], last: int) -> dict[str, Any]:
    """H1: does one value of R^2 mean different CE_rec in the two models? The transfer gap Gamma of R^2
    (`transfer.transfer_gap`: isotonic fits over all budgets, judged at B*), in units of CE_rec, its Student
    interval over seeds and documents, and its sign in every cell.
    """
    t = THRESHOLDS
    draws, in_range = pair.transfer_gap_draws("r2", judged=pair.mask(tokens=last))
    gamma, (lo, hi) = float(draws[0]), pair.interval(draws)
    same_sign = float(np.mean([np.sign(row["gamma_r2"]) == np.sign(gamma) for row in cells]))
    h1 = None
    if in_range >= t.in_range:
        h1 = bool(abs(gamma) >= t.gamma and without_zero(lo, hi) and same_sign >= t.same_sign)
    interval = dict(gamma_r2=gamma, gamma_r2_lo=lo, gamma_r2_hi=hi)
    return interval | dict(same_sign=same_sign, in_range=in_range, h1=h1)


def normalisation(pair: ModelPair, last: int) -> dict[str, Any]:
    """N: of the sink-free Euclidean scores in range, the one with the smallest |Gamma| on the even documents,
    against R^2 on the odd ones: what chose it does not judge it.
    """
    judged = pair.mask(tokens=last)
    gaps = {score: pair.transfer_gap(score, judged, HALF_A) for score in SINK_FREE}
    sizes = {score: abs(gap) for score, (gap, in_range) in gaps.items() if in_range >= THRESHOLDS.in_range}
    control = min(sizes, key=lambda score: sizes[score]) if sizes else None
    of_control = pair.transfer_gap(control, judged, HALF_B)[0] if control else np.nan
    of_r2 = pair.transfer_gap("r2", judged, HALF_B)[0]
    return dict(
        control=control,
        gamma_control_half_b=of_control,
        gamma_r2_half_b=of_r2,
        normalised_away=abs(of_control) < THRESHOLDS.normalisation * abs(of_r2),
        gamma_controls={name: pair.transfer_gap(name, judged)[0] for name in EUCLIDEAN_CONTROLS},
    )


def without_zero(lo: float, hi: float) -> bool:
    return lo > 0 or hi < 0


def leaf_of(found: Evidence, n_seeds: int) -> tuple[str, str]:
    """(leaf, reason): the first that applies. n_seeds: in each model at B*."""
    if found.improved > THRESHOLDS.improved:
        return "undecided", TEXT["improved"].format(share=percent(found.improved))
    if shut := [TEXT[f"not {gate}"] for gate, is_open in found.g0.items() if not is_open]:
        return "undertrained", "; ".join(shut).format(t=THRESHOLDS)
    equal, unlike = "CE_rec is equal within the margin for every k", "R² does not mean the same in both"
    if found.h1 and found.normalised_away:
        reason = f"{found.control} has less than half of R²'s transfer gap"
        return "N", f"{reason}, and CE_rec is equal" if found.h0 else reason
    if found.h1:
        return ("H0+H1", f"{equal} and {unlike}") if found.h0 else ("H1", unlike)
    unjudged = TEXT["unjudged"].format(share=percent(found.in_range)) if found.h1 is None else ""
    if found.h0:
        return "H0", equal + unjudged
    if found.equal:
        return "undecided", TEXT["never a gap"] + unjudged
    more = deltas.more_needed(found.cells, THRESHOLDS.margin, n_seeds)
    return "undecided", TEXT["neither"] + unjudged + more


# --------------------------------------------------------------------------------------- tables and verdict
def analyse(out: pathlib.Path, settings: dict) -> Findings:
    """Everything after one row per SAE: a pure function of the rows, and of the processors in run.json."""
    found = load_measurements(out, settings, N_RESAMPLES)
    of_one = of_one_processor(out, found.saes)
    found, left_out = subset(found, of_one), int((~of_one).sum())
    alive = np.array([row["alive"] for row in found.saes])
    conditions = Conditions(found.values, found.meta, alive, settings["models"], min(settings["documents"]))
    if pairs := settings.get("pairs", []):
        conditions = conditions.by_hook()
    rows, verdicts, stars, laws = [], [], [], []
    for sinks, recipe in itertools.product(settings["sinks"], settings["recipe"]):
        part = conditions.only(conditions.mask(recipe=recipe, sae=sae_name(settings["expansion"], sinks)))
        rows += deltas.delta_rows(part, recipe, sinks, pairs)
        verdicts += [adjudicate(part.of(two), recipe, sinks) for two in pairs or compared(settings["models"])]
        of_arm = curves.Curves.of(part, N_RESAMPLES)
        stars += curves.k_stars(of_arm, recipe, sinks)
        laws += curves.laws(of_arm, recipe, sinks, decay=RECIPES[recipe].DECAY > 0)
    first, records = verdicts[0], [verdict.record() for verdict in verdicts]
    same = {name: getattr(first, name) for name in ("small", "large", "recipe", "sinks")}
    shown = [row for row in rows if same.items() <= row.items()]
    said = answer(first, shown, verdicts[1:])
    correlation = deltas.seed_correlation(conditions.of(pairs[0] if pairs else settings["models"]))
    parts = [
        expa_learning.k_star_section(stars, first.small, first.large),
        expa_learning.learning_section(found.saes, settings),
        expa_learning.law_section(laws),
        published.section(rows, found.saes, stars, settings["hooks"]),
        "\n".join(about_the_run(found.saes, settings)),
    ]
    figures = expa_learning.figures(found.saes, settings)
    if shown:
        figures["deltas.png"] = expa_report.delta_figure(shown, first.difference, LEAVES[first.leaf])
        figures["mismatch.png"] = expa_report.mismatch_figure(shown)
    verdict = records[0] | dict(other_arms=records[1:], kstar=[star.row() for star in stars], power_law=laws)
    return Findings(
        answer=said,
        verdict=verdict,
        short_verdict=f"H0/H1: {first.leaf}",
        report=expa_report.report(said, records, rows, correlation, left_out, parts, figures),
        figures=figures,
        table=functools.partial(expa_report.in_short, shown, first.difference),
        tables={"deltas.csv": as_csv(rows, deltas.COLUMNS)},
    )


def answer(verdict: Verdict, shown: list[dict], others: Sequence[Verdict] = ()) -> Answer:
    """shown: the rows of deltas.csv that the verdict is about. others: verdicts on other pairs and arms."""
    v, hooks, text = verdict, verdict.depths == [PAIRED], LEAVES[verdict.leaf]
    if v.leaf in ("undertrained", "undecided", "N"):
        text += f" {as_sentence(v.reason)}"
    limits = TEXT.get(f"limits of {v.leaf}", TEXT["still open"]).format(margin=THRESHOLDS.margin)
    if not shown:
        return Answer(TEXT["question of one model"], text, limits)
    end = [row for row in shown if row["tokens"] == v.budget] or shown
    widest = max(end, key=lambda row: np.nan_to_num(abs(row["delta_ce_rec"])))
    ce, r2 = (number(widest, f"delta_{name}", 3) for name in ("ce_rec", "r2"))
    at = dict(budget=readable_count(widest["tokens"]), k=widest["k"], difference=v.difference)
    text += " " + TEXT["at the end"].format(ce=ce, r2=r2, **at)
    if v.found and v.leaf in ("H1", "H0+H1", "N"):
        text += " " + TEXT["at one r2"].format(gamma=number(vars(v.found), "gamma_r2", 3))
    pairs = [one for one in others if hooks and (one.recipe, one.sinks) == (v.recipe, v.sinks)]
    if pairs:
        text += f" Other pairs: {'; '.join(f'{one.difference}, {one.leaf}' for one in pairs)}."
    scope = TEXT["scope"].format(what="hooks" if hooks else "models", n=widest["n_seeds"])
    question = TEXT["question"].format(two=in_words(v.small, "and", v.large, v.depths))
    return Answer(question, text, f"{limits} {scope}")


# ---------------------------------------------------------------------------------------------------- main
def main() -> None:
    command = with_pairs(parse_args(__doc__, GRID, flags=FLAGS), GRID["models"])
    if command.grid.saes:
        raise UserError("--sae: Exp-A is about how SAEs train; expb.py evaluates existing ones")
    run_and_report(command, Experiment("expa"), analyse)


if __name__ == "__main__":
    run_script(main)
