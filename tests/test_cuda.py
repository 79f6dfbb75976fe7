"""csrc/ops_cuda.cu against the definition, the CPU's kernels and float64: on the emulator (emulate.py), and
the same cases on a GPU where there is one.

What test_kernels.py asks of every device is there. Here is what only CUDA's code can get wrong: tiles, ties
and k at its edges, indices outside, blocks and threads in any order. Small integers where ties are wanted:
every sum is then exact.
"""

import contextlib

import emulate
from transport_geometry import ROOT, kernels

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

CPU = torch.ops.tg  # before `gpu` puts another in its place
SMALL = dict(TILE=1, TILE_TOKENS=3)
INF, NAN = float("inf"), float("nan")
some = settings(max_examples=30, deadline=None)
schedules = st.tuples(st.integers(0, 2**32), st.sampled_from([0, 2, 5, 40]))


class Gpu:
    """The operators with operands and results moved to the device and back."""

    def __init__(self, device, emulated):
        self.device, self.emulated, self.ops = device, emulated, torch.ops.tg

    def schedule(self, seed=0, every=0):
        if self.emulated:
            self.emulated.schedule(seed, every)

    def __getattr__(self, op):
        if op not in kernels.OPS:
            raise AttributeError(op)

        def call(*args):
            moved = [a.to(self.device) if isinstance(a, torch.Tensor) else a for a in args]
            out = getattr(self.ops, op)(*moved)
            return out.cpu() if isinstance(out, torch.Tensor) else tuple(x.cpu() for x in out)

        return call


@pytest.fixture(scope="module", params=[*emulate.GPU, pytest.param("small", marks=emulate.EMULATED.marks)])
def gpu(request):
    """ "small" is emulated with tiles of 3 tokens and 600 latents. Memory that nobody has written is NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated
    with pytest.MonkeyPatch.context() as patch:
        small = request.param == "small"
        yield Gpu(*emulate.place("emulated" if small else request.param, patch, **(SMALL if small else {})))
    torch.use_deterministic_algorithms(deterministic)


def draw(seed, *shape, integer=False):
    gen = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-2, 3, shape, generator=gen).float() if integer else torch.randn(*shape, generator=gen)
    )


def by_definition(pre, k):
    """The k largest of each row, NaN above all, of equal ones the first; ascending by index."""
    rank = torch.where(pre.isnan(), INF, pre.double().clamp(-1e300, 1e300))
    index = rank.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return pre.gather(1, index).relu(), index


def assert_same(got, want):
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------------------------------------- encode
@some
@given(
    N=st.integers(0, 7),
    d=st.integers(0, 9),
    F=st.integers(1, 1500),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
    how=schedules,
)
def test_encode_is_the_definition_ties_and_all(gpu, N, d, F, share, seed, how):
    k = max(1, round(share**3 * F))
    h, W, b = (draw(seed + i, *shape, integer=True) for i, shape in enumerate(((N, d), (F, d), (F,))))
    gpu.schedule(*how)
    got = gpu.topk_encode(h, W, b, k)
    assert_same(got, by_definition(h @ W.T + b, k))
    if d:
        assert_same(got, CPU.topk_encode(h, W, b, k))
        assert_same(got, kernels.topk_encode_ref(h, W, b, k))


NUMBERS = [NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, -1.0, 1.0000001]


@some
@given(
    N=st.integers(1, 5),
    F=st.integers(1, 1200),
    share=st.floats(0, 1),
    kinds=st.lists(st.sampled_from(NUMBERS), min_size=1),
    seed=st.integers(0, 999),
    how=schedules,
)
def test_every_kind_of_number(gpu, N, F, share, kinds, seed, how):
    """Pre-activations that are exactly these: from the bias, and from the weights."""
    k = max(1, round(share**2 * F))
    gen = torch.Generator().manual_seed(seed)
    x = torch.tensor(kinds)[torch.randint(0, len(kinds), (F,), generator=gen)]
    gpu.schedule(*how)
    want = by_definition(x.expand(N, F), k)
    assert_same(gpu.topk_encode(torch.zeros(N, 1), torch.zeros(F, 1), x, k), want)
    assert_same(gpu.topk_encode(torch.ones(N, 1), x[:, None], torch.zeros(F), k), want)


@pytest.mark.parametrize("F", [1, 2, 127, 128, 129, 511, 512, 513, 2048, 2049, 4100])
def test_k_at_its_edges(gpu, F):
    for k in sorted({1, 2, 33, F // 2, F - 1, F, 2048}):
        if not 1 <= k <= min(F, kernels.MAX_K_CUDA) or (F > 600 and k in (2, 33)):
            continue
        rising = torch.arange(F).float()
        for b in (rising, -rising, torch.zeros(F), draw(F, F)):
            got = gpu.topk_encode(torch.zeros(1, 1), torch.zeros(F, 1), b, k)
            assert_same(got, by_definition(b[None], k))


@pytest.mark.parametrize("N,d,F,k", [(20, 33, 9001, 7), (1, 8, 16, 16), (70, 16, 5000, 130)])
def test_encode_of_several_tiles(gpu, N, d, F, k):
    N *= 1 if gpu.emulated else 60
    h, W, b = draw(0, N, d, integer=True), draw(1, F, d, integer=True), draw(2, F, integer=True)
    gpu.schedule()
    assert_same(gpu.topk_encode(h, W, b, k), by_definition(h @ W.T + b, k))


def canonical(h, W, b):
    """float64 sums rounded once. Another order of summation may round one in 2^29 of them the other way."""
    return (h.double() @ W.double().T + b.double()).float()


def plain(h, W, b):
    pass


def signs(seed, *shape):
    return draw(seed, *shape).sign()


def lost_in_the_weights(h, W, b):
    """In bfloat16 all latents are the same to token 0; what rounding takes from each lies along the token."""
    pattern = signs(1, h.shape[1])
    for f in range(len(W)):
        W[f] = pattern[torch.randperm(len(pattern), generator=torch.Generator().manual_seed(f))]
    h[0] = signs(0, h.shape[1])
    W *= h[0]
    W += 2.0**-10 * signs(2, len(W), 1) * torch.arange(1, len(W) + 1)[:, None] / len(W) * h[0]
    b *= 0


def lost_in_the_token(h, W, b):
    """The same, but what rounding takes is the token's."""
    lost_in_the_weights(h, W, b)
    W[:] = W.round()
    h[0] += 2.0**-10 * signs(3, h.shape[1])


