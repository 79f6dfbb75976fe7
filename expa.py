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

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import parse_args, parse_models, run_script
from transport_geometry.errors import UserError, brief, printable
from transport_geometry.measuring.metrics import EUCLIDEAN_CONTROLS
from transport_geometry.models.loading import readable_names
from transport_geometry.models.plant import split
from transport_geometry.records import store
from transport_geometry.records.condition import hook_of
from transport_geometry.records.results import (
    about_the_run,
    load_measurements,
    of_one_processor,
    rows_hash,
    subset,
)
from transport_geometry.records.tables import (
    Content,
    as_csv,
    as_json,
    estimate,
    grouped,
    markdown,
    percent,
    plain,
    readable_count,
    signed,
    span,
)
from transport_geometry.reporting import console as console
from transport_geometry.reporting import published
from transport_geometry.reporting.console import (
    Answer,
    as_sentence,
    coloured,
    columns,
    number,
    print_result,
    quiet_output,
)
from transport_geometry.reporting.figures import BLUE, GREEN, ORANGE, label_ends, pyplot
from transport_geometry.reporting.page import with_page
from transport_geometry.running.grid import Command, sae_name
from transport_geometry.running.run import Experiment, run
from transport_geometry.saes.recipes import RECIPES
from transport_geometry.statistics import curves, stats
from transport_geometry.statistics.hook_pair import Conditions, ModelPair, mismatch

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
FLAGS = {
    "--pairs": dict(
        metavar="A:B,...",
        help="hooks to compare, the second minus the first: layers of the one model of --models (10:11), or "
        "MODEL@LAYER:MODEL@LAYER (default: equal depths of the smallest and the largest model)",
    )
}
PAIRED = "paired"  # the depth of hooks that --pairs compares


# ------------------------------------------------------------------------ the tree, fixed before any result
@dataclass(frozen=True)
class Thresholds:
    # B*: the largest budget with so many seeds in both models
    min_seeds: int = 3
    # of patches that *improve* CE: above, nothing is lost that CE_rec could measure
    improved: float = 0.5
    # G0: this fraction of latents alive in both models, or no more than this between them
    alive: float = 0.80
    alive_gap: float = 0.10
    # G0: CE_rec moved less than this since the budget before
    converged: float = 0.02
    # G0: standard error of Delta CE_rec over evaluation documents
    se: float = 0.01
    # H0: 90% interval of Delta CE_rec inside +- this, for every k
    margin: float = 0.02
    # H1: |transfer gap of R^2| at least this, its 95% interval without 0, and of one sign for this share of k
    gamma: float = 0.03
    same_sign: float = 0.75
    # a transfer gap mostly outside the fitted range is not judged
    in_range: float = stats.MIN_IN_RANGE
    # N: a sink-free Euclidean score has less than this share of R^2's gap
    normalisation: float = 0.5


THRESHOLDS = Thresholds()
# may decide N; r2_defl1 breaks where the top direction is badly rebuilt
SINK_FREE = ("r2_nosink", "r2_ln", "nmse_tok", "cosine")


@dataclass(frozen=True)
class Arm:
    """How SAEs are trained, `--recipe` and `--sinks`. The verdict is the first arm's; others are controls."""

    recipe: str
    sinks: str


@dataclass(frozen=True)
class Equality:
    """C1, H0: is CE_rec the same in both models, and was it not before?"""

    equal: bool
    gap_before: bool
    h0: bool


@dataclass(frozen=True)
class Transfer:
    """C1, H1: does one value of R^2 mean different CE_rec in the two models? h1 None: not judged."""

    gamma_r2: float
    gamma_r2_lo: float
    gamma_r2_hi: float
    same_sign: float
    in_range: float
    h1: bool | None


@dataclass(frozen=True)
class Normalisation:
    """C1b, N: does the best sink-free Euclidean score show the gap too? control None: none is in range."""

    control: str | None
    gamma_control_half_b: float
    gamma_r2_half_b: float
    normalised_away: bool
    gamma_controls: dict[str, float]


@dataclass(frozen=True)
class Evidence:
    """What the tree finds at B*: rows of (depth, k), the gates of G0 (open or not), the three questions."""

    previous_budget: int
    improved: float
    cells: list[dict]
    g0: dict[str, bool]
    equality: Equality
    transfer: Transfer
    normalisation: Normalisation

    def record(self) -> dict[str, Any]:
        """As verdict.json has it: flat."""
        flat = dict(vars(self))
        for question in ("equality", "transfer", "normalisation"):
            flat |= vars(flat.pop(question))
        return flat


@dataclass(frozen=True)
class Verdict:
    """The leaf of a pair and an arm, and why. budget: B*; it and `found` are None where the tree does not
    come to it.
    """

    arm: Arm
    small: str  # a model, or the first hook of a pair
    large: str
    depths: list[str]
    leaf: str = "undecided"
    reason: str = ""
    budget: int | None = None
    found: Evidence | None = None

    @property
    def difference(self) -> str:
        return in_words(self.large, "minus", self.small, self.depths)

    def stopped(self, reason: str) -> "Verdict":
        return dataclasses.replace(self, reason=reason)

    def record(self) -> dict[str, Any]:
        """As verdict.json has it: flat, without what the tree did not come to."""
        flat = {name: getattr(self, name) for name in ("small", "large", "depths", "leaf", "reason")}
        flat |= vars(self.arm) | {"thresholds": vars(THRESHOLDS)}
        if self.budget is not None:
            flat["budget"] = self.budget
        return flat | (self.found.record() if self.found else {})


