"""Truths planted into models and SAEs, to see whether the instrument finds what is there.

A model's name may end in plants, `stdlib-s+null3700`: a twin of the model that every script takes for one
more. Either the model is changed, and computes the same function:

  null C       position 0 carries a vector of norm C along the all-ones direction, which LayerNorm does not
               see
  visible C    ... along another one, which the next block takes off again: a patch has to rebuild it
  relative C   as visible, and what lies beside it is written larger and read back smaller, so that an error
               there is felt less the larger the sink is

or its SAEs are:

  starved S:N  they have had the share S of every budget below N tokens (S alone: of every budget)
  turned A:B   their error, as long as before at every token and at the same angle to h, is turned towards
               what the model feels (A > 0) or does not feel (A < 0): by A at the first block, B at the last,
               in equal steps (A alone: the same at all). R², NMSE and cosine stay as they are.

Shapes: B sequences, T positions, N tokens, d = d_model.
"""

import contextlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transport_geometry.errors import UserError
from transport_geometry.models.lm import Hook, blocks, text_config
from transport_geometry.saes.sae import SAE

import torch

SINKS = ("null", "visible", "relative")
OF_THE_SAE = ("starved", "turned")
KIND, NUMBER = "|".join(SINKS + OF_THE_SAE), r"-?\d+(?:\.\d+)?"
NAMED = re.compile(rf"(.+?)((?:\+(?:{KIND}){NUMBER}(?::{NUMBER})?)+)")
EACH = re.compile(rf"\+({KIND})({NUMBER})(?::({NUMBER}))?")
# the norm at which an error beside a `relative` sink is felt half; at 3700 a thirteenth
FELT_HALF = 300
MOST_NORM = 1e5  # beyond, float32 leaves nothing of what lies beside the sink
FORMS = "null3700, visible3700, relative3700, starved0.5, turned0.5 or turned-1:1"
QUARTER = 4  # the most, and the least, felt quarter of the directions


@dataclass(frozen=True)
class Plant:
    """What is planted, and how much: the one or two numbers of its name."""

    kind: str
    first: float
    second: float | None = None

    def __str__(self) -> str:
        """As names have it."""
        second = "" if self.second is None else f":{self.second:.10g}"
        return f"+{self.kind}{self.first:.10g}{second}"

    @property
    def in_model(self) -> bool:
        return self.kind in SINKS

    def had(self, tokens: int) -> int:
        """How many tokens an SAE of this budget has had."""
        if self.kind != "starved" or (self.second is not None and tokens >= self.second):
            return tokens
        return max(1, round(tokens * self.first))

    def turn(self, layer: int, n_layers: int) -> float:
        """How far the errors at a block are turned; 0: not at all."""
        if self.kind != "turned":
            return 0.0
        at_last = self.first if self.second is None else self.second
        return self.first + (at_last - self.first) * layer / max(1, n_layers - 1)


def split(name: str) -> tuple[str, str]:
    """(the model, "+" and its plants) of a name; empty where there are none. A folder that is so called is
    one.
    """
    named = None if os.path.exists(name) else NAMED.fullmatch(name)
    return (named[1], named[2]) if named else (name, "")


def plants(name: str) -> tuple[Plant, ...]:
    """What a model's name plants. Raises UserError for an amount that means nothing."""
    found = []
    for kind, *numbers in EACH.findall(split(name)[1]):
        amounts = [float(number) for number in numbers if number]
        least, most = {"starved": (1e-9, 1.0), "turned": (-1.0, 1.0)}.get(kind, (1e-9, MOST_NORM))
        judged = amounts if kind == "turned" else amounts[:1]
        if not least <= min(judged) <= max(judged) <= most:
            wanted = f"above 0 and at most {most:g}" if least > 0 else f"from {least:g} to {most:g}"
            raise UserError(f"--models {name}: {kind} takes numbers {wanted}")
        if len(amounts) > 1 and kind in SINKS:
            raise UserError(f"--models {name}: {kind} takes one number")
        found.append(Plant(kind, *amounts))
    kinds = [plant.kind for plant in found]
    if len(set(kinds)) < len(kinds) or sum(plant.in_model for plant in found) > 1:
        raise UserError(f"--models {name}: one sink, and each of the others once, please")
    return tuple(found)


def had(planted: Sequence[Plant], tokens: int) -> int:
    """How many tokens an SAE of this budget has had."""
    for plant in planted:
        tokens = plant.had(tokens)
    return tokens


def own_name(name: str) -> str:
    """The name without plants that leave the model as it is: of the model that its SAEs are trained on."""
    return split(name)[0] + "".join(map(str, (plant for plant in plants(name) if plant.in_model)))