def best_ones_screened_low(h, W, b):
    """The last 20 latents beat 40 early ones by what rounding takes from all of them, which is as much as it
    can be; in bfloat16 they lie below what those have at least. All others are small."""
    h[0] = signs(0, h.shape[1])
    W *= 0.05
    W[1:41], W[-20:] = h[0] * (1 - 0.0019), h[0] * (1 + 0.0019)
    W[-20:, 0] -= h[0, 0] * 3 / 32
    b *= 0


def outlier_dimensions(h, W, b):
    h[:, :2] *= 300


def near_ties_by_the_thousand(h, W, b):
    W[200:2600] = W[200] * (
        1 + 1e-7 * torch.randint(0, 9, (2400, 1), generator=torch.Generator().manual_seed(5))
    )


def equal_latents(h, W, b):
    W[200:2600], b[200:2600] = W[200].clone(), 0


def tokens_of_zeros(h, W, b):
    h[1:3], b[:] = 0, 0.5


def denormals(h, W, b):
    h *= 1e-30
    W *= 1e-12
    b *= 0


def less_than_bfloat16_has(h, W, b):
    h *= 1e-39
    b *= 0


def huge_norms(h, W, b):
    h[0] *= 1e38
    h[1] *= 1e30
    W[100:130] *= 3e36


def masked_latents(h, W, b):
    b[:2000] = -INF


def not_numbers(h, W, b):
    h[0, 3], W[7], W[9, 2], b[11], b[12], h[3, 1] = NAN, NAN, INF, NAN, INF, -INF


BASIC = plain, lost_in_the_weights, lost_in_the_token, best_ones_screened_low
TIED = outlier_dimensions, near_ties_by_the_thousand, equal_latents, tokens_of_zeros
EXTREME = denormals, less_than_bfloat16_has, huge_norms, masked_latents, not_numbers


@pytest.mark.parametrize("made", [*BASIC, *TIED, *EXTREME])
@pytest.mark.parametrize("d,F,k", [(36, 2700, 20), (33, 2701, 1)])
def test_encode_is_canonical_whatever_the_screen(gpu, made, d, F, k):
    """What is screened out and what is computed after all: the emulator's screen errs as far as it may, in
    another way each time."""
    h, W, b = draw(0, 5, d), draw(1, F, d), draw(2, F)
    made(h, W, b)
    want = by_definition(canonical(h, W, b), k)
    for seed in range(2):
        gpu.schedule(seed)
        assert_same(gpu.topk_encode(h, W, b, k), want)


