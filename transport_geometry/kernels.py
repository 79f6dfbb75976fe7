"""The operators of a TopK sparse autoencoder: one public function each, the same call on every device.

    values, indices = topk_encode(h, W_enc, b_enc, k)             [N,d] -> [N,k] twice, differentiable
    h_hat           = sparse_decode(values, indices, W_dec, b_dec)                 -> [N,d], differentiable
    stats, h_hat    = gradient_weighted_distortion(values, indices, W_dec, b_dec, h, g, want_h_hat=True)

and for training without arrays of gradients `reconstruction_error`, `adam_rows`, `scatter_rows`,
`gather_dot`.

float32 on CPU and CUDA (float64 on CPU too, for tests) runs in the C++ extension of csrc/. Anything else
(MPS, bfloat16, no compiler at install, `KERNELS=ref` in the environment) runs the plain PyTorch functions
`*_ref` below, which are the tests' oracle as well. Neither holds an [N,F] array. A wrong argument is a
ValueError; an index outside [0, F) is an error on the CPU. CUDA does not check indices first (that would
synchronise): an invalid one gives NaN (in the token's row; in every row of scatter_rows), never a read out of
bounds.
"""

import hashlib
import importlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from transport_geometry import PACKAGE, ROOT

import torch

Tensor = torch.Tensor

# columns of the distortion: g.delta, |delta|^2, |h_hat|^2, h.h_hat, |h|^2
STATS = ("g_delta", "delta_sq", "h_hat_sq", "h_h_hat", "h_sq")
OPS = (
    "topk_encode",
    "sparse_decode",
    "gradient_weighted_distortion",
    "scatter_rows",
    "gather_dot",
    "reconstruction_error",
    "adam_rows_",
)
CPU_ONLY = ("reconstruction_error", "adam_rows_")  # CUDA builds them from the other kernels and PyTorch
TILE = 1 << 24  # elements that the plain functions may hold at once (64 MB of float32)
MAX_K_CUDA = 2048  # the CUDA encoder keeps a multiple of k candidates in shared memory


def _source_hash() -> str:
    """Names and bytes of csrc, hashed as setup.py does it; "" where csrc is not there."""
    files = sorted(p for p in (ROOT / "csrc").glob("*") if p.suffix in (".cpp", ".cu", ".h"))
    if not files:
        return ""
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()[:12]


def _note() -> str:
    """What setup.py could not build, and why; "" where nothing failed. pip does not show it."""
    note = PACKAGE / "_kernels_not_built.txt"
    return note.read_text(encoding="utf-8").strip() if note.is_file() else ""


def _load() -> tuple[ModuleType | None, str]:
    """-> (extension module or None, why not). Import torch first: the extension links against it."""
    try:
        module = importlib.import_module("transport_geometry._kernels")
    except ImportError as error:
        # it is there and does not load: say what the loader said
        if error.name != "transport_geometry._kernels":
            return None, f"_kernels does not load: {error}"
        return None, _note() or "not compiled: pip install -e . -c constraints.txt"
    missing = [op for op in OPS if not hasattr(torch.ops.tg, op)]
    if missing:
        return None, f"_kernels is older than kernels.py (no {missing[0]}): reinstall"
    return module, ""


_module, WHY_NOT = _load()
BUILT = _module is not None
DEVICES: str = _module.devices if _module else ""  # what the extension was built for, as "cpu+cuda 8.0;9.0"
_forced: str | None = "ref" if os.environ.get("KERNELS") == "ref" else None


def use(which: str | None) -> None:
    """Force "ref" or "ext" for every later call, None for the choice by device and dtype. For tests."""
    global _forced
    if which not in ("ref", "ext", None):
        raise ValueError(f'use: "ref", "ext" or None, not {which!r}')
    if which == "ext" and not BUILT:
        raise RuntimeError(f"the extension is not built: {WHY_NOT}")
    _forced = which


