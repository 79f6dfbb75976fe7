"""Each operator and a whole training step against a bare encode GEMM, which any encoder in float32 costs at
least, and against plain PyTorch.

    python bench/bench_kernels.py                            d=512 F=16384 k=32, 4096 tokens
    python bench/bench_kernels.py --threads 1 --ours --shapes 512x16384,1024x32768,128x4096 --k 8,32,128
    python bench/bench_kernels.py --device cuda --n 50

All candidates of a shape take turns, n rounds; the figures are medians, and the ratios are of medians within
this one process. With one thread on a CPU the clock is CPU time. The bytes that a distortion must move are h,
g, h_hat, its statistics, the code, and the rows of W_dec that the code names, once each; the bandwidth is
that of copying 256 MB, read and written.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bench
from common import run_script
from transport_geometry import kernels
from transport_geometry.measuring.evaluate import dense_statistics
from transport_geometry.saes.recipes import Statistics, Training

import torch
from torch.nn.functional import embedding_bag

HEAD = """{kernels}; {device} ({called}), {N} tokens, median of {n} interleaved
torch: its own operations for the same; gemm: a bare h @ W_enc.T. step: encode, decode, MSE, gradients.
whole step: recipe base with its optimiser, AuxK idle; "rest" is all of it but the encode.
"""
SHAPE = """
d={d} F={F} k={k}: gemm {gemm:.2f} ms, {rate:.0f} GFLOP/s; copy {bandwidth:.1f} GB/s
a distortion must move {must:.1f} MB, and takes {times:.2f} times what copying them takes
                ours ms  torch ms  ours/torch  ours/gemm"""
LINE = "{name:12}{ours:11.3f}{theirs:>10}{by_torch:>12}{by_gemm:11.3f}"


@dataclass(frozen=True, eq=False)
class Composition:
    """The same results from PyTorch's own operations: a dense encode, torch.topk, embedding_bag; a dense code
    in the backward.
    """

    h: torch.Tensor
    g: torch.Tensor
    leaves: tuple[torch.Tensor, ...]  # W_enc, b_enc, W_dec, b_dec
    k: int

    def encode(self) -> Any:
        W_enc, b_enc = self.leaves[:2]
        return (self.h @ W_enc.T + b_enc).relu().topk(self.k, dim=1)

    def decode(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        W_dec, b_dec = self.leaves[2:]
        return embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec

    def distortion(self, values: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h_hat = self.decode(values, indices)
        return dense_statistics(self.h, h_hat, self.g), h_hat

    def step(self) -> tuple[torch.Tensor, ...]:
        values, indices = self.encode()
        W_enc, _, W_dec, b_dec = self.leaves
        Z = torch.zeros(len(self.h), len(W_enc), device=self.h.device).scatter(1, indices, values)
        return torch.autograd.grad((Z @ W_dec + b_dec - self.h).square().mean(), self.leaves)


def shapes(text: str) -> list[tuple[int, int]]:
    """'512x16384,128x4096' -> [(512, 16384), (128, 4096)]."""
    return [(int(d), int(F)) for d, F in (part.split("x") for part in text.split(","))]


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument("--shapes", type=shapes, default="512x16384")
    parser.add_argument("--k", type=bench.ints, default="32")
    parser.add_argument("--N", type=int, default=4096)
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--ours", action="store_true", help="leave torch's columns out")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cpu, threads = args.device == "cpu", torch.get_num_threads()
    called = f"{threads} thread{'s' * (threads > 1)}" if cpu else torch.cuda.get_device_name()
    head = {name: getattr(args, name) for name in ("device", "N", "n")}
    print(HEAD.format(kernels=kernels.describe(), called=called, **head))

    def now() -> float:
        if not cpu:
            torch.cuda.synchronize()
        return time.process_time() if cpu and threads == 1 else time.perf_counter()

    for d, F in args.shapes:
        for k in args.k:
            measure(d, F, args.N, k, args.n, args.device, args.ours, now)


def measure(
    d: int, F: int, N: int, k: int, n: int, device: str, only_ours: bool, now: Callable[[], float]
) -> None:
    torch.manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    h, g, b_enc, b_dec = draw(N, d), draw(N, d), 0.1 * draw(F), draw(d)
    W_enc, W_dec = draw(F, d) / d**0.5, draw(F, d) / d**0.5
    leaves = tuple(x.clone().requires_grad_() for x in (W_enc, b_enc, W_dec, b_dec))
    plain, trained = Composition(h, g, (W_enc, b_enc, W_dec, b_dec), k), Composition(h, g, leaves, k)
    values, indices = kernels.topk_encode(h, W_enc, b_enc, k)
    big = draw(1 << 26)
    copy = torch.empty_like(big)
    statistics = Statistics.of(h, torch.zeros(N, dtype=torch.bool, device=device))
    training = Training(statistics, F, k, 0, [10**9])
    moments, adam = (torch.zeros_like(W_dec), torch.zeros_like(W_dec)), kernels.Adam(1e-6, 1, 1e-8)

    def our_step() -> tuple[torch.Tensor, ...]:
        W_enc, b_enc, W_dec, b_dec = leaves
        h_hat = kernels.sparse_decode(*kernels.topk_encode(h, W_enc, b_enc, k), W_dec, b_dec)
        return torch.autograd.grad((h_hat - h).square().mean(), leaves)

    ours: dict[str, Callable[[], object]] = {
        "encode": lambda: kernels.topk_encode(h, W_enc, b_enc, k),
        "decode": lambda: kernels.sparse_decode(values, indices, W_dec, b_dec),
        "distortion": lambda: kernels.gradient_weighted_distortion(values, indices, W_dec, b_dec, h, g, True),
        "step": our_step,
        "error": lambda: kernels.reconstruction_error(values, indices, W_dec, b_dec, h),
        "adam rows": lambda: kernels.adam_rows(W_dec, moments, adam, values, indices, g),
        "unit rows": lambda: kernels.adam_rows(W_dec, moments, adam, values, indices, g, unit=True),
        "whole step": lambda: training.one_step(h),
    }
    theirs: dict[str, Callable[[], object]] = {
        "encode": plain.encode,
        "decode": lambda: plain.decode(values, indices),
        "distortion": lambda: plain.distortion(values, indices),
        "step": trained.step,
    }
    jobs: dict[str, Callable[[], object]] = {"gemm": lambda: h @ W_enc.T, "copy": lambda: copy.copy_(big)}
    jobs |= {f"our {name}": job for name, job in ours.items()}
    jobs |= {} if only_ours else {f"torch {name}": job for name, job in theirs.items()}
    s = bench.take_turns(jobs, n, warm_up=1, clock=now)
    bandwidth = 2 * big.nbytes / s["copy"]
    rows = len(indices.unique())
    must = 3 * h.nbytes + values.nbytes + indices.nbytes + 4 * rows * d + 4 * N * len(kernels.STATS)
    speed = dict(gemm=1e3 * s["gemm"], rate=2e-9 * N * d * F / s["gemm"], bandwidth=bandwidth / 1e9)
    times = s["our distortion"] * bandwidth / must
    print(SHAPE.format(d=d, F=F, k=k, must=must / 1e6, times=times, **speed))
    s["our rest"] = s["our whole step"] - s["our encode"]
    for name in (*ours, "rest"):
        mine, its = s[f"our {name}"], s.get(f"torch {name}")
        by_torch, shown = (f"{mine / its:.3f}", f"{1e3 * its:.1f}") if its else ("", "")
        line = dict(ours=1e3 * mine, theirs=shown, by_torch=by_torch, by_gemm=mine / s["gemm"])
        print(LINE.format(name=name, **line), flush=True)


if __name__ == "__main__":
    run_script(main)
