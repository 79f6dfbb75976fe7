"""Every metric against a dense float64 computation, hand cases, and the invariances that its definition
promises.
"""

import math

from helpers import tiny_model
from transport_geometry.errors import Fault
from transport_geometry.measuring import evaluate as evaluation
from transport_geometry.measuring.evaluate import activations, evaluate
from transport_geometry.measuring.metrics import PROXIES, SIMILARITY, Sums, computed
from transport_geometry.models.lm import Hook
from transport_geometry.saes import sinks
from transport_geometry.saes.basis_gate import near
from transport_geometry.saes.sae import tied_init
from transport_geometry.statistics.resampling import document_weights

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def hook():
    """(model in float32, rows [6,12], layer, h [N,d] of the evaluated positions)."""
    model = tiny_model(dtype=torch.float32)
    rows = torch.randint(0, 41, (6, 12), generator=torch.Generator().manual_seed(5))
    return model, rows, 1, Hook(model, 1).head(rows)[:, :-1].flatten(0, 1)


def point(hook, reconstruction, batch=6):
    model, rows, layer, h = hook
    sums = evaluate(Hook(model, layer), rows, {"it": reconstruction}, batch)["it"].sums
    values = computed(Sums({q: v[None] for q, v in sums.items()}, np.ones((1, len(rows))), h.shape[1]))
    return {name: float(v[0, 0]) for name, v in values.items()}


def random_sae(hook, k=5):
    h = hook[3]
    return tied_init(h.shape[1], 48, k, 0, h.mean(0)).requires_grad_(False)


def test_identity_loses_nothing(hook):
    m = point(hook, lambda h, mean: h)
    for name in "r2 r2_nosink r2_defl1 r2_ln cosine ce_rec ce_rec_sinkclean frac_zero frac_mean".split():
        assert m[name] == pytest.approx(1, abs=1e-6), name
    for name in "swd_tok swd_seq swd_sampled gd_mean gd_abs nmse nmse_tok mse relerr kl".split():
        assert m[name] == pytest.approx(0, abs=1e-9), name
    assert math.isnan(m["fed"])


def test_the_mean_and_zero_are_the_ablations_and_a_bias_is_seen(hook):
    """dictionary_learning's score centres the error and gives the last one 1.000."""
    m = point(hook, lambda h, mean: mean.expand_as(h))
    assert m["r2"] == pytest.approx(0, abs=1e-6) and m["frac_mean"] == pytest.approx(0, abs=1e-6)
    assert m["ce_recon"] == pytest.approx(m["ce_mean"], rel=1e-6)
    m = point(hook, lambda h, mean: torch.zeros_like(h))
    assert m["frac_zero"] == pytest.approx(0, abs=1e-6) and m["nmse"] == pytest.approx(1) and m["cosine"] == 0
    assert point(hook, lambda h, mean: h + 3 * h.std())["r2"] < -3


