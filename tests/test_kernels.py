"""The operators against float64, against the dense sparse autoencoder and against their own other paths.

No recorded output.
"""

import emulate
from helpers import PEAK, Largest, process
from transport_geometry import kernels
from transport_geometry.kernels import (
    STATS,
    Adam,
    adam_rows,
    adam_vector,
    gather_dot,
    gradient_weighted_distortion,
    reconstruction_error,
    sparse_decode,
    topk_encode,
)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

EXT = pytest.param(
    "ext", marks=pytest.mark.skipif(not kernels.BUILT, reason=f"extension not built: {kernels.WHY_NOT}")
)
PATHS = pytest.mark.parametrize("path", ["ref", EXT])
needs_ext = pytest.mark.skipif(not kernels.BUILT, reason=f"extension not built: {kernels.WHY_NOT}")


@pytest.fixture(autouse=True)
def _restore():
    yield
    kernels.use(None)


@pytest.fixture
def device(request, monkeypatch):
    """The CPU, the CUDA sources on the CPU (emulate.py), or a GPU; more of the last two in test_cuda.py."""
    return emulate.place(request.param, monkeypatch)[0]


DEVICES = pytest.mark.parametrize("device", ["cpu", *emulate.GPU], indirect=True)


def made(N, d, F, k, seed=0, dtype=torch.float64, integer=False, device="cpu"):
    """h, W_enc, b_enc, W_dec, b_dec, g; small integers where ties are wanted (every product is then
    exact).
    """
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape):
        if integer:
            return torch.randint(-2, 3, shape, generator=gen)
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    return [draw(*shape).to(dtype).to(device) for shape in ((N, d), (F, d), (F,), (F, d), (d,), (N, d))]


def by_definition(h, W, b, k):
    """Rank by (value, then lower index) with a stable sort of the dense float64 pre-activations."""
    pre = h.double() @ W.double().T + b.double()
    index = pre.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return pre.gather(1, index).relu(), index


def dense_code(values, indices, F):
    return torch.zeros(len(values), F, dtype=values.dtype).scatter(1, indices, values)


shapes = st.tuples(
    st.integers(0, 150), st.integers(1, 70), st.integers(1, 2300), st.floats(0, 1), st.integers(0, 99)
)


# ---------------------------------------------------------------------------------------------------- encode
@PATHS
@settings(max_examples=25, deadline=None)
@given(shape=shapes, integer=st.booleans(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_encode_is_the_definition(path, shape, integer, dtype):
    N, d, F, share, seed = shape
    k = max(1, round(share**3 * F))
    if dtype == torch.float32:
        integer = True  # exact in float32 as well: index sets must be equal, ties and all
    h, W, b, *_ = made(N, d, F, k, seed, dtype, integer)
    kernels.use(path)
    values, indices = topk_encode(h, W, b, k)
    want, index = by_definition(h, W, b, k)
    assert torch.equal(indices, index)
    torch.testing.assert_close(values.double(), want, rtol=1e-12, atol=1e-12)


@PATHS
def test_nan_and_infinity_stay_in_bounds_and_visible(path):
    h, W, b, *_ = made(40, 8, 1500, 6, dtype=torch.float32)
    b[10:1400] = float("-inf")
    b[700] = float("nan")
    h[3], h[5] = float("nan"), float("inf")
    kernels.use(path)
    values, indices = topk_encode(h, W, b, 6)
    assert values.isnan().any(1).all() and indices.ge(0).all() and indices.lt(1500).all()
    assert all(len(set(row.tolist())) == 6 for row in indices)


@needs_ext
@pytest.mark.parametrize("N", [1, 63, 300])
def test_bits_do_not_depend_on_threads(N):
    """But the encoder's last ones: its GEMM is the library's, and MKL's AVX2 kernels cut it by the number of
    threads.
    """
    h, W, b, W_dec, b_dec, g = made(N, 96, 2500, 9, dtype=torch.float32)
    values, indices = topk_encode(h, W, b, 9)
    results, encoded = [], []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        encoded.append(topk_encode(h, W, b, 9))
        results.append(
            [
                sparse_decode(values, indices, W_dec, b_dec),
                *torch.ops.tg.scatter_rows(values, indices, g, 2500),
                torch.ops.tg.gather_dot(g, W, indices),
                *gradient_weighted_distortion(values, indices, W_dec, b_dec, h, g, True),
                *reconstruction_error(values, indices, W_dec, b_dec, h),
                *(updated := [W_dec.clone(), W.clone().square(), b.new_ones(W.shape)]),
                *adam_rows(updated[0], (updated[1], updated[2]), Adam(1e-2, 3, 1e-8), values, indices, g),
            ]
        )
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))
    (one, at), (two, at_two) = encoded
    bound = 2 * gamma(97) * (h.double().norm(dim=1) * W.double().norm(dim=1).max() + b.abs().max())
    assert torch.equal(at, at_two) and ((one - two).double().abs() <= bound[:, None]).all()


