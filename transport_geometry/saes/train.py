"""Training TopK SAEs: the stream of activations, the recipes, checkpoints, and filling the cache with what it
lacks.

Shapes: N tokens, d = d_model, F = d_sae, k = active latents. Gao et al. 2024, arXiv:2406.04093.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transport_geometry import kernels
from transport_geometry.errors import Damaged, Fault, UserError, reading
from transport_geometry.machine import processor
from transport_geometry.models import text
from transport_geometry.models.lm import OVERHEAD, Hook, block_outputs, block_size, text_config
from transport_geometry.progress import Progress, line
from transport_geometry.records import store
from transport_geometry.saes.sae import (
    CHECKPOINT,
    TopKSAE,
    TrainingSpec,
    is_whole,
    must_vary,
    save_sae,
    sink_positions,
    tied_init,
)

import torch
from torch import Tensor
from tqdm import tqdm

CHUNK = 250_000  # tokens shuffled together
# of the memory of the machine or GPU: what the hooks of one pass may hold of activations and of SAEs
MEMORY = 0.5
# Up to so many times d dead latents, AuxK's code is a matrix, as large as two of h: its GEMMs cost less than
# the gathers of d/2 rows a token
DENSE = 2
TRAIN_VERSION = 4  # bump when training mathematics changes: older cached SAEs are then left alone


def memory_of(device: torch.device) -> int:
    """Bytes that the GPU has, or the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(d: int, d_sae: int, device: torch.device) -> None:
    """Raises UserError where one SAE in training does not fit: weights, Adam's two moments, and gradients, 4
    bytes each of 2 F d.

    On a CPU recipe `base` holds no gradients: with D dead latents it takes 4 (6 F d + 4 D d) bytes, and
    beside them some [n,d] of a batch of n tokens and a tile. Recipe `saelens`, whose latents are ranked by
    copies folded with the decoder's norms and whose gradients are clipped by their common norm, takes up to
    4 * 19 F d.
    """
    needed, there = 4 * 4 * 2 * d_sae * d, memory_of(device)
    if needed > there:
        called = device.type if device.type == "cuda" else "this machine"
        raise UserError(
            f"--expansion {d_sae // d}: an SAE of {d_sae} latents takes {needed / 1e9:,.0f} GB in training, "
            f"and {called} has {there / 1e9:,.0f}"
        )


def token_flops(d: int, d_sae: int, overhead: int = OVERHEAD) -> float:
    """Of a token in the training of an SAE: the encode, and the sparse rest."""
    return 5 * d * d_sae + 2 * overhead


# ------------------------------------------------------------------------------------------ activations
@dataclass(eq=False)
class Stream:
    """What SAEs of one hook are trained on: its activations, with its sink positions or without."""

    layer: int
    sinks: str  # "drop" leaves sink positions out and does not count them
    tokens: int  # that are given out
    number: int = 0  # of the chunk that comes next
    median: float | None = None  # of the norms of the first batch, which says what a sink is
    over: int = field(init=False)  # tokens before the first chunk, still to be passed over
    waiting: int = 0  # tokens in `parts`
    # (h [n,d], sink [n], which of them): both arms of a hook hold the same h
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.over = self.number * CHUNK

    @property
    def length(self) -> int:
        """Tokens of the next chunk; 0 where all are given out."""
        return max(0, min(CHUNK, self.tokens - self.number * CHUNK))

    def passes_over(self, n: int) -> bool:
        """Pass over the next n positions without the model, where that can be: how many are sinks only the
        model knows.
        """
        if self.median is None or self.sinks == "drop" or n > self.over:
            return False
        self.over -= n
        return True

    def add(self, h: Tensor) -> None:
        """h [B,T,d] of the next rows."""
        norms = torch.linalg.vector_norm(h, dim=-1)
        self.median = norms[:, 1:].median().item() if self.median is None else self.median
        sink = sink_positions(norms, self.median).flatten()
        taken = (~sink if self.sinks == "drop" else torch.ones_like(sink)).nonzero().squeeze(1)
        over = min(self.over, len(taken))
        self.over -= over
        if over < len(taken):
            self.parts.append((h.flatten(0, 1), sink, taken[over:]))
            self.waiting += len(taken) - over

    def chunk(self) -> tuple[Tensor, Tensor]:
        """(h [n,d], sink [n]) of the next chunk, which is then given out."""
        n, at = self.length, 0
        h = self.parts[0][0].new_empty(n, self.parts[0][0].shape[1])
        sink = self.parts[0][1].new_empty(n)
        while at < n:
            of, of_sink, taken = self.parts.pop(0)
            now, later = taken[: n - at], taken[n - at :]
            h[at : at + len(now)], sink[at : at + len(now)] = of[now], of_sink[now]
            at += len(now)
            if len(later):
                self.parts.insert(0, (of, of_sink, later))
        self.number, self.waiting = self.number + 1, self.waiting - n
        return h, sink


