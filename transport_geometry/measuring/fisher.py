"""The pullback Fisher G = J^T F J at a hook, as quadratic forms delta^T G delta: exact by forward-mode AD,
and estimated.

J is the Jacobian of the logits with respect to the hook's activations, F = diag(p) - p p^T. Which positions J
spans makes three different numbers (blocks):

  sequence  all positions' delta pushed forward together: sum_tau Var_{p_tau}(u_tau), u = J delta. What
            patching does.
  token     each position's delta alone, all positions it reaches: sum_t delta_t^T G_t delta_t, no cross
            terms (only estimated, from sampled labels).
  same      each position's delta alone, its own prediction only: sum_t delta_t^T G_tt delta_t.

Shapes: B sequences, T positions, V = vocabulary, m = draws. Forms are per predicted position [B,T-1], in
nats^2.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from transport_geometry.errors import UserError
from transport_geometry.models.lm import Hook, attending, for_every_head

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel


# ------------------------------------------------------------------------------------------ pushing forward
def push_forward(hook: Hook, input_ids: Tensor, h: Tensor, delta: Tensor) -> Tensor:
    """u = J delta [B,T-1,V]: how the logits move to first order when all positions of h [B,T,d] move by
    delta.

    Forward-mode AD in one pass up to the final norm; the unembedding, being linear, only meets the tangent.
    Attention runs in plain operations: the fused kernels have no forward derivative (pytorch #128971). On
    MPS, whose attention is decomposed for backward passes only (#179294), and where something else has no
    forward derivative, u comes from two backward passes.
    """
    linear = hook.unembeds(input_ids)

    def f(x: Tensor) -> Tensor:
        return hook.tail(input_ids, x, unembedded=not linear)[:, :-1]

    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        moved = None
        if h.device.type != "mps":
            with contextlib.suppress(NotImplementedError), forward_ad.dual_level():
                moved = forward_ad.unpack_dual(f(forward_ad.make_dual(h, delta))).tangent
        if moved is None:
            moved = push_forward_twice(f, h, delta)
    if linear:
        moved = torch.nn.functional.linear(moved, hook.model.get_output_embeddings().weight)
    return moved.to(h.dtype)


def push_forward_twice(f: Callable, h: Tensor, delta: Tensor) -> Tensor:
    """The same without forward-mode AD: J^T v is linear in v, so its derivative along delta is J delta."""
    with torch.enable_grad():
        x = h.detach().requires_grad_()
        y = f(x)
        v = torch.zeros_like(y, requires_grad=True)
        pulled = torch.autograd.grad(y, x, v, create_graph=True)[0]
        return torch.autograd.grad(pulled, v, delta)[0]


def variance(p: Tensor, u: Tensor) -> Tensor:
    """Var_p(u) = u^T F u over the vocabulary: p, u [...,V] -> [...]. Centred first: a shift of all logits
    changes nothing.
    """
    centred = u - torch.einsum("...v,...v->...", p, u)[..., None]
    return torch.einsum("...v,...v->...", p, centred * centred)


# ------------------------------------------------------------------------------------------ the three blocks
def sequence_form(hook: Hook, input_ids: Tensor, h: Tensor, delta: Tensor, p: Tensor) -> Tensor:
    """[B,T-1] whose sum over a sequence is delta^T G delta with every position's delta at once. p [B,T-1,V]
    of the clean run.
    """
    return variance(p, push_forward(hook, input_ids, h, delta))


def same_form(hook: Hook, input_ids: Tensor, h: Tensor, delta: Tensor, p: Tensor) -> Tensor:
    """[B,T-1]: delta_t^T G_tt delta_t of every position, exactly, in one pass with self-position attention.

    Raises UserError for a family that mixes positions after the hook in a way that cannot be exchanged: its
    form would silently be partly, or wholly, the sequence's.
    """
    check_attention_mixes(hook, input_ids, h)
    with attending(hook.model, self_position_attention):
        return variance(p, push_forward(hook, input_ids, h, delta))


def check_attention_mixes(hook: Hook, input_ids: Tensor, h: Tensor) -> None:
    """Raises UserError where positions are mixed after the hook by something else than attention (a
    convolution, a recurrence), or attention is not the one it is exchanged for.

    With `self_position_attention` the logits must be the model's own, and those at the last position must
    have a gradient of exactly 0 at the others, whatever the dtype. Checked once per model and hook, on the
    clean h of one sequence.
    """
    known, name = vars(hook.model).setdefault("mixed_by_attention", set()), type(hook.model).__name__
    if hook.layer in known:
        return
    one, x = input_ids[:1], h[:1].detach().requires_grad_()
    with attending(hook.model, self_position_attention), torch.enable_grad():
        logits = hook.tail(one, x)
        moved = torch.autograd.grad(logits[:, -1], x, logits[:, -1].detach())[0][:, :-1]
    if moved.any():
        raise UserError(
            f"{name}: positions are mixed after block {hook.layer} by something else than attention, so a "
            "position cannot be looked at alone"
        )
    with torch.no_grad():
        own = hook.tail(one, h[:1])
    apart, of = (torch.linalg.vector_norm(z.float(), dim=-1) for z in (logits.detach() - own, own))
    if (apart > (0.05 if own.dtype == torch.bfloat16 else 1e-3) * of).any():
        raise UserError(f"{name}: its attention is more than a masked softmax of scaled scores")
    known.add(hook.layer)


def self_position_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """Attention whose value is the usual one and whose derivative sees a query's own key and value only.

    query [B,H,T,e], key and value [B,H',T,e] with H' dividing H.
    """
    key, value = for_every_head(module, query, key, value, more)
    scores = query @ key.detach().transpose(2, 3)
    own = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    scores = torch.where(own, (query * key).sum(-1, keepdim=True), scores) * scaling
    a = torch.softmax(scores + attention_mask, -1)
    out = a @ value.detach() + a.diagonal(dim1=-2, dim2=-1)[..., None] * (value - value.detach())
    return out.transpose(1, 2).contiguous(), a


# ------------------------------------------------------------------------------------------ estimators
def sampled_form(gradients: list[Tensor], delta: Tensor) -> tuple[Tensor, Tensor]:
    """(token [m,B,T], sequence [m,B]): (g_y.delta)^2 per position, and (sum_t g_y.delta)^2, one for each
    drawn label set.

    g_y [B,T,d] is the gradient of the summed CE with labels y drawn from p, not from the data: the mean over
    draws is delta^T G delta (the true Fisher; with the data's labels it would be the empirical one, Kunstner
    et al. 2019).
    """
    gd = torch.stack([(g * delta).sum(-1) for g in gradients])
    return gd.square(), gd.sum(-1).square()


def subsampled_form(p: Tensor, u: Tensor, entries: Tensor, importance: bool, centred: bool) -> Tensor:
    """The research log's proposal: a few rows of the Jacobian, and F = diag(p): u^T diag(p) u from S of its V
    entries [...,S].

    They are drawn uniformly (scaled by V/S) or, `importance`, from p (mean over S). Uncentred it estimates
    E_p[u^2], which is Var_p(u) + (E_p u)^2 and moves when all logits shift; `centred` subtracts E_p u first.
    """
    v = u - torch.einsum("...v,...v->...", p, u)[..., None] if centred else u
    picked = v.gather(-1, entries).square()
    if importance:
        return picked.mean(-1)
    return (p.gather(-1, entries) * picked).mean(-1) * p.shape[-1]