def test_everything_against_dense_float64(hook):
    model, rows, layer, h32 = hook
    sae = random_sae(hook)
    m = point(hook, sae)
    exact = tiny_model()  # the same weights in float64
    whole = Hook(exact, layer).head(rows)
    B, T, d = whole.shape
    x = whole.clone().requires_grad_()
    logits = Hook(exact, layer).tail(rows, x)[:, :-1]
    ce = -torch.log_softmax(logits, -1).gather(-1, rows[:, 1:, None]).squeeze(-1)
    g = torch.autograd.grad(ce.sum(), x)[0][:, :-1]
    h = whole[:, :-1]
    W, b = sae.W_enc.double(), sae.b_dec.double()
    z = torch.relu((h - b) @ W.T)
    cut = z.topk(sae.k, -1).values[..., -1:]
    h_hat = torch.where(z >= cut, z, 0) @ sae.W_dec.double() + b
    delta, gd = h_hat - h, (g * (h_hat - h)).sum(-1)
    mean = h.reshape(-1, d).mean(0)
    centred = h - mean
    sink = torch.zeros(B, T - 1, dtype=bool)
    sink[:, 0] = True
    calm = h - h[~sink].mean(0)
    u = torch.linalg.svd(centred.reshape(-1, d), full_matrices=False).Vh[0]

    def off(v):
        return v - (v @ u)[..., None] * u

    def ln(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    def sq(v):
        return v.square().sum(-1)

    def patched(h_hat):
        tail = Hook(exact, layer).tail(rows, torch.cat([h_hat, whole[:, -1:]], 1))[:, :-1]
        return torch.log_softmax(tail, -1)

    def ce_of(log_q):
        return -log_q.gather(-1, rows[:, 1:, None]).squeeze(-1)

    generators = (torch.Generator().manual_seed(row) for row in range(B))
    random = torch.stack([torch.randn(T - 1, d, generator=generator) for generator in generators]).double()
    random *= delta.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True)
    log_p, log_q = torch.log_softmax(logits, -1), patched(h_hat)
    lost = (torch.where(sink[..., None], h, other) for other in (h_hat, h + random))
    log_q_clean, log_q_random = map(patched, lost)
    recon, sinkclean = ce_of(log_q), ce_of(log_q_clean)
    kl_calm, kl_random = (
        (log_p.exp() * (log_p - q)).sum(-1)[[0, 1, 4, 5]].sum() for q in (log_q_clean, log_q_random)
    )
    expected = {
        "r2": 1 - sq(delta).sum() / sq(centred).sum(),
        "r2_nosink": 1 - sq(delta)[~sink].sum() / sq(calm)[~sink].sum(),
        "r2_defl1": 1 - sq(off(delta)).sum() / sq(off(centred)).sum(),
        "r2_ln": 1 - sq(ln(h_hat) - ln(h)).sum() / sq(ln(h) - ln(h).reshape(-1, d).mean(0)).sum(),
        "nmse": sq(delta).sum() / sq(h).sum(),
        "nmse_tok": (sq(delta) / sq(h)).mean(),
        "mse": delta.square().mean(),
        "cosine": torch.cosine_similarity(h, h_hat, -1).mean(),
        "relerr": (delta.norm(dim=-1) / (h.norm(dim=-1) + 1e-10)).mean(),
        "swd_tok": gd.square().mean(),
        "swd_seq": gd.sum(1).square().mean() / (T - 1),
        "gd_mean": gd.mean(),
        "gd_abs": gd.abs().mean(),
        "ce_orig": ce.mean(),
        "ce_recon": recon.mean(),
        "dce": (recon - ce).mean(),
        "ce_rec": 2 - recon.mean() / ce.mean(),
        "ce_rec_sinkclean": 2 - sinkclean.mean() / ce.mean(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        "sink_share": sq(centred)[sink].sum() / sq(centred).sum(),
        "kl_excess": (kl_calm / kl_random).log(),
        "l0": (torch.where(z >= cut, z, 0) > 0).sum(-1).double().mean(),
    }
    for name, value in expected.items():
        assert m[name] == pytest.approx(float(value), rel=2e-4, abs=1e-6), name
    assert min(abs(m["r2"] - 1), abs(m["ce_rec"] - 1)) > 1e-3  # nothing above was trivially equal


def test_metrics_do_not_depend_on_the_batch(hook):
    sae = random_sae(hook)
    six, one = point(hook, sae, batch=6), point(hook, sae, batch=1)
    for name in six:
        assert one[name] == pytest.approx(six[name], rel=1e-4, abs=1e-7), name


def test_half_of_sampled_swd_is_kl_for_small_errors(hook, monkeypatch):
    """E_y (sum_t g_y.delta)^2 / token = 2 KL / token + O(delta^3): the unit that swd_sampled carries."""
    monkeypatch.setattr(evaluation, "DRAWS", 400)
    noise = torch.randn(hook[3].shape, generator=torch.Generator().manual_seed(7))
    m = point(hook, lambda h, mean: h + 0.01 * noise)
    # squares of sums over tokens, of nearly normal numbers: relative variance 2, over 400 draws x 6 sequences
    assert 0.5 * m["swd_sampled"] == pytest.approx(m["kl"], rel=5 * (2 / 2400) ** 0.5)


def test_sinks_are_position_zero_and_ten_medians():
    norms = torch.ones(2, 5)
    norms[1, 3] = 10.5
    norms[0, 4] = 9.5
    assert sinks.sink_positions(norms, 1.0).nonzero().tolist() == [[0, 0], [1, 0], [1, 3]]


def test_weights_are_the_same_as_repeating_sequences(hook):
    model, rows, layer, h = hook
    sums = evaluate(Hook(model, layer), rows, {"it": random_sae(hook)}, 6)["it"].sums
    weights = np.array([[0, 2, 1, 0, 3, 0.0]])
    index = [1, 1, 2, 4, 4, 4]
    a = computed(Sums({q: v[None] for q, v in sums.items()}, weights, 16))
    b = computed(Sums({q: v[None][:, index] for q, v in sums.items()}, np.ones((1, 6)), 16))
    for name in a:
        assert a[name] == pytest.approx(b[name], rel=1e-12), name


def test_scores_of_every_proxy_are_larger_where_less_is_lost():
    for proxy in PROXIES:
        little, much = (0.9, 0.5) if proxy.score is SIMILARITY else (0.1, 0.5)
        assert proxy.score(np.array(little)) > proxy.score(np.array(much)), proxy.name


def test_document_weights_rows():
    w = document_weights(7, 20, 0)
    assert w.shape == (23, 7) and (w[0] == 1).all() and (w[1] + w[2] == 1).all() and (w[3:].sum(1) == 7).all()
    assert np.array_equal(w, document_weights(7, 20, 0))


@pytest.mark.parametrize("constant", [0.0, 3.3])
def test_a_model_whose_activations_are_all_one_is_one_line(constant, hook):
    model = tiny_model(dtype=torch.float32)
    for name, p in model.named_parameters():
        p.data.fill_(constant if "embed_in" in name else 0)
    for measure in (lambda of, rows: activations(of, rows, 6), near):
        with pytest.raises(Fault, match="layer 1: the activations of .* do not vary"):
            measure(Hook(model, 1), hook[1])


def test_sinks_that_are_left_are_as_they_were(hook):
    """What is measured then is what another reconstruction gives that is h itself at position 0."""
    model, rows, layer, h = hook
    sae = random_sae(hook)
    first = torch.arange(len(h)).view(len(rows), -1)[:, 0]

    def at_the_others(h, mean):
        h_hat = sae.reconstruct(h)[2].clone()
        h_hat[first] = h[first]
        return h_hat

    by_hand = evaluate(Hook(model, layer), rows, {"it": at_the_others}, 6)["it"].sums
    left = evaluate(Hook(model, layer), rows, {"it": sae}, 6, leave_sinks=True)["it"].sums
    for name, value in by_hand.items():
        if name != "l0":
            assert left[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    whole = evaluate(Hook(model, layer), rows, {"it": sae}, 6)["it"].sums
    assert left["ce_recon"] == pytest.approx(whole["ce_sinkclean"], rel=1e-5)
    assert abs(left["sse"] - whole["sse"]).min() > 1e-3
