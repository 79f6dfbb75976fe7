"""The two claims, here and in general: against hand counts, covariance matrices, planted autocorrelation and
simulated coverage.
"""

import itertools

from transport_geometry.reporting import claims_report
from transport_geometry.statistics import claims, hook_tests, leaderboard
from transport_geometry.statistics.hook_dependence import (
    Dependence,
    dependence,
    effective_hooks,
    neighbour_correlation,
    proxy_errors,
)
from transport_geometry.statistics.hook_tests import flip_test, swap_test
from transport_geometry.statistics.intervals import document_interval, stretched_interval, without_noise
from transport_geometry.statistics.resampling import cluster_ids, seed_draws

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import scipy.stats

MODELS = ("large", "small")  # in the order of their names, as hooks are numbered


def grid(models=MODELS, layers=12, ks=(4, 12, 32), seeds=1, saes=("topk-x4",)):
    """meta of a full grid, seeds innermost."""
    conditions = list(itertools.product(models, range(layers), saes, ks, range(seeds)))
    model, layer, sae, k, seed = map(np.array, zip(*conditions))
    cell = np.array([f"{c[:4]}" for c in conditions])
    zero = np.zeros(len(k))
    return dict(model=model, layer=layer, depth=layer, sae=sae, k=k, tokens=zero, seed=seed, cell=cell)


def along_depth(rng, phi, n, layers, models=1):
    """AR(1) of unit variance, [n, models * layers]: scipy's filter after a long run-in."""
    z = rng.standard_normal((n, models, layers + 400))
    e = scipy.signal.lfilter([(1 - phi**2) ** 0.5], [1, -phi], z)[..., 400:]
    return e.reshape(n, -1)


def on_saes(by_hook, meta, rng, icc=0.9):
    """[C]: what the SAEs of a hook share, by_hook [G], and a rest of their own."""
    ids = cluster_ids(meta)
    order = np.unique(ids, return_index=True)[1]
    place = np.empty(len(order), int)
    place[np.lexsort((meta["layer"][order], meta["model"][order]))] = np.arange(len(order))
    return icc**0.5 * by_hook[place[ids]] + (1 - icc) ** 0.5 * rng.standard_normal(len(ids))


def binomial_sd(p, n):
    """Standard error of a share of n data sets."""
    return (p * (1 - p) / n) ** 0.5


# ------------------------------------------------------------------------- how many hooks there are in effect
def test_neighbour_correlation_by_hand():
    """Two models of three hooks: means 2 and 0 taken off, four neighbours, six squares."""
    e = np.array([1.0, 2, 3, 1, 0, -1])
    assert neighbour_correlation(e, (3, 3)) == pytest.approx((0 + 0 + 0 + 0) / 4)
    e = np.array([1.0, 1, -2, 3, -3, 0])
    assert neighbour_correlation(e, (3, 3)) == pytest.approx(((1 - 2 - 9 + 0) / 4) / (24 / 6))
    held_fixed = e + [5, 5, 5, 0, 0, 0]
    assert neighbour_correlation(held_fixed, (3, 3)) == pytest.approx(-2.5 / 4)
    # about one mean, 1.5: what a model shares is left in
    e = np.array([2.0, 3, 2, 1, 0, 1])
    assert neighbour_correlation(e, (3, 3), one_mean=True) == pytest.approx((1.5 * 2) / 4 / (5.5 / 6))
    assert np.isnan(neighbour_correlation(np.ones(6), (3, 3)))
    assert np.isnan(neighbour_correlation(np.arange(3.0), (1, 1, 1)))  # no neighbours