# ----------------------------------------------------------------------- decode, distortion: within rounding
def gamma(n):
    """How far n float32 roundings in a row move a number, relatively, at most (Higham 2002, Lemma 3.1)."""
    return n * 2.0**-24 / (1 - n * 2.0**-24)


NO_BIAS = torch.zeros(())


def product(A, B, bias=NO_BIAS):
    """A B + bias in float64, and how far float32 may be from it: a sum of n terms, in any order, fused or
    not, rounds each of them n times at most (Higham 2002, (3.5)). Zeros round nothing."""
    A, B, bias = A.double(), B.double(), bias.double()
    n = (A != 0).double() @ (B != 0).double() + (bias != 0)
    return A @ B + bias, gamma(n) * (A.abs() @ B.abs() + bias.abs())


def assert_within(what, got, truth, bound):
    error = (got.cpu().double() - truth).abs()
    assert error.shape == bound.shape
    assert (error <= bound).all(), f"{what}: {(error / bound).nan_to_num(0).max():.3g} bounds"


@DEVICES
@PATHS
@pytest.mark.parametrize(
    "N,d,F,k", [(1, 1, 1, 1), (37, 137, 300, 7), (200, 64, 1025, 32), (5, 515, 64, 64), (0, 8, 9, 3)]
)
def test_decode_and_backward_are_within_rounding(device, path, N, d, F, k):
    h, W, b, W_dec, b_dec, g = made(N, d, F, k, dtype=torch.float32)
    values, indices = by_definition(h, W, b, k)
    values = values.float()
    Z = dense_code(values, indices, F)
    kernels.use(path)
    v, i, W_, b_, g_ = (x.to(device) for x in (values, indices, W_dec, b_dec, g))
    rows, sums = kernels._call("scatter_rows", g_, v, i, g_, F)
    assert_within("h_hat", sparse_decode(v, i, W_, b_), *product(Z, W_dec, b_dec))
    assert_within("rows", rows, *product(Z.T, g))
    assert_within("sums", sums[:, None], *product(Z.T, torch.ones(N, 1)))
    dots = kernels._call("gather_dot", g_, g_, W_, i)
    assert_within("dots", dots, *(x.gather(1, indices) for x in product(g, W_dec.T)))


@PATHS
def test_rows_of_a_latent_that_fires_on_every_token(path):
    """20000 equal terms, whose roundings all go one way: a running float32 sum is off by thousands of them. A
    library's matmul may be one (MKL's is on an AMD CPU); the extension adds blocks of 32 in float64."""
    N = 20000
    coef = torch.tensor([0.1, 0.7]).expand(N, 2).contiguous()
    x = torch.linspace(0.1, 0.9, 16).expand(N, 16).contiguous()
    indices = torch.tensor([0, 2]).expand(N, 2).contiguous()
    kernels.use(path)
    rows, sums = kernels._call("scatter_rows", x, coef, indices, x, 3)
    bound = gamma({"ref": N, "ext": 32 + 1}[path])  # 1: the float64 total becomes float32
    total = N * torch.tensor([0.1, 0.0, 0.7]).double()
    products = total[:, None] * x[0].double()
    assert_within("rows", rows, products, bound * products)
    assert_within("sums", sums, total, bound * total)


