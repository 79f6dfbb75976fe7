"""The split model, gradients, attention plans and KL against truths computed another way."""

import math

from transport_geometry.models.lm import Hook, cross_entropy, kl_divergence, log_probs, log_softmax

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


# ------------------------------------------------------------------------------------------------ model split
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_patched_run_equals_hooked_full_forward(tiny, rows, layer):
    h = Hook(tiny, layer).head(rows)
    h_hat = h + 0.1 * torch.randn(h.shape, generator=torch.Generator().manual_seed(2), dtype=h.dtype)
    handle = tiny.gpt_neox.layers[layer].register_forward_hook(lambda module, inputs, output: h_hat)
    hooked = tiny(rows).logits
    handle.remove()
    torch.testing.assert_close(Hook(tiny, layer).tail(rows, h_hat), hooked, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Hook(tiny, layer).tail(rows, h), tiny(rows).logits, rtol=1e-12, atol=1e-12)
    assert (hooked - tiny(rows).logits).abs().max() > 1e-3  # the patch did something


def test_head_is_the_block_output_not_the_normed_hidden_state(tiny, rows):
    states = tiny(rows, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        torch.testing.assert_close(Hook(tiny, layer).head(rows), states[layer + 1], rtol=0, atol=0)
    last = Hook(tiny, 2).head(rows)
    assert (last - states[3]).abs().max() > 0.1
    torch.testing.assert_close(tiny.gpt_neox.final_layer_norm(last), states[3])


def test_a_failing_tail_leaves_the_model_whole(tiny, rows):
    before = tiny(rows).logits
    h = Hook(tiny, 1).head(rows)
    with pytest.raises(RuntimeError):
        Hook(tiny, 1).tail(rows, h[..., :3])
    assert torch.equal(tiny(rows).logits, before)


# -------------------------------------------------------------------------------------------------- gradients
def summed_ce(model, layer, rows, h):
    return cross_entropy(log_probs(Hook(model, layer).tail(rows, h).double()), rows).sum()


def double_log_probs(logits):
    return torch.log_softmax(logits[:, :-1], -1)


@pytest.mark.parametrize("layer", [0, 2])
def test_g_against_central_differences(tiny, rows, layer):
    h = Hook(tiny, layer).head(rows)
    _, (g,) = Hook(tiny, layer).clean_pass(rows, h)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        delta = torch.randn(h.shape, generator=generator, dtype=h.dtype)
        eps = 1e-5

        def ce(x):
            return cross_entropy(double_log_probs(Hook(tiny, layer).tail(rows, x)), rows).sum()

        slope = (ce(h + eps * delta) - ce(h - eps * delta)) / (2 * eps)
        assert abs(slope - (g * delta).sum()) < 1e-7 * slope.abs().clamp(min=1)


def test_g_is_of_the_sum_so_batches_do_not_matter(tiny, rows):
    h = Hook(tiny, 1).head(rows)
    _, (g,) = Hook(tiny, 1).clean_pass(rows, h)
    one_by_one = [Hook(tiny, 1).clean_pass(rows[i : i + 1], h[i : i + 1])[1][0] for i in range(len(rows))]
    torch.testing.assert_close(g, torch.cat(one_by_one), rtol=1e-10, atol=1e-12)


def test_last_position_has_no_gradient_and_the_first_has(tiny, rows):
    _, gradients = Hook(tiny, 1).clean_pass(rows, Hook(tiny, 1).head(rows), torch.rand(2, 3, 11))
    for g in gradients:
        assert (g[:, -1] == 0).all() and (g[:, 0].abs().sum(-1) > 0).all()


def test_all_ones_is_a_null_direction_of_a_gpt_neox_hook(tiny, rows):
    """Every reader of the residual stream is a LayerNorm, which removes the mean over d."""
    h = Hook(tiny, 1).head(rows)
    final, (g,) = Hook(tiny, 1).clean_pass(rows, h)
    log_p = log_softmax(Hook(tiny, 1).logits(final))
    assert g.sum(-1).abs().max() < 1e-12 * g.abs().max() * h.shape[-1]
    shifted = double_log_probs(Hook(tiny, 1).tail(rows, h + 10 * torch.randn(3, 12, 1, dtype=h.dtype)))
    torch.testing.assert_close(shifted, log_p, rtol=0, atol=1e-10)


def test_g_of_the_last_layer_in_closed_form(tiny, rows):
    """g = J_LN' W_U' (p - e_y), the LayerNorm Jacobian written out."""
    h = Hook(tiny, 2).head(rows)
    final, (g,) = Hook(tiny, 2).clean_pass(rows, h)
    log_p = log_softmax(Hook(tiny, 2).logits(final))
    norm, W_U = tiny.gpt_neox.final_layer_norm, tiny.get_output_embeddings().weight
    residual = log_p.exp()
    residual.scatter_add_(-1, rows[:, 1:, None], -torch.ones_like(residual[..., :1]))
    upstream = residual @ W_U * norm.weight
    x = h[:, :-1]
    centred = x - x.mean(-1, keepdim=True)
    std = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    unit = centred / std
    expected = (
        upstream - upstream.mean(-1, keepdim=True) - unit * (upstream * unit).mean(-1, keepdim=True)
    ) / std
    torch.testing.assert_close(g[:, :-1], expected, rtol=1e-9, atol=1e-12)


def test_sampled_labels_give_the_true_fisher(tiny, rows):
    """E_y (g_y.delta)^2 summed over a sequence = sum_t Var_p(J delta), J by forward-mode differentiation."""
    h = Hook(tiny, 1).head(rows)
    delta = 0.3 * torch.randn(h.shape, generator=torch.Generator().manual_seed(4), dtype=h.dtype)
    with sdpa_kernel(SDPBackend.MATH):
        logits, change = torch.func.jvp(lambda x: Hook(tiny, 1).tail(rows, x)[:, :-1], (h,), (delta,))
    p = torch.softmax(logits, -1)
    exact_form = (p * (change - (p * change).sum(-1, keepdim=True)).square()).sum((-1, -2))
    draws = torch.cat(
        [
            torch.stack(
                [
                    (g * delta).sum((-1, -2)).square()
                    for g in Hook(tiny, 1).clean_pass(
                        rows, h, torch.rand(50, 3, 11, generator=torch.Generator().manual_seed(i))
                    )[1][1:]
                ]
            )
            for i in range(12)
        ]
    )
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact_form).abs() < 4 * error).all() and (error < 0.2 * exact_form).all()


