"""Where it hurts: what a patch adds to cross-entropy by the position in its row, and the tokens that it costs
most.

Shapes: S evaluation sequences, T positions of which T-1 are evaluated. Harm is dCE, nats a token.
"""

import math
import pathlib
import typing
from collections.abc import Sequence
from typing import Any

from transport_geometry.records import store
from transport_geometry.records.condition import Condition, hook_of
from transport_geometry.records.tables import grouped, markdown, read_table, short
from transport_geometry.reporting.figures import pyplot
from transport_geometry.reporting.templates import blocks

import numpy as np
import torch

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

HARM, WORST = "harm.csv", "worst.csv"
TEXT = blocks("where_it_hurts")
N_WORST = 10
BEFORE = 8  # tokens that are shown, up to the one whose next is lost


def position_bins(n: int) -> list[tuple[int, int]]:
    """[(first, last)] of n positions: a bin each for 0 and 1, then twice as many in each.

    >>> position_bins(10)
    [(0, 0), (1, 1), (2, 3), (4, 7), (8, 9)]
    """
    firsts = [0] + [2**i for i in range(n.bit_length()) if 2**i < n]
    return [(first, min(after, n) - 1) for first, after in zip(firsts, [*firsts[1:], n])]


def by_position(condition: Condition, harm: np.ndarray) -> list[dict[str, Any]]:
    """Of harm.csv: mean dCE in every bin of positions, and the bin's share of the whole. harm [S,T-1]."""
    total = harm.sum(dtype=float)
    return [
        vars(condition)
        | {
            "first": first,
            "last": last,
            "dce": harm[:, first : last + 1].mean(dtype=float),
            "share": harm[:, first : last + 1].sum(dtype=float) / total if total else math.nan,
        }
        for first, last in position_bins(harm.shape[1])
    ]


def worst_tokens(
    condition: Condition, harm: np.ndarray, input_ids: torch.Tensor, document: np.ndarray, tokenizer: Any
) -> list[dict[str, Any]]:
    """Of worst.csv: the tokens that lose most, with the text before them. harm [S,T-1]; input_ids [S,T]."""
    rows = []
    for rank, flat in enumerate(np.argsort(-harm, axis=None, kind="stable")[:N_WORST], 1):
        s, t = divmod(int(flat), harm.shape[1])
        ids = input_ids[s].tolist()
        rows.append(
            vars(condition)
            | {
                "rank": rank,
                "document": int(document[s]),
                "sequence": s,
                "position": t,
                "dce": float(harm[s, t]),
                "before": tokenizer.decode(ids[max(0, t + 1 - BEFORE) : t + 1]),
                "next": tokenizer.decode(ids[t + 1 : t + 2]),
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------- in a report
def of_folder(out: pathlib.Path) -> tuple[str, dict[str, "Figure"]]:
    """(section of the report in Markdown, {file: figure}) of a results folder; nothing of one of an earlier
    version. Raises Damaged.
    """
    record = out / store.RUN
    if HARM not in store.written(record):
        return "", {}
    harm, worst = (read_table(store.checked(record, name)) for name in (HARM, WORST))
    return section(harm, worst), {"harm.png": plot(harm)}


def section(harm: Sequence[dict[str, Any]], worst: Sequence[dict[str, Any]]) -> str:
    """In Markdown. harm, worst: rows of harm.csv and worst.csv."""
    seen: set[tuple] = set()
    tokens: list[dict[str, Any]] = []
    for row in sorted(worst, key=lambda row: -row["dce"]):
        place = row["model"], row["sequence"], row["position"]
        if place not in seen and len(tokens) < N_WORST:
            seen.add(place)
            tokens.append(
                {
                    "hook": hook_of(row),
                    "sae": row["sae"],
                    "k": row["k"],
                    "position": row["position"],
                    "dCE": row["dce"],
                    "text": quoted(row["before"]),
                    "next": quoted(row["next"]),
                }
            )
    table = [{"hook": hook} | {name: short(y) for name, y in curve} for hook, curve in curves(harm).items()]
    columns = list(dict.fromkeys(name for row in table for name in row))
    filled = [dict.fromkeys(columns, "") | row for row in table]
    return TEXT["section"].format(curves=markdown(filled), tokens=markdown(tokens))


def curves(harm: Sequence[dict[str, Any]]) -> dict[str, list[tuple[str, float]]]:
    """{hook: [(positions, mean dCE over its SAEs)]}."""
    out: dict[str, list[tuple[str, float]]] = {}
    for (model, layer, first, last), rows in grouped(harm, ["model", "layer", "first", "last"]).items():
        name = f"{first}" if first == last else f"{first} to {last}"
        mean = float(np.mean([row["dce"] for row in rows]))
        out.setdefault(f"{model}@{layer}", []).append((name, mean))
    return out


def quoted(text: Any) -> str:
    """A piece of text in a table's cell."""
    return "`" + repr(str(text))[1:-1].replace("|", "\\u007c").replace("`", "'") + "`"


def plot(harm: Sequence[dict[str, Any]]) -> "Figure":
    """harm.png: a line a hook, early ones dark."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    of_hooks = curves(harm)
    longest = max(of_hooks.values(), key=len)
    for i, (hook, curve) in enumerate(of_hooks.items()):
        colour = plt.get_cmap("viridis")(i / max(len(of_hooks), 2))
        axis.plot(
            range(len(curve)), [y for _, y in curve], color=colour, marker="o", markersize=3, label=hook
        )
    axis.axhline(0, color="#777777", linewidth=0.8)
    axis.set_xticks(range(len(longest)), [name for name, _ in longest], fontsize=8)
    axis.set(xlabel="position in the row", ylabel="dCE, nats a token")
    axis.set_yscale("symlog", linthresh=0.1)
    axis.legend(fontsize=7, ncols=2, loc="upper right")
    axis.grid(alpha=0.25)
    return figure
