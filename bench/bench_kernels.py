"""Each operator against plain PyTorch, and against a bare encode GEMM, the least that any encoder can cost.

    python bench/bench_kernels.py                            d=512 F=16384 N=4096 k=32
    python bench/bench_kernels.py --device cuda --n 50

All candidates take turns, n rounds; the figures are medians, and the ratios are of medians within this one
process.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bench
from common import run_script
from transport_geometry import kernels
from transport_geometry.evaluate import dense_statistics

import torch
from torch.nn.functional import embedding_bag

HEAD = (
    "{kernels}; {device} ({called}), d={d} F={F} N={N} k={k}, median of {n} interleaved\n"
    "bare encode GEMM {gemm:.1f} ms\n"
    "                ours ms  torch ms  ours/torch  ours/gemm"
)
LINE = "{name:12}{ours:10.1f}{theirs:10.1f}{by_torch:12.3f}{by_gemm:11.3f}"


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


def main() -> None:
    parser = bench.parser_of(__doc__)
    for name, default in (("d", 512), ("F", 16384), ("N", 4096), ("k", 32), ("n", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    d, F, N, k = args.d, args.F, args.N, args.k
    torch.manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=args.device)

    h, g, b_enc, b_dec = draw(N, d), draw(N, d), 0.1 * draw(F), draw(d)
    W_enc, W_dec = draw(F, d) / d**0.5, draw(F, d) / d**0.5
    leaves = tuple(x.clone().requires_grad_() for x in (W_enc, b_enc, W_dec, b_dec))
    plain, trained = Composition(h, g, (W_enc, b_enc, W_dec, b_dec), k), Composition(h, g, leaves, k)
    values, indices = kernels.topk_encode(h, W_enc, b_enc, k)

    def our_step() -> tuple[torch.Tensor, ...]:
        W_enc, b_enc, W_dec, b_dec = leaves
        h_hat = kernels.sparse_decode(*kernels.topk_encode(h, W_enc, b_enc, k), W_dec, b_dec)
        return torch.autograd.grad((h_hat - h).square().mean(), leaves)

    jobs: dict[str, Callable[[], object]] = {
        "gemm": lambda: h @ W_enc.T,
        "our encode": lambda: kernels.topk_encode(h, W_enc, b_enc, k),
        "torch encode": plain.encode,
        "our decode": lambda: kernels.sparse_decode(values, indices, W_dec, b_dec),
        "torch decode": lambda: plain.decode(values, indices),
        "our distortion": lambda: kernels.gradient_weighted_distortion(
            values, indices, W_dec, b_dec, h, g, True
        ),
        "torch distortion": lambda: plain.distortion(values, indices),
        "our step": our_step,
        "torch step": trained.step,
    }
    called = f"{torch.get_num_threads()} threads"
    if args.device == "cuda":
        called = torch.cuda.get_device_name()

    def now() -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    ms = {name: 1e3 * s for name, s in bench.take_turns(jobs, args.n, warm_up=1, clock=now).items()}
    print(HEAD.format(kernels=kernels.describe(), called=called, gemm=ms["gemm"], **vars(args)))
    for name in ("encode", "decode", "distortion", "step"):
        ours, theirs = ms[f"our {name}"], ms[f"torch {name}"]
        by_torch, by_gemm = ours / theirs, ours / ms["gemm"]
        print(LINE.format(name=name, ours=ours, theirs=theirs, by_torch=by_torch, by_gemm=by_gemm))


if __name__ == "__main__":
    run_script(main)
