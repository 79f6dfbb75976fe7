"""The claim *here*: what proxies do on the SAEs that were measured, on these layers of these models.

The units are evaluation documents, and seeds where a model has several, so one hook is enough. What proxies
do on other hooks is the claim *in general*, which `leaderboard` tests over hooks; neither says anything about
the other.

Shapes: C SAEs, W weightings of the documents (`resampling.ALL`, ...), R draws, P pairs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from transport_geometry.records.condition import without_sinks
from transport_geometry.statistics.correlations import correlation, k_dummies, rank_residual, weighted_design
from transport_geometry.statistics.intervals import document_interval, percentiles
from transport_geometry.statistics.resampling import ALL, ESTIMATE, N_FIXED, RESAMPLES, SeedDraws, seed_draws

import numpy as np

R2, SWD = "r2", "swd_tok"
MARGIN = 0.05  # of CE_rec: two SAEs that are closer do not count as a pair to be ordered
SHARED = ("model", "k", "tokens")  # columns in which both SAEs of a pair are equal
# columns of a leaderboard; `partial` and `diff_r2` themselves stand in front
COLUMNS = (
    "partial_here_lo partial_here_hi diff_r2_here_lo diff_r2_here_hi swd_here swd_here_lo swd_here_hi "
    "pairs right right_lo right_hi right_r2 right_r2_lo right_r2_hi right_swd right_swd_lo right_swd_hi"
).split()
ARMS = {"keep": "sinks keep", "drop": "sinks drop"}  # of --sinks: their strata


# ------------------------------------------------------------------------------------------------ which SAEs
def arms(meta: dict) -> dict[str, np.ndarray]:
    """{stratum: which SAEs [C] bool}: the arms of --sinks, by the names of the SAEs, where there are both."""
    dropped = np.array([without_sinks(sae) for sae in meta.get("sae", [])], bool)
    found = {ARMS["keep"]: ~dropped, ARMS["drop"]: dropped}
    return found if all(here.any() for here in found.values()) else {}


@dataclass(frozen=True)
class SAEPairs:
    """Pairs of SAEs that a proxy has to put in order: a[p] and b[p]."""

    a: np.ndarray  # [P] of C
    b: np.ndarray  # [P]

    def difference(self, v: np.ndarray) -> np.ndarray:
        """v [..., C] of a minus that of b: [..., P]."""
        return v[..., self.a] - v[..., self.b]


def clear_pairs(ce_rec: np.ndarray, meta: dict) -> SAEPairs:
    """Pairs of one model, k and budget whose CE_rec [W, C] differ by MARGIN or more, and not by chance: the
    95% interval of the difference over documents excludes 0.
    """
    a, b = np.triu_indices(ce_rec.shape[1], 1)
    same = np.all([np.asarray(meta[name])[a] == np.asarray(meta[name])[b] for name in SHARED], axis=0)
    pairs = SAEPairs(a[same], b[same])
    if len(ce_rec) <= N_FIXED or not len(pairs.a):
        return SAEPairs(pairs.a[:0], pairs.b[:0])
    delta = pairs.difference(ce_rec)
    lo, hi = percentiles(delta[RESAMPLES])
    clear = (np.abs(delta[ALL]) >= MARGIN) & ((lo > 0) | (hi < 0))
    return SAEPairs(pairs.a[clear], pairs.b[clear])


# ------------------------------------------------------------------------------------------------ the columns
def document_columns(
    scores: dict[str, np.ndarray], target: np.ndarray, meta: dict, n_documents: int, pairs: SAEPairs | None
) -> dict[str, dict[str, float]]:
    """{proxy: COLUMNS} of scores {proxy: [W, C]}, larger = better. pairs: those to order, or None.

    partial_here, diff_r2_here: intervals of partial Spearman with the target given k, and of its difference
    to R^2's. swd_here: SWD's minus the proxy's. right: share of the pairs that the proxy orders as the target
    does; right_r2: minus R^2's share; right_swd: SWD's share minus the proxy's. Proxy and target are always
    under the same resample (`document_interval`). nan: R^2 or SWD is not among the proxies, or one value is
    not finite.
    """
    draws = seed_draws(meta, len(target))
    design = weighted_design(draws.weights, k_dummies(meta))
    of_target = rank_residual(target[draws.documents], design)
    partial = {
        name: correlation(rank_residual(s[draws.documents], design), of_target) for name, s in scores.items()
    }
    nothing = np.full(len(draws.documents), np.nan)
    right = dict.fromkeys(scores, nothing)
    if pairs is not None and len(pairs.a):
        right = {name: share_right(s, target, pairs, draws) for name, s in scores.items()}

    def ends(key: str, values: np.ndarray, n_ranked: int = 0) -> dict[str, float]:
        lo, hi = document_interval(values, draws.sources, n_documents, n_ranked)
        return {f"{key}_lo": lo, f"{key}_hi": hi}

    def shares(key: str, values: np.ndarray, least: float) -> dict[str, float]:
        within = {end: float(np.clip(v, least, 1)) for end, v in ends(key, values).items()}
        return {key: float(values[ESTIMATE])} | within

    cells = {}
    for name in scores:
        minus_r2 = partial[name] - partial.get(R2, nothing)
        swd_minus = partial.get(SWD, nothing) - partial[name]
        cells[name] = {
            **ends("partial_here", partial[name], target.shape[1]),
            **ends("diff_r2_here", minus_r2),
            "swd_here": float(swd_minus[ESTIMATE]),
            **ends("swd_here", swd_minus),
            "pairs": np.nan if pairs is None else len(pairs.a),
            **shares("right", right[name], 0),
            **shares("right_r2", right[name] - right.get(R2, nothing), -1),
            **shares("right_swd", right.get(SWD, nothing) - right[name], -1),
        }
    return cells


def share_right(score: np.ndarray, target: np.ndarray, pairs: SAEPairs, draws: SeedDraws) -> np.ndarray:
    """[R]: share of the pairs whose score and target, both [W, C], differ in the same direction; a tie has
    none. nan where a score is not finite.
    """
    if not np.isfinite(score).all():
        return np.full(len(draws.documents), np.nan)
    agree = np.sign(pairs.difference(score)) == np.sign(pairs.difference(target))
    weight = draws.weights[:, pairs.a] * draws.weights[:, pairs.b]
    with np.errstate(invalid="ignore"):
        return (agree[draws.documents] * weight).sum(1) / weight.sum(1)


# ------------------------------------------------------------------------------------------- the word on H2
LEAVES = ("beats-all", "beats-r2-only", "worse", "not-shown", "undecided")


@dataclass(frozen=True)
class Here:
    """What H2, that SWD predicts CE_rec better, comes to on these SAEs."""

    leaf: str  # of LEAVES
    reason: str
    not_beaten: tuple[str, ...] = ()  # Euclidean controls that SWD is not shown to order better than


def row_of(board: list[dict], proxy: str, stratum: str = "pooled") -> dict:
    """Of a board, for CE_rec; empty where there is none."""
    rows = (row for row in board if (row["proxy"], row["target"]) == (proxy, "ce_rec"))
    return next((row for row in rows if row["stratum"] == stratum), {})


def leaf_here(board: list[dict], controls: Sequence[str]) -> Here:
    """From the pooled rows of a board, for CE_rec. SWD has to beat every control, each at 95%: more of them
    make no finding by chance more likely.
    """
    rows = {name: row_of(board, name) for name in (R2, *controls)}
    if not np.isfinite(rows[R2].get("swd_here_lo", np.nan)):
        return Here("undecided", "too few SAEs of one k, or one document")
    lo, hi = (rows[R2][f"swd_here_{end}"] for end in ("lo", "hi"))
    left = tuple(name for name in controls if rows[name] and not rows[name]["swd_here_lo"] > 0)
    if hi < 0:
        return Here("worse", "the interval of SWD minus R² lies below 0", left)
    if not lo > 0:
        return Here("not-shown", "the interval of SWD minus R² holds 0", left)
    if left:
        return Here("beats-r2-only", f"not shown to do better than {', '.join(left)}", left)
    return Here("beats-all", "SWD minus any other of these scores lies above 0", left)


def in_verdict(board: list[dict], controls: Sequence[str]) -> dict:
    """What a verdict on H2 holds of the claim here."""
    r2 = row_of(board, R2)
    columns = "swd_here swd_here_lo swd_here_hi pairs right right_swd right_swd_lo right_swd_hi".split()
    return asdict(leaf_here(board, controls)) | {name: r2.get(name) for name in columns}
