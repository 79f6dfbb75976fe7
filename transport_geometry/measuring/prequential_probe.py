"""A one-observer prequential estimate: what one linear probe learns of the next token from h in one pass over
text, and how much less from h_hat.

A linear softmax with Adam reads pairs (x, y) once each, x = h or h_hat at the hook, y the next token. Each
pair is coded by the probe before it learns from it, L = sum_t -log2 p_{t-1}(y_t | x_t) bits; what it learns
is the area between that curve and its end, K = sum_t (l_t - l_end) (`K_auc` of Finzi et al. 2026, "From
Entropy to Epiplexity"). Lost information is l(h_hat) - l(h) on held-out documents. It bounds no other
observer: another form, more pairs or another rate learns more from either.

Shapes: n pairs to learn from, m held out, d = d_model, V = vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transport_geometry.models.lm import Hook, cross_entropy, text_config
from transport_geometry.records.tables import markdown, span
from transport_geometry.running.grid import EvalSet
from transport_geometry.running.run import eval_batch
from transport_geometry.saes.sae import SAE, TrainingSpec
from transport_geometry.statistics.intervals import interval
from transport_geometry.statistics.resampling import RESAMPLES, document_weights
from transport_geometry.text import heldout

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

MAX_PAIRS = 2**14  # that the observer reads
BATCH = 64  # pairs a step
RATE = 3e-3  # of Adam
END = 0.1  # share of the pass that counts as its end
N_RESAMPLES = 2000
INPUTS = ("h", "h_hat")
RULE = "refused: the observer learnt nothing (K ≤ 0, or held out no better than its table)"


# ------------------------------------------------------------------------------------------- the observer
@dataclass(frozen=True, eq=False)
class Observed:
    """What an observer learnt from one input."""

    code: float  # L, bits of the whole pass
    learnt: float  # K, bits
    held: np.ndarray  # [m], bits of each held-out pair at the end
    table: np.ndarray  # [m], bits of the same by the table it began with

    @property
    def refused(self) -> bool:
        """Did it learn nothing from x, so that its losses say nothing about x?"""
        return not (self.learnt > 0 and self.held.mean() < self.table.mean())


def observe(
    x: Tensor,
    y: Tensor,
    held_x: Tensor,
    held_y: Tensor,
    n_labels: int,
    rank: int | None = None,
    seed: int = 0,
) -> Observed:
    """One pass of a linear softmax over x [n,d], y [n], in an order set by the seed; then x, y held out
    [m,d], [m].

    Its bias begins at the log of each label's count in y (plus 1/2), a table that is given and not learnt,
    and its weights at zero. K therefore counts what is learnt from x; where x tells nothing, the noise of the
    steps makes it negative. Every coordinate of x is standardised over x, without the held-out pairs. rank:
    of the weights, for less than a full [V,d].

    l_end is the table's mean bits over all of y, less the mean bits won over the table in the last END of the
    pass: a rare label costs the same whenever it comes, so this has the expectation of the plain mean and
    less noise.
    """
    mean, scale = x.mean(0), x.std(0) + 1e-10
    x, held_x = (x - mean) / scale, (held_x - mean) / scale
    generator = torch.Generator().manual_seed(seed)
    table = torch.log_softmax((torch.bincount(y, minlength=n_labels) + 0.5).log(), 0).to(x)
    factors = [torch.zeros(n_labels, rank or x.shape[1]).to(x)]
    if rank:
        factors.append(torch.randn(rank, x.shape[1], generator=generator).to(x) / math.sqrt(x.shape[1]))
    weights = [*factors, table.clone()]
    for tensor in weights:
        tensor.requires_grad_()
    optimiser = torch.optim.Adam(weights, lr=RATE, fused=x.device.type in ("cpu", "cuda"))

    def bits(x: Tensor, y: Tensor) -> Tensor:
        for factor in reversed(factors):
            x = x @ factor.T
        return torch.nn.functional.cross_entropy(x + weights[-1], y, reduction="none") / math.log(2)

    losses, order = [], torch.randperm(len(x), generator=generator).to(x.device)
    for here in order.split(BATCH):
        loss = bits(x[here], y[here])
        losses.append(loss.detach())
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
    with torch.no_grad():
        held = torch.cat([bits(*pair) for pair in zip(held_x.split(1024), held_y.split(1024))])
    in_table = -table.double() / math.log(2)
    plain, loss = in_table[y[order]], torch.cat(losses).double()
    end = plain.mean() - (plain - loss)[-max(1, round(END * len(x))) :].mean()
    found = (held.double(), in_table[held_y])
    return Observed(
        loss.sum().item(), (loss - end).sum().item(), *(bits_of.cpu().numpy() for bits_of in found)
    )


# ------------------------------------------------------------------------------------------- once per hook
@torch.no_grad()
def pairs(hook: Hook, input_ids: Tensor, sae: SAE, batch: int) -> tuple[dict[str, Tensor], Tensor]:
    """({"h": [n,d], "h_hat": [n,d]}, next token [n]) at the positions of input_ids [S,T] that have one."""
    chunks = [hook.head(chunk.to(hook.device))[:, :-1].flatten(0, 1) for chunk in input_ids.split(batch)]
    h_hat = [sae.reconstruct(h)[2] for h in chunks]
    return {"h": torch.cat(chunks), "h_hat": torch.cat(h_hat)}, input_ids[:, 1:].flatten().to(hook.device)


@torch.no_grad()
def patched_dce(hook: Hook, input_ids: Tensor, sae: SAE, batch: int) -> np.ndarray:
    """CE of the patched run less that of the clean one, in bits, [S*(T-1)] for input_ids [S,T]."""
    out = []
    for chunk in input_ids.to(hook.device).split(batch):
        h = hook.head(chunk)
        h_hat = torch.cat([sae.reconstruct(h[:, :-1].flatten(0, 1))[2].view_as(h[:, :-1]), h[:, -1:]], 1)
        clean, patched = (cross_entropy(hook.log_probs(chunk, at), chunk) for at in (h, h_hat))
        out.append((patched - clean).flatten().double() / math.log(2))
    return torch.cat(out).cpu().numpy()


def mean_of_documents(bits: np.ndarray, document: np.ndarray) -> tuple[float, float, float]:
    """(mean, lo, hi) of bits [S*(T-1)] over tokens, documents [S] resampled."""
    by_row = bits.reshape(len(document), -1)
    weights = document_weights(int(document.max()) + 1, N_RESAMPLES, seed=0)[:, document]
    draws = weights @ by_row.mean(1) / weights.sum(1)
    return float(draws[0]), *interval(draws[RESAMPLES])


def study(eval_set: EvalSet, sae: SAE, device: torch.device) -> list[dict]:
    """The row of observer.csv: an observer of h beside one of the middle SAE's h_hat.

    Each learns from the training side, one pass over at most MAX_PAIRS pairs, and is tested on the held-out
    rows. Bits of one token, except the two K, which are bits of the whole pass. Where either observer is
    `refused`, what is lost is undefined.
    """
    hook, held, condition = eval_set.hook, eval_set.held, eval_set.middle.condition
    origin, ctx = eval_set.middle.origin, held.input_ids.shape[1]
    batch, V = eval_batch(hook, ctx), text_config(hook.model).vocab_size
    n = max(1, MAX_PAIRS // (ctx - 1))
    split = origin.split if isinstance(origin, TrainingSpec) else "train"
    rows = heldout.spread_rows(eval_set.source.data, eval_set.tokenizer, ctx, n, split, eval_set.bos)
    x, y = pairs(hook, rows, sae, batch)
    held_x, held_y = pairs(hook, held.input_ids, sae, batch)
    bar = tqdm(INPUTS, desc=f"observer {eval_set.label}", delay=2, leave=False, disable=None)
    h, h_hat = (observe(x[name], y, held_x[name], held_y, V) for name in bar)
    row = {"model": condition.model, "layer": condition.layer, "k": condition.k, "pairs": len(y)}
    row |= {
        "table": float(h.table.mean()),
        "loss_h": float(h.held.mean()),
        "loss_h_hat": float(h_hat.held.mean()),
    }
    row |= {"code_h": h.code / len(y), "code_h_hat": h_hat.code / len(y)}
    row |= {"k_auc_h": h.learnt, "k_auc_h_hat": h_hat.learnt, "refused": int(h.refused or h_hat.refused)}
    lost = mean_of_documents(h_hat.held - h.held, held.document)
    dce = mean_of_documents(patched_dce(hook, held.input_ids, sae, batch), held.document)
    if row["refused"]:
        lost = (np.nan,) * 3
    for name, found in (("lost", lost), ("dce_bits", dce)):
        row |= dict(zip((name, f"{name}_lo", f"{name}_hi"), found))
    return [row]


# ------------------------------------------------------------------------------------------- over hooks
TEXT = """\
**{answer}**

