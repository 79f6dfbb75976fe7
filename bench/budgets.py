"""Do more tokens make a better SAE? Held-out R^2 and CE_rec over budgets, in recipe `base` or at other
factors on its rate.

    python bench/budgets.py --widths 256,2048 --k 4,8,32 --tokens 100k,300k,1M,3M,10M --seeds 3
    python bench/budgets.py --model stdlib-l --widths 1024 --tokens 1M --factors 2.5,5,10 --batch 1000   # a sweep
    python bench/budgets.py --tokens ""                         # table and curve of what bench/budgets.csv holds

One row per SAE is added to bench/budgets.csv, and what is there is not trained again. Factors multiply 2e-4
sqrt(2^14 / width). The activations of one pass over the text lie in a file (3.3 GB for stdlib-l); budgets
beyond it repeat them, as every run does.
"""

import argparse
import csv
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from common import parse_count
from transport_geometry.figures import as_png, model_colours, pyplot
from transport_geometry.lm import cross_entropy, head, log_probs, tail
from transport_geometry.models import load_model
from transport_geometry.sae import sink_positions
from transport_geometry.tables import markdown, readable_count
from transport_geometry.text import packed_rows
from transport_geometry.train import CHUNK, Training

import numpy as np
import torch
from tqdm import tqdm

HERE, LAYER, CTX = pathlib.Path(__file__).resolve().parent, 3, 256
KEY = {"model": str, "width": int, "k": int, "tokens": int, "seed": int, "batch": int, "factor": float}
COLUMNS = {
    **KEY,
    **dict.fromkeys(("r2", "ce_rec", "r2_first", "ce_rec_first", "r2_train", "alive", "cpu_s"), float),
}
TABLE = HERE / "budgets.csv"
own_pace = Training.pace