@DEVICES
@PATHS
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_distortion_statistics(device, path, scale):
    """At scale 1e4, |h| is about 1e5 |delta|: sums formed from |h|^2 - 2 h.h_hat + |h_hat|^2 would have no
    digit left.
    """
    N, d, F, k = 150, 130, 700, 11
    h, W, b, W_dec, b_dec, g = made(N, d, F, k, dtype=torch.float32)
    values, indices = (x.to(t) for x, t in zip(by_definition(h, W, b, k), (torch.float32, torch.int64)))
    b_dec = b_dec * scale
    kernels.use(path)
    h_hat = sparse_decode(values, indices, W_dec, b_dec)
    h = (h_hat + 0.1 * torch.randn(N, d, generator=torch.Generator().manual_seed(1))) if scale > 1 else h
    args = [x.to(device) for x in (values, indices, W_dec, b_dec, h, g)]
    stats, kept = (x.cpu() for x in gradient_weighted_distortion(*args, want_h_hat=True))
    assert gradient_weighted_distortion(*args)[1].shape == (0, d)
    y, x, grad = kept.double(), h.double(), g.double()
    delta = y - x
    terms = torch.stack([grad * delta, delta**2, y**2, x * y, x**2], 1)
    truth, size = terms.sum(2), terms.abs().sum(2)
    error = (stats.double() - truth).abs()
    # a term is delta (rounded, in its square twice), a product and d sums, here and in the truth: in float64,
    # or in float32 on a GPU's plain path; then comes the last rounding, to float32
    wide = 2.0**-24 if (path, device) == ("ref", "cuda") else 2.0**-53
    allowed = 2.0**-24 * truth.abs() + 2 * (d + 3) * wide * size
    worst = dict(zip(STATS, (error / allowed).amax(0).tolist()))
    assert stats.shape == (N, len(STATS)) and (error <= allowed).all(), worst
    if device == "cpu":
        assert torch.equal(kept, h_hat)


@pytest.mark.parametrize("device", ["cpu", emulate.CUDA])
@PATHS
@pytest.mark.parametrize("N,d,F,k", [(1, 1, 1, 1), (37, 137, 300, 7), (200, 64, 1025, 32), (0, 8, 9, 3)])
def test_reconstruction_error_is_within_rounding(device, path, N, d, F, k):
    h, W, b, W_dec, b_dec, _ = made(N, d, F, k, dtype=torch.float32)
    values, indices = by_definition(h, W, b, k)
    kernels.use(path)
    operands = (x.to(device) for x in (values.float(), indices, W_dec, b_dec, h))
    delta, dots, square = (x.cpu() for x in reconstruction_error(*operands))
    Z = dense_code(values.float(), indices, F)
    h_hat, bound = product(Z, W_dec, b_dec)
    assert_within("delta", delta, h_hat - h.double(), bound + gamma(1) * (h_hat.abs() + h.abs() + bound))
    assert_within("dots", dots, *(x.gather(1, indices) for x in product(delta, W_dec.T)))
    exact = delta.double().square().sum(1)
    assert_within("square", square, exact, gamma(d + 1) * exact)


# ------------------------------------------------------------------------------------------------- optimiser
@PATHS
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("N,d,F,k", [(37, 137, 300, 7), (200, 64, 1025, 32)])
def test_adam_is_torchs(path, unit, dtype, N, d, F, k):
    """Ten steps with gradients of a code and more rows; latents without an entry move by their moments. In
    float32 its distance from float64 is less than twice that of PyTorch's own; without unit both are near
    float32's rounding."""
    kernels.use(path)
    made_ = made(N, d, F, k)
    start = made_[1] / made_[1].norm(dim=1, keepdim=True)
    results = []
    for kind in (torch.float64, dtype):
        W = start.to(kind, copy=True)
        leaf = W.clone().requires_grad_()
        optimiser = torch.optim.Adam([leaf], lr=1e-3, eps=1e-9)
        moments = (torch.zeros_like(W), torch.zeros_like(W))
        for t in range(1, 11):
            h, W_enc, b, *_, g = (x.to(kind) for x in made(N, d, F, k, seed=t))
            coef, indices = by_definition(*(x.double() for x in (h, W_enc, b)), k)
            rows = torch.arange(t, F, 7)
            coef, more = coef.to(kind), h[:1].expand(len(rows), d)
            before = W.clone()
            sums, back = adam_rows(W, moments, Adam(1e-3, t, 1e-9), coef, indices, g, (rows, more), unit)
            Z = dense_code(coef, indices, F)
            leaf.grad = Z.T @ g
            leaf.grad[rows] += more
            if unit:
                leaf.grad -= (leaf.grad * leaf.detach()).sum(1, keepdim=True) * leaf.detach()
            optimiser.step()
            if unit:
                leaf.data /= leaf.data.norm(dim=1, keepdim=True)
            close = 1e-11 if kind == torch.float64 else 1e-4
            torch.testing.assert_close(sums, Z.sum(0), rtol=close, atol=close)
            torch.testing.assert_close(back, Z.sum(0) @ before, rtol=close, atol=close)
        results.append((W, leaf.detach()))
    (truth, theirs), (ours, torchs) = results
    torch.testing.assert_close(truth, theirs, rtol=1e-11, atol=1e-13)
    assert ((truth - start).norm(dim=1) > 1e-4).double().mean() > 0.9
    if dtype == torch.float32:
        mine, its = ((x.double() - truth).square().mean().sqrt() for x in (ours, torchs))
        assert mine < 2 * its, (mine / its).item()


