"""Fisher quadratic forms against dense Jacobians in float64, their invariances, and the estimators' bias and
intervals.
"""

from helpers import log_probs_64, tiny_model
from transport_geometry.measuring import fisher
from transport_geometry.models.lm import Hook, attending

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

LAYER = 1


def dense_truth(model) -> tuple:
    """(model, rows [2,6], h, delta, p, J [B,T-1,V,T,d]) in float64."""
    rows = torch.randint(0, 17, (2, 6), generator=torch.Generator().manual_seed(3))
    h = Hook(model, LAYER).head(rows)
    delta = 0.3 * torch.randn(h.shape, dtype=h.dtype, generator=torch.Generator().manual_seed(4))
    delta[:, -1] = 0
    with sdpa_kernel(SDPBackend.MATH):
        of_each = (
            torch.autograd.functional.jacobian(lambda x: Hook(model, LAYER).tail(row, x)[0, :-1], at)
            for row, at in zip(rows.split(1), h.split(1))
        )
        J = torch.stack([jacobian[:, :, 0] for jacobian in of_each])
    p = log_probs_64(Hook(model, LAYER).tail(rows, h)).exp()
    return model, rows, h, delta, p, J


@pytest.fixture(scope="module")
def truth():
    return dense_truth(tiny_model(d=8, vocab=17))


def dense(p, J, delta, which):
    """delta^T G delta by the dense J: per predicted position for sequence and same, per sequence for
    token.
    """
    F = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    if which == "sequence":
        u = torch.einsum("btvsd,bsd->btv", J, delta)
        return torch.einsum("btv,btvw,btw->bt", u, F, u)
    each = torch.einsum("btvsd,bsd->btsv", J, delta)
    form = torch.einsum("btsv,btvw,btsw->bts", each, F, each)
    return form.diagonal(dim1=1, dim2=2) if which == "same" else form.sum((1, 2))


def test_forms_are_the_dense_ones(truth):
    model, rows, h, delta, p, J = truth
    hook = Hook(model, LAYER)
    for form, which in ((fisher.sequence_form, "sequence"), (fisher.same_form, "same")):
        found = form(hook, rows, h, delta, p)
        torch.testing.assert_close(found, dense(p, J, delta, which)[:, :5], rtol=1e-10, atol=1e-12)
    assert model.config._attn_implementation == "sdpa"
    with attending(model, fisher.self_position_attention):  # values unchanged
        inside = hook.tail(rows, h)
    torch.testing.assert_close(inside, hook.tail(rows, h), rtol=1e-12, atol=1e-12)


def test_the_blocks_differ(truth):
    """Over all 2^5 patterns of signs of whole positions, the sequence's form averages to the token's."""
    model, rows, h, delta, p, J = truth
    patterns = torch.tensor(np.array(np.meshgrid(*[[1.0, -1.0]] * 5)).reshape(5, -1).T)
    signs = torch.cat([patterns, torch.ones(32, 1, dtype=patterns.dtype)], 1)[:, None].expand(32, 2, 6)
    forms = [fisher.sequence_form(Hook(model, LAYER), rows, h, delta * s[..., None], p) for s in signs]
    token = dense(p, J, delta, "token")
    torch.testing.assert_close(torch.stack(forms).sum(-1).mean(0), token, rtol=1e-10, atol=1e-12)
    assert (token - dense(p, J, delta, "sequence").sum(1)).abs().max() > 1e-3


def test_two_backward_passes_give_what_forward_mode_gives(truth):
    model, rows, h, delta, p, J = truth

    def f(x):
        return Hook(model, LAYER).tail(rows, x)[:, :-1]

    with sdpa_kernel(SDPBackend.MATH):
        twice = fisher.push_forward_twice(f, h, delta)
    u = fisher.push_forward(Hook(model, LAYER), rows, h, delta)
    torch.testing.assert_close(u, twice, rtol=1e-10, atol=1e-12)
    numeric = (f(h + 1e-5 * delta) - f(h - 1e-5 * delta)).detach() / 2e-5
    torch.testing.assert_close(u, numeric, rtol=1e-6, atol=1e-8)