def test_encode_of_many_gaussians_is_canonical(gpu):
    h, W, b = draw(0, 20, 64), draw(1, 5003, 64), draw(2, 5003)
    gpu.schedule(3)
    for k in (1, 32, 300):
        assert_same(gpu.topk_encode(h, W, b, k), by_definition(canonical(h, W, b), k))


# ------------------------------------------------------------------------------- decode, distortion, backward
def code(seed, N, k, F, outside=0.0):
    """values, indices, and which of these lie outside [0, F)."""
    gen = torch.Generator().manual_seed(seed)
    indices = torch.rand(N, F, generator=gen).argsort(1)[:, :k].sort(1).values
    values = torch.rand(N, k, generator=gen)
    bad = torch.rand(N, k, generator=gen) < outside
    wild = torch.tensor([-1, F, F + 1, 2**31, 2**32, 2**62, -(2**63), 2**63 - 1])
    return values, torch.where(bad, wild[torch.randint(0, 8, (N, k), generator=gen)], indices), bad


shapes = dict(
    N=st.integers(0, 9),
    d=st.integers(0, 300),
    F=st.integers(1, 60),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
    how=schedules,
)


@some
@given(**shapes)
def test_decode_is_the_cpus_to_the_bit_and_distortion_within_a_rounding(gpu, N, d, F, share, seed, how):
    values, indices, _ = code(seed, N, round(share * F), F)
    W, b, h, g = draw(seed, F, d), draw(seed + 1, d), draw(seed + 2, N, d), draw(seed + 3, N, d)
    gpu.schedule(*how)
    h_hat = gpu.sparse_decode(values, indices, W, b)
    assert torch.equal(h_hat, CPU.sparse_decode(values, indices, W, b))
    stats, kept = gpu.gradient_weighted_distortion(values, indices, W, b, h, g, True)
    assert torch.equal(kept, h_hat)
    alone, none = gpu.gradient_weighted_distortion(values, indices, W, b, h, g, False)
    assert torch.equal(alone, stats) and none.shape == (0, d)
    want = CPU.gradient_weighted_distortion(values, indices, W, b, h, g, False)[0]
    torch.testing.assert_close(stats, want, rtol=3e-7, atol=1e-7)


@some
@given(**{**shapes, "d": st.integers(1, 150)})
def test_an_index_outside_is_never_followed_and_seen_as_nan(gpu, N, d, F, share, seed, how):
    k = round(share * F)
    values, indices, bad = code(seed, N, k, F, outside=0.1)
    W, b, h, g = draw(seed, F, d), draw(seed + 1, d), draw(seed + 2, N, d), draw(seed + 3, N, d)
    gpu.schedule(*how)
    hit, inside = bad.any(1), indices.masked_fill(bad, 0)
    h_hat = gpu.sparse_decode(values, indices, W, b)
    assert h_hat[hit].isnan().all()
    assert torch.equal(h_hat[~hit], gpu.sparse_decode(values, inside, W, b)[~hit])
    stats, _ = gpu.gradient_weighted_distortion(values, indices, W, b, h, g, False)
    assert stats[hit][:, :4].isnan().all() and not stats[:, 4].isnan().any() and not stats[~hit].isnan().any()
    dots = gpu.gather_dot(h, W, indices)
    assert torch.equal(dots.isnan(), bad)
    assert torch.equal(dots[~bad], gpu.gather_dot(h, W, inside)[~bad])
    rows, sums = gpu.scatter_rows(values, indices, h, F)  # nobody knows which row is short of the entry
    want = gpu.scatter_rows(values, inside, h, F)
    if bad.any():
        assert rows.isnan().all() and sums.isnan().all()
    else:
        assert torch.equal(rows, want[0]) and torch.equal(sums, want[1])


