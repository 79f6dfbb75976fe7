"""One hash per operator and input, the same on two machines where the kernels compute the same bits.

    python bench/bits.py > here    # on each machine; `diff here there` prints nothing

Inputs are integers by numpy's PCG64 divided by powers of two, so that they are the same bytes everywhere;
torch.randn is not. Which bits of a NaN are set is the processor's choice and is left out.
"""

import hashlib
import sys

from transport_geometry import kernels

import numpy as np
import torch

SHAPES = ((300, 96, 1000, 24), (65, 33, 1025, 7), (128, 256, 2048, 32))  # N, d, F, k
CHANGES = {
    "plain": lambda h, W, b: None,
    "sink 172": lambda h, W, b: h[::9].mul_(172),
    "dims 172": lambda h, W, b: h[:, :2].mul_(172),
    "NaN": lambda h, W, b: (h[3, 0].fill_(torch.nan), h[5].fill_(torch.inf), W[7, 1].fill_(torch.nan)),
    "denormal": lambda h, W, b: (h.mul_(1e-40), b.mul_(0)),
    "ties": lambda h, W, b: (W.copy_(W[:10].repeat(len(W) // 10 + 1, 1)[: len(W)]), b.mul_(0)),
}


def digest(*tensors: torch.Tensor) -> str:
    found = hashlib.sha256()
    for x in tensors:
        found.update(torch.where(x == x, x, 0).numpy().tobytes() + x.isnan().numpy().tobytes())
    return found.hexdigest()[:16]


def operators(h: torch.Tensor, W: torch.Tensor, b: torch.Tensor, g: torch.Tensor, k: int) -> dict[str, tuple]:
    """{operator: what it returns}. What is not finite is left out after the encoder: it makes NaN of all."""
    found = {"inputs": (h, W, b, g)}
    for screen in ("none", "own", "integers"):
        kernels._module.screen_first(screen)
        found[f"topk_encode, {screen}"] = kernels.topk_encode(h, W, b, k)
    h, W, b_dec = h.nan_to_num(1, 1), W.nan_to_num(1), g[0].clone()
    z, at = found["topk_encode, none"]
    z = z.nan_to_num(1, 1)
    found["sparse_decode"] = (kernels.sparse_decode(z, at, W, b_dec),)
    found["gradient_weighted_distortion"] = kernels.gradient_weighted_distortion(z, at, W, b_dec, h, g, True)
    found["reconstruction_error"] = kernels.reconstruction_error(z, at, W, b_dec, h)
    found["gather_dot"] = (kernels.gather_dot(g, W, at),)
    found["scatter_rows"] = kernels.scatter_rows(z, at, g, len(W))
    # sums of integers are exact in any order; numpy's root is correctly rounded, MKL's in torch is not
    norm = torch.from_numpy(np.sqrt(W.double().square().sum(1, keepdim=True).numpy()))
    for unit in (False, True):
        w, m, v = (W / norm if unit else W).to(W.dtype, copy=True), W * 0, W * 0
        steps = (kernels.Adam(1e-3, t, 1e-8) for t in (1, 2))  # two, so that the moments are not 0
        sums = [kernels.adam_rows(w, (m, v), step, z, at, g, unit=unit) for step in steps]
        found[f"adam_rows, unit {unit}"] = (w, m, v, *sums[0], *sums[1])
    return found


if __name__ == "__main__":
    print(kernels.describe(), file=sys.stderr)
    for N, d, F, k in SHAPES:
        for name, change in CHANGES.items():
            for dtype in (torch.float32, torch.float64):
                rng = np.random.default_rng(0)
                draws = (rng.integers(-(2**20), 2**20, shape) for shape in ((N, d), (F, d), F, (N, d)))
                h, W, b, g = (torch.from_numpy(x / 2**20).to(dtype) for x in draws)
                change(h, W.div_(8), b.div_(8))
                for operator, outputs in operators(h, W, b, g, k).items():
                    print(f"{(N, d, F, k)} {name}, {dtype}: {operator} {digest(*outputs)}", flush=True)