def adjudicate(conditions: Conditions, arm: Arm) -> Verdict:
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
    verdict = Verdict(arm, small, large, depths=[str(depth) for depth in shared])
    if small == large:
        return verdict.stopped("one model")
    if not shared:
        return verdict.stopped("no layers of equal depth in the smallest and the largest model")

    pair = conditions.only(np.isin(conditions.meta["depth"], shared)).pair(small, large)
    budgets = np.unique(pair.meta["tokens"])
    enough = [b for b in budgets if seeds_in_both(pair, b) >= THRESHOLDS.min_seeds]
    if not enough:
        return verdict.stopped(f"no budget has {THRESHOLDS.min_seeds} seeds in both")
    last = enough[-1]
    earlier = budgets[budgets < last]
    verdict = dataclasses.replace(verdict, budget=int(last))
    if not len(earlier):
        so = "so nothing says whether training has converged"
        return verdict.stopped(f"no budget before {readable_count(int(last))}, {so}")

    cells = cells_at(pair, last, earlier[-1])
    found = Evidence(
        previous_budget=int(earlier[-1]),
        improved=float(np.mean(pair.values["ce_rec"][stats.ALL][pair.mask(tokens=last)] > 1)),
        cells=cells,
        g0=gates(cells),
        equality=equality(pair, cells, earlier),
        transfer=transfer(pair, cells, last),
        normalisation=normalisation(pair, last),
    )
    leaf, reason = leaf_of(found, seeds_in_both(pair, last))
    return dataclasses.replace(verdict, leaf=leaf, reason=reason, found=found)


def compared(models: list[str]) -> list[list[str]]:
    """Of models from the smallest to the largest, the sets that a verdict is about: those in which nothing is
    planted, and for each planted twin the same with it in its model's place, or beside it where that is
    alone.
    """
    plain = [model for model in models if not split(model)[1]]
    twins = [model for model in models if split(model)[1] and split(model)[0] in plain]
    others = {twin: [model for model in plain if model != split(twin)[0]] or plain for twin in twins}
    sets = [plain] * (len(plain) > 1) + [[*others[twin], twin] for twin in twins]
    return sets or [models]


def seeds_in_both(pair: ModelPair, tokens: int) -> int:
    return min(len(np.unique(pair.meta["seed"][pair.mask(model=m, tokens=tokens)])) for m in pair.models)


def cells_at(pair: ModelPair, last: int, before: int) -> list[dict]:
    """What the tree asks of every (depth, k) at the budget `last` = B*: live latents in both models, how far
    CE_rec moved since the budget `before`, Delta CE_rec with its 90% interval, standard error over documents
    and variance over seeds, and the transfer gap of R^2.
    """
    rows = []
    for cell in pair.grid("depth", "k"):
        alive, moved = [], []
        for model in pair.models:
            alive.append(float(pair.alive[pair.mask(model=model, tokens=last, **cell)].mean()))
            now, then = (pair.mean("ce_rec", model=model, tokens=b, **cell)[0] for b in (last, before))
            moved.append(float(now - then))
        delta = pair.delta("ce_rec", tokens=last, **cell)
        lo, hi = pair.interval(delta, level=0.90)
        gamma, _ = pair.transfer_gap("r2", judged=pair.mask(tokens=last, **cell))
        rows.append(
            dict(
                depth=str(cell["depth"]),
                k=int(cell["k"]),
                alive_small=alive[0],
                alive_large=alive[1],
                moved_small=moved[0],
                moved_large=moved[1],
                delta_ce_rec=float(delta[0]),
                lo90=lo,
                hi90=hi,
                se=float(delta[pair.sources["documents"]].std(ddof=1)),
                seed_variance=pair.seed_variance(delta),
                gamma_r2=gamma,
            )
        )
    return rows


def gates(cells: list[dict]) -> dict[str, bool]:
    """G0: is there anything to judge yet? {gate: open}; every cell must pass. The thresholds are this
    project's own, fixed beforehand.
    """
    t = THRESHOLDS
    alive = [(row["alive_small"], row["alive_large"]) for row in cells]
    moved = [max(abs(row["moved_small"]), abs(row["moved_large"])) for row in cells]
    return {
        "alive": all(min(ab) >= t.alive or abs(ab[0] - ab[1]) <= t.alive_gap for ab in alive),
        "converged": all(distance < t.converged for distance in moved),
        "precise": all(row["se"] < t.se for row in cells),
    }


def equality(pair: ModelPair, cells: list[dict], earlier: np.ndarray) -> Equality:
    """C1, H0: Delta CE_rec is inside the margin in every cell, by two one-sided tests at 5%, which is a 90%
    interval (Schuirmann 1987), and a smaller budget, one of `earlier` [b], shows a gap that could go.
    """
    margin = THRESHOLDS.margin
    equal = all(-margin < row["lo90"] and row["hi90"] < margin for row in cells)
    gap_before = False
    for cell in pair.grid("tokens", "depth", "k"):
        if cell["tokens"] in earlier:
            delta = pair.delta("ce_rec", **cell)
            gap_before |= bool(abs(delta[0]) >= margin and without_zero(*pair.interval(delta)))
    return Equality(equal, gap_before, h0=equal and gap_before)


def transfer(pair: ModelPair, cells: list[dict], last: int) -> Transfer:
    """C1, H1: the transfer gap Gamma of R^2 (`stats.transfer_gap`: isotonic fits over all budgets, judged at
    B*), in units of CE_rec, its Student interval over seeds and documents, and its sign in every cell.
    """
    t = THRESHOLDS
    draws, in_range = pair.transfer_gap_draws("r2", judged=pair.mask(tokens=last))
    gamma = float(draws[0])
    lo, hi = pair.interval(draws)
    same_sign = float(np.mean([np.sign(row["gamma_r2"]) == np.sign(gamma) for row in cells]))
    h1 = None
    if in_range >= t.in_range:
        h1 = bool(abs(gamma) >= t.gamma and without_zero(lo, hi) and same_sign >= t.same_sign)
    return Transfer(gamma, lo, hi, same_sign, in_range, h1)


