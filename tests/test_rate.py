"""Code lengths against entropies, the Gaussian bound against its definition, quantisation against its law,
and the softmax geometry against the exact forms.
"""

from types import SimpleNamespace

from helpers import log_probs_64, tiny_model
from transport_geometry.measuring import fisher, rate
from transport_geometry.measuring.evaluate import activations, evaluate
from transport_geometry.measuring.metrics import index_bits
from transport_geometry.models.lm import Hook
from transport_geometry.records.condition import Condition
from transport_geometry.saes.sae import TopKSAE, tied_init
from transport_geometry.statistics.curves import k_star

import numpy as np
import pytest
import torch


def entropy(p) -> float:
    p = np.asarray(p)
    return float(-(p * np.log2(p)).sum())


# -------------------------------------------------------------------------------------- code lengths
def test_indices_cost_their_entropy():
    """Within .01 bit a token, where latents fire alone and alike; and as `index_bits` has it."""
    rng, n_doc, n = np.random.default_rng(0), 10, 20_000
    rates = np.array([0.5, 0.3, 0.1, 0.02, 0.001, 0.2, 0.05, 0.4])
    fired = rng.binomial(n, rates, (n_doc, len(rates))).astype(float)
    n_tok = np.full(n_doc, float(n))
    bits = rate.index_lengths(fired, n_tok).sum() / n_tok.sum()
    assert abs(bits - sum(entropy([r, 1 - r]) for r in rates)) < 0.01
    halves = np.stack([fired[::2].sum(0), fired[1::2].sum(0)])
    assert bits == pytest.approx(index_bits(halves, np.array([n_tok[::2].sum(), n_tok[1::2].sum()])))
    assert np.isnan(rate.index_lengths(fired[:1], n_tok[:1])).all()  # no other half
    assert np.isnan(index_bits(np.array([[2.0, 0], [0, 0]]), np.array([4, 0])))


def drawn(rng, p_of, n: int, n_doc: int = 10):
    """(latent, symbol, document), each [n]: latents alike, symbols 1, 2, ... of each by its row of p_of."""
    latent = rng.integers(len(p_of), size=n)
    cdf = np.cumsum(p_of, 1)
    symbol = 1 + (rng.random(n)[:, None] > cdf[latent]).sum(1).clip(max=len(cdf[0]) - 1)
    return latent, symbol, rng.integers(n_doc, size=n)


P_OF = np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4], [0.97, 0.01, 0.01, 0.01]])


def test_values_cost_the_entropy_of_their_latent():
    """Of each latent's own distribution, not of the mixture, within .01 bit a value."""
    data = drawn(np.random.default_rng(0), P_OF, 300_000)
    found = rate.value_lengths(*data, 10).sum() / 300_000
    truth = np.mean([entropy(p) for p in P_OF])
    assert abs(found - truth) < 0.01 and entropy(P_OF.mean(0)) - truth > 0.3


def test_few_values_cost_more_than_their_entropy_and_never_less_on_average():
    rng, truth = np.random.default_rng(1), np.mean([entropy(p) for p in P_OF])
    mean = {}
    for n in (20, 200, 2000):
        each = [rate.value_lengths(*drawn(rng, P_OF, n), 10).sum() / n for _ in range(200)]
        mean[n] = np.mean(each), np.std(each) / 200**0.5
    for found, se in mean.values():
        assert found > truth - 3 * se
    assert mean[20][0] > mean[200][0] > mean[2000][0] and mean[20][0] - truth > 10 * mean[20][1]


def test_a_symbol_that_was_never_seen_can_be_sent():
    """At what the prior says: two documents, one value each."""
    bits = rate.value_lengths(np.array([0, 0]), np.array([1, 7]), np.array([0, 1]), 2)
    pooled = [(0 + 1 / 2) / 2, (0 + 1 / 56) / 2]  # of the other's one value, and the prior's one
    p = [16 * pooled[0] / 17, 16 * pooled[1] / 17]
    np.testing.assert_allclose(bits, -np.log2(p))
    alone = rate.value_lengths(np.array([0]), np.array([3]), np.array([0]), 1)
    np.testing.assert_allclose(alone, np.log2(12))  # nothing known: the prior alone