def describe() -> str:
    """One line, kept in run.json: what serves the operators, and whether that is what csrc now says."""
    version = f"torch {torch.__version__}"
    if _module is None:
        return f"kernels: NOT BUILT ({WHY_NOT}) - plain PyTorch, same numbers, slower; {version}"
    if _forced == "ref":
        return f"kernels: plain PyTorch, as KERNELS=ref or use('ref') asks, {version}"
    screen = ""
    if _source_hash() in ("", _module.source):
        screen = f"; encode screens in {_first_screen(_module)}"
    else:  # such a build may lack what _first_screen asks of it
        version += " - STALE: csrc has changed since the build, reinstall"
    if "cuda" not in DEVICES and (why := _note() or "built without nvcc" * torch.cuda.is_available()):
        version += f" - plain PyTorch on CUDA, same numbers, slower: {why}"
    return f"kernels: C++ ({DEVICES}{screen}), {version}"


def in_short() -> str:
    """The first line of a run: `describe` without what only run.json keeps."""
    whole = describe()
    if not whole.startswith("kernels: C++"):
        return f"fast kernels: off, {whole.removeprefix('kernels: ')}"
    note = whole.partition(" - ")[2]
    return f"fast kernels: on, {note}" if note else "fast kernels: on"


def _first_screen(module: ModuleType) -> str:
    """What topk_encode tries first on this CPU, with what was measured (csrc/encode.cpp)."""
    price = module.int8_gemm_cost()
    if math.isinf(price):
        return "float32 (8-bit products are not exact here)"
    return f"{'8 bits' if price < module.MAX_INT8_GEMM_COST else 'float32'}, {price:.2f} of a float32 GEMM"


def _extension_serves(x: Tensor, k: int = 1) -> bool:
    if not BUILT or _forced == "ref":
        return False
    cuda = x.is_cuda and "cuda" in DEVICES and x.dtype == torch.float32 and k <= MAX_K_CUDA
    cpu = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    if _forced == "ext" and not (cpu or cuda):
        raise RuntimeError(f"use('ext'): the extension does not serve {x.dtype} on {x.device} with k={k}")
    return cpu or cuda