def normalisation(pair: ModelPair, last: int) -> Normalisation:
    """C1b, N: of the sink-free Euclidean scores in range, the one with the smallest |Gamma| on the even
    documents, against R^2 on the odd ones: what chose it does not judge it.
    """
    judged = pair.mask(tokens=last)
    sizes = {}
    for score in SINK_FREE:
        gamma, in_range = pair.transfer_gap(score, judged, stats.HALF_A)
        if in_range >= THRESHOLDS.in_range:
            sizes[score] = abs(gamma)
    control = min(sizes, key=lambda score: sizes[score]) if sizes else None
    of_control = pair.transfer_gap(control, judged, stats.HALF_B)[0] if control else np.nan
    of_r2 = pair.transfer_gap("r2", judged, stats.HALF_B)[0]
    return Normalisation(
        control=control,
        gamma_control_half_b=of_control,
        gamma_r2_half_b=of_r2,
        normalised_away=abs(of_control) < THRESHOLDS.normalisation * abs(of_r2),
        gamma_controls={name: pair.transfer_gap(name, judged)[0] for name in EUCLIDEAN_CONTROLS},
    )


def leaf_of(found: Evidence, n_seeds: int) -> tuple[str, str]:
    """(leaf, reason): the first that applies. n_seeds: in each model at B*."""
    equal, h0, h1 = found.equality.equal, found.equality.h0, found.transfer.h1
    unjudged = UNJUDGED.format(share=percent(found.transfer.in_range)) if h1 is None else ""
    if found.improved > THRESHOLDS.improved:
        return "undecided", IMPROVED.format(share=percent(found.improved))
    if shut := [text.format(t=THRESHOLDS) for gate, text in SHUT.items() if not found.g0[gate]]:
        return "undertrained", "; ".join(shut)
    if h1 and found.normalisation.normalised_away:
        reason = NORMALISED_AWAY.format(control=found.normalisation.control)
        return "N", f"{reason}, and CE_rec is equal" if h0 else reason
    if h0 and h1:
        return "H0+H1", f"{EQUAL} and {UNLIKE}"
    if h0:
        return "H0", EQUAL + unjudged
    if h1:
        return "H1", UNLIKE
    if equal:
        return "undecided", NEVER_A_GAP + unjudged
    return "undecided", NEITHER + unjudged + n_needed(found.cells, n_seeds)


LEAVES = {
    "undertrained": "The SAEs are not trained far enough to say anything about the gap: a difference now may "
    "be gone with more tokens.",
    "N": "R² does not carry over between the two, but a sink-free Euclidean score does: the gap is how R² is "
    "normalised.",
    "H0+H1": "CE_rec is the same in both after training, and yet one value of R² means different CE_rec in "
    "them.",
    "H0": "CE_rec is the same in both once the SAEs are trained.",
    "H1": "A gap stays after training: one value of R² means different CE_rec in the two.",
    "undecided": "This grid cannot decide.",
}
IMPROVED = (
    "{share} of the patches improve CE, so CE_rec does not say what an SAE loses: is this text far from the "
    "models'?"
)
SHUT = {
    "alive": "too few latents are alive, and not equally few",
    "converged": "CE_rec still moves by {t.converged} or more between the last two budgets",
    "precise": "the evaluation set is too small",
}
NORMALISED_AWAY = "{control} has less than half of R²'s transfer gap"
EQUAL = "CE_rec is equal within the margin for every k"
UNLIKE = "R² does not mean the same in both"
NEVER_A_GAP = (
    "CE_rec is equal within the margin at every budget: there never was a gap that could go, and no transfer "
    "gap of R² is shown"
)
NEITHER = "neither equal CE_rec nor a transfer gap of R² is shown"
UNJUDGED = "; R² is not transferable: only {share} of its values lie in the range of the other's"
MORE_SEEDS = "; about {n} seeds of each would show equality if the means stay"
MORE_DOCUMENTS = "; equality would take more evaluation documents, whatever the seeds"


def n_needed(cells: list[dict], n: int) -> str:
    """What would show equality if the means stay: the seeds of each side, now n, at which every 90% interval
    fits the margin (normal approximation); empty where a mean is outside, or they suffice.
    """
    margin, seeds = THRESHOLDS.margin, []
    for row in cells:  # z^2 (seed variance n / N + sequence variance) = room^2
        room = ((margin - abs(row["delta_ce_rec"])) / 1.645) ** 2 - row["se"] ** 2
        if abs(row["delta_ce_rec"]) >= margin:
            return ""
        if room <= 0:
            return MORE_DOCUMENTS
        seeds.append(int(np.ceil(n * row["seed_variance"] / room)))
    return MORE_SEEDS.format(n=max(seeds)) if max(seeds) > n else ""


def without_zero(lo: float, hi: float) -> bool:
    return lo > 0 or hi < 0


# ---------------------------------------------------------------------------------------------- deltas.csv
DELTAS = "r2 r2_nosink r2_defl1 cosine ce_rec dce frac_zero".split()
MORE_DELTAS = "ce_rec_sinkclean frac_mean".split()


def with_ends(names: list[str]) -> list[str]:
    return [f"{name}{end}" for name in names for end in ("", "_lo", "_hi")]


COLUMNS = [
    *"small large depth recipe sinks k tokens n_seeds".split(),
    *with_ends([f"delta_{metric}" for metric in DELTAS]),
    *with_ends(["mismatch"]),
    "mismatch_published",
    *with_ends(["ratio"]),
    *with_ends([f"delta_{metric}" for metric in MORE_DELTAS]),
]


def delta_rows(conditions: Conditions, arm: Arm, pairs: Sequence[Sequence[str]] = ()) -> list[dict]:
    """deltas.csv of one arm: the second minus the first of each pair, at every depth that both have, per k
    and budget. pairs: where none are named all models, larger minus smaller.
    """
    rows = []
    for small, large in pairs or itertools.combinations(conditions.models, 2):
        pair = conditions.pair(small, large)
        for cell in pair.grid("depth", "k", "tokens"):
            if all(pair.mask(model=model, **cell).any() for model in pair.models):
                key = dict(small=small, large=large, depth=cell["depth"], **vars(arm))
                key |= dict(k=int(cell["k"]), tokens=int(cell["tokens"]))
                rows.append(key | delta_row(pair, cell))
    return rows


