"""How one SAE is trained: recipe `base`, recipe `saelens`, and smaller budgets that branch off a longer run.

Shapes: n tokens, d = d_model, F = d_sae, k = active latents. Gao et al. 2024, arXiv:2406.04093.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from transport_geometry import flops, kernels
from transport_geometry.errors import Fault
from transport_geometry.progress import Progress
from transport_geometry.saes.sae import TopKSAE, must_vary, tied_init

import torch
from torch import Tensor
from tqdm import tqdm

CHUNK = 250_000  # tokens shuffled together
# With at most so many times d dead latents AuxK's code is a matrix, as large as two of h: its GEMMs cost less
# than gathering d/2 rows a token
DENSE = 2
TRAIN_VERSION = 4  # bump when training mathematics changes: older cached SAEs are then left alone


@torch.no_grad()
def unit_norm_step(optimiser: torch.optim.Optimizer, W_dec: Tensor) -> None:
    """A step of the optimiser, before and after which the decoder's rows W_dec [F,d] have norm 1. The part of
    the gradient along a row is removed first: the normalisation would undo it, but Adam would count it.
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
    """Of the raw activations, sinks left out."""

    mean: Tensor  # [d]
    square: float  # E|h|^2
    variance: float  # about the mean, summed over d

    @classmethod
    def of(cls, h: Tensor, sink: Tensor, about: str = "") -> "Statistics":
        """h [n,d], sink [n]. Raises Fault where all are sinks or nothing varies."""
        calm = h[~sink]
        if not len(calm):
            raise Fault(f"{about}: nothing but sink positions, all {len(h)} of them")
        must_vary(calm, about)
        mean = calm.mean(0)
        square, variance = calm.square().sum(1).mean(), (calm - mean).square().sum(1).mean()
        return cls(mean, square.item(), variance.item())


class Training:
    """Recipe `base`: the training of one SAE, and of those with smaller budgets that share its beginning.

    Gao et al. 2024 with every schedule a share of the run: tied unit-norm init, b_dec = mean, activations
    scaled to E|h|^2 = d, Adam at 2e-4 sqrt(2^14/F) with 5% warm-up and a linear decay over the last 20%,
    decoder rows kept at norm 1 with the parallel part of their gradient removed, AuxK with coefficient 1/32
    on latents silent for 10% of the budget. Scale and mean leave sink positions out.

    The rate grows with the root of the tokens per step, from five times Gao et al.'s at 256 to twenty times
    at 4096: larger batches tolerate larger rates, and one rate for all wastes most of what they could give.
    Measured on stdlib-s layer 3, held-out R^2 at 1M and 3M tokens: F=256, k=8 .811 and .814, at fivefold
    throughout .806 and .809; F=2048, k=32 .938 and .957. A rate that falls as budgets grow made longer runs
    worse. bench/RESULTS.md, "More tokens".

    The trunk. Budgets of equal batch and rate do not differ until the first decays, so one run at constant
    rate serves them: where budget B starts to decay, a copy branches off and ends at B. Between branches the
    trunk is the run of the next budget (its share of dead tokens); the warm-up is the first budget's. The
    stream is cut at every budget, so that B sees the tokens of a run of its own, and the smallest budget's
    SAE is that of a run of its own to the bit. From 10M tokens up only: bench/RESULTS.md says how far a
    branch is from a run of its own.
    """

    DECAY = 0.2
    TRUNK_FROM = 10**7
    COPIES = 3  # of the weights' size, held between two chunks: the weights and their moments

    def __init__(self, statistics: Statistics, d_sae: int, k: int, seed: int, budgets: Sequence[int]):
        """budgets ascending, of one pace: the last is this SAE's."""
        self.statistics, self.seed, self.step = statistics, seed, 0
        self.batch, self.boost = self.pace(budgets[-1])
        self.initialise(d_sae, k)
        # tokens since a latent fired; the last slot takes the zeros
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
        """(tokens per step, factor on the rate) of a budget. Neither falls as budgets grow; from 4,096,000
        tokens on both stay.
        """
        batch = min(max(tokens // 1000, 256), 4096, tokens)
        return batch, 5 * math.sqrt(batch / 256)

    # ------------------------------------------------------------------ schedule
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
        """Train on h [n,d], the stream from token `start`, continuing at this run's step: [itself, branches
        ...].

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
                        bar.update(self.batch * ((i % 100) + 1) * flops.of_training(*self.sae.W_dec.T.shape))
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
        if D <= d // 2:  # all of them take part
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
        """An optimiser step on h [n,d], raw -> the loss, still on the device: SSE per token over the
        variance. The gradients are written out, so that those of W_enc and W_dec never take their [F,d].
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
        back = torch.where(values > 0, products * weight, 0)  # ReLU: what was cut to 0 has no gradient
        adam, of = kernels.Adam(self.rate(), self.step + 1, eps=6.25e-10), self.moments
        code = values * weight, indices, delta
        d_b_enc, d_centred = kernels.adam_rows(
            sae.W_enc, of["W_enc"], adam, back, indices, centred, more.get("W_enc")
        )
        kernels.adam_rows(sae.W_dec, of["W_dec"], adam, *code, more.get("W_dec"), unit=True)
        if aux:
            d_b_enc[dead] += aux["b_enc"]
        kernels.adam_vector(sae.b_enc, of["b_enc"], adam, d_b_enc)
        kernels.adam_vector(sae.b_dec, of["b_dec"], adam, delta.sum(0) * weight - d_centred)
        self.step += 1
        return square.mean() / self.variance

    def finished(self) -> TopKSAE:
        """The SAE for raw activations: the scale folded into the biases, the unit-norm decoder as it is."""
        sae, scale = self.sae, self.scale
        raw = TopKSAE(sae.W_enc, sae.b_enc / scale, sae.W_dec, sae.b_dec / scale, sae.k)
        return raw.requires_grad_(False)

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
        """Continue from a state. Its step says where the stream stands and, with the seed, in which order it
        is drawn.
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
        device = mean.device
        rows = torch.rand(d_sae, len(mean), generator=torch.Generator().manual_seed(self.seed)) * 2 - 1
        rows = (0.1 * rows / rows.norm(dim=1, keepdim=True)).to(device)
        self.sae = TopKSAE(rows.clone(), torch.zeros(d_sae, device=device), rows, torch.zeros_like(mean), k)
        fused = device.type in ("cpu", "cuda")
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=3e-4, fused=fused)

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
