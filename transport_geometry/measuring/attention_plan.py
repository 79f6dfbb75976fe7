"""Attention plans: how a patch changes what every query attends to, and how much of its harm that causes.

A row of attention is the plan of a transport problem with one marginal: P_i is the minimum over the simplex
of <P, C_i> + eps sum P log P, C_ij = -q_i.k_j, eps = 1 / scaling (Litman 2025, arXiv:2508.08369). Only rows
are constrained, so there is one potential per query, the log-sum-exp of its scores, and no Sinkhorn. The
divergence that belongs to it is KL: eps KL(P || P_hat) is what keeping the plan P costs beyond the best plan
where the costs are those of the patched run. Cost <P, C> and potential themselves move when a constant is
added to all keys of a query, which leaves P unchanged: between two runs they are not comparable, and nothing
here compares them.

Shapes: B sequences, H heads, T positions (queries, and keys before them), e = d_head, d = d_model, V =
vocabulary. P, A and A_hat are plans [B,H,T,T], v and v_hat values [B,H,T,e].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transport_geometry.errors import UserError
from transport_geometry.measuring import fisher
from transport_geometry.models.lm import (
    Hook,
    attending,
    blocks,
    for_every_head,
    kl_divergence,
    log_probs,
    plain_attention,
)

import torch
from torch import Tensor


# ------------------------------------------------------------------------------------------ of one block
@dataclass(frozen=True, eq=False)
class Change:
    """How the patch changes one block's attention, per head and query: each [B,H,T]. Query 0 has one key, so
    its plan cannot change.
    """

    kl: Tensor  # KL(A || A_hat), nats
    jeffreys: Tensor  # KL(A || A_hat) + KL(A_hat || A)
    half_var: Tensor  # Var_A(change of the scores) / 2: the second order of both halves of it
    kl_first: Tensor  # the part of kl in how much goes to position 0, and not in how the rest is split
    first: Tensor  # A at position 0
    first_hat: Tensor
    entropy: Tensor  # of A, nats
    entropy_hat: Tensor
    out_sq: Tensor  # |o|^2 of o = A v, before the output projection
    plan_sq: Tensor  # |(A_hat - A) v|^2
    value_sq: Tensor  # |A_hat (v_hat - v)|^2; the two parts sum to o_hat - o


def plan_change(a: Tensor, b: Tensor, log_a: Tensor, log_b: Tensor) -> dict[str, Tensor]:
    """All fields of Change that are about plans alone, from two plans a, b [B,H,T,T] and their logarithms (0
    where a query does not see a key, and the plans are 0).

    The logarithms are log-softmax, never of a probability that has underflowed. kl_first by the chain rule:
    KL = KL of (P_0, 1 - P_0) + (1 - P_0) KL(P_j>=1 || Q_j>=1), each renormalised; 1 - P_0 is the sum of the
    rest, since the difference would cancel at a sink.
    """
    change = log_b - log_a
    kl = kl_divergence(a.flatten(0, 1), log_a.flatten(0, 1), log_b.flatten(0, 1)).view(a.shape[:-1])
    rest, rest_hat = (x[..., 1:].sum(-1) for x in (a, b))
    tiny = torch.finfo(a.dtype).tiny
    of_rest = rest * (rest.clamp(min=tiny) / rest_hat.clamp(min=tiny)).log()
    return dict(
        kl=kl,
        jeffreys=torch.einsum("bhts,bhts->bht", b - a, change),
        half_var=fisher.variance(a, change) / 2,
        kl_first=of_rest - a[..., 0] * change[..., 0],
        first=a[..., 0].clone(),  # a view would keep the plan
        first_hat=b[..., 0].clone(),
        entropy=-torch.einsum("bhts,bhts->bht", a, log_a),
        entropy_hat=-torch.einsum("bhts,bhts->bht", b, log_b),
    )


# ------------------------------------------------------------------------------------------ four runs in one
def four_runs(
    hook: Hook, input_ids: Tensor, h: Tensor, h_hat: Tensor, look: Callable[[int, Change], object]
) -> tuple[Tensor, Tensor]:
    """log p [B,T-1,V] of two runs between the clean one, fed h [B,T,d], and the patched one, fed h_hat:

      frozen     fed h_hat, every attention after the hook with the clean run's plan;
      plan only  fed h, every attention after the hook with the patched run's plan.

    Only the plans are exchanged: each run's values and MLPs are computed from its own residual stream. All
    four go through the tail as one stack [clean; patched; frozen; plan only], so that the plans of one block
    at a time are held. look(block, Change) is called for every block after the hook.

    Raises UserError where one of these blocks has no attention that can be read.
    """
    B, name, met = len(h), type(hook.model).__name__, []

    def compared(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
        block = getattr(module, "layer_idx", None)
        if block is None:
            raise UserError(f"{name}: its attention does not say which block it is of")
        if block <= hook.layer:  # a family whose patched run is a full forward
            return plain_attention(module, query, key, value, attention_mask, scaling, **more)
        met.append(block)
        key, value = for_every_head(module, query, key, value, more)
        two = slice(2 * B)  # the mask may be one for all
        scores = query[two] @ key[two].transpose(2, 3) * scaling + attention_mask[two]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        hidden = attention_mask[two] < torch.finfo(attention_mask.dtype).min / 2
        plans, logs = torch.softmax(scores, -1), torch.log_softmax(scores, -1).masked_fill_(hidden, 0)
        plan_part = plan_change(*plans.chunk(2), *logs.chunk(2))
        a, a_hat = plans.to(value.dtype).chunk(2)
        v, v_hat, v_frozen, v_plan_only = value.chunk(4)
        o, o_moved, o_hat = a @ v, a_hat @ v, a_hat @ v_hat
        squares = (o.float().square(), (o_moved - o).float().square(), (o_hat - o_moved).float().square())
        out_sq, plan_sq, value_sq = (x.sum(-1) for x in squares)
        look(block, Change(**plan_part, out_sq=out_sq, plan_sq=plan_sq, value_sq=value_sq))
        out = torch.cat([o, o_hat, a @ v_frozen, a_hat @ v_plan_only])
        return out.transpose(1, 2).contiguous(), None

    with attending(hook.model, compared):
        logits = hook.tail(input_ids.repeat(4, 1), torch.cat([h, h_hat, h_hat, h]))
    after = list(range(hook.layer + 1, len(blocks(hook.model))))
    if sorted(met) != after:
        raise UserError(
            f"{name}: attention must be read once in each of the blocks {after} after the hook, and was in "
            f"{sorted(met)}"
        )
    frozen, plan_only = (log_probs(one) for one in logits.chunk(4)[2:])
    return frozen, plan_only


def check_readable(hook: Hook, input_ids: Tensor) -> None:
    """Raises UserError where the attention after the hook cannot be exchanged or read, or is not all
    that mixes positions; input_ids [1,T] are run once.
    """
    with torch.no_grad():
        h = hook.head(input_ids)
        fisher.check_attention_mixes(hook, input_ids, h)
        four_runs(hook, input_ids, h, h, lambda block, change: None)
