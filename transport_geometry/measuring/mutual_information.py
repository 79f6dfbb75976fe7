"""Mutual information between a hook's activations and the model's output, by trained critics, and how many
dimensions a critic needs (Gulati et al. 2026, arXiv:2602.08105); rules refuse that number where it is noise.

A critic scores pairs: S_ij of x_i and y_j, [B,B]; pairs with i = j belong together, the others come from
different sequences. Both sides are embedded, z_x and z_y [B,KZ]. `separable`: S = z_x z_y^T; `hybrid`: a
small network of both. The dimension is the participation ratio of the squared singular values of
Cov(z_x, z_y).

Shapes: S sequences, m positions of each, B = batch, KZ = embedding, d = d_model. All in nats, on the CPU.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transport_geometry.errors import UserError
from transport_geometry.measuring.dimension import participation_ratio
from transport_geometry.models.lm import Hook, text_config
from transport_geometry.saes.sinks import sinks_of
from transport_geometry.text import heldout

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

BATCH = 128  # sequences, one position of each; InfoNCE is at most log BATCH = 4.85
WIDTH, KZ, PAIR_WIDTH = 128, 64, 64  # hidden layers, embeddings, the hybrid critic's layers
LEARNING_RATE = 1e-3
CHECK_EVERY = 25  # steps between two evaluations on the sequences that decide when to stop
SMILE_CLIP = 5.0
BLOCK_SEQUENCES = 16  # neighbouring sequences may be of one document: standard errors count blocks of these
ESTIMATORS = ("infonce", "smile", "nwj")

# ------------------------------------------------------------------------------------------- rules of refusal
MIN_MI, N_SE = 0.1, 3.0  # nats, and standard errors above shuffled pairs: below, the spectrum is noise
FROM_CEILING = 0.75  # nats below log B: above, the bound decides the estimate, not the pairs
OVERFIT = 0.3  # by how much of the fitted pairs' MI the held-out pairs' MI may differ
LADDER_TOLERANCE = 0.25  # by how much the dimension may differ from that at the next amount of noise


@dataclass(frozen=True)
class Schedule:
    """How a critic is trained. Of several restarts the one that fits its own pairs best is kept: the pairs it
    is measured on choose nothing.
    """

    critic: str
    steps: int
    restarts: int


# the separable critic is near its best after some hundred steps; the hybrid one is slow and gets stuck
SCHEDULES = {"separable": Schedule("separable", 300, 1), "hybrid": Schedule("hybrid", 5000, 3)}


@dataclass(frozen=True, eq=False)
class Pairs:
    """Positions of sequences: x [S,m,dx], y [S,m,dy]."""

    x: Tensor
    y: Tensor

    def shuffled(self, generator: torch.Generator) -> "Pairs":
        """x with the y of other sequences: their MI is 0."""
        return Pairs(self.x, self.y[torch.randperm(len(self.y), generator=generator)])


@dataclass(frozen=True, eq=False)
class Split:
    """Pairs to fit a critic to, to stop it by, and to measure it on; no document is in two of them."""

    fit: Pairs
    stop: Pairs
    held: Pairs

    @property
    def enough(self) -> bool:
        """Are there sequences for a batch in each part? A batch takes one position of a sequence."""
        return all(len(part.x) >= BATCH and part.x.shape[1] > 0 for part in self.parts)

    @property
    def parts(self) -> tuple[Pairs, Pairs, Pairs]:
        return self.fit, self.stop, self.held

    def standardised(self) -> "Split":
        """Every channel of mean 0 and variance 1 over `fit`."""

        def scaled(name: str) -> list[Tensor]:
            of_fit = getattr(self.fit, name).flatten(0, 1)
            mean, sd = of_fit.mean(0), of_fit.std(0).clamp(min=1e-6)
            return [(getattr(part, name) - mean) / sd for part in self.parts]

        return Split(*(Pairs(x, y) for x, y in zip(scaled("x"), scaled("y"))))


# ------------------------------------------------------------------------------------------------- estimators
def values(S: Tensor, estimator: str) -> Tensor:
    """[B] whose mean is the estimate of MI from scores S [B,B].

    infonce: log B + S_ii - (logsumexp of row i + of column i) / 2, never above log B. nwj: S_ii - mean over j
    != i of exp(S_ij - 1). smile: S_ii - log of the mean over all i != j of exp(S_ij), S_ij clipped there
    (Song & Ermon 2020: no bound).
    """
    B, own = len(S), S.diagonal()
    if estimator == "infonce":
        return math.log(B) + own - (S.logsumexp(0) + S.logsumexp(1)) / 2
    others = ~torch.eye(B, dtype=torch.bool)
    if estimator == "nwj":
        return own - ((S - 1).exp() * others).sum(1) / (B - 1)
    clipped = S.clamp(-SMILE_CLIP, SMILE_CLIP)[others]
    return own - (clipped.logsumexp(0) - math.log(len(clipped)))


def loss(S: Tensor, estimator: str) -> Tensor:
    """What training lowers: minus the estimate, or, for smile, the Jensen-Shannon bound's (a clipped score
    has no gradient).
    """
    if estimator != "smile":
        return -values(S, estimator).mean()
    B, own = len(S), S.diagonal()
    return softplus(-own).mean() + (softplus(S).sum() - softplus(own).sum()) / (B * (B - 1))


# ------------------------------------------------------------------------------------------------ the critics
class Critic(nn.Module):
    """Scores S [B,B] of x [B,dx] and y [B,dy]."""

    def __init__(self, dx: int, dy: int, hybrid: bool):
        super().__init__()
        self.of_x, self.of_y = encoder(dx), encoder(dy)
        if hybrid:
            n = PAIR_WIDTH
            self.pair_x, self.pair_y = nn.Linear(KZ, n), nn.Linear(KZ, n, bias=False)
            self.pair = nn.Sequential(nn.LeakyReLU(), nn.Linear(n, n), nn.LeakyReLU(), nn.Linear(n, 1))
        self.hybrid = hybrid

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z_x, z_y = self.of_x(x), self.of_y(y)
        if not self.hybrid:
            return z_x @ z_y.T
        # the first layer of a network of (z_x, z_y) is a sum of two: form pairs only after it
        return self.pair(self.pair_x(z_x)[:, None] + self.pair_y(z_y)).squeeze(-1)


def encoder(width: int) -> nn.Sequential:
    """[B,width] -> [B,KZ]."""
    layers: list[nn.Module] = []
    for n_in in (width, WIDTH, WIDTH):
        layers += [nn.Linear(n_in, WIDTH), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, KZ))


def batches(pairs: Pairs, sigma: float, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
    """(rows [B], x [B,dx], y [B,dy]): one position of each of B sequences, every position once, with fresh
    noise of sigma times the channels' standard deviation (1) on y. An incomplete batch is left out.
    """
    for column in torch.randperm(pairs.x.shape[1], generator=generator).tolist():
        for rows in torch.randperm(len(pairs.x), generator=generator).split(BATCH):
            if len(rows) == BATCH:
                y = pairs.y[rows, column]
                yield rows, pairs.x[rows, column], y + sigma * torch.randn(y.shape, generator=generator)


@torch.no_grad()
def by_sequence(critic: Critic, pairs: Pairs, sigma: float, estimator: str, seed: int) -> Tensor:
    """`values` of every position, averaged over those of a sequence: [S'] in the order of the text."""
    total, count = torch.zeros(len(pairs.x)), torch.zeros(len(pairs.x))
    for rows, x, y in batches(pairs, sigma, torch.Generator().manual_seed(seed)):
        total[rows] += values(critic(x, y), estimator)
        count[rows] += 1
    return total[count > 0] / count[count > 0]


def trained(
    split: Split, sigma: float, estimator: str, schedule: Schedule, seed: int
) -> tuple[Critic, float]:
    """(critic, MI of the pairs it was fitted to), as it was where `stop` had the largest estimate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = Critic(split.fit.x.shape[-1], split.fit.y.shape[-1], schedule.critic == "hybrid")
    optimizer = torch.optim.Adam(critic.parameters(), lr=LEARNING_RATE, fused=True)
    best, kept = -math.inf, critic.state_dict()
    again = itertools.chain.from_iterable(batches(split.fit, sigma, generator) for _ in itertools.count())
    for step, (_, x, y) in enumerate(itertools.islice(again, schedule.steps), 1):
        optimizer.zero_grad()
        loss(critic(x, y), estimator).backward()
        optimizer.step()
        if step % CHECK_EVERY == 0 or step == schedule.steps:
            found = by_sequence(critic, split.stop, sigma, estimator, seed=0).mean().item()
            if found > best:
                best, kept = found, copy.deepcopy(critic.state_dict())
    critic.load_state_dict(kept)
    return critic, by_sequence(critic, split.fit, sigma, estimator, seed=1).mean().item()


@torch.no_grad()
def embedded_dimension(critic: Critic, pairs: Pairs, sigma: float, seed: int) -> float:
    """PR of the squared singular values of Cov(z_x, z_y) over all positions."""
    y = pairs.y.flatten(0, 1)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    z_x, z_y = critic.of_x(pairs.x.flatten(0, 1)).double(), critic.of_y(y + sigma * noise).double()
    cross = (z_x - z_x.mean(0)).T @ (z_y - z_y.mean(0)) / (len(y) - 1)
    return participation_ratio(torch.linalg.svdvals(cross).square().numpy())


def critic_row(split: Split, sigma: float, estimator: str, schedule: Schedule) -> dict[str, Any]:
    """Of the best restart's critic on the held-out pairs: MI and its standard error, MI of the fitted pairs,
    dimension. nan where there are too few sequences for a batch.
    """
    row = {"estimator": estimator, "sigma": sigma, "critic": schedule.critic}
    row |= dict.fromkeys(("mi", "mi_se", "mi_fit", "dimension"), np.nan)
    if not split.enough:
        return row
    runs = [trained(split, sigma, estimator, schedule, seed) for seed in range(schedule.restarts)]
    critic, mi_fit = max(runs, key=lambda run: run[1])
    each = by_sequence(critic, split.held, sigma, estimator, seed=2)
    blocks = torch.stack([block.mean() for block in each.split(BLOCK_SEQUENCES)])
    return row | {
        "mi": each.mean().item(),
        "mi_se": (blocks.std() / len(blocks) ** 0.5).item(),
        "mi_fit": mi_fit,
        "dimension": embedded_dimension(critic, split.held, sigma, seed=3),
    }


# -------------------------------------------------------------------------------------------- what is refused
def refusals(rows: Sequence[Mapping[str, Any]], ceiling: float | None) -> list[str]:
    """The rule that each row's dimension fails, or "". Rows of one ladder, sigma ascending, with mi, mi_se,
    mi_null, mi_null_se, mi_fit, dimension. ceiling: the largest MI that the estimator can give; None: no
    bound.
    """
    alone = [_refused_alone(row, ceiling) for row in rows]

    def agree(i: int, j: int) -> bool:
        a, b = rows[i]["dimension"], rows[j]["dimension"]
        return not alone[j] and abs(a - b) <= LADDER_TOLERANCE * max(a, b)

    neighbours = [[j for j in (i - 1, i + 1) if 0 <= j < len(rows)] for i in range(len(rows))]
    return [
        why or ("" if any(agree(i, j) for j in neighbours[i]) else "ladder") for i, why in enumerate(alone)
    ]


def _refused_alone(row: Mapping[str, Any], ceiling: float | None) -> str:
    mi, fit = row["mi"], row["mi_fit"]
    if not np.isfinite([mi, row["mi_null"], row["dimension"]]).all():
        return "too few sequences"
    if not mi > max(MIN_MI, row["mi_null"] + N_SE * math.hypot(row["mi_se"], row["mi_null_se"])):
        return "null"
    if ceiling is not None and not mi < ceiling - FROM_CEILING:
        return "saturation"
    return "" if abs(mi - fit) <= OVERFIT * abs(fit) else "overfit"


# ------------------------------------------------------------------------------------------- pairs of a model
CTX, PER_SEQUENCE = 64, 4  # short rows: more sequences for the same forward passes
N_FIT, N_STOP, N_HELD = 1024, 256, 512
ROW_STRIDE = 2  # every second row of the text, so that more documents are read
KEPT_VARIANCE = 0.9  # of the logits' Fisher-weighted variance, by the components kept
MAX_TOKENS = 2048  # of which the components are computed


def rows_of(
    data: str, split: str, tokenizer: Any, ctx: int, first: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids [S,ctx] to fit, to stop (both of the training side, with a gap between them) and to measure
    (of the held-out side); first: the token that each row begins with, if any. Fewer rows of a short text.
    """

    def some(side: str, n: int) -> Tensor:
        rows = heldout.packed_rows(data, side, tokenizer, ctx, split, first)
        found = list(itertools.islice(rows, 0, n * ROW_STRIDE, ROW_STRIDE))
        return torch.stack(found) if found else torch.zeros(0, ctx, dtype=torch.int64)

    train = some("train", N_FIT + 2 * N_STOP)
    # a short text is divided in the same proportions
    fit = len(train) * N_FIT // (N_FIT + 2 * N_STOP)
    gap = (len(train) - fit) // 2
    return train[:fit], train[fit + gap :], some("heldout", N_HELD)


@torch.no_grad()
def pairs_at(hook: Hook, input_ids: Tensor, batch: int, seed: int) -> Pairs:
    """h and the final norm's output at PER_SEQUENCE positions of each row, drawn among those that have a
    target and are no sinks.
    """
    if not len(input_ids):
        return Pairs(torch.zeros(0, 0, 1), torch.zeros(0, 0, 1))
    h = torch.cat([hook.head(ids.to(hook.device)).cpu() for ids in input_ids.split(batch)])
    x, y = h[:, :-1], final_norm(hook, input_ids, h, batch)
    sinks = sinks_of(x)
    order = torch.rand(sinks.shape, generator=torch.Generator().manual_seed(seed))
    order[sinks] = 2.0
    chosen = order.argsort(1)[:, : min(PER_SEQUENCE, int((~sinks).sum(1).min())), None]
    return Pairs(*(v.gather(1, chosen.expand(-1, -1, v.shape[-1])) for v in (x, y)))


@torch.no_grad()
def final_norm(hook: Hook, input_ids: Tensor, h: Tensor, batch: int) -> Tensor:
    """The unembedding's input at positions that have a target, [S,T-1,d] on the CPU, for h [S,T,d]."""
    parts = zip(input_ids.split(batch), h.split(batch))
    ends = [hook.tail(x.to(hook.device), at.to(hook.device), unembedded=False) for x, at in parts]
    return torch.cat([end[:, :-1].float().cpu() for end in ends])


def fisher_components(y: Tensor, unembedding: Any) -> Tensor:
    """[d,r]: the directions of the final norm's output y [N,d] that are the principal components of the
    logits weighted with the output Fisher, up to KEPT_VARIANCE of their
    variance.

    With z = W y and F the mean of diag(p) - p p^T, these are the eigenvectors u of M^1/2 Cov(y) M^1/2, M =
    W^T F W, as M^1/2 u: components of y never larger than d, whatever the vocabulary.
    """
    W = unembedding.weight.detach().float().cpu()
    bias = None if unembedding.bias is None else unembedding.bias.detach().float().cpu()
    mean_p, mean_sq = torch.zeros(len(W), dtype=torch.float64), 0.0
    some = y[:: max(1, len(y) // MAX_TOKENS)]
    for part in some.split(256):
        p = torch.softmax(linear(part, W, bias), -1)
        mean_p += p.double().sum(0) / len(some)
        seen = (p @ W).double()
        mean_sq = mean_sq + seen.T @ seen / len(some)
    wide = W.double()
    values_of_m, vectors = eigh((wide.T @ (wide * mean_p[:, None]) - mean_sq).numpy())
    root = vectors * np.sqrt(np.clip(values_of_m, 0, None)) @ vectors.T
    centred = (y - y.mean(0)).double().numpy()
    spectrum, u = eigh(root @ (centred.T @ centred / len(y)) @ root)
    shares = np.cumsum(spectrum[::-1]) / spectrum.sum()
    kept = int(np.searchsorted(shares, KEPT_VARIANCE)) + 1
    return torch.tensor(root @ u[:, ::-1][:, :kept]).float()


def targets(hook: Hook, parts: tuple[Pairs, Pairs, Pairs], input_ids: Tensor) -> dict[str, Split]:
    """{what Y is: standardised pairs}: the final norm's output, and the logits' Fisher-weighted components
    (where the logits are the unembedding and nothing else).
    """
    plain = Split(*parts)
    of = {"final norm": plain}
    if not plain.enough:
        return of
    if hook.unembeds(input_ids):
        unembedding = hook.model.get_output_embeddings()
        A = fisher_components(plain.fit.y.flatten(0, 1), unembedding)
        of["logits, Fisher"] = Split(*(Pairs(part.x, part.y @ A) for part in parts))
    vocab = text_config(hook.model).vocab_size
    for name, split in of.items():
        refuse_logits(name, split.fit.y.shape[-1], vocab)
    return {name: split.standardised() for name, split in of.items()}


def refuse_logits(name: str, width: int, vocab: int) -> None:
    """Raises UserError where Y is as wide as the vocabulary."""
    if width >= vocab:
        raise UserError(
            f"Y = {name}, {width} channels for {vocab} tokens: raw logits are a linear function of the final "
            "norm's output and hold no more than it, and a critic's first layer would learn the pairs by "
            "heart; take that output, or the logits' Fisher-weighted components"
        )


def critic_rows(
    split: Split, ladder: Sequence[float], estimators: Sequence[str], schedule: Schedule
) -> list[dict]:
    """A row for each estimator and amount of noise; mi_null, mi_null_se: of a critic trained and measured on
    shuffled pairs, whose MI is 0.
    """
    out = []
    for estimator in estimators:
        generator = torch.Generator().manual_seed(4)
        unrelated = Split(*(part.shuffled(generator) for part in split.parts))
        null = critic_row(unrelated, 0.0, estimator, schedule)
        of_null = {"mi_null": null["mi"], "mi_null_se": null["mi_se"]}
        out += [critic_row(split, sigma, estimator, schedule) | of_null for sigma in ladder]
    return out
