"""Exp-C's statistics and studies on planted truths; the forward-mode passes on an embedded model."""

import itertools

import expc_fisher
from helpers import log_probs_64, tiny_model
from transport_geometry.measuring import fisher, fisher_study
from transport_geometry.measuring.evaluate import evaluate
from transport_geometry.measuring.metrics import Sums, computed
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import load_model
from transport_geometry.reporting.sae_words import KL_MARGIN
from transport_geometry.saes.sae import tied_init
from transport_geometry.statistics import hook_tests
from transport_geometry.statistics.correlations import partial_spearman
from transport_geometry.statistics.hook_tests import added_value, out_of_hook_gain
from transport_geometry.statistics.resampling import document_weights
from transport_geometry.text.heldout import heldout_rows

import numpy as np
import pytest
import scipy
import torch


def test_forward_mode_in_float32_is_that_in_float64_on_an_embedded_model():
    model, tokenizer = load_model("stdlib-s", torch.device("cpu"))
    x = heldout_rows("stdlib", tokenizer, ctx=64, n=2).input_ids
    h = Hook(model, 3).head(x)
    delta = 0.5 * h.std() * torch.randn(h.shape, generator=torch.Generator().manual_seed(0))
    single = fisher.push_forward(Hook(model, 3), x, h, delta)
    u = fisher.push_forward(Hook(model.double(), 3), x, h.double(), delta.double())
    assert (single - u).norm() / u.norm() < 1e-5


@pytest.fixture(scope="module")
def hook():
    model = tiny_model()
    rows = torch.randint(0, 41, (4, 12), generator=torch.Generator().manual_seed(5))
    h = Hook(model, 1).head(rows)
    delta = torch.randn(h.shape, dtype=h.dtype, generator=torch.Generator().manual_seed(6))
    delta[:, -1] = 0
    return model, rows, h, delta


@pytest.fixture(scope="module")
def with_sae(hook):
    """(Hook in float32, rows, SAE)."""
    _, rows, _, _ = hook
    single = Hook(tiny_model(dtype=torch.float32), 1)
    mean = single.head(rows).flatten(0, 1).mean(0)
    return single, rows, tied_init(16, 48, 5, 0, mean).requires_grad_(False)


def test_the_path_integral_is_dce(with_sae):
    table = {row["nodes"]: row["error"] for row in fisher_study.path_integral(*with_sae)}
    assert table[8] < 1e-3 < table[0] and table[8] < table[2]


def test_centred_estimators_are_unbiased_and_rows_from_p_vary_less(with_sae):
    rows = fisher_study.estimators(*with_sae)
    table = {(row["estimator"], row["backward passes"]): row for row in rows}
    uniform, from_p = (
        table[f"diagonal F, {rows}, centred", "256 a token"] for rows in ("uniform rows", "rows from p")
    )
    assert from_p["sd"] < uniform["sd"] and from_p["repeats"] == uniform["repeats"] == 50
    uncentred = table["diagonal F, rows from p, as proposed, uncentred", "256 a token"]
    assert uncentred["mean"] > 1 + 4 * uncentred["se"]
    for row in (uniform, from_p, table["sampled labels (true Fisher)", "1"]):
        assert abs(row["mean"] - 1) < 4 * row["se"], row["estimator"]


def test_geometry_of_a_known_pair():
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    G = q @ np.diag([8, 4, 4] + [0] * 17) @ q.T
    shape = fisher_study.shape_of_g(G, q @ np.diag([1.0] * 3 + [0] * 17) @ q.T)
    truth = {"pr": 256 / 96, "trace": 16, "top1": 0.5, "alignment": 16 * 20 / (16 * 3)}
    assert {name: shape[name] for name in truth} == pytest.approx(truth)
    assert fisher_study.shape_of_g(np.eye(20), G)["alignment"] == pytest.approx(1)
    assert fisher_study.shape_of_g(G, G)["overlap1"] == pytest.approx(1)


def test_geometry_is_the_mean_of_the_fisher_blocks(hook):
    """Its trace against E|g_y|^2 = the mean of tr G_t, exact by pushing every basis vector of every position
    forward.
    """
    model, rows, h, _ = hook
    p = log_probs_64(Hook(model, 1).tail(rows, h)).exp()
    trace = 0.0
    for t in range(rows.shape[1] - 1):
        for i in range(16):
            unit = torch.zeros_like(h)
            unit[:, t, i] = 1
            trace += fisher.sequence_form(Hook(model, 1), rows, h, unit, p).sum().item()
    single = tiny_model(dtype=torch.float32)
    document = np.arange(8 * len(rows))
    with_sinks, _ = fisher_study.geometry(Hook(single, 1), rows.repeat(8, 1), 4, document)
    assert (
        with_sinks["sinks"] == "in" and with_sinks["top1_lo"] <= with_sinks["top1"] <= with_sinks["top1_hi"]
    )
    assert with_sinks["trace"] == pytest.approx(trace / (rows.shape[1] - 1) / len(rows), rel=0.06)


