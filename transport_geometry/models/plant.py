"""Known effects planted into models and SAEs, to test whether the instrument finds them.

A model's name may end in plants, as in `stdlib-s+null3700`: scripts take such a twin for one more model.
Some plants change the model, but not the function that it computes:

  null C       position 0 carries a vector of norm C along the all-ones direction, which LayerNorm ignores
  visible C    ... along another direction, which the next block removes again: a patch has to rebuild it
  relative C   as visible; the rest of position 0 is also scaled up there and back down in the next block, so
               that an error there matters less the larger the sink is
  short C      the reverse, for a model that has sinks of its own: a norm n above C becomes C (n/C)^(1/8) at
               every position, and the next block undoes that: 80 C is written as 1.7 C, and a reconstruction
               that is a tenth too short there is read as one of less than half

Others change its SAEs:

  starved S:N  budgets below N tokens are cut to the share S (S alone: all budgets are)
  turned A:B   at every token the error keeps its length and its angle to h, and is turned towards directions
               that change the logits much (A > 0) or little (A < 0): by A at the first block, B at the last,
               linear between (A alone: the same at all). R², NMSE and cosine do not change.

Shapes: B sequences, T positions, N tokens, d = d_model.
"""

import contextlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from transport_geometry.errors import UserError
from transport_geometry.models.lm import Hook, blocks, text_config
from transport_geometry.saes.sae import SAE

import torch

SINKS = ("null", "visible", "relative")
OF_THE_MODEL, OF_THE_SAE = (*SINKS, "short"), ("starved", "turned")
KIND, NUMBER = "|".join(OF_THE_MODEL + OF_THE_SAE), r"-?\d+(?:\.\d+)?"
WITH_PLANTS = re.compile(rf"(.+?)((?:\+(?:{KIND}){NUMBER}(?::{NUMBER})?)+)")
ONE_PLANT = re.compile(rf"\+({KIND})({NUMBER})(?::({NUMBER}))?")
# norm of a `relative` sink at which an error beside it counts half; at 3700 a thirteenth
HALVING_NORM = 300
MAX_NORM = 1e5  # beyond, float32 rounds away the rest of position 0
FORMS = "null3700, visible3700, relative3700, short300, starved0.5, turned0.5 or turned-1:1"


@dataclass(frozen=True)
class Plant:
    """What is planted, and its one or two numbers."""

    kind: str
    first: float
    second: float | None = None

    def __str__(self) -> str:
        """As it stands in a name."""
        second = "" if self.second is None else f":{self.second:.10g}"
        return f"+{self.kind}{self.first:.10g}{second}"

    @property
    def in_model(self) -> bool:
        return self.kind in OF_THE_MODEL

    def turn(self, layer: int, n_layers: int) -> float:
        """How far the errors at a block are turned; 0: not at all."""
        if self.kind != "turned":
            return 0.0
        at_last = self.first if self.second is None else self.second
        return self.first + (at_last - self.first) * layer / max(1, n_layers - 1)


def split(name: str) -> tuple[str, str]:
    """(model, plants) of a name; plants begin with "+", or are empty. An existing folder of this name is a
    model without plants.
    """
    named = None if os.path.exists(name) else WITH_PLANTS.fullmatch(name)
    return (named[1], named[2]) if named else (name, "")


def plants(name: str) -> tuple[Plant, ...]:
    """The plants of a model's name. Raises UserError for numbers out of range."""
    found = []
    for kind, *numbers in ONE_PLANT.findall(split(name)[1]):
        amounts = [float(number) for number in numbers if number]
        least, most = {"starved": (1e-9, 1.0), "turned": (-1.0, 1.0)}.get(kind, (1e-9, MAX_NORM))
        judged = amounts if kind == "turned" else amounts[:1]
        if not least <= min(judged) <= max(judged) <= most:
            wanted = f"above 0 and at most {most:g}" if least > 0 else f"from {least:g} to {most:g}"
            raise UserError(f"--models {name}: {kind} takes numbers {wanted}")
        if len(amounts) > 1 and kind in OF_THE_MODEL:
            raise UserError(f"--models {name}: {kind} takes one number")
        found.append(Plant(kind, *amounts))
    kinds = [plant.kind for plant in found]
    if len(set(kinds)) < len(kinds) or sum(plant.in_model for plant in found) > 1:
        raise UserError(f"--models {name}: at most one sink or short, and every other plant once")
    return tuple(found)


def planted_budget(planted: Sequence[Plant], tokens: int) -> int:
    """Tokens that an SAE of this budget is trained on, given what is planted."""
    for plant in planted:
        if plant.kind == "starved" and (plant.second is None or tokens < plant.second):
            tokens = max(1, round(tokens * plant.first))
    return tokens


def own_name(name: str) -> str:
    """The name without the plants that do not change the model: that of the model its SAEs are trained on."""
    return split(name)[0] + "".join(map(str, (plant for plant in plants(name) if plant.in_model)))


# -------------------------------------------------------------------------------- models of the same function
@dataclass(frozen=True, eq=False)
class Gauge:
    """An invertible map of a block's output: x_t -> gain_t turn x_t + offset_t at the first n positions."""

    gain: torch.Tensor  # [n,1]
    offset: torch.Tensor  # [n,d]
    turn: torch.Tensor | None = None  # [d,d], orthogonal

    def write(self, x: torch.Tensor) -> torch.Tensor:
        """x [B,T,d] -> [B,T,d]; later positions stay the same to the bit."""
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