# -------------------------------------------------------------------------------------- water-filling
def test_the_gaussian_bound_is_water_filling():
    """Of variances and a water level theta, R = sum log2 max(v / theta, 1) / 2 and D = sum min(v, theta)
    (Cover & Thomas 2006, 10.3.3)."""
    assert rate.share_left(np.array([4.0, 1.0]), np.array(2.0)) == pytest.approx(1 / 5)
    spectrum = np.random.default_rng(0).exponential(size=12)
    for theta in (1e-3, 0.1, 0.7, 1.5, spectrum.max()):
        bits = 0.5 * np.log2(np.maximum(spectrum / theta, 1)).sum()
        left = np.minimum(spectrum, theta).sum() / spectrum.sum()
        assert rate.share_left(spectrum, bits) == pytest.approx(left)
    assert rate.share_left(np.array([3.0, 1.0, 0.0]), np.array(0.0)) == pytest.approx(1)


# -------------------------------------------------------------------------------------- quantisation
def axes_sae(d: int) -> TopKSAE:
    """Reads every coordinate of h > 0 as it is, and gives it back."""
    eye = torch.eye(d)
    return TopKSAE(eye, torch.zeros(d), eye, torch.zeros(d), d).requires_grad_(False)


def test_small_steps_add_a_twelfth_of_their_square():
    h = 1 + torch.rand(20_000, 8, generator=torch.Generator().manual_seed(0))
    sae = axes_sae(8)
    assert (sae.reconstruct(h)[2] - h).abs().max() == 0
    for step in (0.01, 0.05):
        error = (rate.Quantised(sae, step).reconstruct(h)[2] - h).double().square().sum(1).mean()
        assert error == pytest.approx(8 * step**2 / 12, rel=0.01)
    coarse = rate.Quantised(sae, 10.0).encode(h)[0]
    assert (coarse == 0).all()  # below half a step: not sent
    assert rate.unit(sae, h) == pytest.approx(h.double().std(correction=0).item())


@pytest.fixture(scope="module")
def hook():
    """(eval_set, SAEs, middle condition, shared): as much of an EvalSet as `coded_rows` looks at."""
    model = tiny_model(dtype=torch.float32)
    rows = torch.randint(0, 41, (8, 12), generator=torch.Generator().manual_seed(5))
    h = Hook(model, 1).head(rows)[:, :-1].flatten(0, 1)
    held = SimpleNamespace(input_ids=rows, document=np.array([0, 0, 1, 2, 3, 3, 4, 5]))
    one = Condition("tiny", 1, "topk", "base", 48, 5, 0, 10)
    middle = SimpleNamespace(condition=one)
    eval_set = SimpleNamespace(
        name="tiny", hook=Hook(model, 1), held=held, d=16, label="tiny L1", middle=middle
    )
    saes = {one: tied_init(16, 48, 5, 0, h.mean(0)).requires_grad_(False)}
    return eval_set, saes, one, activations(Hook(model, 1), rows, 4)


def test_distortion_is_that_of_a_patched_run_after_quantisation(hook):
    """Every sum as `evaluate` has it of the quantised SAE, and of the plain one as the step goes to 0."""
    eval_set, saes, one, shared = hook
    steps = (1.0, 1e-5)
    rows, _ = rate.coded_rows(eval_set, saes, {one: 0.7}, steps, shared, 4)
    input_ids, document = eval_set.held.input_ids, eval_set.held.document
    coders = {1.0: rate.Quantised(saes[one], 0.7), 1e-5: saes[one]}
    for step, result in evaluate(eval_set.hook, input_ids, coders, 8, shared=shared).items():
        mine = [row for row in rows if row["step"] == step]
        assert [row["document"] for row in mine] == list(range(6))
        for name in set(rate.CODED) - {"bits_idx", "bits_val"}:
            wanted = np.bincount(document, result.sums[name], 6)
            tolerance = dict(rtol=1e-5) if step == 1 else dict(rtol=2e-3, atol=1e-4)
            np.testing.assert_allclose([row[name] for row in mine], wanted, **tolerance, err_msg=name)


def test_rows_charge_what_is_sent(hook):
    """Indices and values of the code itself, counted by hand."""
    eval_set, saes, one, shared = hook
    rows, G = rate.coded_rows(eval_set, saes, {one: 1.0}, (2.0,), shared, 4)
    h, document = shared.h[:, :-1], eval_set.held.document
    values, indices = saes[one].encode(h.flatten(0, 1))
    symbol = np.rint(values.numpy() / 2).astype(int)
    where = np.broadcast_to(np.repeat(document, 11)[:, None], symbol.shape)
    sent = symbol > 0
    assert 0 < sent.mean() < 1
    assert [row["l0"] for row in rows] == np.bincount(where[sent], minlength=6).tolist()
    bits = rate.value_lengths(indices.numpy()[sent], symbol[sent], where[sent], 6)
    np.testing.assert_allclose([row["bits_val"] for row in rows], bits)
    fired = np.zeros((6, 48))
    np.add.at(fired, (where[sent], indices.numpy()[sent]), 1)
    n_tok = np.bincount(document) * 11.0
    np.testing.assert_allclose([row["bits_idx"] for row in rows], rate.index_lengths(fired, n_tok))
    assert G.shape == (16, 16) and np.allclose(G, G.T)