# -------------------------------------------------------------------------------------- beside a random error
def test_planted_errors_cost_what_they_must():
    """Isotropic: rho = 1. Along the top eigenvector of G: more than a random error. Along G's null space:
    less.
    """
    model = tiny_model(dtype=torch.float32)
    rows = torch.randint(0, 41, (64, 12), generator=torch.Generator().manual_seed(5))
    h = Hook(model, 1).head(rows)
    noise = torch.Generator().manual_seed(7)
    _, (_, *gradients) = Hook(model, 1).clean_pass(rows, h, torch.rand(16, 64, 11, generator=noise))
    G = sum(torch.einsum("btd,bte->de", g, g) for g in gradients)
    top = torch.linalg.eigh(G).eigenvectors[:, -1]
    null = torch.ones(16) / 4  # GPT-NeoX reads the stream through LayerNorm: the all-ones direction is null
    # not exactly: the form would be 0, its log minus infinity
    null = 0.98 * null + 0.2 * torch.linalg.eigh(G).eigenvectors[:, 1]
    errors = {
        "isotropic": lambda x, mean: x + 0.1 * torch.randn(x.shape, generator=noise),
        "top": lambda x, mean: x + 0.1 * torch.randn(len(x), 1, generator=noise) * top,
        "null": lambda x, mean: x + 0.1 * torch.randn(len(x), 1, generator=noise) * null,
    }
    results = evaluate(Hook(model, 1), rows, errors, 64)
    weights = document_weights(64, 1000, 0)
    said = {}
    for name, result in results.items():
        values = computed(Sums({q: v[None] for q, v in result.sums.items()}, weights, 16))
        for metric in ("fed_excess", "kl_excess"):
            lo, hi = np.quantile(values[metric][3:, 0], [0.025, 0.975])
            side = int(lo > KL_MARGIN) - int(hi < -KL_MARGIN)
            assert side == {"top": 1, "null": -1, "isotropic": 0}[name], (name, metric)
        said[name] = values["rho"][3:, 0]
    off = {name: (rho.mean() - 1) / rho.std() for name, rho in said.items()}  # in standard errors
    assert abs(off["isotropic"]) < 4 and off["top"] > 4 and off["null"] < -4


# -------------------------------------------------------------------------------------------------------- C2'
def conditions(rng, own: float, layers: int = 6, models: int = 3, ks=(4, 12, 32), icc: float = 0.9):
    """(x, base, y, meta): y rises with base, and by `own` with what x has beyond it, all apart from k; the
    default grid is the one that ships, and all that varies correlates by `icc` within a hook.
    """
    axes = np.meshgrid(np.arange(models), np.arange(layers), ks, indexing="ij")
    model, layer, k = (axis.ravel() for axis in axes)
    hook = model * layers + layer

    def vary():
        shared, alone = rng.standard_normal(models * layers)[hook], rng.standard_normal(len(k))
        return icc**0.5 * shared + (1 - icc) ** 0.5 * alone

    base, extra, rest, log_k = vary(), vary(), vary(), np.log(k)
    meta = dict(model=model, layer=layer, k=k, tokens=np.zeros(len(k)), cell=np.arange(len(k)).astype(str))
    y = 5 * log_k + base + own * extra + 0.3 * rest
    return 3 * log_k + base + extra, 3 * log_k + base, y, meta


@pytest.fixture
def few_patterns(monkeypatch):
    """Above 14 hooks, 401 random patterns rather than 10,000, others for every data set."""
    whole, seeds = hook_tests.sign_patterns, iter(range(10**6))
    monkeypatch.setattr(hook_tests, "sign_patterns", lambda G: whole(G, 401, next(seeds)))


def test_added_value_enumerates_64_patterns():
    """Six hooks of three SAEs: ranks, least squares, and every pattern of signs by hand."""
    rng = np.random.default_rng(1)
    for own in (0.0, 0.0, 1.0):
        x, base, y, meta = conditions(rng, own, layers=3, models=2)
        rank, least = scipy.stats.rankdata, lambda Z, v: v - Z @ np.linalg.lstsq(Z, v, rcond=None)[0]
        Z = np.column_stack([meta["k"] == 4, meta["k"] == 12, meta["k"] == 32, rank(base)]).astype(float)
        rx, ry = least(Z, rank(x)), least(Z, rank(y))
        signs = (np.repeat(pattern, 3) for pattern in itertools.product((1, -1), repeat=6))
        r = [np.corrcoef(rx, least(Z, ry * sign))[0, 1] for sign in signs]
        added, p = added_value(x, base, y, meta)
        assert added == pytest.approx(r[0]) and p == np.mean(np.abs(r) >= abs(r[0]) - 1e-9) and p >= 2 / 64