@PATHS
def test_adam_of_a_vector_is_torchs(path):
    kernels.use(path)
    w = torch.linspace(-1, 1, 130, dtype=torch.float64)
    leaf, moments = w.clone().requires_grad_(), (torch.zeros_like(w), torch.zeros_like(w))
    optimiser = torch.optim.Adam([leaf], lr=1e-3, eps=1e-9)
    for t in range(1, 6):
        leaf.grad = torch.sin(w * t)
        adam_vector(w, moments, Adam(1e-3, t, 1e-9), leaf.grad.clone())
        optimiser.step()
    torch.testing.assert_close(w, leaf.detach(), rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------------- gradients
@PATHS
@pytest.mark.parametrize("N,d,F,k", [(30, 9, 50, 4), (7, 5, 6, 6), (64, 16, 1100, 1)])
def test_gradients_equal_the_dense_autoencoder(path, N, d, F, k):
    def loss_and_grads(dense):
        leaves = [x.clone().requires_grad_() for x in made(N, d, F, k)[:5]]
        h, W, b, W_dec, b_dec = leaves
        if dense:
            pre = h @ W.T + b
            keep = dense_code(torch.ones(N, k, dtype=h.dtype), pre.topk(k).indices, F)
            h_hat = (pre * keep).relu() @ W_dec + b_dec
        else:
            h_hat = sparse_decode(*topk_encode(h, W, b, k), W_dec, b_dec)
        loss = (h_hat - h).pow(2).mean()
        return torch.autograd.grad(loss, leaves)

    kernels.use(path)
    for a, want in zip(loss_and_grads(False), loss_and_grads(True)):
        torch.testing.assert_close(a, want, rtol=1e-10, atol=1e-12)


@PATHS
def test_the_gradient_of_gather_dot(path):
    h, W, b, *_ = made(6, 4, 9, 3)
    kernels.use(path)
    indices = topk_encode(h, W, b, 3)[1]
    operands = (h.requires_grad_(), W.requires_grad_())
    assert torch.autograd.gradcheck(lambda *a: gather_dot(*a, indices), operands)


@needs_ext
@pytest.mark.parametrize("device", ["cpu", emulate.CUDA])
def test_opcheck(device):
    h, W, b, W_dec, b_dec, g = made(9, 5, 30, 4, dtype=torch.float32, device=device)
    values, indices = topk_encode(h, W, b, 4)

    def leaf(x):
        return x.detach().clone().requires_grad_()

    opcheck, tg = torch.library.opcheck, torch.ops.tg
    opcheck(tg.topk_encode, (leaf(h), leaf(W), leaf(b), 4))
    opcheck(tg.sparse_decode, (leaf(values), indices, leaf(W_dec), leaf(b_dec)))
    opcheck(tg.gradient_weighted_distortion, (values, indices, W_dec, b_dec, h, g, True))
    opcheck(tg.gather_dot, (g, W_dec, indices))
    opcheck(tg.scatter_rows, (values, indices, g, 30))
    if device == "cpu":
        opcheck(tg.reconstruction_error, (values, indices, W_dec, b_dec, h))
        more, m, v = (torch.tensor([3, 7]), h[:2]), torch.zeros_like(W), torch.ones_like(W)
        adam = Adam(1e-3, 2, 1e-8).numbers()
        opcheck(tg.adam_rows_, (W_dec, m, v, values, indices, g, *more, *adam, True))


# ------------------------------------------------------------------------------------- memory, bad arguments
STEP = """
from transport_geometry import kernels
import torch
torch.set_num_threads(2)
kernels.use("ext")  # whatever KERNELS says
N, d, F, k = 4096, 8, 65536, 8
h, W, b, c = torch.randn(N, d), torch.randn(F, d), torch.zeros(F), torch.zeros(d)
def step(n):
    values, indices = kernels.topk_encode(h[:n].requires_grad_(), W.requires_grad_(), b, k)
    kernels.sparse_decode(values, indices, W, c).pow(2).mean().backward()
    kernels.gradient_weighted_distortion(values.detach(), indices, W, c, h[:n], h[:n], True)
step(256)
before = peak()
step(N)
print(peak() - before)
"""


@needs_ext
def test_no_array_of_tokens_by_latents():
    """A step on 4096 tokens x 65536 latents (1 GB if dense, 128 MB if only a thread's tokens were) may add 48
    MB to that of 256 tokens.
    """
    extra = int(process("-c", PEAK + STEP).stdout) / 1024
    assert extra < 48, f"{extra:.0f} MB"


@PATHS
def test_largest_tensor_any_operator_makes(path, monkeypatch):
    """The plain path keeps to its tile; the extension's own tile is below the dispatcher and measured
    above.
    """
    monkeypatch.setattr(kernels, "TILE", 1 << 16)
    N, F, d, k, limit = 1024, 1024, 8, 4, 1 << 16

    h, W, b, W_dec, b_dec, g = (x.requires_grad_() for x in made(N, d, F, k, dtype=torch.float32))
    kernels.use(path)
    with Largest() as seen:
        values, indices = topk_encode(h, W, b, k)
        sparse_decode(values, indices, W_dec, b_dec).pow(2).sum().backward()
        gradient_weighted_distortion(values.detach(), indices, W_dec, b_dec, h, g, True)
    assert N * d <= seen.most <= limit < N * F


@PATHS
def test_bad_arguments(path):
    h, W, b, W_dec, b_dec, g = made(4, 3, 8, 2, dtype=torch.float32)
    kernels.use(path)
    values, indices = topk_encode(h, W, b, 2)
    code = values, indices, W_dec, b_dec
    m, adam = torch.zeros_like(W_dec), Adam(1e-3, 1, 1e-8)
    for wrong, operator, operands in (
        *(("k=", topk_encode, (h, W, b, k)) for k in (0, -1, 9, True, 2.0)),
        ("topk_encode", topk_encode, (h[0], W, b, 2)),
        ("topk_encode", topk_encode, (h, W[:, :2], b, 2)),
        ("topk_encode", topk_encode, (h, W, b[:3], 2)),
        ("topk_encode", topk_encode, (h.double(), W, b, 2)),
        ("topk_encode", topk_encode, (h.int(), W.int(), b.int(), 2)),
        ("topk_encode", topk_encode, (h, W.to("meta"), b, 2)),
        ("sparse_decode", sparse_decode, (values, indices.int(), W_dec, b_dec)),
        ("sparse_decode", sparse_decode, (values[:3], indices, W_dec, b_dec)),
        ("sparse_decode", sparse_decode, (values, indices, W_dec, b_dec[:2])),
        ("g is", gradient_weighted_distortion, (*code, h, g[:2])),
        ("h is", reconstruction_error, (*code, h[:2])),
        ("indices is", gather_dot, (h, W, indices.int())),
        ("v is", adam_rows, (W_dec, (m, m[:2]), adam, values, indices, g)),
        ("indices is", adam_rows, (W_dec, (m, m), adam, values[:3], indices, g)),
        ("x is", adam_rows, (W_dec, (m, m), adam, values, indices, g[:, :2])),
        ("more is", adam_rows, (W_dec, (m, m), adam, values, indices, g, (torch.tensor([1]), g))),
    ):
        with pytest.raises(ValueError, match=wrong):
            operator(*operands)
    for outside in (8, -1, 2**62):
        wrong = indices.clone()
        wrong[2, 1] = outside
        for follow in (
            lambda: sparse_decode(values, wrong, W_dec, b_dec),
            lambda: gradient_weighted_distortion(values, wrong, W_dec, b_dec, h, g),
            lambda: kernels._call("scatter_rows", g, values, wrong, g, 8),
            lambda: adam_rows(W_dec, (m, m.clone()), adam, values, wrong, g),
        ):
            with pytest.raises((RuntimeError, IndexError)):
                follow()


def test_every_other_dtype_runs_plain_pytorch():
    h, W, b, W_dec, b_dec, _ = made(10, 6, 20, 3, dtype=torch.bfloat16)
    values, indices = topk_encode(h.requires_grad_(), W, b, 3)
    sparse_decode(values, indices, W_dec, b_dec).sum().backward()
    assert h.grad.dtype == torch.bfloat16
    with pytest.raises(ValueError):
        kernels.use("fast")