def delta_row(pair: ModelPair, cell: dict[str, Any]) -> dict[str, Any]:
    """What two models differ by in one cell, with 95% intervals: Student over seeds and documents, Fieller
    for the ratio of Delta R^2 to Delta CE_rec, a bootstrap over seeds for their mismatch.
    """
    r2, ce = pair.by_seed("r2", **cell), pair.by_seed("ce_rec", **cell)
    delta = {metric: pair.delta(metric, **cell) for metric in DELTAS + MORE_DELTAS}
    row: dict[str, Any] = dict(n_seeds=min(map(len, r2)), mismatch_published=np.nan)
    for metric, draws in delta.items():
        row |= with_interval(f"delta_{metric}", draws[0], *pair.interval(draws))
    row |= with_interval("mismatch", *mismatch(r2, ce))
    if len(r2[0]) == len(r2[1]):  # the research log's: seeds of the same index, in one direction
        row["mismatch_published"] = float(np.mean((r2[1] > r2[0]) & (ce[1] < ce[0])))
    return row | with_interval("ratio", *pair.ratio_interval(delta["r2"], delta["ce_rec"]))


def with_interval(name: str, value: float, lo: float, hi: float) -> dict[str, Any]:
    return dict(zip(with_ends([name]), (value, lo, hi)))


def headline(deltas: list[dict], verdict: Verdict) -> list[dict]:
    """The rows the verdict is about: its pair and arm."""
    about = dict(small=verdict.small, large=verdict.large, **vars(verdict.arm))
    return [row for row in deltas if about.items() <= row.items()]


def seed_correlation(conditions: Conditions) -> float:
    """Correlation of what a seed does to CE_rec in the smallest and in the largest model, over cells: would
    pairing be justified? nan with fewer than three pairs.
    """
    names = ["model", "depth", "recipe", "sae", "k", "tokens"]
    columns = [*(conditions.meta[name] for name in names), conditions.values["ce_rec"][stats.ALL]]
    cells = grouped([dict(zip([*names, "ce"], row)) for row in zip(*columns)], names)
    pairs: list[tuple[float, float]] = []
    for (model, *cell), here in cells.items():  # conditions come sorted by seed
        there = cells.get((conditions.models[-1], *cell), [])
        if model == conditions.models[0] != conditions.models[-1] and len(here) == len(there) > 1:
            ours, theirs = (np.array([row["ce"] for row in side]) for side in (here, there))
            pairs += zip(ours - ours.mean(), theirs - theirs.mean())
    return float(np.corrcoef(np.array(pairs).T)[0, 1]) if len(pairs) > 2 else np.nan


# ------------------------------------------------------------------------------------------- in three lines
QUESTION = (
    "Between {two}, does the gap in what patching an SAE in does to cross-entropy go away as "
    "the SAEs are trained longer, and does R² show the same gap?"
)
ONE_MODEL = (
    "Does the gap between two models, in what patching an SAE in does to cross-entropy, go away as the SAEs "
    "are trained longer?"
)
AT_THE_END = (
    "At {budget} tokens and k = {k}, where it is widest, the gap in CE_rec is {ce} and the gap in R² {r2}, "
    "{difference}."
)
ONE_R2 = "At one value of R² CE_rec differs by {gamma} between them."
OPENS = {
    "undertrained": "It speaks neither for a gap that stays nor for one that goes: H0 and H1 are open, and "
    "what waits for this verdict (Exp-B and on) decides nothing yet.",
    "undecided": "It speaks neither for a gap that stays nor for one that goes: H0 and H1 are open, and what "
    "waits for this verdict (Exp-B and on) decides nothing yet.",
    "N": "It does not make R² useless within one of the two: it is between them that it does not carry over.",
    "H0": "Equal means within ±{t.margin} of CE_rec, and says nothing of larger budgets or of other scores.",
    "H1": "It is a gap between these two, whatever its cause, and no law of scale.",
    "H0+H1": "Equal means within ±{t.margin} of CE_rec; that R² does not carry over is no law of scale.",
}
SCOPE = " Two {what} on one text, {n} seeds each."


def in_words(a: str, word: str, b: str, depths: Sequence[str]) -> str:
    """Two models, or two hooks, with a word between them.

    >>> in_words("l", "minus", "s", ["0.50"]), in_words("s@11", "minus", "s@10", [PAIRED])
    ('l minus s', 'block 11 minus block 10 of s')
    """
    if list(depths) != [PAIRED]:
        return f"{a} {word} {b}"
    (model, _, layer), (other, _, layer_b) = a.rpartition("@"), b.rpartition("@")
    of_a = f" of {model}" if model != other else ""
    return f"block {layer}{of_a} {word} block {layer_b} of {other}"


def answer(verdict: Verdict, deltas: list[dict], others: Sequence[Verdict] = ()) -> Answer:
    """deltas: the headline's rows. others: verdicts on other pairs of hooks, to be named."""
    v, last = verdict, [row for row in deltas if row["tokens"] == verdict.budget]
    if not deltas:
        return Answer(ONE_MODEL, f"{LEAVES[v.leaf]} {as_sentence(v.reason)}", OPENS[v.leaf])
    found, end = [LEAVES[v.leaf]], last or deltas
    if v.leaf in ("undertrained", "undecided", "N"):
        found.append(as_sentence(v.reason))
    widest = max(end, key=lambda row: np.nan_to_num(abs(row["delta_ce_rec"])))
    found.append(
        AT_THE_END.format(
            budget=readable_count(widest["tokens"]),
            k=widest["k"],
            ce=number(widest, "delta_ce_rec", 3),
            r2=number(widest, "delta_r2", 3),
            difference=v.difference,
        )
    )
    if v.found and v.found.transfer.h1 and v.leaf in ("H1", "H0+H1", "N"):
        found.append(ONE_R2.format(gamma=number(vars(v.found.transfer), "gamma_r2", 3)))
    if others:
        found.append(f"Other pairs: {'; '.join(f'{one.difference}, {one.leaf}' for one in others)}.")
    what = "hooks" if v.depths == [PAIRED] else "models"
    limits = OPENS[v.leaf].format(t=THRESHOLDS) + SCOPE.format(what=what, n=widest["n_seeds"])
    return Answer(QUESTION.format(two=in_words(v.small, "and", v.large, v.depths)), " ".join(found), limits)