# -------------------------------------------------------------------------------- models of the same function
@dataclass(frozen=True, eq=False)
class Gauge:
    """Another way to write what a block puts out: x_t -> gain_t turn x_t + offset_t at the first n
    positions.
    """

    gain: torch.Tensor  # [n,1]
    offset: torch.Tensor  # [n,d]
    turn: torch.Tensor | None = None  # [d,d], orthogonal

    def write(self, x: torch.Tensor) -> torch.Tensor:
        """x [B,T,d] -> [B,T,d]; what lies beyond the first n positions stays as it is, to the bit."""
        here, beyond = x[:, : len(self.gain)], x[:, len(self.gain) :]
        n = here.shape[1]
        turned = here if self.turn is None else here @ self.turn.T
        return torch.cat([turned * self.gain[:n] + self.offset[:n], beyond], 1)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `write`."""
        here, beyond = x[:, : len(self.gain)], x[:, len(self.gain) :]
        n = here.shape[1]
        plain = (here - self.offset[:n]) / self.gain[:n]
        return torch.cat([plain if self.turn is None else plain @ self.turn, beyond], 1)


def sink(plant: Plant, d: int) -> Gauge:
    """What is planted at position 0."""
    ones = torch.ones(d, dtype=torch.float64) / math.sqrt(d)
    if plant.kind == "null":
        direction = ones
    else:
        direction = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        direction -= (direction @ ones) * ones
        direction /= direction.norm()
    gain = 1 + plant.first / FELT_HALF if plant.kind == "relative" else 1.0
    return Gauge(torch.tensor([[gain]]), (plant.first * direction).float()[None])


class _Planted:
    """Before a block's own class: it reads what the block before it has written, and writes.

    In the block's own forward: a hook on it would fire too where the block does not run (`Hook.tail`).
    """

    reads: bool
    writes: bool

    def gauge(self: Any) -> Gauge:
        return Gauge(self.planted_gain, self.planted_offset, getattr(self, "planted_turn", None))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x = self.gauge().read(hidden_states) if self.reads else hidden_states
        out = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if not self.writes:
            return out
        if isinstance(out, tuple):
            return (self.gauge().write(out[0]), *out[1:])
        return self.gauge().write(out)


def regauge(model: Any, gauge: Gauge) -> None:
    """From now on every block but the last writes in this gauge and the next one reads it, in place: hooks
    are moved, and logits are not. Raises UserError for a family in which that is not so.
    """
    probe = torch.arange(8)[None] % text_config(model).vocab_size
    parts, norm = blocks(model), torch.linalg.vector_norm
    with torch.no_grad():
        before = model(probe, use_cache=False).logits
        for i, block in enumerate(parts):
            cls = type(block)
            does = {"reads": i > 0, "writes": i + 1 < len(parts)}
            block.__class__ = type(cls.__name__, (_Planted, cls), does)
            for name, tensor in vars(gauge).items():
                if tensor is not None:
                    block.register_buffer(f"planted_{name}", tensor.to(model.dtype))
        after = None
        with contextlib.suppress(Exception):  # a family whose blocks are called otherwise
            after = model(probe, use_cache=False).logits
    if after is None or not norm(after - before) <= 1e-4 * norm(before):
        raise UserError(f"{type(model).__name__}: nothing can be planted in it, its logits would not stay")


def planted(model: Any, name: str) -> None:
    """What the name says, planted into its model, in place. Raises UserError."""
    for plant in plants(name):
        if plant.in_model and model.dtype != torch.float32:
            raise UserError(f"--models {name}: a sink is planted in float32 only")
        if plant.in_model:
            regauge(model, sink(plant, text_config(model).hidden_size))


# ------------------------------------------------------------------------------------------- turned errors
def felt(hook: Hook, input_ids: torch.Tensor) -> torch.Tensor:
    """Eigenvectors [d,d] of E[g_y g_y^T] over input_ids [B,T], in columns from the least to the most felt.
    g_y: labels drawn from the model, one set.
    """
    uniforms = torch.rand(1, *input_ids[:, 1:].shape, generator=torch.Generator().manual_seed(0))
    _, (_, g) = hook.clean_pass(input_ids, hook.head(input_ids), uniforms.to(input_ids.device))
    g = g[:, :-1].flatten(0, 1).cpu().double()
    return torch.linalg.eigh(g.T @ g).eigenvectors


class TurnedSAE(SAE):
    """An SAE whose error is turned into a subspace: by 0 not at all, by 1 altogether. Its length and its
    component along h stay, at every token.
    """

    basis: torch.Tensor  # [d,n], orthonormal columns

    def __init__(self, sae: SAE, directions: torch.Tensor, turn: float):
        """directions [d,d] of `felt`; turn in [-1, 1], towards the most felt quarter of them or the least."""
        super().__init__()
        self.sae, self.turn, self.k = sae, turn, sae.k
        n = directions.shape[1] // QUARTER
        basis = directions[:, -n:] if turn > 0 else directions[:, :n]
        self.register_buffer("basis", basis.to(sae.W_dec.dtype).to(sae.W_dec.device))

    @property
    def W_dec(self) -> torch.Tensor:  # type: ignore[override]
        return self.sae.W_dec

    def encode(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.sae.encode(h)

    def reconstruct(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values, indices, h_hat = self.sae.reconstruct(h)
        delta = h_hat - h
        beside = without(delta, h)
        inside = without((beside @ self.basis) @ self.basis.T, h)
        share = abs(self.turn)
        mixed = (1 - share) * beside + share * as_long_as(beside, inside)
        return values, indices, h_hat + as_long_as(beside, mixed) - beside


def without(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """x [N,d] less its components along h [N,d]."""
    along = (x * h).sum(1, keepdim=True) / h.square().sum(1, keepdim=True).clamp(min=1e-30)
    return x - along * h


def as_long_as(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y [N,d] with the lengths of x [N,d]."""
    norm = torch.linalg.vector_norm
    return y * (norm(x, dim=1, keepdim=True) / norm(y, dim=1, keepdim=True).clamp(min=1e-30))
