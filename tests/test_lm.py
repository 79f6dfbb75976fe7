"""The split model, gradients and KL against truths computed another way."""

import math

from helpers import log_probs_64
from transport_geometry.models.lm import Hook, cross_entropy, kl_divergence

import pytest
import torch


# ------------------------------------------------------------------------------------------------ model split
def test_a_failing_tail_leaves_the_model_whole(tiny, rows):
    before = tiny(rows).logits
    h = Hook(tiny, 1).head(rows)
    with pytest.raises(RuntimeError):
        Hook(tiny, 1).tail(rows, h[..., :3])
    assert torch.equal(tiny(rows).logits, before)


# -------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("layer", [0, 2])
def test_g_against_central_differences(tiny, rows, layer):
    h = Hook(tiny, layer).head(rows)
    _, (g,) = Hook(tiny, layer).clean_pass(rows, h)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        delta = torch.randn(h.shape, generator=generator, dtype=h.dtype)
        eps = 1e-5

        def ce(x):
            return cross_entropy(log_probs_64(Hook(tiny, layer).tail(rows, x)), rows).sum()

        slope = (ce(h + eps * delta) - ce(h - eps * delta)) / (2 * eps)
        assert abs(slope - (g * delta).sum()) < 1e-7 * slope.abs().clamp(min=1)


def test_g_is_of_the_sum_so_batches_do_not_matter(tiny, rows):
    h = Hook(tiny, 1).head(rows)
    _, (g,) = Hook(tiny, 1).clean_pass(rows, h)
    one_by_one = [Hook(tiny, 1).clean_pass(rows[i : i + 1], h[i : i + 1])[1][0] for i in range(len(rows))]
    torch.testing.assert_close(g, torch.cat(one_by_one), rtol=1e-10, atol=1e-12)


def test_last_position_has_no_gradient_and_the_first_has(tiny, rows):
    ends = torch.tensor([0.0, 1 - 2**-24]).view(2, 1, 1).expand(2, 3, 11)  # both ends of [0, 1) are labels
    for uniforms in (torch.rand(2, 3, 11), ends):
        _, gradients = Hook(tiny, 1).clean_pass(rows, Hook(tiny, 1).head(rows), uniforms)
        for g in gradients:
            assert (g[:, -1] == 0).all() and (g[:, 0].abs().sum(-1) > 0).all() and g.isfinite().all()


# --------------------------------------------------------------------------------------------------------- KL
@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.1, 1.0, 60.0])
def test_kl_is_right_at_every_size(size):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 7, 500, generator=generator, dtype=torch.float64)
    change = size * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    log_p, log_q = (torch.log_softmax(x, -1) for x in (logits, logits + change))
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