# -------------------------------------------------------------------------------------------- verdict.json
@dataclass(frozen=True)
class Findings:
    """What the report shows: rows of conditions.csv and deltas.csv, the verdicts (of all arms, the first the
    headline's), k* and power laws over budgets, and the run's settings.
    """

    saes: list[dict]
    deltas: list[dict]
    verdicts: list[Verdict]
    stars: list[curves.KStar]
    laws: list[dict]
    correlation: float
    left_out: int  # SAEs of other processors
    settings: dict[str, Any]

    @property
    def verdict(self) -> Verdict:
        return self.verdicts[0]

    @property
    def headline(self) -> list[dict]:
        return headline(self.deltas, self.verdict)

    @property
    def answer(self) -> Answer:
        first = self.verdict
        others = [v for v in self.verdicts[1:] if v.arm == first.arm and v.depths == [PAIRED]]
        return answer(first, self.headline, others)


def analyse(out: pathlib.Path, settings: dict) -> Findings:
    """deltas.csv, verdict.json, report.md and the plots: a pure function of conditions.csv, sequences.npz and
    what run.json says of processors.
    """
    found = load_measurements(out, settings, N_RESAMPLES)
    paired = of_one_processor(out, found.saes)
    found, left_out = subset(found, paired), int((~paired).sum())
    alive = np.array([row["alive"] for row in found.saes])
    conditions = Conditions(found.values, found.meta, alive, settings["models"], min(settings["documents"]))
    pairs = settings.get("pairs", [])
    if pairs:
        conditions = conditions.by_hook(PAIRED)
    deltas, verdicts, stars, laws = [], [], [], []
    for sinks, recipe in itertools.product(settings["sinks"], settings["recipe"]):
        arm, sae = Arm(recipe, sinks), sae_name(settings["expansion"], sinks)
        part = conditions.only(conditions.mask(recipe=recipe, sae=sae))
        deltas += delta_rows(part, arm, pairs)
        verdicts += [adjudicate(part.of(two), arm) for two in pairs or compared(settings["models"])]
        of_arm = curves.Curves.of(part, N_RESAMPLES)
        stars += curves.k_stars(of_arm, recipe, sinks)
        laws += curves.laws(of_arm, recipe, sinks, decay=RECIPES[recipe].DECAY > 0)
    correlation = seed_correlation(conditions.of(pairs[0] if pairs else settings["models"]))
    findings = Findings(found.saes, deltas, verdicts, stars, laws, correlation, left_out, settings)
    record = verdicts[0].record() | dict(
        answer=vars(findings.answer),
        other_arms=[verdict.record() for verdict in verdicts[1:]],
        kstar=[star.row() for star in stars],
        power_law=laws,
        settings=settings,
        rows_sha256=rows_hash(out),
    )
    pictures = plots(findings)
    files: dict[str, Content | None] = {
        "deltas.csv": as_csv(deltas, COLUMNS),
        "verdict.json": as_json(plain(record)),
        "report.md": report(findings, sorted(pictures)),
        **pictures,
    }
    charts = [chart.of_deltas(findings.headline, verdicts[0].difference)] if findings.headline else []
    store.put(out / store.RUN, with_page(out, files, charts))
    return findings


# ----------------------------------------------------------------------------------------------- report.md
TITLE = """\
# Exp-A: does the gap survive training?

{answer}"""
PICTURE = """\
![the two gaps over the token budget](deltas.png)
"""
WORDS = """\
H0/H1: {v.leaf} ({v.reason}).
"""
LEFT_OUT = """\
No SAE is compared with one that another processor trained: {n} are left out of all that follows.
"""

HEADLINE = """\
## Deltas: {v.difference}, recipe {v.arm.recipe}, sinks {v.arm.sinks}

{table}

Intervals: 95%, Student with Satterthwaite's degrees of freedom, seeds (jackknife on each side) and \
evaluation documents (bootstrap) together; undefined where one seed leaves none. Mismatch: ΔR² and ΔCE_rec \
differ in sign, over all pairs of seeds; published rule: ΔR² > 0 and ΔCE_rec < 0 on seeds of the same index. \
A mismatch that all pairs agree on has no bootstrap interval. ΔR²/ΔCE_rec: Fieller; undefined where the \
denominator's interval holds 0.

Seeds are not paired: the same seed draws the same tokens in the same order in both, but the two SAEs learn \
other directions.{correlation}
"""
CORRELATION = " The correlation of what a seed does to CE_rec in the two is {value}."

