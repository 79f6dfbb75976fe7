"""Of Exp-E: in which blocks and heads after a hook the attention plans change, measured once per hook with
the middle SAE of the grid, and what that says over hooks.

W weightings of the documents, C conditions (SAEs), as in `results.Measured`.
"""

import dataclasses
import typing
from collections.abc import Sequence

from transport_geometry.measuring.attention_plan import Change, four_runs
from transport_geometry.measuring.dimension import participation_of
from transport_geometry.measuring.evaluate import activations
from transport_geometry.measuring.metrics import DISTORTION
from transport_geometry.records.tables import grouped, markdown, percent
from transport_geometry.reporting.figures import joined_points, pyplot
from transport_geometry.running.grid import EvalSet
from transport_geometry.running.run import eval_batch
from transport_geometry.saes.sae import SAE
from transport_geometry.statistics.over_hooks import (
    correlation_within_models,
    larger_minus_smaller,
    mean_over_hooks,
    side_of_zero,
)

import numpy as np
import torch

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLES = ("depth.csv", "hooks.csv")
FIELDS = tuple(field.name for field in dataclasses.fields(Change))
OF_A_HEAD = "model layer block head kl kl_first first first_hat entropy entropy_hat".split()


def study(eval_set: EvalSet, sae: SAE, device: torch.device) -> dict[str, list[dict]]:
    """{"depth.csv": a row per head of each block after the hook, FIELDS as means over queries t >= 1;
    "hooks.csv": one row}.
    """
    hook, input_ids, condition = eval_set.hook, eval_set.held.input_ids, eval_set.middle.condition
    shared = activations(hook, input_ids, batch := eval_batch(hook, input_ids.shape[1]))
    used, calm = shared.h[:, :-1].flatten(0, 1), ~shared.sink.flatten()
    name = {"model": condition.model, "layer": condition.layer}
    ratios = {"pr": participation_of(used), "pr_nosink": participation_of(used[calm])}
    of_hook = [name | {"d": eval_set.d} | ratios]
    which = name | {key: getattr(condition, key) for key in ("recipe", "k", "seed", "tokens")}
    if hook.is_last:  # no attention, and a row that says so
        nothing = dict.fromkeys(("block", "head", *FIELDS), np.nan)
        return {"depth.csv": [which | nothing], "hooks.csv": of_hook}
    sums: dict[int, dict[str, torch.Tensor]] = {}

    def look(block: int, change: Change) -> None:
        mine = sums.setdefault(block, {})
        for name in FIELDS:
            mine[name] = mine.get(name, 0) + getattr(change, name)[:, :, 1:-1].cpu().double().sum((0, 2))

    with torch.no_grad():
        for x, h in zip(input_ids.split(batch), shared.h.split(batch)):
            x, h = x.to(device), h.to(device)
            h_hat = torch.cat([sae.reconstruct(h.flatten(0, 1))[2].view_as(h)[:, :-1], h[:, -1:]], 1)
            four_runs(hook, x, h, h_hat, look)
    n = len(input_ids) * max(input_ids.shape[1] - 2, 0) or np.nan
    depth = [
        which | {"block": block, "head": head} | {field: float(v[head]) / n for field, v in fields.items()}
        for block, fields in sorted(sums.items())
        for head in range(len(fields["kl"]))
    ]
    return {"depth.csv": depth, "hooks.csv": of_hook}


# -------------------------------------------------------------------------------------------- over hooks
def by_block(depth: Sequence[dict], of_hooks: Sequence[dict]) -> list[dict]:
    """A row per hook that attention follows: kl [blocks after it], mean over heads; share: of the sum over
    blocks, in the first one; first_over_rest: log2 of the first block's KL over the mean of the later ones'
    (nan where there is none); pr, pr_nosink of the hook. depth, of_hooks: rows of TABLES.
    """
    hooks = {(row["model"], row["layer"]): row for row in of_hooks}
    rows = []
    for (model, layer), of_hook in grouped(depth, ("model", "layer")).items():
        kl = np.array([np.mean([r["kl"] for r in heads]) for heads in grouped(of_hook, ["block"]).values()])
        if not np.isfinite(kl).all():  # the last block
            continue
        with np.errstate(divide="ignore", invalid="ignore"):  # a patch that changes nothing
            later = np.log2(kl[0] / kl[1:].mean()) if len(kl) > 1 else np.nan
            share = kl[0] / kl.sum()
        row = {"model": model, "layer": layer, "k": of_hook[0]["k"], "kl": kl, "share": share}
        of_pr = {name: hooks[model, layer][name] for name in ("pr", "pr_nosink")}
        rows.append(row | {"first_over_rest": later} | of_pr)
    return rows