def test_variance_does_not_see_a_shift_of_all_logits_and_the_uncentred_form_does():
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(5, 30, generator=generator, dtype=torch.float64), -1)
    u = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(fisher.variance(p, u + 10), fisher.variance(p, u), rtol=1e-10, atol=0)
    F = torch.diag_embed(p) - p[..., None] * p[:, None]
    torch.testing.assert_close(fisher.variance(p, u), torch.einsum("nv,nvw,nw->n", u, F, u))
    B = torch.diag_embed(p.sqrt()) - p[..., None] * p.sqrt()[:, None]
    torch.testing.assert_close(F, B @ B.mT)
    everything = torch.arange(30).expand(5, 30)
    torch.testing.assert_close(
        fisher.subsampled_form(p, u + 10, everything, importance=False, centred=True), fisher.variance(p, u)
    )
    uncentred = fisher.subsampled_form(p, u + 10, everything, importance=False, centred=False)
    torch.testing.assert_close(uncentred, fisher.variance(p, u) + (p * (u + 10)).sum(-1) ** 2)


def test_sampled_labels_are_unbiased_and_their_intervals_cover(truth):
    """1,000 repeats of m = 256 draws: 95% intervals hold the exact value in 95%, within 4 standard errors and
    the 0.4% that the form's skewness still costs Student's interval (1.2% at m = 64: it falls as 1/m)."""
    model, rows, h, delta, p, J = truth
    exact = dense(p, J, delta, "sequence").sum().item()
    generator = torch.Generator().manual_seed(2)
    big, m, repeats = 200, 256, 1000
    # gradients for every label at every position once: then a draw is a sum of rows
    u = torch.einsum("btvsd,bsd->btv", J, delta)
    # g_y.delta = E_p u - u_y, for each predicted position
    gd = torch.einsum("btv,btv->bt", p, u)[..., None] - u
    labels = torch.multinomial(p.reshape(-1, p.shape[-1]), m * repeats, replacement=True, generator=generator)
    drawn = gd.reshape(-1, gd.shape[-1]).gather(1, labels).view(*gd.shape[:2], repeats, m)
    # per sequence, squared after summing over positions; then over sequences
    form = drawn.sum(1).square().sum(0)
    half = student.ppf(0.975, m - 1) * form.std(1) / m**0.5
    cover = ((form.mean(1) - exact).abs() <= half).double().mean().item()
    assert abs(form.mean().item() / exact - 1) < 0.01  # 6 standard errors
    assert abs(cover - 0.95) < 0.004 + 4 * (0.05 * 0.95 / repeats) ** 0.5
    # and the gradients themselves, as `clean_pass` draws them, are those
    uniforms = torch.rand(big, 2, 5, generator=generator, dtype=h.dtype)
    _, (_, *gradients) = Hook(model, LAYER).clean_pass(rows, h, uniforms)
    token, sequence = fisher.sampled_form(gradients, delta)
    assert abs(sequence.sum(1).mean().item() - exact) < 4 * sequence.sum(1).std().item() / big**0.5
    per_token = dense(p, J, delta, "token").sum().item()
    assert abs(token.sum((1, 2)).mean().item() - per_token) < 4 * token.sum((1, 2)).std().item() / big**0.5


FAMILIES = {
    "llama": dict(num_key_value_heads=2),
    "qwen2": dict(num_key_value_heads=2),
    "gpt2": dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "gemma2": dict(
        num_key_value_heads=2,
        head_dim=4,
        sliding_window=3,
        query_pre_attn_scalar=4,
        final_logit_softcapping=2.0,
        attn_logit_softcapping=None,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_forms_on_other_families(family):
    """Grouped keys, tied and scaled embeddings, sliding windows, capped logits: against dense Jacobians."""
    sizes = dict(hidden_size=8, num_hidden_layers=3, num_attention_heads=4, intermediate_size=16)
    common = dict(vocab_size=17, max_position_embeddings=32, initializer_range=0.3)
    config = AutoConfig.for_model(family, **sizes, **common, **FAMILIES[family])
    model, rows, h, delta, p, J = dense_truth(
        AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)
    )
    assert J.shape == (2, 5, 17, 6, 8)
    exact = 1e-5 if family in ("llama", "qwen2", "gemma2") else 1e-10  # their norms compute in float32
    for form, which in ((fisher.sequence_form, "sequence"), (fisher.same_form, "same")):
        found, truth = form(Hook(model, LAYER), rows, h, delta, p), dense(p, J, delta, which)[:, :5]
        torch.testing.assert_close(found, truth, rtol=exact, atol=exact * 1e-2)