def test_added_value_is_found_and_not_invented(few_patterns):
    """Found in nearly all of 60, invented in at most 7% of 500, within 4 standard errors; with cells for
    hooks it is 18%.
    """
    rng = np.random.default_rng(0)
    leaves = [expc_fisher.leaf_h2_prime(*added_value(*conditions(rng, 1.0))) for _ in range(60)]
    assert np.mean([leaf == "supported" for leaf in leaves]) > 0.9 - 5 * (0.9 * 0.1 / 60) ** 0.5
    none = [added_value(*conditions(rng, 0.0)) for _ in range(500)]
    assert np.mean([p < 0.05 for _, p in none]) < 0.07 + 4 * (0.07 * 0.93 / 500) ** 0.5
    assert expc_fisher.leaf_h2_prime(np.nan, np.nan) == "undecided"
    data = [conditions(rng, own) for own in (1.0, 0.0) for _ in range(20)]
    gains = [out_of_hook_gain(*one, n_resamples=50)[0] for one in data]
    assert np.median(gains[:20]) > 0.3 > 0 > np.median(gains[20:]) - 0.02


def test_out_of_hook_gain_leaves_whole_hooks_out():
    """By hand; and x that knows a hook's number by heart, one value for each, predicts nothing of a hook that
    it has not seen.
    """
    rng = np.random.default_rng(2)
    x, base, y, meta = conditions(rng, 1.0)
    hook, left = meta["model"] * 6 + meta["layer"], []
    for columns in ([base], [base, x]):
        Z = np.column_stack([*(meta["k"] == k for k in (4, 12, 32)), *columns]).astype(float)
        fits = (np.linalg.lstsq(Z[hook != h], y[hook != h], rcond=None)[0] for h in range(18))
        left.append(sum(((y - Z @ fit)[hook == h] ** 2).sum() for h, fit in enumerate(fits)))
    share, lo, hi = out_of_hook_gain(x, base, y, meta)
    assert share == pytest.approx(1 - left[1] / left[0]) and lo < share < hi
    by_heart = [
        out_of_hook_gain(rng.standard_normal(18)[hook], *conditions(rng, 0.0)[1:], n_resamples=50)[0]
        for _ in range(40)
    ]
    assert np.mean(by_heart) < 0


def test_added_value_is_undefined_where_nothing_is_left():
    def undefined(*data):
        return np.isnan(added_value(*data)).all() and np.isnan(out_of_hook_gain(*data)).all()

    assert undefined(*conditions(np.random.default_rng(0), 1.0, models=1, layers=5))  # below 6 hooks
    assert undefined(*conditions(np.random.default_rng(0), 1.0, models=1, layers=1, ks=range(1, 19)))
    x, base, y, meta = conditions(np.random.default_rng(0), 1.0, models=2, layers=3, ks=(4,))
    meta["k"] = np.arange(6)  # one condition per k
    assert undefined(x, base, y, meta)
    x, base, y, meta = conditions(np.random.default_rng(0), 1.0)
    assert np.isnan(added_value(np.r_[np.nan, x[1:]], base, y, meta)).all()
    assert np.isnan(added_value(base, base, y, meta)).all()


def test_the_ladder_says_at_which_step_the_order_is_lost():
    """Every rung but KL is far from dCE; its rho is the partial Spearman of the values themselves."""
    *_, meta = conditions(rng := np.random.default_rng(3), 0.0)

    def noise(sd):
        return sd * rng.standard_normal(18)[meta["model"] * 6 + meta["layer"]]

    dce = -np.log(meta["k"]) + noise(0.5)
    names = [name for name, *_ in expc_fisher.RUNGS]
    of = {name: np.exp(dce + noise(0.01 if name == "kl" else 0.6)) for name in names} | {"dce": np.exp(dce)}
    rungs = expc_fisher.ladder({name: np.tile(v, (3, 1)) for name, v in of.items()}, meta)
    rho = [row["rho"] for row in rungs]
    assert rho == pytest.approx([partial_spearman(of[name], of["dce"], meta) for name in names])
    assert [row["step"] for row in rungs[1:]] == pytest.approx(np.diff(rho)) and rho[-1] == 1
    shown = [row["rung"] for row in rungs[:-1] if row["step_lo"] > 0 or row["step_hi"] < 0]
    assert shown == ["KL"] and "softmax" in rungs[3]["what joins"]


def test_calibration_is_one_where_the_model_is_quadratic():
    form = 10 * np.random.default_rng(0).uniform(1, 3, (5, 8))
    n = np.full(form.shape, 10.0)
    sums = dict(n=n, fisher_seq=form, gd=0 * n, ce_orig=20 * n, kl=form / 2, ce_recon=20 * n + form / 2)
    for a in (0.1, 0.3):
        sums |= {f"kl_{a}": a**2 * form / 2, f"ce_{a}": 20 * n + a**2 * form / 2}
    for row in expc_fisher.calibration(sums, dict(model=np.full(5, "m"), layer=np.full(5, 1))):
        found = [row[key] for key in ("kl_slope", "kl_r2", "dce_slope", "dce_r2")]
        assert found == pytest.approx([1, 1, 1, 1])


@pytest.mark.parametrize(
    "locality, radius", [((1.05, 1.1, 1.3), 0.3), ((1.3, 1, 1), 0), ((1, 1, 1), 1), ((np.nan, 1, 1), np.nan)]
)
def test_the_radius_ends_before_the_first_alpha_that_is_off(locality, radius):
    row = dict(zip(("locality_0.1", "locality_0.3", "locality_1"), locality))
    assert expc_fisher.radius(row) == pytest.approx(radius, nan_ok=True)
