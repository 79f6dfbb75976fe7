"""What Exp-D measures once per hook, without an SAE: dimensions by three geometries, and trained critics; and
which of the counts are refused.
"""

import math

from transport_geometry.measuring import mutual_information as mi
from transport_geometry.measuring.dimension import canonical_rows, geometry_rows, norms
from transport_geometry.measuring.evaluate import activations
from transport_geometry.measuring.fisher_study import MAX_BLOCKS, moments
from transport_geometry.models.lm import Hook
from transport_geometry.records.tables import grouped

import numpy as np
import torch

DRAWS = 2  # of labels for G: eight move dim_fisher by one part in a hundred
SIGMAS = (0.0, 0.5, 1.0, 2.0)  # noise on Y, in standard deviations of its channels
# which critics are trained: {Y: {estimator: amounts of noise}}; the `ladder` rule needs at least two amounts
CRITICS: dict[str, dict[str, tuple[float, ...]]] = {
    "final norm": {"infonce": SIGMAS, "smile": SIGMAS[2:], "nwj": SIGMAS[2:]},
    "logits, Fisher": {"infonce": SIGMAS},
}


def dimensions(
    hook: Hook, input_ids: torch.Tensor, document: np.ndarray, batch: int
) -> dict[str, list[dict]]:
    """{table: rows} of input_ids [S,T] of the documents [S]: participation ratios of the covariance and of
    what the output is sensitive to, norms by position, canonical correlations with the final norm's output.
    """
    shared = activations(hook, input_ids, batch)
    blocks = min(int(document.max()) + 1, MAX_BLOCKS)
    sums = moments(hook, input_ids, shared, batch, document % blocks, blocks, DRAWS)
    out = mi.final_norm(hook, input_ids, shared.h, batch)
    kept = ~shared.sink
    of_each = torch.from_numpy(document)[:, None].expand(kept.shape)[kept].numpy()
    h, y = (v[kept].double().numpy() for v in (shared.h[:, :-1], out))
    return {
        "geometry.csv": geometry_rows(*sums),
        "positions.csv": norms(shared.h),
        "canonical.csv": canonical_rows(h, y, of_each, SIGMAS),
    }


def trained_critics(
    hook: Hook, texts: tuple[torch.Tensor, ...], one: torch.Tensor, batch: int, critic: str
) -> list[dict]:
    """A row for each Y, estimator and amount of noise. texts: of `mutual_information.rows_of`; one [1,T]: a
    row of tokens to try the hook with.
    """
    fit, stop, held = (mi.pairs_at(hook, rows, batch, seed) for seed, rows in enumerate(texts))
    sizes = {"n_fit": len(fit.x), "n_held": len(held.x)}
    return [
        {"target": target, "width": pairs.fit.y.shape[-1]} | sizes | row
        for target, pairs in mi.targets(hook, (fit, stop, held), one.to(hook.device)).items()
        for estimator, sigmas in CRITICS[target].items()
        for row in mi.critic_rows(pairs, sigmas, (estimator,), mi.SCHEDULES[critic])
    ]


def judged(rows: list[dict], ladder: tuple[str, ...]) -> list[dict]:
    """Rows of a read-out with `refused`, the rule that their dimension fails or "". Rows that agree in the
    columns `ladder` differ in their noise, and are judged together.
    """
    out = []
    for group in grouped(rows, ladder).values():
        group = sorted(group, key=lambda row: row["sigma"])
        ceiling = math.log(mi.BATCH) if group[0].get("estimator") == "infonce" else None
        out += [row | {"refused": why} for row, why in zip(group, mi.refusals(group, ceiling))]
    return out
