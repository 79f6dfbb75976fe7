"""What an experiment receives: one batch of the clean run, and one reconstruction patched into it.

Shapes: B sequences, T positions, N = B*(T-1) patched positions (all that have a target), d = d_model, V =
vocabulary, K = active latents kept a token.
"""

import functools
from dataclasses import dataclass

from transport_geometry.models.lm import Hook, log_softmax

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Clean:
    """One batch of the unpatched run, computed once for all SAEs of a hook."""

    hook: Hook
    input_ids: Tensor  # [B,T]
    h: Tensor  # [B,T,d]
    sink: Tensor  # [B,T-1] bool, on the CPU
    final: Tensor  # [B,T-1,d], see `Hook.final`
    g: Tensor  # [N,d], gradient of the summed CE
    g_sampled: list[Tensor]  # of [N,d], the same with labels drawn from p

    @functools.cached_property
    def log_p(self) -> Tensor:
        """[B,T-1,V]: 4 V bytes a position, computed only on request."""
        return log_softmax(self.hook.logits(self.final))

    @functools.cached_property
    def p(self) -> Tensor:
        """[B,T-1,V], likewise."""
        return self.log_p.exp()

    @functools.cached_property
    def h_flat(self) -> Tensor:
        """h at the patched positions, [N,d]."""
        return self.h[:, :-1].flatten(0, 1)

    @functools.cached_property
    def ln(self) -> Tensor:
        """h at the patched positions after LayerNorm, [N,d]."""
        return torch.nn.functional.layer_norm(self.h_flat, self.h_flat.shape[1:])

    def whole(self, x: Tensor) -> Tensor:
        """x [N,d] as what the tail is fed: [B,T,d], with the clean h at the last position."""
        B, T, d = self.h.shape
        return torch.cat([x.view(B, T - 1, d), self.h[:, -1:]], 1)

    def final_of(self, x: Tensor) -> Tensor:
        """`Hook.final` of the run that is fed x [N,d] at the patched positions."""
        return self.hook.final(self.input_ids, self.whole(x))

    def log_probs(self, h: Tensor) -> Tensor:
        """log p [B,T-1,V] of a run that is fed h [B,T,d], whatever it is."""
        return self.hook.log_probs(self.input_ids, h)

    def per_token(self, x: Tensor) -> Tensor:
        """x [N] or [B,T-1] as [B,T-1] float64 on the CPU, where per-token values are summed."""
        x = x.reshape(self.sink.shape)
        return x.double() if x.device.type == "cpu" else x.cpu().double()


@dataclass(frozen=True, eq=False)
class Patch:
    """One reconstruction of the batch's h, and the model's run on it."""

    clean: Clean
    h_hat: Tensor  # [N,d]
    values: Tensor | None  # [N,K] code z; None of a reconstruction without one
    indices: Tensor | None  # [N,K]
    stats: dict[str, Tensor]  # kernels.STATS, each [B,T-1] float64 on the CPU
    final: Tensor  # [B,T-1,d] of the patched run, see `Hook.final`

    @functools.cached_property
    def log_q(self) -> Tensor:
        """[B,T-1,V] of the patched run: 4 V bytes a position, computed only on request."""
        return log_softmax(self.clean.hook.logits(self.final))

    @functools.cached_property
    def delta_flat(self) -> Tensor:
        """h_hat - h, [N,d]."""
        return self.h_hat - self.clean.h_flat

    @functools.cached_property
    def delta(self) -> Tensor:
        """h_hat - h as [B,T,d]: 0 at the last position, which is not patched."""
        B, T, d = self.clean.h.shape
        return torch.cat([self.delta_flat.view(B, T - 1, d), torch.zeros_like(self.clean.h[:, -1:])], 1)

    @functools.cached_property
    def g_delta_sampled(self) -> list[Tensor]:
        """g_y . delta, [B,T-1] for each set of sampled labels y."""
        return [self.clean.per_token((g * self.delta_flat).sum(1)) for g in self.clean.g_sampled]