@dataclass(frozen=True, eq=False)
class ShortNorms:
    """An invertible map of a block's output that leaves every direction: norms n above `limit` become
    limit (n/limit)^(1/POWER).
    """

    limit: torch.Tensor  # []

    POWER = 8

    def write(self, x: torch.Tensor) -> torch.Tensor:
        """x [B,T,d] -> [B,T,d]."""
        return self._raised(x, 1 / self.POWER)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `write`."""
        return self._raised(x, self.POWER)

    def _raised(self, x: torch.Tensor, power: float) -> torch.Tensor:
        larger = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / self.limit
        return x * larger.clamp(min=1) ** (power - 1)


def gauge_of(plant: Plant, d: int) -> Gauge | ShortNorms:
    """The map that plants this into a model: `ShortNorms`, or one that plants a sink at position 0."""
    if plant.kind == "short":
        return ShortNorms(torch.tensor(plant.first))
    ones = torch.ones(d, dtype=torch.float64) / math.sqrt(d)
    if plant.kind == "null":
        direction = ones
    else:
        direction = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        direction -= (direction @ ones) * ones
        direction /= direction.norm()
    gain = 1 + plant.first / HALVING_NORM if plant.kind == "relative" else 1.0
    return Gauge(torch.tensor([[gain]]), (plant.first * direction).float()[None])


class _Planted:
    """Mixed in before a block's class: the block reads its input with the inverse of the map, and writes its
    output with the map. (A forward hook would also fire where `Hook.tail` replaces the block.)
    """

    reads: bool
    writes: bool
    kind: type[Gauge] | type[ShortNorms]

    def gauge(self: Any) -> Gauge | ShortNorms:
        """Of the tensors that `regauge` left, which go to another device with the block."""
        names = (field.name for field in fields(self.kind))
        return self.kind(**{name: getattr(self, f"planted_{name}", None) for name in names})

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        x = self.gauge().read(hidden_states) if self.reads else hidden_states
        out = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if not self.writes:
            return out
        if isinstance(out, tuple):
            return (self.gauge().write(out[0]), *out[1:])
        return self.gauge().write(out)


def regauge(model: Any, gauge: Gauge | ShortNorms) -> None:
    """Change the model in place: every block but the last writes with this map and the next one reads it. The
    hooks' activations change, and the logits do not. Raises UserError for a family where they would.
    """
    probe = torch.arange(8)[None] % text_config(model).vocab_size
    parts, norm = blocks(model), torch.linalg.vector_norm
    with torch.no_grad():
        before = model(probe, use_cache=False).logits
        for i, block in enumerate(parts):
            cls = type(block)
            does = {"reads": i > 0, "writes": i + 1 < len(parts), "kind": type(gauge)}
            block.__class__ = type(cls.__name__, (_Planted, cls), does)
            for name, tensor in vars(gauge).items():
                if tensor is not None:
                    block.register_buffer(f"planted_{name}", tensor.to(model.dtype))
        after = None
        with contextlib.suppress(Exception):  # a family whose blocks take other arguments
            after = model(probe, use_cache=False).logits
    if after is None or not norm(after - before) <= 1e-4 * norm(before):
        raise UserError(f"{type(model).__name__}: nothing can be planted in it, its logits would not stay")


def planted(model: Any, name: str) -> None:
    """Plant into the model, in place, what its name says. Raises UserError."""
    for plant in plants(name):
        if plant.in_model and model.dtype != torch.float32:
            raise UserError(f"--models {name}: {plant.kind} is planted in float32 only")
        if plant.in_model:
            regauge(model, gauge_of(plant, text_config(model).hidden_size))


# ------------------------------------------------------------------------------------------- turned errors
def sensitivity_basis(hook: Hook, input_ids: torch.Tensor) -> torch.Tensor:
    """Eigenvectors [d,d] of E[g_y g_y^T] over input_ids [B,T], with one set of labels y drawn from the model:
    columns from the direction that changes the logits least to the one that changes them most.
    """
    uniforms = torch.rand(1, *input_ids[:, 1:].shape, generator=torch.Generator().manual_seed(0))
    _, (_, g) = hook.clean_pass(input_ids, hook.head(input_ids), uniforms.to(input_ids.device))
    g = g[:, :-1].flatten(0, 1).cpu().double()
    return torch.linalg.eigh(g.T @ g).eigenvectors


class TurnedSAE(SAE):
    """An SAE whose error is turned into a subspace: 0 not at all, 1 entirely. At every token the error keeps
    its length and its component along h.
    """

    basis: torch.Tensor  # [d,n], orthonormal columns

    def __init__(self, sae: SAE, directions: torch.Tensor, turn: float):
        """directions [d,d] of `sensitivity_basis`; turn in [-1, 1]: above 0 towards the quarter of them that
        changes the logits most, below 0 towards the quarter that changes them least.
        """
        super().__init__()
        self.sae, self.turn, self.k = sae, turn, sae.k
        n = directions.shape[1] // 4
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
        beside = orthogonal_to(delta, h)
        inside = orthogonal_to((beside @ self.basis) @ self.basis.T, h)
        share = abs(self.turn)
        mixed = (1 - share) * beside + share * match_norm(inside, beside)
        return values, indices, h_hat + match_norm(mixed, beside) - beside


def orthogonal_to(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """x [N,d] without its component along h [N,d]."""
    along = (x * h).sum(1, keepdim=True) / h.square().sum(1, keepdim=True).clamp(min=1e-30)
    return x - along * h


def match_norm(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """x [N,d] scaled to the row norms of target [N,d]."""
    norm = torch.linalg.vector_norm
    return x * (norm(target, dim=1, keepdim=True) / norm(x, dim=1, keepdim=True).clamp(min=1e-30))