@pytest.mark.parametrize("N", [31, 32, 33, 255, 256, 257, 2000])
def test_a_latent_that_fires_on_every_token(gpu, N):
    """Its entries are summed in pieces. Terms that all round one way: a running float32 sum would drift."""
    coef, indices = torch.tensor([0.1, 0.7, 0.3]).repeat(N, 1), torch.tensor([0, 2, 3]).repeat(N, 1)
    indices[:: N // 2, 0] = 1  # and one whose two entries lie before a long segment
    x = draw(N, N, 5).abs()
    gpu.schedule(1)
    rows, sums = gpu.scatter_rows(coef, indices, x, 5)
    Z = torch.zeros(N, 5, dtype=torch.float64).scatter(1, indices, coef.double())
    torch.testing.assert_close(rows.double(), Z.T @ x.double(), rtol=34 * 2.0**-24, atol=0)  # blocks of 32
    torch.testing.assert_close(sums.double(), Z.sum(0), rtol=34 * 2.0**-24, atol=0)


def test_a_latents_row_does_not_depend_on_the_other_latents(gpu):
    N = 700
    coef, x = draw(0, N, 2), draw(1, N, 6)
    indices = torch.tensor([3, 4]).repeat(N, 1)
    alone = gpu.scatter_rows(coef[:, 1:], indices[:, 1:], x, 6)[0][4]
    assert torch.equal(gpu.scatter_rows(coef, indices, x, 6)[0][4], alone)


# ------------------------------------------------------------------------------------------- odds and ends
def test_no_result_depends_on_the_schedule(gpu):
    if not gpu.emulated:
        pytest.skip("a GPU's order is its own")
    h, W, b = draw(0, 5, 8, integer=True), draw(1, 900, 8, integer=True), draw(2, 900, integer=True)
    W_dec, g = draw(3, 900, 8), draw(4, 5, 8)
    first = None
    for seed in range(15):
        gpu.schedule(seed, (0, 2, 3, 7, 30)[seed % 5])
        values, indices = gpu.topk_encode(h, W, b, 34)
        result = [
            values,
            indices,
            gpu.sparse_decode(values, indices, W_dec, b[:8]),
            gpu.gather_dot(g, W_dec, indices),
            *gpu.scatter_rows(values, indices, g, 900),
            *gpu.gradient_weighted_distortion(values, indices, W_dec, b[:8], h, g, True),
        ]
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(first, result))


def test_views_and_empty_operands(gpu):
    h, W, b = draw(0, 6, 40, integer=True), draw(1, 16, 300, integer=True), draw(2, 600, integer=True)
    gpu.schedule()
    got = gpu.topk_encode(h[::2, 3:35:2], W.T, b[::2], 5)
    assert_same(got, by_definition(h[::2, 3:35:2] @ W + b[::2], 5))

    def e(*shape):
        return torch.zeros(*shape)

    def i(*shape):
        return torch.zeros(*shape, dtype=torch.int64)

    assert gpu.topk_encode(e(0, 3), e(5, 3), e(5), 2)[0].shape == (0, 2)
    assert torch.equal(gpu.sparse_decode(e(2, 0), i(2, 0), e(0, 3), torch.ones(3)), torch.ones(2, 3))
    assert gpu.sparse_decode(e(2, 1), i(2, 1), e(0, 3), torch.ones(3)).isnan().all()  # F = 0: all are outside
    assert gpu.gather_dot(e(2, 3), e(0, 3), i(2, 1)).isnan().all()
    assert [x.shape for x in gpu.scatter_rows(e(2, 0), i(2, 0), e(2, 3), 4)] == [(4, 3), (4,)]
    assert [x.shape for x in gpu.scatter_rows(e(2, 1), i(2, 1), e(2, 3), 0)] == [(0, 3), (0,)]
    assert not gpu.scatter_rows(e(0, 2), i(0, 2), e(0, 3), 4)[0].any()
    assert gpu.gradient_weighted_distortion(e(0, 2), i(0, 2), e(4, 3), e(3), e(0, 3), e(0, 3), True)[
        1
    ].shape == (0, 3)


def test_rows_that_cannot_be_read_in_fours(gpu):
    """A contiguous tensor that begins in the middle of another gives the same bits as its copy."""
    F, d = 40, 16

    def shifted(x):
        flat = torch.cat([torch.zeros(1), x.flatten()]).to(gpu.device)
        return flat[1:].view(x.shape)

    W, x, b = draw(0, F, d), draw(1, 6, d), draw(2, F)
    values, indices, _ = code(3, 6, 5, F)
    gpu.schedule()
    for move in (shifted, lambda x: x):
        W_, x_, b_, c = move(W), move(x), move(b), move(x[0])
        result = [
            *gpu.topk_encode(x_, W_, b_, 7),
            gpu.sparse_decode(values, indices, W_, c),
            *gpu.gradient_weighted_distortion(values, indices, W_, c, x_, x_, True)[1:],
            *gpu.scatter_rows(values, indices, x_, F),
        ]
        if move is shifted:
            first = result
    assert all(torch.equal(a, b) for a, b in zip(first, result))


