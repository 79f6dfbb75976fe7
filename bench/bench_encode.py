"""topk_encode against the bare float32 GEMM of its shape, on random weights and on trained ones.

    python bench/bench_encode.py --shapes 128x4096,256x4096,512x16384,1024x32768 --k 8,32,128
    python bench/bench_encode.py --trained stdlib-l@3 --expansion 16 --k 8,32,128

One thread, CPU time, the median of n rounds in which all take turns. "on": how many tokens the
8-bit screen left to the next one. --outliers: so many dimensions of h are 20 times the others.
"""

import bench
from common import run_script
from transport_geometry import kernels
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import load_model
from transport_geometry.saes.recipes import Statistics, Training
from transport_geometry.saes.train import activation_chunks
from transport_geometry.text.heldout import heldout_rows

import torch
from tqdm import tqdm

CPU = torch.device("cpu")
LINE = "{what:24} gemm {gemm:8.1f} ms, {rate:3.0f} GFLOP/s;  " + "k {k:3}  encode {by_gemm:5.3f}  on {on}"
CTX = 128


def trained(name: str, expansion: int, k: int, N: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """h - b_dec [N,d] of held-out text, W_enc, b_enc of an SAE trained on `tokens`."""
    model, tokenizer = load_model(name.partition("@")[0], CPU)
    hook = Hook(model, int(name.partition("@")[2]))
    h, sink = next(iter(activation_chunks(hook, "stdlib", tokenizer, CTX, tokens, "keep")))
    training = Training(Statistics.of(h, sink), expansion * h.shape[1], k, 0, [tokens])
    training.feed(h, 0, tqdm(total=tokens, desc=f"k={k}", leave=False), "")
    sae = training.finished()
    ids = heldout_rows("stdlib", tokenizer, ctx=CTX, n=-(-N // CTX)).input_ids
    return hook.head(ids).flatten(0, 1)[:N] - sae.b_dec, sae.W_enc, sae.b_enc


def random(d: int, F: int, outliers: int, N: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    h, W, b = (torch.randn(*shape, generator=generator) for shape in ((N, d), (F, d), (F,)))
    h[:, :outliers] *= 20
    return h, W / d**0.5, 0.1 * b


def measure(what: str, k: int, h: torch.Tensor, W: torch.Tensor, b: torch.Tensor, n: int) -> None:
    kernels.topk_encode(h[:64], W, b, k)  # measures what its screens cost
    seconds = bench.take_turns(
        {"gemm": lambda: h @ W.T, "encode": lambda: kernels.topk_encode(h, W, b, k)}, n, warm_up=1
    )
    module = kernels._module
    assert module is not None
    module.fallback_tokens()
    kernels.topk_encode(h, W, b, k)
    gemm, by_gemm = seconds["gemm"], seconds["encode"] / seconds["gemm"]
    rate, on = 2 * h.numel() * len(W) / gemm / 1e9, module.fallback_tokens()[0]
    print(LINE.format(what=what, gemm=1e3 * gemm, rate=rate, k=k, by_gemm=by_gemm, on=on), flush=True)


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument("--shapes", default="128x4096,256x4096,512x16384,1024x32768")
    parser.add_argument("--k", type=bench.ints, default="8,32,128")
    parser.add_argument("--outliers", type=int, default=0)
    parser.add_argument("--trained", help="instead: NAME@LAYER of an embedded model")
    parser.add_argument("--expansion", type=int, default=16, help="of the trained")
    parser.add_argument("--tokens", type=int, default=100_000, help="it is trained on")
    parser.add_argument("--N", type=int, default=4096, help="tokens encoded")
    parser.add_argument("--n", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(kernels.describe(), f"{args.N} tokens, median of {args.n}", sep="; ")
    for k in args.k:
        if args.trained:
            h, W, b = trained(args.trained, args.expansion, k, args.N, args.tokens)
            measure(f"{args.trained} {h.shape[1]}x{len(W)}", k, h, W, b, args.n)
            continue
        for shape in args.shapes.split(","):
            d, F = map(int, shape.split("x"))
            measure(f"random {shape}", k, *random(d, F, args.outliers, args.N), args.n)


if __name__ == "__main__":
    run_script(main)
