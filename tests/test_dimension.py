"""Dimensions against covariances, spectra and Gaussian pairs whose dimension is known."""

from dataclasses import dataclass

from helpers import tiny_model
from transport_geometry.measuring import dimension, mutual_information
from transport_geometry.measuring.evaluate import activations
from transport_geometry.measuring.fisher_study import Moments, moments
from transport_geometry.models.lm import Hook

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm


def sums_of(x: np.ndarray, block: np.ndarray) -> Moments:
    """Of positions x [N,d] in blocks [N]; g = x."""
    blocks = int(block.max()) + 1
    sums = Moments.none(blocks, x.shape[1])
    for b in range(blocks):
        part = torch.from_numpy(x[block == b])
        sums.add(b, part, part[None])
    return sums


# --------------------------------------------------------------------------------------- participation ratios
def test_pr_of_known_spectra():
    pr = dimension.participation_ratio
    assert pr(np.ones(7)) == pytest.approx(7) and pr(5 * np.eye(1, 7)[0]) == pytest.approx(1)
    assert pr(np.r_[1000.0, np.ones(63)]) == pytest.approx(1063**2 / 1_000_063)
    assert np.isnan(pr(np.zeros(3)))


@pytest.mark.parametrize("n, plain", [(64, 31.5), (128, 42.5)])
def test_the_finite_sample_bias_is_taken_out(n, plain):
    rng, found = np.random.default_rng(0), []
    for _ in range(20):
        sums = sums_of(rng.standard_normal((n, 64)), np.arange(n))
        found.append((dimension.counts(sums, np.ones(n))["pr"], dimension.pr_corrected(sums, np.ones(n))))
    assert np.mean(found, 0) == pytest.approx([plain, 64], rel=0.03)


def test_pairs_within_a_document_are_no_pairs():
    """Half the variance of 50 positions is their document's: 40 of them do not hold 32 directions plainly."""
    rng, found = np.random.default_rng(0), []
    document = np.repeat(np.arange(40), 50)
    for _ in range(5):
        x = rng.standard_normal((40, 32))[document] + rng.standard_normal((2000, 32))
        sums = sums_of(x, document)
        by_position = dimension.pr_corrected(sums_of(x, np.arange(2000)), np.ones(2000))
        ones = np.ones(40)
        found.append((dimension.counts(sums, ones)["pr"], by_position, dimension.pr_corrected(sums, ones)))
    plain, by_position, corrected = np.mean(found, 0)
    assert plain < by_position < 28 and corrected == pytest.approx(32, rel=0.05)


def test_dim_fisher_of_diagonal_matrices_and_under_rotation():
    G, sigma = np.diag([1.0, 4.0, 9.0, 0.0]), np.diag([4.0, 1.0, 1.0, 5.0])
    assert dimension.dim_fisher(G, sigma) == pytest.approx((4 + 4 + 9) ** 2 / (16 + 16 + 81), rel=1e-12)
    rng = np.random.default_rng(0)
    Q, A = np.linalg.qr(rng.standard_normal((4, 4)))[0], rng.standard_normal((4, 4))
    B = np.linalg.inv(A).T
    for turned in ((Q @ G @ Q.T, Q @ sigma @ Q.T), (B @ G @ B.T, A @ sigma @ A.T), (3 * G, 5 * sigma)):
        assert dimension.dim_fisher(*turned) == pytest.approx(dimension.dim_fisher(G, sigma), rel=1e-9)
    assert dimension.dim_fisher(Q @ G @ Q.T, sigma) != pytest.approx(dimension.dim_fisher(G, sigma), rel=0.01)
    assert np.isnan(dimension.dim_fisher(0 * G, sigma))


def test_counts_are_those_of_the_positions():
    """Against numpy's covariance, and the eigenvalues of Sigma^1/2 G Sigma^1/2 itself."""
    rng = np.random.default_rng(1)
    h, g = rng.standard_normal((2, 60, 5)) * [3, 1, 1, 0.5, 2] + 4
    sums = Moments.none(3, 5)
    for b in range(3):
        rows = slice(20 * b, 20 * b + 20)
        sums.add(b, torch.from_numpy(h[rows]), torch.from_numpy(np.stack([g[rows], -g[rows]])))
    sigma, G = np.cov(h.T, bias=True), g.T @ g / 60
    root = sqrtm(sigma)
    values = np.linalg.eigvalsh(sigma)[::-1]
    found = dimension.counts(sums, np.ones(3))
    for m, name in ((0, "pr"), (1, "pr_defl1"), (2, "pr_defl2"), (4, "pr_defl4")):
        assert found[name] == pytest.approx(values[m:].sum() ** 2 / (values[m:] ** 2).sum(), rel=1e-9)
    of_both = np.linalg.eigvalsh(root @ G @ root)
    assert found["dim_fisher"] == pytest.approx(of_both.sum() ** 2 / (of_both**2).sum(), rel=1e-9)
    assert found["energy"] == pytest.approx(of_both.sum(), rel=1e-9)
    none = dimension.counts(Moments.none(3, 5), np.ones(3))
    assert np.isnan(list(none.values())).all()


