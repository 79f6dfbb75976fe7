"""The same function, another hook: what a planted sink does to the activations, and which metrics stay the
same where one reconstruction is written in other ways.

A metric that moves says something about how the hook is written, not only about the SAE. Shapes: B sequences,
T positions, d = d_model.
"""

from collections.abc import Callable, Sequence

from transport_geometry.measuring.dimension import participation_of
from transport_geometry.measuring.evaluate import activations, evaluate
from transport_geometry.measuring.metrics import METRICS, Sums, computed
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import load_model
from transport_geometry.models.plant import Gauge, regauge

import numpy as np
import torch


def spectra(names: Sequence[str], layer: int, input_ids: torch.Tensor) -> list[dict]:
    """What planted sinks do to a hook: a row for each model, the plain one first. pr: participation ratio of
    the covariance, pr_nosink: without sink positions; sst_ratio: SST over the plain model's; logits: the
    largest change of a logit. input_ids [B,T].
    """
    rows: list[dict] = []
    for name in names:
        model, _ = load_model(name, torch.device("cpu"))
        shared = activations(Hook(model, layer), input_ids, 8)
        with torch.no_grad():
            logits = model(input_ids[:4], use_cache=False).logits
        h = shared.h[:, :-1]  # the evaluated positions
        sst = h.flatten(0, 1).double().var(0, correction=0).sum().item()
        if not rows:
            plain_logits, plain_sst = logits, sst
        rows.append(
            {
                "model": name,
                "layer": layer,
                "pr": participation_of(h.flatten(0, 1)),
                "pr_nosink": participation_of(h[~shared.sink]),
                "sst_ratio": sst / plain_sst,
                "logits": (logits - plain_logits).abs().max().item(),
            }
        )
    return rows


def gauges(d: int, ctx: int) -> dict[str, Gauge]:
    """Ways to write the same hook: a shift along the all-ones direction of another size at every position,
    which LayerNorm does not see; a rotation that keeps that direction; another length at every position.
    """
    generator = torch.Generator().manual_seed(0)
    ones, zeros = torch.ones(ctx, 1), torch.zeros(ctx, d)
    axis = torch.full((d, 1), d**-0.5, dtype=torch.float64)
    inside = torch.randn(d, d, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(torch.cat([axis, inside[:, 1:]], 1))[0]  # its first column is the axis
    within = torch.linalg.qr(inside[1:, 1:])[0]
    turn = basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), within) @ basis.T
    sizes = torch.randn(ctx, 1, generator=generator)
    return {
        "shift along 1": Gauge(ones, 20 * sizes.expand(ctx, d)),
        "rotation around 1": Gauge(ones, zeros, turn.float()),
        "length of each token": Gauge((0.5 * sizes).exp(), zeros),
    }


def gauge_suite(name: str, layer: int, input_ids: torch.Tensor) -> list[dict]:
    """Every metric of one and the same reconstruction of a model, written in each gauge: a row a metric, with
    how far it moves. input_ids [B,T].
    """
    found: dict[str, dict[str, float]] = {}
    n_seq, ctx = input_ids.shape
    for how, gauge in ({"as it is": None} | gauges(64, ctx)).items():
        model, _ = load_model(name, torch.device("cpu"))
        if gauge is not None:
            regauge(model, gauge)
        sums = evaluate(Hook(model, layer), input_ids, {"half": half(gauge, ctx)}, n_seq)["half"].sums
        values = computed(Sums({q: v[None] for q, v in sums.items()}, np.ones((1, n_seq)), 64))
        found[how] = {metric: float(value[0, 0]) for metric, value in values.items()}
    before = found.pop("as it is")
    rows = []
    for metric in (m.name for m in METRICS if np.isfinite(before.get(m.name, np.nan))):
        moved = {how: values[metric] - before[metric] for how, values in found.items()}
        rows.append({"metric": metric, "as it is": before[metric]} | moved)
    return rows


def gauges_of(rows: Sequence[dict]) -> list[str]:
    """The names of the gauges in rows of `gauge_suite`."""
    return [name for name in rows[0] if name not in ("metric", "as it is")]


def stays(row: dict, gauge: str) -> bool:
    """Is a metric the same in this gauge, to 1e-3 of its size?"""
    return bool(abs(row[gauge]) <= 1e-3 * max(abs(row["as it is"]), 1e-2))


def half(gauge: Gauge | None, ctx: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A reconstruction that is smooth, so that rounding stays rounding: half of the directions, the rest at a
    fifth of their size.
    """
    basis = torch.linalg.qr(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)))[0]

    def reconstruct(h: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        x = h.view(-1, ctx - 1, h.shape[1])
        x = x if gauge is None else gauge.read(x)
        x = 0.2 * x + 0.8 * (x @ basis) @ basis.T
        return (x if gauge is None else gauge.write(x)).reshape(h.shape)

    return reconstruct