def test_neighbours_are_in_the_order_of_depth_and_of_one_model():
    """Errors that alternate along depth; the rows in any order, layer 10 behind layer 9. What jumps from one
    model to the next is no pair of neighbours.
    """
    meta, rng = grid(), np.random.default_rng(0)
    errors = on_saes(np.tile([1.0, -1], 12), meta, rng, icc=1)
    assert dependence(errors, meta).phi < -0.8
    mixed = rng.permutation(len(errors))
    shuffled = dependence(errors[mixed], {name: v[mixed] for name, v in meta.items()})
    assert shuffled == dependence(errors, meta) and shuffled.n_hooks == shuffled.n_effective == 24
    # a number for each model, and what alternates: as alike as neighbours can be, about one mean
    shared = on_saes(np.repeat([2.0, -2], 12) + np.tile([0.5, -0.5], 12), meta, rng, icc=1)
    assert dependence(shared, meta).phi > 0.9
    one = {name: v[meta["model"] == "large"] for name, v in meta.items()}
    assert dependence(shared[meta["model"] == "large"], one).phi < -0.8


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_effective_hooks_are_the_variance_of_a_mean(phi):
    for sizes in ((12,), (12, 5, 1)):
        covariance = scipy.linalg.block_diag(*(scipy.linalg.toeplitz(phi ** np.arange(n)) for n in sizes))
        G = sum(sizes)
        assert effective_hooks(phi, sizes) == pytest.approx(1 / (covariance.sum() / G**2))
        assert effective_hooks(-0.5, sizes) == G  # never more than there are


@pytest.mark.parametrize("models, layers, phi", [(1, 18, 0.8), (3, 6, 0.5)])
def test_phi_is_right_in_the_middle(models, layers, phi):
    """Half of 400 estimates lie above the truth, of several models more: the larger of two. The plain
    correlation of neighbours lies below it in 60% at least.
    """
    meta, rng = grid(tuple("abc"[:models]), layers), np.random.default_rng(1)
    series = along_depth(rng, phi, 400, layers, models)
    raw = neighbour_correlation(series, (layers,) * models)
    found = [dependence(on_saes(e, meta, rng, icc=1), meta).phi for e in series]
    above, most = np.mean(np.array(found) > phi), 4 * binomial_sd(0.5, 400)
    assert -most < above - 0.5 < most + 0.25 * (models > 1)
    assert np.mean(raw < phi) > 0.6


def test_stretch():
    assert Dependence(0.0, 12, 12.0).stretch == 1
    assert Dependence(0.3, 12, 6.75).stretch == pytest.approx((12 / 6.75) ** 0.5)
    assert np.isnan(Dependence(0.5, 12, 5.9).stretch)
    draws = np.linspace(-1, 3, 4001)
    assert stretched_interval(0.0, draws, 2.0) == pytest.approx((-1.8, 5.8))
    lo, hi = stretched_interval(np.tanh(0.5), np.tanh(draws), 2.0, fisher=True)
    assert (np.arctanh(lo), np.arctanh(hi)) == pytest.approx((0.5 + 2 * (-0.9 - 0.5), 0.5 + 2 * (2.9 - 0.5)))
    assert np.isnan(stretched_interval(0.0, draws, np.nan)).all()


def test_a_stretched_test_says_less():
    """d by hand: of 64 sign patterns those with the sum 21, the observed one, are 2; at 1.5 times its size 14
    is enough.
    """
    d = np.arange(1.0, 7.0)
    signs = itertools.product((1, -1), repeat=6)
    sizes = [abs(np.dot(s, d)) for s in signs]
    by_hand = np.mean([i == 0 or size * 1.5 * (6 / 5) ** 0.5 >= 21 - 1e-9 for i, size in enumerate(sizes)])
    assert flip_test(d, stretch=1.5) == by_hand > flip_test(d) == 2 / 64
    assert np.isnan(flip_test(d, stretch=np.nan))
    rng, meta = np.random.default_rng(2), grid(("a",))
    a, b, y = rng.normal(size=(3, 36))
    free, wide, none = (swap_test(a, b, y, meta, stretch=s) for s in (1.0, 3.0, np.nan))
    assert free[0] == wide[0] == none[0] and free[1] < wide[1] and np.isnan(none[1])