def test_the_interval_of_a_mean_is_students():
    x = np.random.default_rng(0).standard_normal(12)
    half = dimension.jackknife_half([np.delete(x, i).mean() for i in range(12)])
    assert half == pytest.approx(2.20099 * x.std(ddof=1) / 12**0.5, rel=1e-5)
    assert np.isnan(dimension.jackknife_half([1.0, 2.0]))


@dataclass(frozen=True, eq=False)
class Planted(Hook):
    """The same model and function: a large constant vector is added at position 0 where h is taken, and taken
    away where it is given back.
    """

    def shift(self, h):
        out = torch.zeros_like(h)
        out[:, 0] = 300 * torch.linspace(-1, 2, h.shape[-1], dtype=h.dtype)
        return out

    def head(self, input_ids):
        h = super().head(input_ids)
        return h + self.shift(h)

    def tail(self, input_ids, h, unembedded=True):
        return super().tail(input_ids, h - self.shift(h), unembedded)


def test_a_planted_sink_collapses_pr_and_not_what_is_without_sinks():
    model = tiny_model(dtype=torch.float32)
    ids = torch.randint(0, 41, (24, 12), generator=torch.Generator().manual_seed(0))
    rows = {}
    for kind in (Hook, Planted):
        hook = kind(model, 1)
        both = moments(hook, ids, activations(hook, ids, 8), 8, np.arange(24), 24, draws=2)
        rows[kind] = dimension.geometry_rows(*both)
    (plain, plain_out), (planted, planted_out) = rows[Hook], rows[Planted]
    assert plain["pr"] > 4 and planted["pr"] < 1.01
    for name in ("pr", "pr_defl1", "dim_fisher", "energy", "log_ratio"):
        assert planted_out[name] == pytest.approx(plain_out[name], rel=1e-4), name
    # G is a mean over positions, so that Sigma^1/2 G Sigma^1/2 over all of them collapses with Sigma: what H3
    # reads does not
    assert planted["dim_fisher"] < 1.01
    assert planted["log_ratio"] == pytest.approx(plain["log_ratio"], abs=0.25)
    assert planted["log_ratio_lo"] < planted["log_ratio"] < planted["log_ratio_hi"]


def test_norms_by_position():
    h = torch.ones(5, 9, 4)
    h[:, 0] *= 20
    rows = {row["position"]: row for row in dimension.norms(h)}
    assert list(rows) == [0, 1, 2, 3, 4] and rows[0]["norm"] == pytest.approx(20) and rows[3]["norm"] == 1
    assert rows[0]["sst_share"] == pytest.approx(7 / 8) and rows[2]["sst_share"] == pytest.approx(1 / 56)


# ------------------------------------------------------------------------------------- canonical correlations
def gaussian_pairs(rho, d: int, n: int, seed: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """x, y [n,d] with these canonical correlations and no others, each side in a basis of its own."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, n, d))
    rho = np.asarray(rho)
    K = len(rho)
    y[:, :K] = rho * x[:, :K] + np.sqrt(1 - rho**2) * y[:, :K]
    return x @ rng.standard_normal((d, d)), y @ rng.standard_normal((d, d))


SPECTRA = {  # rho -> PR of SNR^2, by hand
    (0.9, 0.5): 1.0122,
    (0.9, 0.7, 0.5, 0.3): 1.1153,
    (0.8,) * 4: 4.0,
    (0.95,) * 2 + (0.6,) * 6: 2.0445,
}


@pytest.mark.parametrize("rho, dim", SPECTRA.items())
def test_the_snr_dimension_of_four_spectra(rho, dim):
    assert dimension.snr_dimension(np.array(rho)) == pytest.approx(dim, rel=1e-3)
    x, y = gaussian_pairs(rho, 12, 20_000)
    (row,) = dimension.canonical_rows(x, y, np.arange(20_000) // 100, (0.0,))
    assert row["dimension"] == pytest.approx(dim, rel=0.1)
    assert row["mi"] == pytest.approx(-0.5 * np.log(1 - np.square(rho)).sum(), rel=0.05)


def test_independent_pairs_are_refused_and_what_is_fitted_is_not_held_out():
    """20 channels each, 200 positions to fit: 1 nat there and none beyond."""
    pairs = gaussian_pairs((), 64, 8192)
    rows = dimension.canonical_rows(*pairs, np.arange(8192) // 64, (0.0, 0.5, 1.0, 2.0))
    assert mutual_information.refusals([row | {"mi_se": 0.0} for row in rows], None) == ["null"] * 4
    (row,) = dimension.canonical_rows(*gaussian_pairs((), 20, 400), np.arange(400), (0.0,))
    assert row["mi_fit"] > 0.8 and row["mi"] < 0.15 and row["mi_null"] < 0.15