def where_plans_change(
    rows: Sequence[dict], values: dict, meta: dict, models: list[str], n_resamples: int
) -> dict[str, dict]:
    """Three questions, each {value, lo, hi, n, word}: do plans change more in the first block or in later
    ones? in the largest model? where the participation ratio (PR) is low? And each model's hook of the lowest
    PR, with its depth.

    rows: of `by_block`; values {metric: [W,C]}, meta. Plan distortion in log10, so 0.3 is twice as much;
    `per_error` divides it by nmse_tok before, since both are quadratic in a small error.
    """
    rows = sorted(rows, key=lambda row: (row["model"], row["layer"]))
    hooks = {
        name: np.array([row[name] for row in rows]) for name in ("model", "layer", "pr", "first_over_rest")
    }
    here = [(meta["model"] == row["model"]) & (meta["layer"] == row["layer"]) for row in rows]
    several = np.isfinite(hooks["first_over_rest"])
    of_several = {name: column[several] for name, column in hooks.items()}
    first = mean_over_hooks(of_several["first_over_rest"][None], of_several, n_resamples)
    out: dict[str, dict] = {
        "first_block": first | {"word": side_of_zero(first, "first block", "later blocks")},
        "lowest_pr": {
            f"{row['model']}@{row['layer']}": float(meta["depth"][mask][0])
            for row, mask in zip(rows, here)
            if is_lowest(row, rows)
        },
    }
    kl = -DISTORTION(values["plan_kl"])
    for name, y in (("", kl), ("_per_error", kl + DISTORTION(values["nmse_tok"]))):
        size = larger_minus_smaller(y, meta, models, n_resamples)
        out[f"larger_model{name}"] = size | {"word": side_of_zero(size, "more", "less")}
        of_hooks = np.stack([y[:, mask].mean(1) for mask in here], 1)
        of_pr = correlation_within_models(np.log10(hooks["pr"]), of_hooks, hooks, n_resamples)
        out[f"low_pr{name}"] = of_pr | {"word": side_of_zero(of_pr, "less", "more")}
    return out


def is_lowest(row: dict, rows: Sequence[dict]) -> bool:
    """Has the hook the smallest participation ratio of its model's?"""
    return bool(row["pr"] == min(other["pr"] for other in rows if other["model"] == row["model"]))


# -------------------------------------------------------------------------------------------- to read
def block_table(rows: Sequence[dict]) -> str:
    """One row per hook: PR, and KL by block after it."""
    most = max(len(row["kl"]) for row in rows)
    table = []
    for row in rows:
        cells = {name: row[name] for name in ("model", "layer", "k")}
        cells["PR"] = f"{row['pr']:.3g}" + (" lowest" if is_lowest(row, rows) else "")
        cells |= {"PR_nosink": row["pr_nosink"], "plan_kl": float(row["kl"].mean())}
        cells |= dict(zip((f"+{i + 1}" for i in range(most)), [*map(float, row["kl"]), *[""] * most]))
        table.append(cells | {"first block's share": percent(row["share"])})
    return markdown(table)


def head_table(depth: Sequence[dict], models: Sequence[str]) -> str:
    """The three heads of each model whose plans change most, over its hooks."""
    known = sorted((row for row in depth if np.isfinite(row["kl"])), key=lambda row: -row["kl"])
    return markdown(
        [row for model in models for row in [one for one in known if one["model"] == model][:3]], OF_A_HEAD
    )


def depth_figure(rows: Sequence[dict], models: Sequence[str]) -> "Figure":
    """KL by block, a line for each hook, a panel for each model."""
    plt = pyplot()
    shape = dict(figsize=(3.6 * len(models) + 1, 3.8), sharey=True, squeeze=False, layout="constrained")
    figure, axes = plt.subplots(1, len(models), **shape)
    last = max(row["layer"] + len(row["kl"]) for row in rows)
    for axis, model in zip(axes[0], models):
        mine = [row for row in rows if row["model"] == model]
        colours = plt.get_cmap("viridis")(np.linspace(0.05, 0.9, max(len(mine), 1)))
        for row, colour in zip(mine, colours):
            blocks = row["layer"] + 1 + np.arange(len(row["kl"]))
            says = [f"{model}@{row['layer']}, block {i}: {kl:.3g}" for i, kl in zip(blocks, row["kl"])]
            joined_points(axis, blocks, row["kl"], says, colour, label=f"after block {row['layer']}")
        axis.set(yscale="log", xlabel="block", title=model, xlim=(0.5, last + 0.5))
        axis.grid(alpha=0.3)
        if mine:
            axis.legend(title="patched", fontsize=8)
    axes[0, 0].set_ylabel("plan distortion: mean KL(A ‖ Â)\nover heads and queries, nats")
    return figure