def stream_chunks(
    model: Any,
    streams: Sequence[Stream],
    rows: Iterable[Tensor],
    passed: Callable[[int], object] | None = None,
) -> Iterator[tuple[Stream, Tensor, Tensor]]:
    """(stream, h [n,d], sink [n]) whenever a stream has a chunk of n tokens, until all are given out: one run
    of the model over `rows` [B,T], as deep as the deepest stream, serves them all.

    All positions of every sequence. passed(positions) is told of every batch.
    """
    device = next(model.parameters()).device
    for input_ids in rows:
        n = input_ids.numel()
        running = [stream for stream in streams if not stream.passes_over(n)]
        layers = sorted({stream.layer for stream in running})
        for layer in layers:  # so that nothing is trained on what cannot be evaluated
            Hook(model, layer).way_to_patch(input_ids.to(device))
        found = block_outputs(model, layers, input_ids.to(device)) if layers else {}
        for stream in running:
            stream.add(found[stream.layer])
        if passed:
            passed(n)
        for stream in running:
            while 0 < stream.length <= stream.waiting:
                yield stream, *stream.chunk()
        streams = [stream for stream in streams if stream.length]
        if not streams:
            return


def activation_chunks(
    hook: Hook, data: str, tokenizer: Any, ctx: int, tokens: int, sinks: str, first: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """(h [n,d], sink [n]) of one hook on the training text, n = CHUNK until `tokens` are given out. `first`
    chunks are passed over, without the model where that can be.
    """
    rows = text.train_rows(data, tokenizer, ctx, rows_at_once(ctx))
    for _, h, sink in stream_chunks(hook.model, [Stream(hook.layer, sinks, tokens, first)], rows):
        yield h, sink


def rows_at_once(ctx: int) -> int:
    """Rows in a batch of the training text."""
    return max(1, 4096 // ctx)


# ---------------------------------------------------------------------------------------------- training
@torch.no_grad()
def unit_norm_step(optimiser: torch.optim.Optimizer, W_dec: Tensor) -> None:
    """A step of the optimiser, before and after which the decoder's rows W_dec [F,d] have norm 1. What of the
    gradient is along a row would be undone after the step, and is taken out before it, or Adam would count
    it.
    """
    assert W_dec.grad is not None
    along = torch.einsum("fd,fd->f", W_dec.grad, W_dec)
    W_dec.grad.addcmul_(along[:, None], W_dec, value=-1)
    optimiser.step()
    W_dec /= torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)


def transposed(x: Tensor) -> Tensor:
    """x^T as the left operand of a matmul: MPS is wrong for some that are views."""
    return x.T.contiguous() if x.device.type == "mps" else x.T


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of the raw activations that are no sinks."""

    mean: Tensor  # [d]
    square: float  # E|h|^2
    variance: float  # about the mean, summed over d

    @classmethod
    def of(cls, h: Tensor, sink: Tensor, about: str = "") -> "Statistics":
        """h [n,d], sink [n]. Raises Fault where nothing but sinks is there, or nothing varies."""
        calm = h[~sink]
        if not len(calm):
            raise Fault(f"{about}: nothing but sink positions, all {len(h)} of them")
        must_vary(calm, about)
        mean = calm.mean(0)
        square, variance = calm.square().sum(1).mean(), (calm - mean).square().sum(1).mean()
        return cls(mean, square.item(), variance.item())


class Training:
    """The training of one SAE, and of those with smaller budgets that share its beginning: recipe `base`.

    Gao et al. 2024 with every schedule a share of the run: tied unit-norm init, b_dec = mean, activations
    scaled to E|h|^2 = d, Adam at 2e-4 sqrt(2^14/F) with 5% warm-up and a linear decay over the last 20%,
    decoder rows kept at norm 1 with the parallel part of their gradient removed, AuxK with coefficient 1/32
    on latents silent for 10% of the budget. Scale and mean leave sink positions out.

    The rate goes with the root of the tokens per step, five times Gao et al.'s at 256 and twenty times at
    4096: a larger batch is there to be followed further, and at one rate for all most of what it could give
    is lost. A rate that falls as budgets grow made longer runs worse. Measured on stdlib-s layer 3, held-out
    R^2 at 1M and 3M tokens: F=256, k=8 .811 and .814, at fivefold throughout .806 and .809; F=2048, k=32 .938
    and .957. bench/RESULTS.md, "More tokens".

    The trunk. Budgets of equal batch and rate differ in nothing until the first decays, so one run at
    constant rate serves them: where budget B starts to decay, a copy branches off and ends at B. Between
    branches the trunk is the run of the next budget (its share of dead tokens); the warm-up is the first
    budget's. The stream is cut at every budget, so that B's tokens are those of a run of its own, and the
    smallest budget's SAE is that of a run of its own to the bit. From 10M tokens up only: see
    bench/RESULTS.md for how far a branch is from a run of its own.
    """

    DECAY = 0.2
    TRUNK_FROM = 10**7
    COPIES = 3  # of the weights' size, between two chunks: they and their moments

    def __init__(self, statistics: Statistics, d_sae: int, k: int, seed: int, budgets: Sequence[int]):
        """budgets ascending, of one pace: the last is this SAE's."""
        self.statistics, self.seed, self.step = statistics, seed, 0
        self.batch, self.boost = self.pace(budgets[-1])
        self.initialise(d_sae, k)
        # since a latent fired; the last slot takes the zeros
        self.idle = torch.zeros(d_sae + 1, device=statistics.mean.device)
        self.aim(budgets)

    def initialise(self, d_sae: int, k: int) -> None:
        mean = self.statistics.mean
        self.scale = math.sqrt(len(mean) / self.statistics.square)
        self.variance = self.statistics.variance * self.scale**2
        self.sae = tied_init(len(mean), d_sae, k, self.seed, mean * self.scale).requires_grad_(False)
        self.lr = 2e-4 * math.sqrt(2**14 / d_sae) * self.boost
        weights = self.sae.named_parameters()
        self.moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights}

    @staticmethod
    def pace(tokens: int) -> tuple[int, float]:
        """(tokens per step, factor on the rate) of a budget. Neither ever falls with it; from 4,096,000
        tokens on both stay.
        """
        batch = min(max(tokens // 1000, 256), 4096, tokens)
        return batch, 5 * math.sqrt(batch / 256)

    # ------------------------------------------------------------------ what happens when
    def aim(self, budgets: Sequence[int]) -> None:
        """Count the steps to every budget, and where each branches off."""
        self.budgets = list(budgets)
        cuts = sorted({*range(0, budgets[-1], CHUNK), *budgets})
        self.pieces = list(itertools.pairwise(cuts))  # token ranges of the stream, each shuffled by itself
        in_piece = [(end - start) // self.batch for start, end in self.pieces]
        steps = dict(zip(cuts[1:], itertools.accumulate(in_piece)))
        self.steps, self.warm_up = steps[budgets[-1]], 0.05 * steps[budgets[0]]
        # (step, budget), ascending
        self.branches = [(int((1 - self.DECAY) * steps[b]), b) for b in budgets[:-1]]
        self.ahead = [(step, b) for step, b in self.branches if step >= self.step]

    def rate(self) -> float:
        return self.lr * min(
            (self.step + 1) / self.warm_up, (self.steps - self.step) / (self.DECAY * self.steps), 1.0
        )

    def dead_after(self) -> float:
        """Tokens without firing that make a latent dead: 10% of the budget the run is heading for."""
        return next((b for step, b in self.branches if self.step < step), self.budgets[-1]) / 10

    def branch_off(self) -> list["Training"]:
        """Copies for the budgets that begin to decay at this step."""
        twins = []
        while self.ahead and self.ahead[0][0] == self.step:
            budget = self.ahead.pop(0)[1]
            twins.append(copy.deepcopy(self))
            twins[-1].aim([b for b in self.budgets if b <= budget])
            twins[-1].ahead = []
        return twins

    def feed(self, h: Tensor, start: int, bar: tqdm | Progress, what: str) -> list["Training"]:
        """Train on h [n,d], the stream from token `start`, going on at the step this run is at: [itself,
        branches ...].

        Every token of a piece once, in an order set by the seed alone. Raises Fault on a loss that is not
        finite.
        """
        runs, done = [self], 0
        for number, (first, last) in enumerate(self.pieces):
            n = (last - first) // self.batch
            if start <= first and last <= start + len(h) and done + n > self.step:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
                order = torch.randperm(last - first, generator=generator).to(h.device) + (first - start)
                for i in range(self.step - done, n):
                    runs += [run for twin in self.branch_off() for run in twin.feed(h, start, bar, what)]
                    loss = self.one_step(h[order[i * self.batch : (i + 1) * self.batch]])
                    if (i + 1) % 100 == 0 or i + 1 == n:
                        if not math.isfinite(loss.item()):
                            raise Fault(f"{what}: the loss is not finite at step {self.step}")
                        bar.update(self.batch * ((i % 100) + 1) * token_flops(*self.sae.W_dec.T.shape))
                        bar.set_postfix_str(f"{what} loss {loss.item():.3f}", refresh=False)
            done += n
        return runs + (self.branch_off() if self.step == self.steps else [])

    # ------------------------------------------------------------------ one step
    def auxiliary_gradients(self, x: Tensor, error: Tensor, dead: Tensor) -> dict[str, Tensor]:
        """AuxK (Gao et al. 2024, A.2): the d/2 strongest dead latents reconstruct the error [n,d] from x,
        centred [n,d]; squared residual over the error's variance, over 32. The gradients of the dead rows.
        """
        (n, d), (D,) = x.shape, dead.shape
        W_enc, b_enc, W_dec = self.sae.W_enc[dead], self.sae.b_enc[dead], self.sae.W_dec[dead]
        variance = (error - error.mean(0)).square().sum(1).mean()
        weight = torch.where(variance > 0, 2 / (32 * n * variance), 0)  # of the residual, in its gradient
        if D <= d // 2:  # every one of them
            z = torch.addmm(b_enc, x, W_enc.T).relu_()
        else:
            values, among_dead = kernels.topk_encode(x, W_enc, b_enc, d // 2)
        if D > DENSE * d:
            no_bias = torch.zeros_like(self.sae.b_dec)
            residual, products, _ = kernels.reconstruction_error(values, among_dead, W_dec, no_bias, error)
            back = torch.where(values > 0, products * weight, 0)
            d_W_enc, d_b_enc = kernels.scatter_rows(back, among_dead, x, D)
            d_W_dec, _ = kernels.scatter_rows(values * weight, among_dead, residual, D)
            return {"W_enc": d_W_enc, "b_enc": d_b_enc, "W_dec": d_W_dec}
        if D > d // 2:
            z = x.new_zeros(n, D).scatter_(1, among_dead, values)
        residual = torch.addmm(error, z, W_dec, beta=-1)
        back = torch.where(z > 0, residual @ W_dec.T * weight, 0)
        d_W_enc, d_W_dec = transposed(back) @ x, transposed(z * weight) @ residual
        return {"W_enc": d_W_enc, "b_enc": back.sum(0), "W_dec": d_W_dec}

    def fired(self, values: Tensor, indices: Tensor, amount: int) -> None:
        """`idle` grows by `amount` for every latent that did not fire."""
        self.idle += amount
        self.idle[torch.where(values > 0, indices, len(self.idle) - 1).flatten()] = 0

    @torch.no_grad()
    def one_step(self, h: Tensor) -> Tensor:
        """An optimiser step on h [n,d], raw; the loss, still on the device: SSE per token over the
        variance. Its gradients are written out, so that those of W_enc and W_dec never take their [F,d].
        """
        sae, n = self.sae, len(h)
        x = h * self.scale
        centred = x - sae.b_dec
        values, indices = kernels.topk_encode(centred, sae.W_enc, sae.b_enc, sae.k)
        delta, products, square = kernels.reconstruction_error(values, indices, sae.W_dec, sae.b_dec, x)
        self.fired(values, indices, n)
        dead = (self.idle[:-1] >= self.dead_after()).nonzero().squeeze(1)
        aux = self.auxiliary_gradients(centred, -delta, dead) if len(dead) else {}
        more = {name: (dead, gradient) for name, gradient in aux.items()}
        weight = 2 / (n * self.variance)  # of delta, in the gradient of the loss
        back = torch.where(values > 0, products * weight, 0)  # ReLU: what was cut to 0 passes nothing on
        adam, of = kernels.Adam(self.rate(), self.step + 1, eps=6.25e-10), self.moments
        d_b_enc, d_centred = kernels.adam_rows(
            sae.W_enc, of["W_enc"], adam, back, indices, centred, more.get("W_enc")
        )
        kernels.adam_rows(
            sae.W_dec, of["W_dec"], adam, values * weight, indices, delta, more.get("W_dec"), unit=True
        )
        if aux:
            d_b_enc[dead] += aux["b_enc"]
        kernels.adam_vector(sae.b_enc, of["b_enc"], adam, d_b_enc)
        kernels.adam_vector(sae.b_dec, of["b_dec"], adam, delta.sum(0) * weight - d_centred)
        self.step += 1
        return square.mean() / self.variance

    def finished(self) -> TopKSAE:
        """The SAE for raw activations: the scale folded into the biases, the unit-norm decoder as it is."""
        sae = self.sae
        return TopKSAE(
            sae.W_enc, sae.b_enc / self.scale, sae.W_dec, sae.b_dec / self.scale, sae.k
        ).requires_grad_(False)

    # ------------------------------------------------------------------ checkpoints
    def optimiser_state(self) -> dict:
        return self.moments

    def load_optimiser(self, state: dict) -> None:
        self.moments = state

    def state(self) -> dict:
        return {
            "sae": self.sae.state_dict(),
            "optimiser": self.optimiser_state(),
            "idle": self.idle,
            "step": self.step,
            "budgets": self.budgets,
            "statistics": vars(self.statistics),
        }

    def load(self, state: dict) -> "Training":
        """Go on from a state. The step says where the stream stands, and with the seed in which order it is
        drawn.
        """
        self.sae.load_state_dict(state["sae"])
        self.load_optimiser(state["optimiser"])
        self.idle, self.step = state["idle"], state["step"]
        self.aim(state["budgets"])
        return self


class SAELensTraining(Training):
    """Recipe `saelens`: what SAELens 6 does to a TopK SAE by default, step by step (tested against 6.54.12).

    Decoder rows of norm 0.1 with the encoder their copy, b_dec = 0, raw activations with their sinks, 4096
    tokens a step, Adam at a constant 3e-4, gradient norm clipped to 1, decoder norms free and latents ranked
    by pre-activation times decoder norm, loss the SSE per token, AuxK with coefficient 1 on latents silent
    for 1000 steps. The rate never decays, so a budget is a checkpoint of the longest run. SAELens shuffles in
    another buffer; the order here is recipe `base`'s.
    """

    DECAY = 0.0
    TRUNK_FROM = 0
    COPIES = 4  # and their gradients
    DEAD_STEPS = 1000

    def initialise(self, d_sae: int, k: int) -> None:
        mean = self.statistics.mean
        rows = torch.rand(d_sae, len(mean), generator=torch.Generator().manual_seed(self.seed)) * 2 - 1
        rows = (0.1 * rows / rows.norm(dim=1, keepdim=True)).to(mean.device)
        self.sae = TopKSAE(
            rows.clone(), torch.zeros(d_sae, device=mean.device), rows, torch.zeros_like(mean), k
        )
        self.optimiser = torch.optim.Adam(
            self.sae.parameters(), lr=3e-4, fused=mean.device.type in ("cpu", "cuda")
        )

    def optimiser_state(self) -> dict:
        return self.optimiser.state_dict()

    def load_optimiser(self, state: dict) -> None:
        self.optimiser.load_state_dict(state)

    @staticmethod
    def pace(tokens: int) -> tuple[int, float]:
        return min(4096, tokens), 1.0

    def folded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_enc, b_enc, W_dec, b_dec of the same function with unit-norm decoder rows: z_i |W_dec_i| ranks
        the latents.
        """
        sae, norm = self.sae, torch.linalg.vector_norm(self.sae.W_dec, dim=1)
        return sae.W_enc * norm[:, None], sae.b_enc * norm, sae.W_dec / norm[:, None], sae.b_dec

    def auxiliary_loss(self, centred: Tensor, error: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """The d/2 dead latents of largest pre-activation, negative ones with their sign, reconstruct the
        error [n,d]; weights: W_enc, b_enc, W_dec of the dead.
        """
        W_enc, b_enc, W_dec = weights
        D, wanted = len(W_enc), centred.shape[1] // 2
        # on MPS never: autograd would transpose the left operands of these matmuls
        if D <= DENSE * centred.shape[1] and centred.device.type != "mps":
            z = torch.nn.functional.linear(centred, W_enc, b_enc)
            if D > wanted:
                values, among_dead = z.topk(wanted)
                z = torch.zeros_like(z).scatter(1, among_dead, values)
            guess = z @ W_dec
        else:
            detached = centred.detach(), W_enc.detach(), b_enc.detach()
            _, among_dead = kernels.topk_encode(*detached, min(wanted, D))
            values = kernels.gather_dot(centred, W_enc, among_dead) + b_enc[among_dead]
            guess = kernels.sparse_decode(values, among_dead, W_dec, torch.zeros_like(self.sae.b_dec))
        return min(D / wanted, 1.0) * (guess - error).square().sum(1).mean()

    def one_step(self, h: Tensor) -> Tensor:
        dead = (self.idle[:-1] > self.DEAD_STEPS).nonzero().squeeze(1)  # as the step before left them
        W_enc, b_enc, W_dec, b_dec = self.folded()
        centred = h - b_dec
        values, indices = kernels.topk_encode(centred, W_enc, b_enc, self.sae.k)
        error = h - kernels.sparse_decode(values, indices, W_dec, b_dec)
        total = error.square().sum(1).mean()
        self.fired(values, indices, 1)
        if len(dead):
            weights = W_enc[dead], b_enc[dead], W_dec[dead]
            total = total + self.auxiliary_loss(centred, error.detach(), weights)
        self.optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        return total.detach()

    def finished(self) -> TopKSAE:
        with torch.no_grad():
            return TopKSAE(*self.folded(), self.sae.k).requires_grad_(False)


RECIPES: dict[str, type[Training]] = {"base": Training, "saelens": SAELensTraining}


def trunk(recipe: str, tokens: int, budgets: Sequence[int]) -> tuple[int, ...]:
    """The budgets below `tokens` whose training is the beginning of its own."""
    pace = RECIPES[recipe].pace
    return tuple(b for b in budgets if RECIPES[recipe].TRUNK_FROM <= b < tokens and pace(b) == pace(tokens))


# --------------------------------------------------------------------------------------- the cache is filled
def lock_of(folder: pathlib.Path) -> str:
    return f".{folder.name}{store.LOCK}"


def train_missing(
    model: Any,
    tokenizer: Any,
    specs: Sequence[TrainingSpec],
    cache: pathlib.Path,
    source: text.Source,
    bar: Progress | None = None,
) -> None:
    """Train the SAEs of one language model that the cache has not, together, from one pass of the model over
    `source`, or as few as memory allows.

    The text's part of their specs is the same in all; hook and recipe, sinks and budget may differ. An
    interrupted run goes on from its last checkpoint; what is damaged is set aside and made again; where
    another process trains one of them, it is waited for. Raises UserError, Fault.
    """
    wanted = {spec.folder(cache): spec for spec in specs}
    with contextlib.suppress(Damaged):
        if all(is_whole(folder, spec) for folder, spec in wanted.items()):
            remove_stale_locks(cache, list(wanted))
            return
    store.writable(cache, "--cache")
    try:
        for folder in sorted(wanted):  # all in one order, so that no two processes wait for each other
            waiting = functools.partial(say_who_trains, folder)
            store.claim(cache, lock_of(folder), waiting)
        todo = {folder: spec for folder, spec in wanted.items() if not mended(folder, spec)}
        runs = runs_of(todo)
        with line(bar, f"training SAEs of {specs[0].model}", training_flops(model, runs)) as bar:
            for of_pass in passes(model, runs):
                train_runs(model, tokenizer, of_pass, source, bar)
    finally:
        for folder in wanted:
            store.release(cache, lock_of(folder))


def say_who_trains(folder: pathlib.Path, who: str) -> None:
    tqdm.write(f"{folder.name} is being trained by {who}; waiting")


def remove_stale_locks(cache: pathlib.Path, folders: list[pathlib.Path]) -> None:
    """Locks that a killed run left; one that cannot be had is in nobody's way."""
    for folder in folders:
        with contextlib.suppress(UserError, Fault):
            if (cache / lock_of(folder)).exists():
                store.claim(cache, lock_of(folder))
                store.release(cache, lock_of(folder))


def mended(folder: pathlib.Path, spec: TrainingSpec) -> bool:
    """`is_whole`, after what a killed run left is put in order; a damaged folder is set aside, and said."""
    try:
        store.settle(folder / store.PROVENANCE)
        return is_whole(folder, spec)
    except Damaged as why:
        tqdm.write(f"{why}; set aside as {store.set_aside(folder, 'damaged').name}, trained again")
        return False


def load_checkpoint(folder: pathlib.Path, device: torch.device) -> dict | None:
    """What an interrupted training left. A damaged one is set aside, and said. Raises Damaged for a damaged
    record.
    """
    record, path = folder / store.PROVENANCE, folder / CHECKPOINT
    if CHECKPOINT not in store.written(record):
        return None
    try:
        with reading(store.checked(record, CHECKPOINT)):
            return torch.load(path, map_location=device, weights_only=True)
    except Damaged as why:
        aside = f", set aside as {store.set_aside(path, 'damaged').name}" if path.exists() else ""
        tqdm.write(f"{why}{aside}; training starts anew")
        store.put(record, {CHECKPOINT: None})
        return None


@dataclass(eq=False)
class Run:
    """SAEs that differ in nothing but their budget, where all but the longest are branches on its way."""

    spec: TrainingSpec  # of the longest budget
    folders: dict[int, pathlib.Path]  # {budget: where its SAE lies}, of those to be made
    chunks: int = 0  # that it has had
    live: list[Training] = field(default_factory=list)  # trunk and branches, as they stand after these chunks
    processors: list[str] = field(default_factory=list)  # that it was trained on

    def resume(self, device: torch.device) -> None:
        """Go on from the checkpoint that an interrupted run left."""
        spec, recipe = self.spec, RECIPES[self.spec.recipe]
        saved = load_checkpoint(self.folders[spec.tokens], device)
        if saved is None:
            return
        trainings = []
        for state in saved["runs"]:
            statistics = Statistics(**state["statistics"])
            fresh = recipe(statistics, spec.d_sae, spec.k, spec.seed, state["budgets"])
            trainings.append(fresh.load(state))
        to_come = {training.budgets[-1] for training in trainings}
        to_come |= {budget for _, budget in trainings[0].ahead} if trainings else set()
        if self.folders.keys() <= to_come:  # else someone deleted an SAE that this run is past
            self.live, self.chunks = trainings, saved["chunks"]
            self.processors = saved.get("processors", [])

    @property
    def budgets(self) -> list[int]:
        return [*self.spec.trunk, self.spec.tokens]

    def begin(self, statistics: Statistics) -> None:
        """statistics: of the first of its budgets."""
        spec, recipe, budgets = self.spec, RECIPES[self.spec.recipe], self.budgets
        self.live = [recipe(statistics, spec.d_sae, spec.k, spec.seed, budgets)]

    def feed(self, h: Tensor, bar: tqdm | Progress, about: str) -> list[Training]:
        """Train on the next chunk; those that have come to their end. Interrupted inside, it stands
        nowhere.
        """
        trainings, self.live = self.live, []
        self.processors = sorted({*self.processors, processor(h.device)})
        label = f"{about} k={self.spec.k} seed {self.spec.seed}"
        fed = [run for training in trainings for run in training.feed(h, self.chunks * CHUNK, bar, label)]
        self.chunks += 1
        if self.chunks * CHUNK < self.spec.tokens:
            self.live = [training for training in fed if training.step < training.steps]
        # the longest, whose checkpoint serves all, last
        ended = [training for training in fed if training.step == training.steps]
        return sorted(ended, key=lambda training: training.budgets[-1])

    def keep(self, training: Training, one_pass: int | None) -> None:
        """Write a finished SAE; one_pass: tokens of the text, once the stream has begun again."""
        *before, tokens = training.budgets
        if tokens in self.folders:
            spec = dataclasses.replace(self.spec, tokens=tokens, trunk=tuple(before))
            seen: dict[str, Any] = {"processor": ", ".join(self.processors)}
            if one_pass is not None and one_pass < tokens:
                seen["one_pass"] = one_pass
            save_sae(self.folders[tokens], training.finished(), spec.facts(), **seen)

    def checkpoint(self) -> None:
        if self.live:
            runs = [training.state() for training in self.live]
            state = {"chunks": self.chunks, "runs": runs, "processors": self.processors}
            record = self.folders[self.spec.tokens] / store.PROVENANCE
            store.put(record, {CHECKPOINT: functools.partial(torch.save, state)}, **self.spec.facts())


def runs_of(todo: dict[pathlib.Path, TrainingSpec]) -> list[Run]:
    """One for each trunk: the specs that share all but the budget. Hooks ascend."""
    runs: dict[tuple, Run] = {}
    for folder, spec in sorted(todo.items(), key=lambda item: (item[1].layer, item[1].tokens)):
        first = (*spec.trunk, spec.tokens)[0]
        pace = RECIPES[spec.recipe].pace(spec.tokens)
        key = (spec.layer, spec.sinks, spec.recipe, spec.d_sae, spec.k, spec.seed, *pace, first)
        shorter = runs[key].folders if key in runs else {}
        runs[key] = Run(spec, {**shorter, spec.tokens: folder})
    return list(runs.values())


# ------------------------------------------------------------------------------------- passes of the model
def held_bytes(d: int, longest: int, live: Iterable[tuple[str, int, int]]) -> int:
    """What a hook of width d holds during a pass: a chunk of activations, and of `longest` tokens that are
    more than a chunk, the SAEs (recipe, d_sae, how many) between one chunk and the next.
    """
    saes = sum(RECIPES[recipe].COPIES * 2 * d * d_sae * n for recipe, d_sae, n in live)
    return 4 * (d * min(CHUNK, longest) + (saes if longest > CHUNK else 0))


def in_passes(hooks: Mapping[int, int], memory: float) -> list[list[int]]:
    """{layer: bytes held} -> the layers of every pass, ascending: as many as fit into `memory`, or one."""
    out: list[list[int]] = []
    filled = 0
    for layer, size in sorted(hooks.items()):
        if not out or filled + size > memory:
            out.append([])
            filled = 0
        out[-1].append(layer)
        filled += size
    return out


def passes(model: Any, runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of every pass of the model over the text: see MEMORY."""
    at: dict[int, list[Run]] = {}
    for run in runs:
        at.setdefault(run.spec.layer, []).append(run)
    d = text_config(model).hidden_size
    sizes = {
        layer: held_bytes(
            d,
            max(run.spec.tokens for run in theirs),
            [(run.spec.recipe, run.spec.d_sae, 2 if run.spec.trunk else 1) for run in theirs],
        )
        for layer, theirs in at.items()
    }
    device = next(model.parameters()).device
    return [
        [run for layer in layers for run in at[layer]]
        for layers in in_passes(sizes, MEMORY * memory_of(device))
    ]


def pass_flops(model: Any, runs: Sequence[Run]) -> float:
    """Of one position in a pass: the blocks up to the last hook."""
    return 2 * (block_size(model) + OVERHEAD) * (1 + max(run.spec.layer for run in runs))


def training_flops(model: Any, runs: Sequence[Run]) -> float:
    """Of these SAEs' training and the passes that it takes."""
    of_passes = (max(run.spec.tokens for run in one) * pass_flops(model, one) for one in passes(model, runs))
    return sum(of_passes) + sum(sae_flops(model, run) for run in runs)


def sae_flops(model: Any, run: Run) -> float:
    tokens = run.spec.tokens + RECIPES[run.spec.recipe].DECAY * sum(run.spec.trunk)
    return tokens * token_flops(text_config(model).hidden_size, run.spec.d_sae)


def train_runs(model: Any, tokenizer: Any, runs: Sequence[Run], source: text.Source, bar: Progress) -> None:
    """Train them to the end, in one pass of the model over the text."""
    of_text = runs[0].spec
    device = next(model.parameters()).device
    fed_by: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        run.resume(device)
        fed_by.setdefault((run.spec.layer, run.spec.sinks), []).append(run)
        bar.update(min(run.chunks * CHUNK / run.spec.tokens, 1) * sae_flops(model, run))
    streams = [
        Stream(*key, max(run.spec.tokens for run in theirs), min(run.chunks for run in theirs))
        for key, theirs in fed_by.items()
    ]
    one_pass: list[int] = []  # tokens in it, once the text begins again

    def once(tokens: int) -> None:
        one_pass.append(tokens)
        tqdm.write(
            f"{of_text.model}: the training side of {source.name} holds {tokens:,} tokens; from here it "
            "repeats"
        )

    def passed(positions: int) -> None:
        bar.update(positions * per_position)
        bar.set_postfix_str("the language model reads", refresh=False)

    def checkpoint() -> None:
        for run in runs:
            run.checkpoint()

    per_position = pass_flops(model, runs)
    rows = text.train_rows(
        source.data, tokenizer, of_text.ctx, rows_at_once(of_text.ctx), of_text.split, once, of_text.bos
    )
    chunks = stream_chunks(model, streams, rows, passed)
    saved_at, cost = time.monotonic(), 0.0
    known: dict[tuple[int, str, int], Statistics] = {}  # of the first n tokens of a stream
    try:
        for stream, h, sink in chunks:
            number, about = stream.number - 1, f"{of_text.model} L{stream.layer}"
            if text.stamp(source.data) != source.stamp:
                raise Fault(
                    f"--data {source.data} was changed while SAEs were trained on it: they are not kept; run "
                    "again"
                )
            if not torch.isfinite(h).all():
                raise Fault(f"{about}: an activation is not finite in chunk {number} of the training text")
            for run in fed_by[stream.layer, stream.sinks]:
                # else done, or further on than the others when they were interrupted
                if run.chunks == number and number * CHUNK < run.spec.tokens:
                    if not run.live:
                        n = run.budgets[0]
                        key = stream.layer, stream.sinks, n
                        if key not in known:
                            known[key] = Statistics.of(h[:n], sink[:n], about)
                        run.begin(known[key])
                    for training in run.feed(h, bar, about):
                        run.keep(training, one_pass[0] if one_pass else None)
            del h, sink  # before the next chunk is put together
            if time.monotonic() - saved_at > max(60, 50 * cost):  # at most 2% of the time
                start = time.perf_counter()
                checkpoint()
                saved_at, cost = time.monotonic(), time.perf_counter() - start
    # the text broke off, or the user did: what is live stands at the end of a chunk
    except (UserError, KeyboardInterrupt):
        checkpoint()
        raise