# -------------------------------------------------------------------------------------- eigendirections
def test_spectra_and_shares_on_axes():
    """Diagonal Sigma and G: everything by hand, and unchanged by a joint rotation."""
    sigma, G, error = np.diag([4.0, 2, 1, 1]), np.diag([0.0, 1, 5, 2]), np.diag([1.0, 1, 1, 5])
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    for turn in (np.eye(4), q):
        of = rate.Geometry(*(turn @ m @ turn.T for m in (sigma, sigma, G, error)))
        rows = rate.spectrum_rows(of)
        np.testing.assert_allclose([row["sigma"] for row in rows], [4, 2, 1, 1])
        np.testing.assert_allclose([row["fisher"] for row in rows], [5, 2, 2, 0], atol=1e-9)
        shares = {(row["directions"], row["group"]): row for row in rate.direction_rows(of)}
        first = shares["G", 1]
        found = [first[name] for name in ("sensitivity", "variance", "error")]
        np.testing.assert_allclose(found, [5 / 8, 1 / 8, 1 / 8])
        assert shares["Σ", 1]["variance"] == pytest.approx(0.5)
        for name in ("variance", "sensitivity", "error"):
            assert sum(row[name] for (of_what, _), row in shares.items() if of_what == "Σ") == pytest.approx(
                1
            )


# -------------------------------------------------------------------------------------- softmax geometry
def test_softmax_geometry_is_the_exact_form_at_the_last_hook():
    model = tiny_model()
    rows = torch.randint(0, 41, (3, 12), generator=torch.Generator().manual_seed(1))
    last = Hook(model, 2)
    h = last.head(rows)
    delta = torch.randn(h.shape, dtype=h.dtype, generator=torch.Generator().manual_seed(2))
    p = log_probs_64(last.tail(rows, h)).exp()
    closed = rate.softmax_form(last, rows, h, delta, p)
    for form in (fisher.sequence_form, fisher.same_form):
        torch.testing.assert_close(closed, form(last, rows, h, delta, p), rtol=1e-9, atol=1e-12)
    assert rate.softmax_form(Hook(model, 1), rows, h, delta, p) is None


# -------------------------------------------------------------------------------------- curves
def test_ratio_at_equal_bits():
    """Curves of one exponent, one twice as high, from other points; only what both reach counts."""
    x, other = np.array([[40.0, 100, 250]]), np.array([[55.0, 90, 300]])
    found = rate.log_ratio((x, np.exp(-0.01 * x)), (other, 2 * np.exp(-0.01 * other)))
    assert found == pytest.approx(np.log(2))
    assert (rate.log_ratio((x, x), (x, x)) == 0).all()
    assert np.isnan(rate.log_ratio((x, x), (x + 500, x)))
    falling = x[:, ::-1], np.exp(-0.01 * x[:, ::-1])  # the order of the points is no matter
    assert rate.log_ratio((x, np.exp(-0.01 * x)), falling) == pytest.approx(0)
    assert np.isnan(rate.log_ratio((x, np.array([[1.0, -1, 1]])), (x, x)))  # a loss that is none


def test_bits_star_of_each_draw_is_of_its_own_bits():
    rng = np.random.default_rng(0)
    bits, ce = np.cumsum(20 + 50 * rng.random((30, 4)), 1), np.sort(rng.random((30, 4)), 1)
    alone = [k_star(bits[[row]], ce[[row]], 0.5)[0] for row in range(30)]
    np.testing.assert_allclose(k_star(bits, ce, 0.5), alone)


def test_front():
    l0, loss = np.array([4.0, 12, 12, 32, 40]), np.array([1.0, 0.5, 0.6, 0.2, 0.3])
    assert rate.front(l0, loss).tolist() == [True, True, False, True, False]
    assert rate.front(np.array([4.0, 4]), np.array([1.0, 1])).all()  # two alike beat neither