TREE = """\
## The tree

At B* = {budget} tokens, {v.small} / {v.large}, recipe {v.arm.recipe}, sinks {v.arm.sinks}:

- G0: alive ≥ {t.alive:.0%} in both or within {t.alive_gap:.0%}: {alive}; CE_rec moved < {t.converged} since \
{previous_budget}: {converged}; SE of ΔCE_rec over documents < {t.se}: {precise}.
- H0: 90% interval of ΔCE_rec inside ±{t.margin} for every k: {equal}; a gap at a smaller budget that could \
go (95% interval without 0, {t.margin} or more): {gap_before}. Patches that improve CE: {improved}.
- H1: transfer gap Γ of R² at least {t.gamma} in size, interval without 0, one sign for {t.same_sign:.0%} of \
k: {h1}. Γ = {gamma_r2}, {same_sign} of one sign, {in_range} of {v.large}'s R² in {v.small}'s range \
({t.in_range:.0%} needed to be judged).
- N: |Γ| of the best sink-free Euclidean score under {t.normalisation:.0%} of R²'s, on the half of the \
documents it was not chosen on: {normalised_away}. {control}: {gamma_control}, R²: {gamma_r2_half_b}. On all \
documents: {gamma_controls}.

{table}

Γ is in units of CE_rec: what {v.large} has above what {v.small}'s curve of CE_rec over R² says, averaged \
with the reverse.
"""
MISMATCH = """\
![mismatch](mismatch.png)
"""

ARMS = """\
## {title}

{table}

The verdict is the first row's; the others are there to be compared with.
"""
FLIPS = """\
Sinks {sinks}: ΔR² and ΔCE_rec differ in sign in {theirs} of seed pairs under saelens, in {ours} under \
base{share}.
"""
SHARE = ": the trainer owns {share:.0%} of the sign flips"

LEARNING = """\
## Learning curves

{table}

Means over seeds. Every budget has its own decay{constant}.
"""
APPENDIX = """\
## Appendix: every metric over the token budget

{pictures}
"""
CONSTANT = " (saelens: a constant rate, so its budgets are checkpoints)"
SHOWN = "r2 r2_nosink r2_defl1 cosine swd_tok ce_rec ce_rec_sinkclean frac_zero kl alive".split()

OTHERS = """\
## {difference}, recipe {recipe}, sinks {sinks}

{table}
"""


def report(f: Findings, pictures: list[str]) -> bytes:
    """report.md; pictures: the plots' files, sorted."""
    sections = [TITLE.format(answer=f.answer.markdown()), PICTURE * bool(f.headline)]
    sections.append(WORDS.format(v=f.verdict))
    sections.append(LEFT_OUT.format(n=f.left_out) * bool(f.left_out))
    if f.headline:
        sections += [headline_section(f), tree_section(f.verdict), MISMATCH]
    sections += [
        arms_section(f),
        curves.k_star_section(f.stars, f.verdict.small, f.verdict.large),
        learning_section(f),
        curves.law_section(f.laws),
        published.section(f.deltas, f.saes, f.stars, f.settings["hooks"]),
    ]
    others = grouped(
        [row for row in f.deltas if row not in f.headline], ["small", "large", "recipe", "sinks"]
    )
    for (small, large, recipe, sinks), here in others.items():
        difference = in_words(large, "minus", small, sorted({row["depth"] for row in here}))
        section = OTHERS.format(difference=difference, recipe=recipe, sinks=sinks, table=delta_table(here))
        sections.append(section)
    shown = (f"![learning curves]({name})" for name in pictures if name.startswith("learning"))
    appendix = APPENDIX.format(pictures="\n".join(shown))
    return "\n".join([*filter(None, sections), *about_the_run(f.saes, f.settings), appendix]).encode()


def headline_section(f: Findings) -> str:
    correlation = ""
    if np.isfinite(f.correlation):
        correlation = CORRELATION.format(value=signed(f.correlation))
    return HEADLINE.format(v=f.verdict, table=delta_table(f.headline), correlation=correlation)


def delta_table(deltas: list[dict]) -> str:
    rows = []
    for row in deltas:
        interval = "[undefined]"
        if np.isfinite(row["mismatch_lo"]):
            interval = f"[{percent(row['mismatch_lo'])}, {percent(row['mismatch_hi'])}]"
        rows.append(
            {
                "depth": row["depth"],
                "k": row["k"],
                "tokens": readable_count(row["tokens"]),
                "seeds": row["n_seeds"],
                "ΔR²": estimate(row, "delta_r2", 3),
                "ΔR² no sink": estimate(row, "delta_r2_nosink", 3),
                "ΔCE_rec": estimate(row, "delta_ce_rec", 3),
                "ΔCE_rec sink clean": estimate(row, "delta_ce_rec_sinkclean", 3),
                "mismatch": f"{percent(row['mismatch'])} {interval}",
                "published rule": percent(row["mismatch_published"]),
                "ΔR²/ΔCE_rec": estimate(row, "ratio", 1),
            }
        )
    columns = list(rows[0])
    several = len({row["depth"] for row in rows}) > 1
    return markdown(rows, columns if several else columns[1:])


def tree_section(v: Verdict) -> str:
    """The gates and tests of the tree with the numbers they met; empty where it did not come to them."""
    if v.found is None or v.budget is None:
        return ""
    found, n = v.found, v.found.normalisation
    rows = []
    for row in found.cells:
        rows.append(
            {
                "depth": row["depth"],
                "k": row["k"],
                "ΔCE_rec, 90%": span(row["delta_ce_rec"], row["lo90"], row["hi90"], 3),
                "Γ of R²": signed(row["gamma_r2"], 3),
                "alive": f"{percent(row['alive_small'])} / {percent(row['alive_large'])}",
                "CE_rec moved": f"{signed(row['moved_small'], 3)} / {signed(row['moved_large'], 3)}",
                "SE": row["se"],
            }
        )
    return TREE.format(
        v=v,
        t=THRESHOLDS,
        budget=readable_count(v.budget),
        previous_budget=readable_count(found.previous_budget),
        **{gate: "open" if passed else "SHUT" for gate, passed in found.g0.items()},
        equal=in_a_word(found.equality.equal),
        gap_before=in_a_word(found.equality.gap_before),
        improved=percent(found.improved),
        h1=in_a_word(found.transfer.h1),
        gamma_r2=estimate(vars(found.transfer), "gamma_r2", 3),
        same_sign=percent(found.transfer.same_sign),
        in_range=percent(found.transfer.in_range),
        normalised_away=in_a_word(n.normalised_away),
        control=n.control or "none in range",
        gamma_control=signed(n.gamma_control_half_b, 3),
        gamma_r2_half_b=signed(n.gamma_r2_half_b, 3),
        gamma_controls=", ".join(f"{score} {signed(gamma, 3)}" for score, gamma in n.gamma_controls.items()),
        table=markdown(rows, list(rows[0])),
    )


