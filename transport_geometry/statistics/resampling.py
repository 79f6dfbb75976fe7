"""Weights of evaluation documents, hooks, depths and seeds: all of them, two halves of the documents, and
bootstrap or jackknife resamples.
"""

from dataclasses import dataclass

import numpy as np

# what the first axis of an array [W, ...] over weightings of the documents holds
ALL, HALF_A, HALF_B = 0, 1, 2  # all documents, the even ones, the odd ones
N_FIXED = 3
RESAMPLES = slice(N_FIXED, None)  # bootstrap resamples, shared by all conditions
ESTIMATE = 0  # of R draws of a statistic; bootstrap draws, too, have their resamples at RESAMPLES

HOOK = ("model", "layer")
MIN_HOOKS_OF_A_MODEL = 3  # of a model: fewer do not say how much its hooks differ


def document_weights(n_documents: int, n_resamples: int, seed: int) -> np.ndarray:
    """[W, D], W = 3 + n_resamples: how often each document counts at ALL, HALF_A, HALF_B and RESAMPLES.

    Whole documents are drawn, since the sequences of one are not independent: rows taken as independent gave
    nominal 95% intervals that covered 40 to 80% (bench/RESULTS.md). Column `document[s]` weighs sequence s.
    """
    even = np.arange(n_documents) % 2 == 0
    draws = np.random.default_rng(seed).multinomial(
        n_documents, np.full(n_documents, 1 / n_documents), size=n_resamples
    )
    return np.vstack([np.ones(n_documents), even, ~even, draws]).astype(float)


def resample_index(W: int, n_resamples: int) -> np.ndarray:
    """[3 + n_resamples]: which of W weightings of the documents belongs to each draw. Draw 3 + r takes
    resample r, from the first again when they run out; all documents when there is none.
    """
    n = W - N_FIXED
    resamples = N_FIXED + np.arange(n_resamples) % n if n > 0 else np.full(n_resamples, ALL)
    return np.r_[ALL, HALF_A, HALF_B, resamples]


def cluster_ids(meta: dict, by: tuple[str, ...] = HOOK) -> np.ndarray:
    """[C] integers, one per distinct combination of the named columns; the default is the hook."""
    labels = ["\t".join(map(str, values)) for values in zip(*(meta[name] for name in by))]
    return np.unique(labels, return_inverse=True)[1]


def mean_by_hook(v: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Mean of v [C] within each hook present, [G]: every hook counts once, however many SAEs it has. ids [C]
    as `cluster_ids` gives them.
    """
    _, inside = np.unique(ids, return_inverse=True)
    return np.bincount(inside, v) / np.bincount(inside)


def rao_wu_weights(rng: np.random.Generator, n: int, n_resamples: int, least: int) -> np.ndarray:
    """[n_resamples, n]: n - 1 of n units drawn with replacement, times n / (n - 1) (Rao & Wu 1988), since
    plain resampling understates the standard error by sqrt((n - 1) / n). nan, and so are the intervals, with
    fewer than `least` units, which say too little about their variance.
    """
    if n < least:
        return np.full((n_resamples, n), np.nan)
    return rng.multinomial(n - 1, np.full(n, 1 / n), n_resamples) * (n / (n - 1))


def bootstrap_weights(
    meta: dict,
    n_resamples: int,
    seed: int,
    clusters: tuple[str, ...] = HOOK,
    least: int = MIN_HOOKS_OF_A_MODEL,
) -> np.ndarray:
    """[3 + n_resamples, C] weights of the conditions: ones, then the clusters of each model resampled
    (`rao_wu_weights`).
    """
    rng, ids, models = np.random.default_rng(seed), cluster_ids(meta, clusters), np.asarray(meta["model"])
    w = np.ones((N_FIXED + n_resamples, len(ids)))
    for model in np.unique(models):
        _, inside = np.unique(ids[models == model], return_inverse=True)
        w[RESAMPLES, models == model] = rao_wu_weights(rng, inside.max() + 1, n_resamples, least)[:, inside]
    return w


def shared_depths(meta: dict, models: list[str]) -> list:
    """The depths that the smallest and the largest model both have; none where they are one model."""
    if models[0] == models[-1]:
        return []
    model, depth = np.asarray(meta["model"]), np.asarray(meta["depth"])
    return sorted(set(depth[model == models[0]]) & set(depth[model == models[-1]]))


def depth_weights(meta: dict, models: list[str], n_resamples: int, seed: int) -> np.ndarray:
    """[3 + n_resamples, D] weights of the depths that `transfer_gap` averages over. A depth is a pair of
    hooks and is drawn whole: drawing hooks model by model would leave most of them without a partner.
    """
    D = len(shared_depths(meta, models))
    resamples = rao_wu_weights(np.random.default_rng(seed), D, n_resamples, MIN_HOOKS_OF_A_MODEL)
    return np.vstack([np.ones((N_FIXED, D)), resamples])


@dataclass(frozen=True)
class SeedDraws:
    """R draws of a statistic where seeds are replicates. In order: its value; its value without each seed of
    each model (jackknife; models are seeded apart, so a seed is left out of one model only); its value under
    each resample of the documents.
    """

    documents: np.ndarray  # [R]: which weighting of the documents
    weights: np.ndarray  # [R, C] of the conditions
    sources: dict[str, np.ndarray]  # {source of variation, a model or "documents": its draws of R}


def seed_draws(meta: dict, W: int) -> SeedDraws:
    """Of C conditions under W weightings of the documents."""
    model, seed = np.asarray(meta["model"]), np.asarray(meta["seed"])
    left_out = [(m, s) for m in np.unique(model) for s in np.unique(seed[model == m])]
    first = 1 + len(left_out)  # of the documents' draws
    w = np.ones((first + W - N_FIXED, len(model)))
    for i, (m, s) in enumerate(left_out, 1):
        w[i, (model == m) & (seed == s)] = 0
    names = np.array(["", *(m for m, _ in left_out)])
    sources = {str(m): np.flatnonzero(names == m) for m in np.unique(model)}
    sources["documents"] = np.arange(first, len(w))
    return SeedDraws(np.r_[np.full(first, ALL), N_FIXED:W], w, sources)