One-observer prequential estimate: a linear softmax reads {pairs} pairs (activation, next token) of the \
training side once, in a fixed order, Adam at {rate:g}, {batch} pairs a step, and is then asked about the \
held-out rows. table: bits of a token by how often it comes on the training side, which both observers are \
given; loss: by what the observer makes of h, of ĥ; K_auc: what it came to know from x in that pass, the \
area between its loss and the loss of the last tenth; lost: loss of ĥ less loss of h, with documents \
resampled; ΔCE: what the patch costs the model itself, in bits. K_auc is of the training side, which the \
embedded models have seen, and the losses of text that they have not.

What this is not: a bound on what another observer would learn from either, or the information that ĥ \
lacks. An observer of another form, another rate or a longer pass knows more, and may lose less or more; \
the model after the hook is one of them, and it loses ΔCE. Only this observer's two losses are \
compared.{refused}

{table}
"""


def section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown about observer.csv, the answer first. A pure function of its rows."""
    if not rows:
        return "**No hook has been shown to the observer.**\n"
    kept = [row for row in rows if not row["refused"]]
    answer = "The observer learnt nothing at any hook, so nothing is said of what it loses."
    if kept:
        above = sum(row["lost_lo"] > 0 for row in kept)
        lost, dce = (np.array([row[name] for row in kept]) for name in ("lost", "dce_bits"))
        answer = (
            f"One linear observer of ĥ knows {np.median(lost):.2f} bits less of the next token than one of "
            f"h, the median of {len(kept)} hooks ({lost.min():.2f} to {lost.max():.2f}; the interval is "
            f"above 0 at {above}); the patch costs the model {np.median(dce):.2f} bits."
        )
    shown = [
        {
            "model": row["model"],
            "layer": row["layer"],
            "k": row["k"],
            "table": row["table"],
            "loss h": row["loss_h"],
            "loss ĥ": row["loss_h_hat"],
            "K_auc h": f"{row['k_auc_h'] / 1000:.1f} kbit",
            "K_auc ĥ": f"{row['k_auc_h_hat'] / 1000:.1f} kbit",
            "lost": "refused" if row["refused"] else span(row["lost"], row["lost_lo"], row["lost_hi"]),
            "ΔCE in bits": span(row["dce_bits"], row["dce_bits_lo"], row["dce_bits_hi"]),
        }
        for row in rows
    ]
    return TEXT.format(
        answer=answer,
        pairs=" or ".join(f"{n:,}" for n in sorted({row["pairs"] for row in rows})),
        rate=RATE,
        batch=BATCH,
        refused=f" `refused`: {RULE}." if len(kept) < len(rows) else "",
        table=markdown(shown, list(shown[0])),
    )