def in_a_word(passed: bool | None) -> str:
    if passed is None:
        return "not judged"
    return "yes" if passed else "no"


def arms_section(f: Findings) -> str:
    """What the trainer and the sinks have to do with it; empty where the run has one arm."""
    if len(f.verdicts) == 1:
        return ""
    flips = {
        (small, large, Arm(*key)): float(np.mean([row["mismatch"] for row in here]))
        for (small, large, *key), here in grouped(f.deltas, ["small", "large", "recipe", "sinks"]).items()
    }
    pairs = list(dict.fromkeys((v.small, v.large) for v in f.verdicts))
    rows = []
    for v in f.verdicts:
        rows.append(
            {
                "small": v.small,
                "large": v.large,
                "recipe": v.arm.recipe,
                "sinks in training": v.arm.sinks,
                "leaf": v.leaf,
                "Γ of R²": estimate(vars(v.found.transfer), "gamma_r2", 3) if v.found else "undefined",
                "mean mismatch": percent(flips.get((v.small, v.large, v.arm))),
                "why": v.reason,
            }
        )
    arms = {v.arm for v in f.verdicts}
    title = "Trainer and sinks as confounds" if len(arms) > 1 else "Every pair"
    parts = [ARMS.format(title=title, table=markdown(rows, list(rows[0])[0 if len(pairs) > 1 else 2 :]))]
    for sinks in dict.fromkeys(v.arm.sinks for v in f.verdicts):
        theirs, ours = (flips.get((*pairs[0], Arm(recipe, sinks))) for recipe in ("saelens", "base"))
        if theirs is None or ours is None:
            continue
        share = SHARE.format(share=1 - ours / theirs) if theirs > 0 and ours <= theirs else ""
        parts.append(FLIPS.format(sinks=sinks, theirs=percent(theirs), ours=percent(ours), share=share))
    return "\n".join(parts)


def learning_section(f: Findings) -> str:
    names = ["model", "layer", "recipe", "sae", "k", "tokens"]
    cells = grouped(f.saes, names)
    rows = []
    for key in sorted(cells, key=lambda key: (f.settings["models"].index(key[0]), key)):
        means = {metric: float(np.mean([row[metric] for row in cells[key]])) for metric in SHOWN}
        rows.append(dict(zip(names, key)) | {"tokens": readable_count(key[-1])} | means)
    return LEARNING.format(
        table=markdown(rows, names + SHOWN),
        constant=CONSTANT if "saelens" in f.settings["recipe"] else "",
    )


# --------------------------------------------------------------------------------------------------- plots
DELTA_LINES = (
    ("delta_r2", "ΔR²", dict(color=BLUE, marker="s")),
    ("delta_r2_nosink", "ΔR² without sinks", dict(color=GREEN, marker="^", linestyle=":")),
    ("delta_ce_rec", "ΔCE_rec", dict(color=ORANGE, marker="o")),
)
APART = 0.005  # of R²: less is one line under another
SAYS = {
    "undertrained": "not trained far enough to say whether the gap stays",
    "undecided": "this grid cannot decide whether the gap stays",
    "N": "what R² says of the gap is how R² is normalised",
    "H0": "the gap in CE_rec goes as the SAEs are trained",
    "H1": "after training, one R² still means two values of CE_rec",
    "H0+H1": "CE_rec becomes equal, and one R² still means two values of it",
}


def plots(f: Findings) -> dict[str, bytes]:
    """{file: PNG}: deltas and mismatch of the headline rows, if any, and a figure of learning curves per
    depth.
    """
    drawn = {}
    if f.headline:
        drawn["deltas.png"] = delta_plot(f.headline, f.verdict)
        drawn["mismatch.png"] = mismatch_plot(f.headline)
    depths = [f.settings["hooks"][hook_of(row)] for row in f.saes]
    for depth in sorted(set(depths)):
        here = [row for row, its in zip(f.saes, depths) if its == depth]
        name = f"learning-{depth}.png" if len(set(depths)) > 1 else "learning.png"
        drawn[name] = curves.learning_plot(here, f.settings)
    return drawn