# ------------------------------------------------------------------------------------------ plain PyTorch
def _blocks(N: int, row: int) -> Iterator[slice]:
    """Slices over N tokens, each of at most TILE elements when a token needs `row` of them."""
    step = max(1, TILE // max(row, 1))
    return (slice(i, min(i + step, N)) for i in range(0, N, step))


def topk_encode_ref(h: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk_encode` without gradient and without C++: at most TILE pre-activations at a time.

    torch.topk leaves the order of equal values open, so one value more than k is asked for: where it equals
    the k-th, the row is selected again as "everything above, then the first ones equal".
    """
    N, F = h.shape[0], W_enc.shape[0]
    values, indices = h.new_empty(N, k), h.new_empty(N, k, dtype=torch.int64)
    for s in _blocks(N, F):
        pre = h[s] @ W_enc.t() + b_enc
        top, index = pre.topk(min(k + 1, F), dim=1)
        index = index[:, :k].sort(dim=1).values
        if k < F:
            tied = (top[:, k - 1] == top[:, k]).nonzero().flatten()
            if len(tied):
                row, kth = pre[tied], top[tied, k - 1 : k]
                above, equal = row > kth, row == kth
                above |= row.isnan()  # as in torch.topk a NaN is the largest value of all
                keep = above | (equal & (equal.int().cumsum(1) <= k - above.int().sum(1, keepdim=True)))
                index[tied] = keep.nonzero()[:, 1].view(-1, k)
        indices[s], values[s] = index, pre.gather(1, index).relu()
    return values, indices


def _rows(W: Tensor, indices: Tensor) -> Tensor:
    # unlike W[indices], refuses a negative one
    return W.index_select(0, indices.flatten()).view(*indices.shape, W.shape[1])


def sparse_decode_ref(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """`sparse_decode` without gradient and without C++."""
    h_hat = values.new_empty(len(values), W_dec.shape[1])
    for s in _blocks(len(values), values.shape[1] * W_dec.shape[1]):
        h_hat[s] = torch.bmm(values[s].unsqueeze(1), _rows(W_dec, indices[s])).squeeze(1) + b_dec
    return h_hat


def gather_dot_ref(x: Tensor, W: Tensor, indices: Tensor) -> Tensor:
    """The gradient of `sparse_decode` to its values: x[n] . W[indices[n,j]].

    x [N,d], W [F,d], indices [N,k] -> [N,k].
    """
    out = x.new_empty(indices.shape)
    for s in _blocks(len(x), indices.shape[1] * W.shape[1]):
        out[s] = torch.bmm(_rows(W, indices[s]), x[s].unsqueeze(2)).squeeze(2)
    return out


def scatter_rows_ref(coef: Tensor, indices: Tensor, x: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """Z^T x [F,d] and the column sums of Z [F], Z [N,F] being the code that coef and indices [N,k] stand for.

    x [N,d]. A dense tile of Z and one matmul: no atomic addition meets another (a token's indices differ), so
    it is deterministic on a GPU too, and MPS has every operator of it. MPS is wrong for some transposed left
    operands, hence contiguous().
    """
    rows, sums = x.new_zeros(F, x.shape[1]), x.new_zeros(F)
    # at most 2^14 tokens: MPS is wrong for dot products of 2^15 terms, too
    for s in _blocks(len(x), max(F, TILE >> 14)):
        Z = x.new_zeros(len(x[s]), F).scatter_add_(1, indices[s], coef[s])
        rows += Z.t().contiguous() @ x[s]
        sums += Z.sum(0)
    return rows, sums


def gradient_weighted_distortion_ref(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    h: Tensor,
    g: Tensor,
    want_h_hat: bool = False,
) -> tuple[Tensor, Tensor]:
    """`gradient_weighted_distortion` without C++; sums in float64 on the CPU, elsewhere in float32, or in
    float64 where that is the input's precision.
    """
    N, d = h.shape
    stats, kept = h.new_empty(N, len(STATS)), h.new_empty(N if want_h_hat else 0, d)
    wide = torch.float64 if h.device.type == "cpu" or h.dtype == torch.float64 else torch.float32
    for s in _blocks(N, values.shape[1] * d):
        h_hat = sparse_decode_ref(values[s], indices[s], W_dec, b_dec)
        y, x, grad = h_hat.to(wide), h[s].to(wide), g[s].to(wide)
        delta = y - x
        terms = (grad * delta, delta * delta, y * y, x * y, x * x)
        stats[s] = torch.stack([term.sum(1) for term in terms], 1).to(h.dtype)
        if want_h_hat:
            kept[s] = h_hat
    return stats, kept


def reconstruction_error_ref(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`reconstruction_error` without C++."""
    delta = _call("sparse_decode", h, values, indices, W_dec, b_dec) - h
    return delta, _call("gather_dot", h, delta, W_dec, indices), delta.square().sum(1)


def adam_rows_ref(*operands: Any) -> tuple[Tensor, Tensor]:
    """`adam_rows` without C++; the gradient takes [F,d]. Operands: as `adam_rows` gives them."""
    W, m, v, coef, indices, x, rows, more, step, root, beta1, beta2, eps, unit = operands
    gradient, sums = _call("scatter_rows", x, coef, indices, x, len(W))
    back = sums @ W
    gradient[rows] += more
    if unit:
        gradient.addcmul_((gradient * W).sum(1, keepdim=True), W, value=-1)
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    W.addcdiv_(m, v.sqrt().mul_(root).add_(eps), value=-step)
    if unit:
        W /= torch.linalg.vector_norm(W, dim=1, keepdim=True)
    return sums, back


def _call(op: str, x: Tensor, *args: Any, k: int = 1) -> Any:
    """An operator without its autograd, by the extension where that serves tensors like x."""
    serves = _extension_serves(x, k) and not (x.is_cuda and op in CPU_ONLY)
    return getattr(torch.ops.tg, op)(*args) if serves else globals()[op.rstrip("_") + "_ref"](*args)


# ------------------------------------------------------------------------------------------------ autograd
class _Encode(torch.autograd.Function):
    """Autograd through `topk_encode_ref` would keep [N,F] alive."""

    @staticmethod
    def forward(h, W_enc, b_enc, k):
        return _call("topk_encode", h, h, W_enc, b_enc, k, k=k)

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, W_enc, _, _ = inputs
        ctx.save_for_backward(h, W_enc, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        h, W_enc, values, indices = ctx.saved_tensors
        grad = grad * (values > 0)  # ReLU: an entry that was cut to 0 has no gradient
        d_h = d_W = d_b = None
        if ctx.needs_input_grad[0]:
            d_h = _call("sparse_decode", grad, grad, indices, W_enc, W_enc.new_zeros(W_enc.shape[1]))
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_W, d_b = _call("scatter_rows", h, grad, indices, h, W_enc.shape[0])
        return d_h, d_W, d_b, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(values, indices, W_dec, b_dec):
        return _call("sparse_decode", values, values, indices, W_dec, b_dec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx, grad):
        values, indices, W_dec = ctx.saved_tensors
        d_values = d_W = d_b = None
        if ctx.needs_input_grad[0]:
            d_values = _call("gather_dot", grad, grad, W_dec, indices)
        if ctx.needs_input_grad[2]:
            d_W, _ = _call("scatter_rows", grad, values, indices, grad, W_dec.shape[0])
        if ctx.needs_input_grad[3]:
            d_b = grad.sum(0)
        return d_values, None, d_W, d_b


if BUILT:  # shapes and gradients for torch.compile and opcheck; the C++ side has schema and numbers only
    SHAPES: dict[str, Any] = {
        "topk_encode": lambda h, W, b, k: (h.new_empty(len(h), k), h.new_empty(len(h), k, dtype=torch.int64)),
        "sparse_decode": lambda values, indices, W, b: values.new_empty(len(values), W.shape[1]),
        "gradient_weighted_distortion": lambda values, indices, W, b, h, g, want_h_hat: (
            h.new_empty(len(h), len(STATS)),
            h.new_empty(len(h) if want_h_hat else 0, h.shape[1]),
        ),
        "scatter_rows": lambda coef, indices, x, F: (x.new_empty(F, x.shape[1]), x.new_empty(F)),
        "gather_dot": lambda x, W, indices: x.new_empty(indices.shape),
        "reconstruction_error": lambda values, indices, W, b, h: (
            torch.empty_like(h),
            torch.empty_like(values),
            h.new_empty(len(h)),
        ),
        "adam_rows_": lambda W, *rest: (W.new_empty(W.shape[0]), W.new_empty(W.shape[1])),
    }
    for _name, _shape in SHAPES.items():
        torch.library.register_fake(f"tg::{_name}", _shape)
    for _name, _function in (("topk_encode", _Encode), ("sparse_decode", _Decode)):
        torch.library.register_autograd(
            f"tg::{_name}", _function.backward, setup_context=_function.setup_context
        )


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, indices):
        ctx.save_for_backward(x, W, indices)
        return _call("gather_dot", x, x, W, indices)

    @staticmethod
    def backward(ctx, grad):
        x, W, indices = ctx.saved_tensors
        d_x = _call("sparse_decode", grad, grad, indices, W, W.new_zeros(W.shape[1]))
        return d_x, _call("scatter_rows", grad, grad, indices, x, len(W))[0], None


# --------------------------------------------------------------------------------------- public functions
def _check(op: str, **operands: tuple[Tensor, str]) -> dict[str, int]:
    """{letter: size} of operands given as (tensor, its dimensions, such as "N d").

    Raises ValueError where a letter has two sizes, or an operand is not of the first one's floating dtype
    (latent numbers: int64) and device.
    """
    sizes: dict[str, int] = {}
    like = next(iter(operands.values()))[0]
    for name, (x, dimensions) in operands.items():
        letters = dimensions.split()
        if x.dim() == len(letters):
            sizes = dict(zip(letters, x.shape)) | sizes
        expected = [sizes.get(letter, letter) for letter in letters]
        if list(x.shape) != expected:
            raise ValueError(f"{op}: {name} is {list(x.shape)}, expected {expected}")
        dtype = torch.int64 if name in ("indices", "rows") else like.dtype
        if x.dtype != dtype or x.device != like.device:
            raise ValueError(f"{op}: {name} is {x.dtype} on {x.device}, expected {dtype} on {like.device}")
    if not like.is_floating_point():
        raise ValueError(f"{op}: {like.dtype} is not a floating dtype")
    return sizes


def topk_encode(h: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations h W_enc^T + b_enc of each token, cut at zero from below.

    h [N,d], W_enc [F,d], b_enc [F] -> values [N,k] >= 0, indices [N,k] int64, ascending within a token. Of
    equal values the lower index wins. A NaN counts as the largest value and stays NaN. Gradients to h, W_enc,
    b_enc run through the entries with a positive value only. Extra memory: one tile, whatever N and F, and in
    the extension W_enc in 8 bits. The extension sums a pre-activation in one fixed order, so that the result
    has the same bits on every CPU and with any number of threads.
    Raises ValueError on shapes, dtypes and devices that do not fit together, and on a k outside 1..F.
    """
    F = _check("topk_encode", h=(h, "N d"), W_enc=(W_enc, "F d"), b_enc=(b_enc, "F"))["F"]
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= F:
        raise ValueError(f"topk_encode: k={k}, expected an int from 1 to F={F}")
    return _Encode.apply(h, W_enc, b_enc, k)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """h_hat[n] = b_dec + sum_j values[n,j] W_dec[indices[n,j]], differentiable.

    values, indices [N,k], W_dec [F,d], b_dec [d] -> [N,d]. Raises ValueError on shapes, dtypes and devices
    that do not fit together.
    """
    code = dict(values=(values, "N k"), indices=(indices, "N k"))
    _check("sparse_decode", **code, W_dec=(W_dec, "F d"), b_dec=(b_dec, "d"))
    return _Decode.apply(values, indices, W_dec, b_dec)


@torch.no_grad()
def gradient_weighted_distortion(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    h: Tensor,
    g: Tensor,
    want_h_hat: bool = False,
) -> tuple[Tensor, Tensor]:
    """What every distortion of delta = h_hat - h needs, per token, in one pass.

    values, indices [N,k], W_dec [F,d], b_dec [d], h [N,d], g [N,d] (gradient of the summed CE) -> stats
    [N,5], h_hat [N,d] (or [0,d]). Columns as in STATS: g.delta, |delta|^2, |h_hat|^2, h.h_hat, |h|^2. h_hat
    is `sparse_decode`'s, rounded to the dtype as the patch will see it; delta is formed elementwise from it
    (|h|^2 - 2 h.h_hat + |h_hat|^2 would cancel when |h| >> |delta|) and summed in float64 by the extension.
    No gradient. Raises ValueError on shapes, dtypes and devices that do not fit together.
    """
    op, code = "gradient_weighted_distortion", dict(values=(values, "N k"), indices=(indices, "N k"))
    _check(op, **code, W_dec=(W_dec, "F d"), b_dec=(b_dec, "d"), h=(h, "N d"), g=(g, "N d"))
    return _call(op, values, values, indices, W_dec, b_dec, h, g, bool(want_h_hat))


# ------------------------------------------------------------------------------------------------- training
def gather_dot(x: Tensor, W: Tensor, indices: Tensor) -> Tensor:
    """x[n] . W[indices[n,j]]: entries of x W^T. x [N,d], W [F,d], indices [N,k] -> [N,k], differentiable.
    Raises ValueError on shapes, dtypes and devices that do not fit together.
    """
    _check("gather_dot", x=(x, "N d"), W=(W, "F d"), indices=(indices, "N k"))
    return _GatherDot.apply(x, W, indices)


@torch.no_grad()
def scatter_rows(coef: Tensor, indices: Tensor, x: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """Z^T x [F,d] and the column sums of Z [F], Z [N,F] being the code that coef and indices [N,k] stand for,
    x [N,d]. No gradient. Raises ValueError on shapes, dtypes and devices that do not fit together.
    """
    _check("scatter_rows", x=(x, "N d"), coef=(coef, "N k"), indices=(indices, "N k"))
    return _call("scatter_rows", x, coef, indices, x, F)


@torch.no_grad()
def reconstruction_error(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradients of |delta|^2 need, delta = `sparse_decode`(...) - h, in one pass over the code.

    values, indices [N,k], W_dec [F,d], b_dec [d], h [N,d] -> delta [N,d], the products delta[n] .
    W_dec[indices[n,j]] [N,k], |delta|^2 [N]. No gradient. Raises ValueError on shapes, dtypes and devices
    that do not fit together.
    """
    op, code = "reconstruction_error", dict(values=(values, "N k"), indices=(indices, "N k"))
    _check(op, **code, W_dec=(W_dec, "F d"), b_dec=(b_dec, "d"), h=(h, "N d"))
    return _call(op, values, values, indices, W_dec, b_dec, h)


@dataclass(frozen=True)
class Adam:
    """One step of Adam (Kingma & Ba 2015, Algorithm 1) as torch.optim.Adam makes it, the t-th."""

    rate: float
    t: int
    eps: float
    beta1: float = 0.9
    beta2: float = 0.999

    def numbers(self) -> tuple[float, float, float, float, float]:
        """step = rate / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t), beta1, beta2, eps: w moves by
        -step m / (root sqrt(v) + eps).
        """
        t = self.t
        step, root = self.rate / (1 - self.beta1**t), 1 / math.sqrt(1 - self.beta2**t)
        return step, root, self.beta1, self.beta2, self.eps


@torch.no_grad()
def adam_rows(
    W: Tensor,
    moments: tuple[Tensor, Tensor],
    adam: Adam,
    coef: Tensor,
    indices: Tensor,
    x: Tensor,
    more: tuple[Tensor, Tensor] | None = None,
    unit: bool = False,
) -> tuple[Tensor, Tensor]:
    """A step of Adam on W [F,d] and its two moments [F,d], in place, without an array for the gradient.

    The gradient is Z^T x, Z [N,F] being the code that coef and indices [N,k] stand for, x [N,d]; and `more`:
    (different latents [D], what is added to their rows [D,d]). unit: rows of W have norm 1 before and after;
    the part of the gradient along a row, which that normalisation would undo, is removed before Adam counts
    it. -> the column sums of Z [F], which are the gradient of a bias, and those times W
    before the step [d], which is minus the gradient of what was subtracted from every x. Raises ValueError on
    shapes, dtypes and devices that do not fit together.
    """
    rows, added = more or (indices.new_empty(0), x.new_empty(0, W.shape[-1]))
    m, v = moments
    code = dict(coef=(coef, "N k"), indices=(indices, "N k"), x=(x, "N d"))
    weights = dict(W=(W, "F d"), m=(m, "F d"), v=(v, "F d"))
    _check("adam_rows", **weights, **code, rows=(rows, "D"), more=(added, "D d"))
    return _call("adam_rows_", x, W, m, v, coef, indices, x, rows, added, *adam.numbers(), unit)


@torch.no_grad()
def adam_vector(w: Tensor, moments: tuple[Tensor, Tensor], adam: Adam, gradient: Tensor) -> None:
    """A step of Adam on w [n], in place, with moments [n] and gradient [n]: `adam_rows` of one row."""
    m, v = moments
    _check("adam_vector", w=(w, "n"), m=(m, "n"), v=(v, "n"), gradient=(gradient, "n"))
    row = torch.zeros(1, dtype=torch.int64, device=w.device)
    none, no_code = w.new_empty(0, len(w)), (w.new_empty(0, 1), row.new_empty(0, 1))
    matrices = (x[None] for x in (w, m, v))
    _call("adam_rows_", w, *matrices, *no_code, none, row, gradient[None], *adam.numbers(), False)