def test_drawn_labels_follow_p(tiny, rows):
    h = Hook(tiny, 2).head(rows)
    _, gradients = Hook(tiny, 2).clean_pass(
        rows, h, torch.tensor([0.0, 1 - 2**-24]).view(2, 1, 1).expand(2, 3, 11)
    )
    assert all(torch.isfinite(g).all() for g in gradients)  # both ends of [0, 1) are labels


# --------------------------------------------------------------------------------------------------------- KL
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 60.0])
def test_kl_is_right_at_every_size(size):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 7, 500, generator=generator, dtype=torch.float64)
    log_p, log_q = (
        torch.log_softmax(logits, -1),
        torch.log_softmax(
            logits + size * torch.randn(logits.shape, generator=generator, dtype=torch.float64), -1
        ),
    )
    truth = (log_p.exp() * (log_p - log_q)).sum(-1)

    def kl(a, b):
        return kl_divergence(a.exp(), a, b)

    ours = kl(log_p.float(), log_q.float()).double()
    # at 1e-4 the KL is 3e-9, and rounding the inputs to float32 alone moves it by 1e-3
    assert ((ours - truth).abs() / truth).max() < (1e-3 if size > 1e-4 else 5e-3)
    assert kl(log_p.float(), log_p.float()).abs().max() == 0


def test_kl_is_right_where_what_was_nothing_becomes_something():
    """A log-probability may rise by 10, 30, 60 in a small KL."""
    for p in (1e-7, 1e-15, 1e-29):
        log_p, log_q = (torch.tensor([[[x, 1 - x]]], dtype=torch.float64).log() for x in (p, 5e-3))
        truth = p * math.log(p / 5e-3) + (1 - p) * (math.log1p(-p) - math.log1p(-5e-3))
        for dtype in (torch.float64, torch.float32):
            found = kl_divergence(log_p.exp().to(dtype), log_p.to(dtype), log_q.to(dtype)).item()
            assert found == pytest.approx(truth, rel=1e-4)


# -------------------------------------------------------------------------------------------- attention plans
def test_plans_are_those_of_the_models_own_eager_attention(tiny, rows):
    """Fed the clean h, what is looked at after the hook is what transformers returns of a whole run; the
    logits are the tail's, and the model is left as it was.
    """
    hook, seen = Hook(tiny, 0), {}
    h = hook.head(rows)
    logits = hook.plans(rows, h, lambda block, plan: seen.setdefault(block, plan))
    assert tiny.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits, hook.tail(rows, h), rtol=1e-9, atol=1e-9)
    tiny.set_attn_implementation("eager")
    whole = tiny(rows, use_cache=False, output_attentions=True).attentions
    tiny.set_attn_implementation("sdpa")
    assert sorted(seen) == [1, 2]  # block 0 is before the hook
    for block, plan in seen.items():
        torch.testing.assert_close(plan, whole[block], rtol=1e-6, atol=1e-7)  # eager's softmax is in float32