def delta_plot(deltas: list[dict], verdict: Verdict) -> Any:
    """Both gaps with their intervals against training tokens, a panel for every depth and k; R² without sinks
    only where it is another line.
    """
    ks, depths = (sorted({row[name] for row in deltas}) for name in ("k", "depth"))
    apart = [abs(row["delta_r2_nosink"] - row["delta_r2"]) for row in deltas]
    hidden = {"delta_r2_nosink"} if np.nanmax(apart, initial=0) < APART else set()
    shown = [line for line in DELTA_LINES if line[0] not in hidden]
    size = (max(2.4 * len(ks) + 1.6, 6.4), 2.6 * len(depths) + 0.7)
    figure, axes = pyplot().subplots(
        len(depths), len(ks), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (depth, k) in zip(axes.flat, itertools.product(depths, ks)):
        here = [row for row in deltas if row["k"] == k and row["depth"] == depth]
        budgets = [row["tokens"] for row in here]
        for name, _, how in shown:
            value, lo, hi = ([row[column] for row in here] for column in with_ends([name]))
            axis.plot(budgets, value, markersize=4, **how)
            axis.fill_between(budgets, lo, hi, color=how["color"], alpha=0.2, linewidth=0)
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.set_title(f"k = {k}, depth {depth}" if len(depths) > 1 else f"k = {k}", fontsize=9)
        curves.budget_axis(axis, sorted({row["tokens"] for row in deltas}))
        axis.tick_params(labelsize=8)
    for axis, depth in zip(axes[:, -1], depths):
        end = max((row for row in deltas if row["depth"] == depth), key=lambda row: (row["k"], row["tokens"]))
        label_ends(axis, [(end[name], what, how["color"]) for name, what, how in shown])
    figure.supxlabel("training tokens of an SAE", fontsize=9)
    figure.supylabel(in_words(verdict.large, "−", verdict.small, verdict.depths), fontsize=9)
    figure.suptitle(f"{SAYS[verdict.leaf].capitalize()}: the two gaps, 95% bands", fontsize=10)
    return figure


def mismatch_plot(deltas: list[dict]) -> Any:
    """The mismatch rate of every k and budget, a panel for every depth."""
    ks, budgets, depths = (sorted({row[name] for row in deltas}) for name in ("k", "tokens", "depth"))
    size = (max(0.9 * len(budgets) * len(depths) + 1, 4.5), 0.42 * len(ks) + 1.2)
    figure, axes = pyplot().subplots(
        1, len(depths), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, depth in zip(axes.flat, depths):
        rate = np.full((len(ks), len(budgets)), np.nan)
        for row in deltas:
            if row["depth"] == depth:
                rate[ks.index(row["k"]), budgets.index(row["tokens"])] = row["mismatch"]
        axis.imshow(rate, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for (i, j), value in np.ndenumerate(rate):
            dark = "white" if value > 0.5 else "black"
            axis.text(j, i, percent(value), ha="center", va="center", fontsize=9, color=dark)
        axis.set_xticks(range(len(budgets)), [readable_count(b) for b in budgets])
        axis.set_yticks(range(len(ks)), [f"k = {k}" for k in ks])
        axis.tick_params(labelsize=8, length=0)
        axis.set_xlabel("training tokens", fontsize=8)
        if len(depths) > 1:
            axis.set_title(f"depth {depth}", fontsize=9)
    figure.suptitle("Seed pairs in which ΔR² and ΔCE_rec differ in sign", fontsize=10)
    return figure


# ---------------------------------------------------------------------------------------------------- main
def deltas_in_short(deltas: list[dict], verdict: Verdict, colour: bool) -> str:
    """Both gaps at the largest budget, for a terminal of 80 columns; what differs in sign, coloured."""
    most = max(row["tokens"] for row in deltas)
    deltas = [row for row in deltas if row["tokens"] == most]
    several = len({row["depth"] for row in deltas}) > 1
    rows = [
        ({"depth": str(row["depth"])} if several else {})
        | {
            "k": str(row["k"]),
            "tokens": readable_count(row["tokens"]),
            "gap in R²": estimate(row, "delta_r2", 3),
            "gap in CE_rec": estimate(row, "delta_ce_rec", 3),
            "mismatch": percent(row["mismatch"]),
        }
        for row in deltas
    ]
    codes = [console.ORANGE if row["mismatch"] >= 0.5 else "" for row in deltas]
    under = "mismatch: seed pairs in which the two gaps differ in sign"
    gap = f"gap: {verdict.difference}, 95%"
    return f"{columns(rows, codes, colour)}\n\n{gap}\n{under}"


def with_pairs(command: Command) -> Command:
    """The command with the hooks of --pairs as its grid, and the pairs, as results call them, among its
    settings. Raises UserError.
    """
    if (typed := command.own["pairs"]) is None or command.finished:
        return dataclasses.replace(command, own={})
    default = tuple(parse_models(GRID["models"]))
    models = () if command.grid.models == default else tuple(name for name, _ in command.grid.models)
    pairs = [pair_of(printable(text, "--pairs"), models) for text in typed.split(",")]
    if len(set(pairs)) < len(pairs):
        raise UserError(f"--pairs {brief(typed)}: the same pair twice")
    hooks = list(dict.fromkeys(itertools.chain(*pairs)))
    called = readable_names(list(dict.fromkeys(name for name, _ in hooks)))
    own = {"pairs": [[f"{called[name]}@{layer}" for name, layer in pair] for pair in pairs]}
    return dataclasses.replace(command, grid=dataclasses.replace(command.grid, models=tuple(hooks)), own=own)


def pair_of(text: str, models: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """(model, layer) of both hooks, as typed. models: of --models, none where it was not typed. Raises
    UserError.
    """
    ends = text.split(":")
    if all(end.isdecimal() for end in ends):
        if len(set(models)) != 1:
            raise UserError(f"--pairs {brief(text)}: layers of which model? --models NAME, please")
        ends = [f"{models[0]}@{end}" for end in ends]
    parts = [end.rpartition("@") for end in ends]
    if not all(name and layer.isdecimal() and len(layer) < 5 for name, _, layer in parts):
        raise UserError(f"--pairs {brief(text)}: two hooks, please, as 10:11 or MODEL@10:MODEL@11")
    hooks = tuple((name, int(layer)) for name, _, layer in parts)
    if len(hooks) != 2 or len(set(hooks)) != 2:
        raise UserError(f"--pairs {brief(text)}: two different hooks, please")
    if models and (others := [name for name, _ in hooks if name not in models]):
        raise UserError(f"--pairs {brief(text)}: {others[0]} is not among --models")
    return hooks


def main() -> None:
    command = with_pairs(parse_args(__doc__, GRID, flags=FLAGS))
    if command.grid.saes:
        raise UserError(
            "--sae: Exp-A is about how SAEs train; expb.py and expc_fisher.py evaluate existing ones"
        )
    with quiet_output(command):
        if (done := run(command, Experiment("expa"))) is None:
            return
        out, settings = done
        f = analyse(out, settings)
    table = "No two models to compare; --pairs compares layers of one."
    if f.headline:
        table = deltas_in_short(f.headline, f.verdict, coloured(sys.stdout))
    print_result(command, out, f.answer, table, f"H0/H1: {f.verdict.leaf}")


if __name__ == "__main__":
    run_script(main)
