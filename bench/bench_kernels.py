"""Each operator against plain PyTorch, and against a bare encode GEMM, the least that any encoder can cost.

    python bench/bench_kernels.py                            d=512 F=16384 N=4096 k=32
    python bench/bench_kernels.py --device cuda --n 50

All candidates take turns, n rounds; the figures are medians, and the ratios are of medians within this one
process.
"""

import argparse
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as functional

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from transport_geometry import kernels


def composition(h, W_enc, b_enc, W_dec, b_dec, g, k):
    """The same results from PyTorch's own operations: a dense encode, torch.topk, embedding_bag; a dense code
    in the backward.
    """

    def encode(h, W_enc, b_enc):
        return (h @ W_enc.T + b_enc).relu().topk(k, dim=1)

    def decode(values, indices, W_dec, b_dec):
        return functional.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec

    def distortion(values, indices):
        h_hat = decode(values, indices, W_dec, b_dec)
        delta = h_hat - h
        return torch.stack(
            [
                (g * delta).sum(1),
                delta.square().sum(1),
                h_hat.square().sum(1),
                (h * h_hat).sum(1),
                h.square().sum(1),
                delta.sum(1),
                h.sum(1),
            ],
            1,
        ), h_hat

    def step(leaves):
        h_, W_enc_, b_enc_, W_dec_, b_dec_ = leaves
        values, indices = encode(h_, W_enc_, b_enc_)
        Z = torch.zeros(len(h_), len(W_enc_), device=h_.device).scatter(1, indices, values)
        return torch.autograd.grad((Z @ W_dec_ + b_dec_ - h_).square().mean(), leaves[1:])

    return encode, decode, distortion, step


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("d", 512), ("F", 16384), ("N", 4096), ("k", 32), ("n", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device=a.device)
    h, g, b_enc, b_dec = draw(a.N, a.d), draw(a.N, a.d), 0.1 * draw(a.F), draw(a.d)
    W_enc, W_dec = draw(a.F, a.d) / a.d**0.5, draw(a.F, a.d) / a.d**0.5
    leaves = [h] + [x.clone().requires_grad_() for x in (W_enc, b_enc, W_dec, b_dec)]
    encode, decode, distortion, step = composition(h, W_enc, b_enc, W_dec, b_dec, g, a.k)
    values, indices = kernels.topk_encode(h, W_enc, b_enc, a.k)

    def our_step():
        h_hat = kernels.sparse_decode(*kernels.topk_encode(h, *leaves[1:3], a.k), *leaves[3:])
        return torch.autograd.grad((h_hat - h).square().mean(), leaves[1:])

    pairs = {  # name: (ours, PyTorch's)
        "encode": (lambda: kernels.topk_encode(h, W_enc, b_enc, a.k), lambda: encode(h, W_enc, b_enc)),
        "decode": (
            lambda: kernels.sparse_decode(values, indices, W_dec, b_dec),
            lambda: decode(values, indices, W_dec, b_dec),
        ),
        "distortion": (
            lambda: kernels.gradient_weighted_distortion(values, indices, W_dec, b_dec, h, g, True),
            lambda: distortion(values, indices),
        ),
        "step": (our_step, lambda: step(leaves)),
    }
    candidates = {"gemm": lambda: h @ W_enc.T} | {
        f"{who} {name}": f for name, both in pairs.items() for who, f in zip(("ours", "torch"), both)
    }
    seconds = {name: [] for name in candidates}
    for _ in range(a.n + 1):  # the first round warms up
        for name, run in candidates.items():
            if a.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if a.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(s[1:]) for name, s in seconds.items()}
    where = torch.cuda.get_device_name() if a.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{kernels.describe()}; {a.device} ({where}), d={a.d} F={a.F} N={a.N} k={a.k}, median of {a.n} interleaved"
    )
    print(f"bare encode GEMM {1e3 * median['gemm']:.1f} ms")
    print(f"{'':12}{'ours ms':>10}{'torch ms':>10}{'ours/torch':>12}{'ours/gemm':>11}")
    for name in pairs:
        ours, theirs = median[f"ours {name}"], median[f"torch {name}"]
        print(
            f"{name:12}{1e3 * ours:10.1f}{1e3 * theirs:10.1f}{ours / theirs:12.3f}{ours / median['gemm']:11.3f}"
        )


if __name__ == "__main__":
    main()
