"""topk_encode on the CPU: every screen gives what no screen gives, to the bit, whatever is put in; and that
is the definition.
"""

import os

from helpers import process
from transport_geometry import ROOT, kernels

import pytest
import torch
from test_kernels import by_definition, gamma, needs_ext

pytestmark = needs_ext
SCREENS = ("none", "own", "integers")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(N=200, d=96, F=3000):
    return draw(N, d), draw(F, d, seed=1) / d**0.5, 0.1 * draw(F, seed=2)


@pytest.fixture(autouse=True)
def _measured():
    yield
    if kernels.BUILT:
        kernels._module.screen_first("measured")


def by_screen(h, W, b, k):
    """{screen: (values as integers, indices)}"""
    found = {}
    for screen in SCREENS:
        kernels._module.screen_first(screen)
        values, indices = torch.ops.tg.topk_encode(h, W, b, k)
        found[screen] = values.view(torch.int32 if h.dtype == torch.float32 else torch.int64), indices
    return found


def assert_same(h, W, b, k):
    none, *others = by_screen(h, W, b, k).values()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(none, other))
    return none[0].view(h.dtype), none[1]


# Each makes (h, W, b) of `problem` into what might mislead a bound.
def outlier_dimensions(h, W, b):
    h[:, :3] *= 1000
    W[:, 5] *= 1e4


def one_heavy_token(h, W, b):
    h[0, 7] = 3e3


def equal_latents(h, W, b):
    W[:], b[:] = W[:10].repeat(300, 1), b[:10].repeat(300)


def near_ties(h, W, b):
    equal_latents(h, W, b)
    W *= 1 + 1e-7 * draw(len(W), 1, seed=3)


SCALES = {  # of h, W, b
    "denormal tokens": (1e-40, 1, 0),
    "denormal latents": (1, 1e-42, 1e-40),
    "products that vanish": (1e-30, 1e-12, 0),
    "huge norms": (1e18, 1e18, 1),
    "overflow": (1e30, 1e15, 1),
    "huge bias": (1, 1, 1e38),
    "all zero": (0, 1, 0),
}


def not_finite(h, W, b):
    h[3], h[5, 7], h[9] = float("nan"), float("inf"), 0
    h[10] *= 1e25
    h[11] *= 1e-30
    W[7], W[17, 3], W[1000:1400] = float("nan"), float("-inf"), 0
    b[8], b[9], b[10:30] = float("nan"), float("inf"), float("-inf")


def all_negative(h, W, b):
    h.abs_()
    W.abs_().neg_()
    b *= 0


MISLEADING = (outlier_dimensions, one_heavy_token, equal_latents, near_ties, not_finite, all_negative)


@pytest.mark.parametrize(
    "change", [*MISLEADING, *SCALES], ids=lambda change: getattr(change, "__name__", change)
)
def test_every_screen_gives_what_none_gives(change):
    h, W, b = problem()
    if change in SCALES:
        for x, scale in zip((h, W, b), SCALES[change]):
            x *= scale
    else:
        change(h, W, b)
    values, indices = assert_same(h, W, b, 24)
    if values.isfinite().all():  # and that is the definition, within the rounding of a sum of d products
        want = by_definition(h, W, b, 24)[0].sort(1).values
        room = gamma(97) * (h.double().norm(dim=1)[:, None] * W.double().norm(dim=1).max() + b.abs().max())
        room += 97 * 2.0**-126  # where digits are lost below the smallest normal number
        assert ((values.double().sort(1).values - want).abs() <= room).all()


@pytest.mark.parametrize(
    "N,d,F,k", [(1, 32, 7, 3), (300, 64, 3000, 700), (65, 33, 1025, 1025), (257, 40, 2048, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_shape_gives_what_none_gives(N, d, F, k, dtype):
    assert_same(*(x.to(dtype) for x in problem(N, d, F)), k)


def test_a_latent_that_only_the_last_digits_decide():
    """Pairs of latents whose pre-activations differ in the last bit of float32, thousands of times."""
    h, W, b = problem(100, 64, 4000)
    W[2000:] = W[:2000]
    b[2000:] = torch.nextafter(b[:2000], torch.tensor(1.0))
    _, indices = assert_same(h, W, b, 50)
    assert (indices >= 2000).any()


def test_the_bounds_hold_and_separate():
    """A screen whose bound is seen not to hold, or leaves too much, passes a token on: none here."""
    h, W, b = problem(500, 256, 4096)
    exact = kernels._module.int8_gemm_cost() < float("inf")
    for screen in ("own", "integers"):
        kernels._module.screen_first(screen)
        kernels._module.fallback_tokens()
        for tokens, bias in ((h, b), (h, 0 * b), (1e-6 * h, 300 * b)):
            torch.ops.tg.topk_encode(tokens, W, bias, 32)
        assert kernels._module.fallback_tokens() == (0, 0)
    torch.ops.tg.topk_encode(h, W[:1].repeat(4096, 1), 0 * b, 32)  # equal latents no screen can separate
    assert kernels._module.fallback_tokens() == (500 * exact, 500)


@pytest.mark.parametrize("in_tokens", [False, True])
def test_what_8_bits_round_away_all_in_one_direction(in_tokens):
    """Rows of integers up to 127 are exact in 8 bits. Others, larger by .45 in every dimension, look the same
    there; only the bound knows that they may win.
    """
    d, F = 64, 2000
    exact = torch.randint(20, 100, (F, d), generator=torch.Generator().manual_seed(0)).float()
    exact[:, 0] = 127
    more = exact + 0.45
    more[:, 0] = 127
    ones = torch.ones(1, d)
    if in_tokens:  # the first half of the latents takes from a token what the second half gives
        h, W = more[:40].clone(), torch.cat([-ones, ones]).repeat(F // 2, 1)
        b = torch.where(W[:, 0] > 0, 0.0, 2 * h.sum(1).mean() - 20) + torch.linspace(0, 2000, F)
    else:
        order = exact.sum(1).argsort()
        h, W, b = ones.repeat(40, 1), exact[order], torch.zeros(F)
        W[::2] = W[::2] + 0.45 * (torch.arange(d) > 0)
    kernels._module.fallback_tokens()
    assert_same(h, W, b, 10)
    assert kernels._module.fallback_tokens() == (0, 0)


LIMITED = """
import torch
from transport_geometry import kernels
from test_encode import assert_same, problem
assert "not exact" in kernels.describe(), kernels.describe()
torch.set_float32_matmul_precision("medium")
kernels._module.screen_first("integers")
assert_same(*problem(), 24)
"""


@pytest.mark.slow
def test_a_library_that_saturates_is_found_out():
    """oneDNN without 8-bit products adds pairs of them in 16 bits: nearly every sum is wrong."""
    if kernels._module.int8_gemm_cost() >= kernels._module.MAX_INT8_GEMM_COST:
        pytest.skip("this CPU has no exact 8-bit products to be taken away")
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    env = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": path}
    process("-c", LIMITED, env=env)