class Hook:
    """The residual stream after block LAYER: a pass of training activations, and held-out sequences twice 48.

    The first 48, as the experiments take them, are eight files; the others lie evenly over all held-out
    files.
    """

    def __init__(self, name: str, file):
        self.model, tokenizer = load_model(name, torch.device("cpu"))
        rows = torch.stack(list(packed_rows("stdlib", "train", tokenizer, CTX)))
        d = self.model.config.hidden_size
        self.h = torch.from_file(file.name, shared=True, size=rows.numel() * d).view(-1, d)
        for i in tqdm(range(0, len(rows), 16), desc=f"activations of {name}", leave=False):
            h = head(self.model, LAYER, rows[i : i + 16])
            if i == 0:
                norms = torch.linalg.vector_norm(h, dim=-1)
                sink, self.median = (
                    sink_positions(norms, norms[:, 1:].median().item()),
                    norms[:, 1:].median().item(),
                )
            self.h[i * CTX : (i + len(h)) * CTX] = h.flatten(0, 1)
        everything = torch.stack(list(packed_rows("stdlib", "heldout", tokenizer, CTX)))
        spread = everything[torch.arange(48) * len(everything) // 48]
        self.held = [
            (rows, h, self.loss(rows, h))
            for rows in (spread, everything[:48])
            for h in [head(self.model, LAYER, rows)]
        ]

    def stream(self, start: int, end: int) -> torch.Tensor:
        """Tokens start..end of the text over and over, [n,d]."""
        first, n = start % len(self.h), end - start
        return (
            self.h[first : first + n]
            if first + n <= len(self.h)
            else torch.cat([self.h[first:], self.h[: first + n - len(self.h)]])
        )

    @torch.no_grad()
    def loss(self, rows: torch.Tensor, h: torch.Tensor) -> float:
        """CE of sequences with h [B,T,d] at the hook."""
        return sum(
            cross_entropy(log_probs(tail(self.model, LAYER, r, x)), r).sum().item()
            for r, x in zip(rows.split(8), h.split(8))
        )

    @torch.no_grad()
    def measure(self, sae) -> dict:
        def fit(h):
            values, indices, h_hat = sae.reconstruct(h)
            return (
                1 - ((h_hat - h).square().sum() / (h - h.mean(0)).square().sum()).item(),
                h_hat,
                len(indices[values > 0].unique()) / len(sae.W_dec),
            )

        found = {"r2_train": fit(self.h[:3_000_000:250])[0]}
        for name, (rows, h, clean) in zip(("_first", ""), self.held[::-1]):
            r2, h_hat, found["alive"] = fit(h.flatten(0, 1))
            found |= {f"r2{name}": r2, f"ce_rec{name}": 2 - self.loss(rows, h_hat.view_as(h)) / clean}
        return found

    def train(self, width: int, k: int, tokens: int, seed: int, bar: tqdm):
        first = self.stream(0, min(CHUNK, tokens))
        norms = torch.nn.functional.pad(torch.linalg.vector_norm(first, dim=-1), (0, -len(first) % CTX))
        sink = sink_positions(norms.view(-1, CTX), self.median).flatten()[: len(first)]
        training = Training(Training.describe(first, sink), width, k, seed, [tokens])
        for start in range(0, tokens, CHUNK):
            training.feed(
                self.stream(start, min(start + CHUNK, tokens)),
                start,
                bar,
                f"F={width} k={k} {readable_count(tokens)}",
            )
        return training.finished()


def read() -> list[dict]:
    with TABLE.open() as file:
        return [{name: kind(row[name]) for name, kind in COLUMNS.items()} for row in csv.DictReader(file)]


def run(args) -> None:
    there = {tuple(row[name] for name in KEY) for row in read()}
    jobs = []
    for tokens in map(parse_count, filter(None, args.tokens.split(","))):
        batch, factor = own_pace(tokens)
        for factor in map(float, args.factors.split(",")) if args.factors else [round(factor, 3)]:
            jobs += [
                (args.model, width, k, tokens, seed, args.batch or batch, factor)
                for seed in range(args.seeds)
                for width in map(int, args.widths.split(","))
                for k in map(int, args.k.split(","))
            ]
    jobs = [job for job in jobs if job not in there]
    if not jobs:
        return
    with tempfile.NamedTemporaryFile() as file, TABLE.open("a", newline="") as table:
        hook, writer = Hook(args.model, file), csv.DictWriter(table, COLUMNS, lineterminator="\n")
        bar = tqdm(total=sum(job[3] for job in jobs), unit="tok", unit_scale=True)
        for job in jobs:
            name, width, k, tokens, seed, batch, factor = job
            Training.pace = staticmethod(lambda tokens: (batch, factor))
            start = time.process_time()
            sae = hook.train(width, k, tokens, seed, bar)
            row = dict(zip(KEY, job)) | {"cpu_s": time.process_time() - start} | hook.measure(sae)
            writer.writerow({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in row.items()})
            table.flush()
        bar.close()


def report() -> None:
    """Tables and curve of the SAEs at the recipe's own pace: mean ± SD over seeds, and the worst step from a
    budget to the next.
    """
    groups: dict[tuple, dict[int, list]] = {}
    for row in read():
        batch, factor = own_pace(row["tokens"])
        if (row["batch"], row["factor"]) == (batch, round(factor, 3)):
            # stdlib-l before stdlib-s
            cells = groups.setdefault((row["model"][::-1], row["width"], row["k"]), {})
            cells.setdefault(row["tokens"], []).append(row)
    budgets = sorted({tokens for cells in groups.values() for tokens in cells})
    colours = model_colours(sorted({model[::-1] for model, *_ in groups}, reverse=True))
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name, title, axis in (("r2", "R²", axes[0]), ("ce_rec", "CE_rec", axes[1]), ("alive", "alive", None)):
        rows = []
        for (model, width, k), cells in sorted(groups.items()):
            scores = {b: np.array([row[name] for row in cells[b]]) for b in budgets if b in cells}
            means = [s.mean() for s in scores.values()]
            line = (
                {"model": model[::-1], "F": width, "k": k}
                | {readable_count(b): "" for b in budgets}
                | {
                    readable_count(b): f"{s.mean():.4f}"
                    + (f" ± {s.std(ddof=1):.4f} ({len(s)})" if len(s) > 1 else "")
                    for b, s in scores.items()
                }
            )
            rows.append(line | {"worst step": f"{np.diff(means).min():+.4f}" if len(means) > 1 else ""})
            if axis:
                axis.plot(
                    list(scores),
                    means,
                    marker=".",
                    color=colours[model[::-1]],
                    lw=0.3 + width**0.5 / 50,
                    ls={4: ":", 8: "--"}.get(k, "-"),
                    label=f"{model[::-1]} {width}, {k}",
                )
        if axis:
            axis.set(xscale="log", xlabel="training tokens", ylabel=f"held-out {title}", ylim=(0.3, 1))
        print(f"{title}:\n", markdown(rows, list(rows[0])), "", sep="\n")
    axes[1].legend(fontsize=6, ncols=2, title="model width, k", title_fontsize=6)
    (HERE / "budgets.png").write_bytes(as_png(figure))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="stdlib-s")
parser.add_argument("--widths", default="256")
parser.add_argument("--k", default="4,8,32")
parser.add_argument("--tokens", default="100k,300k,1M,3M,10M")
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--factors", help="on the rate, instead of the recipe's own")
parser.add_argument("--batch", type=int, help="tokens per step, instead of the recipe's own")
if __name__ == "__main__":
    if not TABLE.exists():
        TABLE.write_text(",".join(COLUMNS) + "\n")
    run(parser.parse_args())
    report()