def test_level_where_neighbours_share_their_errors(monkeypatch):
    """Two proxies equally good, 2 x 12 hooks, autocorrelation .9: a test that takes hooks for independent
    rejects in a quarter of 150 data sets. With what is left of them most have no verdict, and 7% at most
    reject.
    """
    whole = hook_tests.sign_patterns
    monkeypatch.setattr(hook_tests, "sign_patterns", lambda G, n_draws=401, seed=0: whole(G, 401, seed))
    meta, rng, n, p = grid(), np.random.default_rng(3), 150, []
    for i in range(n):
        y, shared, a, b = (on_saes(e, meta, rng) for e in along_depth(rng, 0.9, 4, 12, 2))
        y = y + np.log2(meta["k"])
        a, b = (y + 0.5 * (0.8**0.5 * shared + 0.2**0.5 * own) for own in (a, b))
        hooks = [dependence(proxy_errors(x, y, meta), meta) for x in (a, b)]
        stretch = np.max([one.stretch for one in hooks])
        p.append([swap_test(a, b, y, meta, seed=i, stretch=s)[1] for s in (1.0, stretch)])
    free, judged = np.array(p).T
    assert np.mean(free < 0.05) > 0.15
    assert np.mean(judged < 0.05) < 0.07 + 4 * binomial_sd(0.07, n) and np.isnan(judged).mean() > 0.4


def test_proxy_errors_are_what_k_and_the_target_leave():
    meta, rng = grid(("a",)), np.random.default_rng(4)
    y = np.log2(meta["k"]) + rng.normal(size=36)
    assert np.abs(proxy_errors(np.exp(y), y, meta)).max() < 1e-9  # the same ranks
    x = y + rng.normal(size=36)
    e = proxy_errors(x, y, meta)
    Z = np.column_stack([meta["k"] == 4, meta["k"] == 12, meta["k"] == 32, scipy.stats.rankdata(y)])
    assert np.abs(Z.T @ e).max() < 1e-7 and np.isnan(proxy_errors(x * np.inf, y, meta)).all()


# ----------------------------------------------------------------------------------- intervals over documents
def sources_of(n):
    """As `resampling.seed_draws` gives them for one model of one seed and n resamples."""
    return {"a": np.array([1]), "documents": np.arange(2, 2 + n)}


def spearman(x, y):
    """Of x and y [..., C] without ties."""
    ranks = (scipy.stats.rankdata(v, axis=-1) - (v.shape[-1] + 1) / 2 for v in (x, y))
    a, b = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in ranks)
    return (a * b).sum(-1)


def test_document_interval_covers_where_percentiles_do_not():
    """Rank correlation of 36 SAEs' proxy and target, each a mean over 30 documents with noise: the truth is
    that of the means. Percentiles cover far less than they say. (.91 of
    3000, percentiles .64; more in bench/RESULTS.md.)
    """
    rng, hits, n, D = np.random.default_rng(5), [], 250, 30
    for _ in range(n):
        truth = rng.normal(size=(2, 36))
        truth[1] = 0.9 * truth[0] + 0.44 * truth[1]
        documents = truth + rng.normal(size=(D, 2, 36)) * 0.7
        weights = np.vstack([np.ones((2, D)), rng.multinomial(D, np.full(D, 1 / D), 200)]) / D
        means = np.einsum("rd,dpc->prc", weights, documents)
        draws, true = spearman(*means), spearman(*truth)
        lo, hi = document_interval(draws, sources_of(200), D, n_ranked=36)
        plain = np.quantile(draws[2:], [0.025, 0.975])
        hits.append([lo <= true <= hi, plain[0] <= true <= plain[1]])
    ours, plain = np.mean(hits, axis=0)
    assert abs(ours - 0.91) < 4 * binomial_sd(0.91, n) and plain < 0.8


def test_without_noise_is_the_correlation_behind_it():
    """Normals of correlation .8, with noise of half their variance on both, and with noise twice: Spearman's
    own attenuation, .8 / 1.5 and .8 / 2.
    """
    draws = np.full(50, 0.8 / 2)
    assert without_noise(0.8 / 1.5, draws) == pytest.approx(0.8)
    assert without_noise(-0.8 / 1.5, -draws) == pytest.approx(-0.8)
    assert without_noise(0.97, np.full(50, 0.93)) == 1  # no further
    wide = np.linspace(-0.5, 0.9, 50)
    assert without_noise(0.3, wide) == 0.3 and without_noise(0.5, np.full(50, 0.2)) == 0.5


