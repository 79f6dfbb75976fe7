"""The pullback Fisher G = J^T F J at a hook, as quadratic forms delta^T G delta: exact by forward-mode AD,
and estimated.

J is the Jacobian of the logits with respect to the hook's activations, F = diag(p) - p p^T. Which positions J
spans makes three different numbers (blocks):

  sequence   all positions' delta pushed forward together: sum_tau Var_{p_tau}(u_tau), u = J delta. What patching does.
  token      each position's delta alone, all positions it reaches: sum_t delta_t^T G_t delta_t, no cross terms.
  same       each position's delta alone, its own prediction only: sum_t delta_t^T G_tt delta_t.

Shapes: B sequences, T positions, V = vocabulary, m = draws. Forms are per predicted position [B,T-1], in
nats^2.
"""

import contextlib
from collections.abc import Callable

from transport_geometry.errors import UserError
from transport_geometry.lm import tail

import torch
import transformers
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel


# ------------------------------------------------------------------------------------------ pushing forward
def push_forward(model, layer: int, rows: torch.Tensor, h: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """u = J delta [B,T-1,V]: how the logits move to first order when all positions of h [B,T,d] move by
    delta.

    Forward-mode AD in one pass up to the final norm; the unembedding, being linear, only meets the tangent.
    Attention runs in plain operations: the fused kernels have no forward derivative (pytorch #128971). On
    MPS, whose attention is decomposed for backward passes only (#179294), and where something else has no
    forward derivative, u comes from two backward passes.
    """
    linear = unembeds_linearly(model, layer, rows, h)
    f = lambda x: tail(model, layer, rows, x, unembedded=not linear)[:, :-1]
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        moved = None
        if h.device.type != "mps":
            with contextlib.suppress(NotImplementedError), forward_ad.dual_level():
                moved = forward_ad.unpack_dual(f(forward_ad.make_dual(h, delta))).tangent
        if moved is None:
            moved = push_forward_twice(f, h, delta)
    return (torch.nn.functional.linear(moved, model.get_output_embeddings().weight) if linear else moved).to(
        h.dtype
    )


def unembeds_linearly(model, layer: int, rows: torch.Tensor, h: torch.Tensor) -> bool:
    """Are the logits the unembedding and nothing else (no cap, no scale after it)? Looked at once per
    model.
    """
    if not hasattr(model, "unembeds_linearly"):
        with torch.no_grad():
            unembed = model.get_output_embeddings()
            guess = torch.nn.functional.linear(
                tail(model, layer, rows[:1], h[:1], unembedded=False), unembed.weight, unembed.bias
            )
            model.unembeds_linearly = torch.allclose(
                guess, tail(model, layer, rows[:1], h[:1]), rtol=1e-3, atol=1e-3
            )
    return model.unembeds_linearly


def push_forward_twice(f: Callable, h: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The same without forward-mode AD: J^T v is linear in v, so its derivative along delta is J delta."""
    with torch.enable_grad():
        x = h.detach().requires_grad_()
        y = f(x)
        v = torch.zeros_like(y, requires_grad=True)
        pulled = torch.autograd.grad(y, x, v, create_graph=True)[0]
        return torch.autograd.grad(pulled, v, delta)[0]


def variance(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Var_p(u) = u^T F u over the vocabulary: p, u [...,V] -> [...]. Centred first: a shift of all logits
    changes nothing.
    """
    centred = u - torch.einsum("...v,...v->...", p, u)[..., None]
    return torch.einsum("...v,...v->...", p, centred * centred)


# ------------------------------------------------------------------------------------------ the three blocks
def sequence_form(
    model, layer: int, rows: torch.Tensor, h: torch.Tensor, delta: torch.Tensor, p: torch.Tensor
) -> torch.Tensor:
    """[B,T-1] whose sum over a sequence is delta^T G delta with every position's delta at once. p [B,T-1,V]
    of the clean run.
    """
    return variance(p, push_forward(model, layer, rows, h, delta))


def token_form(
    model,
    layer: int,
    rows: torch.Tensor,
    h: torch.Tensor,
    delta: torch.Tensor,
    p: torch.Tensor,
    signs: torch.Tensor,
) -> torch.Tensor:
    """[m,B,T-1] whose sum over a sequence is, on average over signs [m,B,T] of +-1, sum_t delta_t^T G_t
    delta_t.

    Independent signs take the cross terms between positions away (Hutchinson's trick on positions).
    """
    return torch.stack([sequence_form(model, layer, rows, h, delta * s[..., None], p) for s in signs])


def same_form(
    model, layer: int, rows: torch.Tensor, h: torch.Tensor, delta: torch.Tensor, p: torch.Tensor
) -> torch.Tensor:
    """[B,T-1]: delta_t^T G_tt delta_t of every position, exactly, in one pass with self-position
    attention.
    """
    with self_position(model):
        return variance(p, push_forward(model, layer, rows, h, delta))


def self_position_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention whose value is the usual one and whose derivative sees a query's own key and value only.

    query [B,H,T,e], key and value [B,H',T,e] with H' dividing H.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UserError(
            f"{type(module).__name__}: soft-capped scores or attention sinks of its own, so Exp-C has no same-position form for it"
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.detach().transpose(2, 3)
    own = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    scores = torch.where(own, (query * key).sum(-1, keepdim=True), scores) * scaling
    a = torch.softmax(scores + attention_mask, -1)
    out = a @ value.detach() + a.diagonal(dim1=-2, dim2=-1)[..., None] * (value - value.detach())
    return out.transpose(1, 2).contiguous(), a


transformers.AttentionInterface.register("self_position", self_position_attention)
transformers.AttentionMaskInterface.register("self_position", transformers.masking_utils.eager_mask)


@contextlib.contextmanager
def self_position(model):
    """Within, the derivative of `model` knows no other position than each one's own; its values are
    unchanged.

    Raises UserError for a family whose attention cannot be exchanged: its same-position form would silently
    be the sequence's.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("self_position")
    try:
        if model.config._attn_implementation != "self_position" or not model._supports_attention_backend:
            raise UserError(
                f"{type(model).__name__}: its attention cannot be exchanged, so Exp-C has no same-position form for it"
            )
        yield
    finally:
        model.set_attn_implementation(before)


# ------------------------------------------------------------------------------------------ estimators
def sampled_form(gradients: list[torch.Tensor], delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(token [m,B,T], sequence [m,B]): (g_y.delta)^2 per position, and (sum_t g_y.delta)^2, one for each
    drawn label set.

    g_y [B,T,d] is the gradient of the summed CE with labels y drawn from p, not from the data: the mean over
    draws is delta^T G delta (the true Fisher; with the data's labels it would be the empirical one, Kunstner
    et al. 2019).
    """
    gd = torch.stack([(g * delta).sum(-1) for g in gradients])
    return gd.square(), gd.sum(-1).square()


def subsampled_form(
    p: torch.Tensor, u: torch.Tensor, rows: torch.Tensor, importance: bool, centred: bool
) -> torch.Tensor:
    """The research log's proposal: a few rows of the Jacobian, and F = diag(p): u^T diag(p) u from S rows
    [...,S] of the V.

    rows are drawn uniformly (scaled by V/S) or, `importance`, from p (mean over S). Uncentred it estimates
    E_p[u^2], which is Var_p(u) + (E_p u)^2 and moves when all logits shift; `centred` subtracts E_p u first.
    """
    v = u - torch.einsum("...v,...v->...", p, u)[..., None] if centred else u
    picked = v.gather(-1, rows).square()
    if importance:
        return picked.mean(-1)
    return (p.gather(-1, rows) * picked).mean(-1) * p.shape[-1]