def test_refusals(gpu):
    h, W, b = draw(0, 4, 3), draw(1, 3000, 3), draw(2, 3000)
    for k in (0, -1, 3001, kernels.MAX_K_CUDA + 1):
        with pytest.raises(RuntimeError, match="k="):
            gpu.topk_encode(h, W, b, k)
    for bad in ((h[0], W, b), (h, W[:, :2], b), (h, W, b[:3]), (h.double(), W.double(), b.double())):
        with pytest.raises(RuntimeError, match="topk_encode"):
            gpu.topk_encode(*bad, 2)
    many = 2**31  # blocks; with d = 0 and k = 0 nothing of it is in memory
    with pytest.raises(RuntimeError, match="2147483648 tokens .* split the batch"):
        gpu.sparse_decode(
            torch.zeros(many, 0), torch.zeros(many, 0, dtype=torch.int64), torch.zeros(4, 0), torch.zeros(0)
        )


# ------------------------------------------------------------------- does the emulator see what is not there?
SOURCE = (ROOT / "csrc/ops_cuda.cu").read_text()
SHUFFLE = "for (int step = 16; step > 0; step /= 2) sum +="
FAULTS = {  # what is there, what is put in its place, what must be said
    "a barrier less": ("      __syncthreads();\n      if (there) add(", "      if (there) add(", "race"),
    "an addition without a lock": ("atomicAdd(count, 1)", "(*count)++", "race"),
    "a bound that is one too far": ("if (f < F) {", "if (f <= F) {", "outside of every tensor"),
    "a shared slot that nobody fills": ("x % 32 == 0) warp[s]", "x == 0) warp[s]", "before it is written"),
    "a launch on another stream": ("how.stream = stream;", "how.stream = nullptr;", "another stream"),
    "a shuffle of half a warp": (SHUFFLE, f"if (threadIdx.x % 32 < 16) {SHUFFLE}", "stuck"),
    "an index followed unchecked": ("= uint64_t(f) < uint64_t(F)", "= f < F", "outside of every tensor"),
    "a row that two blocks write": ("h_hat + n * d + i, decode_at", "h_hat + i, decode_at", "race"),
    "a bound without the weights that are lost": ("up(rest + (d + 9)", "up((d + 9)", "encode"),
    "a bound without the lost token": (": float2{up(kept), up(rest)}", ": float2{up(kept), 0}", "encode"),
    "a bound without the rounding of sums": ("0x1p-21 * kept", "0x1p-24 * kept", "encode"),
}


def exercise(ops):
    """Every kernel, on operands that leave threads idle and steps half full."""
    h, W, b = draw(0, 4, 9, integer=True), draw(1, 2700, 9, integer=True), draw(2, 2700, integer=True)
    for made in BASIC:
        operands = h.clone(), W.clone(), b.clone()
        made(*operands)
        got, want = ops.topk_encode(*operands, 40), by_definition(canonical(*operands), 40)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), "encode"
    values, indices = ops.topk_encode(h, W, b, 40)
    wild = indices.clone()
    wild[1, 7] = -5
    for at in (indices, wild):
        ops.sparse_decode(values, at, W, h[0])
        ops.gradient_weighted_distortion(values, at, W, h[0], h, h, True)
        ops.gather_dot(h, W, at)
        ops.scatter_rows(values, at, h, 2700)
    ops.scatter_rows(draw(3, 600, 1), torch.ones(600, 1, dtype=torch.int64), draw(4, 600, 3), 2)


@pytest.mark.slow
@pytest.mark.skipif(bool(emulate.why_not()), reason=emulate.why_not())
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_planted_fault_is_seen_and_nothing_is_said_without_one(fault):
    if fault is None:
        ops, expected = emulate.emulated(**SMALL), contextlib.nullcontext()
    else:
        right, wrong, complaint = FAULTS[fault]
        assert SOURCE.count(right) == 1
        ops = emulate.Emulated(SOURCE.replace(right, wrong), f"tg_{fault.replace(' ', '_')}", **SMALL)
        expected = pytest.raises((RuntimeError, AssertionError), match=complaint)
    with expected:
        for seed in range(3):
            ops.schedule(seed, (0, 2, 40)[seed])
            exercise(ops.ops)