def test_document_interval_of_a_mean_is_students():
    """No bias to take off: the t interval of scipy, which is wider than the percentiles."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=8)
    draws = np.r_[x.mean(), np.nan, x[rng.integers(8, size=(20_000, 8))].mean(1)]
    expected = scipy.stats.t.interval(0.95, 7, x.mean(), scipy.stats.sem(x))
    assert document_interval(draws, sources_of(20_000), 8) == pytest.approx(expected, abs=0.02)
    assert np.isnan(document_interval(draws, sources_of(20_000), 1)).all()


def test_document_interval_of_a_correlation_reaches_one():
    """Six SAEs in perfect order: an interval that ended at tanh of something would never hold the truth."""
    draws = np.r_[1.0, np.nan, np.ones(150), np.full(50, 0.8)]
    lo, hi = document_interval(draws, sources_of(200), 30, n_ranked=6)
    assert hi == 1 and 0.7 < lo <= 0.8
    assert document_interval(-draws, sources_of(200), 30, n_ranked=6) == pytest.approx((-1, -lo))


def test_document_interval_takes_in_seeds():
    """Documents that agree: what is left is the jackknife over three seeds, Student with 2 degrees of
    freedom.
    """
    meta = grid(("a",), layers=1, ks=(4,), seeds=3)
    values = np.array([1.0, 2.0, 6.0])
    found = seed_draws(meta, 3 + 50)
    draws = (found.weights @ values) / found.weights.sum(1)
    expected = scipy.stats.t.interval(0.95, 2, 3.0, scipy.stats.sem(values))
    got = document_interval(draws, found.sources, 50)
    assert got == pytest.approx([3 + (end - 3) * (50 / 49) ** 0.5 for end in expected])


# ------------------------------------------------------------------------------------------------- the pairs
def weighted(v, rng, sd, n=200):
    """[3 + n, C]: all documents, halves and resamples of means that documents know to `sd`."""
    return np.vstack([v, v, v, v + rng.normal(0, sd, (n, len(v)))])


def test_clear_pairs_by_hand():
    """One k of one model: .00, .04, .30; noise that hides nothing. Another model, and another k, pair with
    their own.
    """
    meta = grid(("a", "b"), layers=3, ks=(4, 8))
    ce = np.tile(np.array([0.0, 0.04, 0.30]).repeat(2), 2) + (meta["k"] == 8) * 0.5 + (meta["model"] == "b")
    rng = np.random.default_rng(7)
    pairs = claims.clear_pairs(weighted(ce, rng, 1e-4), meta)
    found = {tuple(sorted((int(meta["layer"][i]), int(meta["layer"][j])))) for i, j in zip(pairs.a, pairs.b)}
    assert found == {(0, 2), (1, 2)} and len(pairs.a) == 2 * 2 * 2
    assert all((meta[name][pairs.a] == meta[name][pairs.b]).all() for name in ("model", "k"))
    # a difference that documents do not show is none
    assert len(claims.clear_pairs(weighted(ce, rng, 0.5), meta).a) == 0
    assert len(claims.clear_pairs(ce[None].repeat(3, 0), meta).a) == 0  # no resamples


def board_of(meta, scores, ce, models):
    how = dict(target_name="ce_rec", controls=["cosine"], loho_control="cosine", n_documents=40)
    return leaderboard.board(scores, ce, 1 - ce + 1.0, meta, models, n_resamples=200, **how)


def two_arms(rng):
    """The finding on SmolLM2 in small: with sinks kept R2 runs against CE_rec and cosine with it, with sinks
    dropped the other way round; SWD is right on both.
    """
    meta = grid(("a",), layers=8, ks=(4, 12), saes=("topk-x4", "topk-x4-nosinks"))
    y = 0.05 * np.log2(meta["k"]) + 0.1 * rng.permutation(8)[meta["layer"]] - (meta["layer"] % 3) * 0.01
    drop = meta["sae"] == "topk-x4-nosinks"
    within = 0.05 * np.log2(meta["k"])
    turned = 2 * within - y
    scores = {"r2": np.where(drop, y, turned), "cosine": np.where(drop, turned, y), "swd_tok": y}
    return meta, {name: weighted(v, rng, 1e-4) for name, v in scores.items()}, weighted(y, rng, 1e-4)


def test_here_says_on_which_arm_a_proxy_fails():
    meta, scores, ce = two_arms(np.random.default_rng(8))
    board = board_of(meta, scores, ce, ["a"])
    assert [row["stratum"] for row in board[::3]] == ["pooled", "sinks keep", "sinks drop", "a"]
    arms = ("sinks keep", "sinks drop")
    right = {name: [claims.row_of(board, name, arm)["right"] for arm in arms] for name in scores}
    assert right == {"r2": [0, 1], "cosine": [1, 0], "swd_tok": [1, 1]}
    swd, keep = claims.row_of(board, "swd_tok"), claims.row_of(board, "r2", "sinks keep")
    assert swd["partial"] == pytest.approx(1) and swd["partial_here_lo"] > 0.95
    assert keep["partial"] < -0.9 and keep["right_swd_lo"] == keep["right_swd"] == 1
    assert claims.leaf_here(board, ["cosine"]).leaf == "beats-all"


@pytest.mark.parametrize(
    "swd, r2, cosine, leaf, left",
    [
        (0.01, 0.5, 0.5, "beats-all", ()),
        (0.01, 0.5, 0.01, "beats-r2-only", ("cosine",)),
        (0.5, 0.01, 0.5, "worse", ("cosine",)),
        (0.1, 0.1, 0.1, "not-shown", ("cosine",)),
    ],
)
def test_each_word_here(swd, r2, cosine, leaf, left):
    rng, meta = np.random.default_rng(9), grid(("a",), layers=12)
    y = np.log2(meta["k"]) + rng.normal(size=36)
    noise = {"swd_tok": swd, "r2": r2, "cosine": cosine}
    # over documents proxies differ by little, so that their errors are their own
    scores = {name: weighted(y + rng.normal(0, 2 * sd, 36), rng, 0.1 + sd / 3) for name, sd in noise.items()}
    found = claims.leaf_here(board_of(meta, scores, weighted(y, rng, 0.1), ["a"]), ["cosine"])
    assert (found.leaf, found.not_beaten) == (leaf, left)


def test_one_hook_is_enough_here_and_none_too_few():
    """Four SAEs of one k at one hook: no test over hooks, and an order all the same."""
    rng, meta = np.random.default_rng(10), grid(("a",), layers=1, ks=(4,), seeds=5)
    y = np.arange(5.0)
    truth = {"swd_tok": y, "r2": -y, "cosine": y}
    scores = {name: weighted(v, rng, 0.01) for name, v in truth.items()}
    board = board_of(meta, scores, weighted(y, rng, 0.01), ["a"])
    swd, r2 = (claims.row_of(board, name) for name in ("swd_tok", "r2"))
    assert swd["right"] == 1 and r2["right"] == 0 and r2["swd_here"] == pytest.approx(2)
    assert np.isnan(swd["p_r2"]) and np.isnan(swd["partial_lo"]) and np.isfinite(swd["partial_here_lo"])
    assert "there is 1 hook; 6 are needed" in claims_report.none_in_general(board, ["a"])


def test_nothing_in_general_where_an_error_goes_from_layer_to_layer():
    """24 hooks whose R2 errors drift along depth: no p and no interval in general, the answer here, and why
    in one sentence; the same errors from side to side have both.
    """
    rng, meta = np.random.default_rng(11), grid()
    y = np.log2(meta["k"]) + on_saes(along_depth(rng, 0.0, 1, 12, 2)[0], meta, rng)
    drift = np.linspace(-1, 1, 12)
    zigzag = drift[[0, 11, 1, 10, 2, 9, 3, 8, 4, 7, 5, 6]]
    for errors, said in ((np.tile(drift, 2), False), (np.tile(zigzag, 2), True)):
        scores = {"r2": weighted(y + on_saes(errors, meta, rng, 0.95), rng, 0.05)}
        for name in ("swd_tok", "cosine"):
            scores[name] = weighted(y + 0.1 * rng.normal(size=72), rng, 0.05)
        board = board_of(meta, scores, weighted(y, rng, 0.05), list(MODELS))
        r2, swd = (claims.row_of(board, name) for name in ("r2", "swd_tok"))
        assert np.isfinite([swd["p_r2"], swd["diff_r2_lo"]]).tolist() == [said, said]
        assert swd["diff_r2_here_lo"] > 0 and (r2["phi"] < 0.5) == said
        sentence = claims_report.none_in_general(board, list(MODELS))
        assert (sentence == "") == said and ("the errors of R² at one layer" in sentence) == (not said)
