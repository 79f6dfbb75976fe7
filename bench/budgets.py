"""Do more tokens make a better SAE? Held-out R^2 and CE_rec over budgets, in recipe `base` or at other
factors on its rate.

    python bench/budgets.py --widths 256,2048 --k 4,8,32 --tokens 100k,300k,1M,3M,10M --seeds 3
    python bench/budgets.py --model stdlib-l --widths 1024 --tokens 1M --factors 2.5,5,10 --batch 1000
    python bench/budgets.py --tokens ""          # table and curve of what bench/budgets.csv holds

One row per SAE is added to bench/budgets.csv (--table), and what is there is not trained again; the curve
lies beside it. Factors multiply 2e-4 sqrt(2^14 / width). The activations of one pass over the text (--text:
of its first tokens) lie in a file (3.3 GB for stdlib-l); budgets beyond it repeat them, as every run does.
"""

import argparse
import csv
import itertools
import pathlib
import tempfile
import time
from dataclasses import asdict, dataclass, fields

import bench
from common import parse_count, run_script
from transport_geometry.models.lm import Hook, cross_entropy
from transport_geometry.models.loading import load_model
from transport_geometry.models.text import packed_rows
from transport_geometry.records.tables import markdown, readable_count
from transport_geometry.reporting.figures import as_png, model_colours, pyplot
from transport_geometry.running.run import CPU
from transport_geometry.saes.recipes import CHUNK, Statistics, Training
from transport_geometry.saes.sae import TopKSAE, sink_positions

import numpy as np
import torch
from tqdm import tqdm

LAYER, CTX, AT_ONCE = 3, 256, 8  # AT_ONCE: sequences
SCORES = ("r2", "ce_rec", "r2_first", "ce_rec_first", "r2_train", "alive", "cpu_s")
own_pace = Training.pace


@dataclass(frozen=True)
class Job:
    """One SAE, as a row of the table names it."""

    model: str
    width: int
    k: int
    tokens: int
    seed: int
    batch: int  # tokens per step
    factor: float  # on the rate

    @classmethod
    def of(cls, row: dict[str, str]) -> "Job":
        numbers = {name: int(row[name]) for name in ("width", "k", "tokens", "seed", "batch")}
        return cls(model=row["model"], factor=float(row["factor"]), **numbers)

    @property
    def is_recipe(self) -> bool:
        """At the recipe's own pace?"""
        batch, factor = own_pace(self.tokens)
        return (self.batch, self.factor) == (batch, round(factor, 3))


KEY = tuple(field.name for field in fields(Job))


@dataclass(frozen=True, eq=False)
class Held:
    """Held-out sequences, and what the model makes of them without an SAE."""

    input_ids: torch.Tensor  # [B,T]
    h: torch.Tensor  # [B,T,d]
    loss: float  # CE, summed


class Stream:
    """The residual stream after block LAYER: a pass of training activations, and held-out sequences twice.

    The first ones, as experiments took them once, are a few files; the others lie evenly over all held-out
    files.
    """

    def __init__(self, name: str, file: pathlib.Path, tokens: int | None, n_held: int):
        """file: where the activations go; tokens: of the text, None for all of it."""
        model, tokenizer = load_model(name, CPU)
        self.hook, d = Hook(model, LAYER), model.config.hidden_size
        most = tokens and -(-tokens // CTX)
        rows = torch.stack(list(itertools.islice(packed_rows("stdlib", "train", tokenizer, CTX), most)))
        self.h = torch.from_file(str(file), shared=True, size=rows.numel() * d).view(-1, d)
        for i in tqdm(range(0, len(rows), 16), desc=f"activations of {name}", leave=False):
            h = self.hook.head(rows[i : i + 16])
            if i == 0:
                self.median = torch.linalg.vector_norm(h, dim=-1)[:, 1:].median().item()
            self.h[i * CTX : (i + len(h)) * CTX] = h.flatten(0, 1)
        everything = torch.stack(list(packed_rows("stdlib", "heldout", tokenizer, CTX)))
        spread = everything[torch.arange(n_held) * len(everything) // n_held]
        self.held, self.first = map(self.hold, (spread, everything[:n_held]))

    def hold(self, input_ids: torch.Tensor) -> Held:
        h = self.hook.head(input_ids)
        return Held(input_ids, h, self.loss(input_ids, h))

    @torch.no_grad()
    def loss(self, input_ids: torch.Tensor, h: torch.Tensor) -> float:
        """CE of sequences with h [B,T,d] at the hook, summed."""
        return sum(
            cross_entropy(self.hook.log_probs(x, part), x).sum().item()
            for x, part in zip(input_ids.split(AT_ONCE), h.split(AT_ONCE))
        )

    def tokens(self, start: int, end: int) -> torch.Tensor:
        """h [n,d] of tokens start..end of the text over and over."""
        first, n = start % len(self.h), end - start
        if first + n <= len(self.h):
            return self.h[first : first + n]
        return torch.cat([self.h[first:], self.h[: first + n - len(self.h)]])

    def train(self, job: Job, bar: tqdm) -> TopKSAE:
        first = self.tokens(0, min(CHUNK, job.tokens))
        norms = torch.nn.functional.pad(torch.linalg.vector_norm(first, dim=-1), (0, -len(first) % CTX))
        sink = sink_positions(norms.view(-1, CTX), self.median).flatten()[: len(first)]
        label = f"F={job.width} k={job.k} {readable_count(job.tokens)}"
        training = Training(Statistics.of(first, sink), job.width, job.k, job.seed, [job.tokens])
        for start in range(0, job.tokens, CHUNK):
            training.feed(self.tokens(start, min(start + CHUNK, job.tokens)), start, bar, label)
        return training.finished()

    @torch.no_grad()
    def measure(self, sae: TopKSAE) -> dict[str, float]:
        found = {"r2_train": fit(sae, self.h[:3_000_000:250])[0]}
        for suffix, held in (("_first", self.first), ("", self.held)):
            r2, h_hat, alive = fit(sae, held.h.flatten(0, 1))
            found[f"r2{suffix}"], found["alive"] = r2, alive
            found[f"ce_rec{suffix}"] = 2 - self.loss(held.input_ids, h_hat.view_as(held.h)) / held.loss
        return found


def fit(sae: TopKSAE, h: torch.Tensor) -> tuple[float, torch.Tensor, float]:
    """(R^2, h_hat, alive) of h [n,d]."""
    values, indices, h_hat = sae.reconstruct(h)
    r2 = 1 - ((h_hat - h).square().sum() / (h - h.mean(0)).square().sum()).item()
    return r2, h_hat, len(indices[values > 0].unique()) / len(sae.W_dec)


def at_pace(batch: int, factor: float) -> None:
    """Every training from here on has this batch and rate, whatever its budget."""
    Training.pace = staticmethod(lambda tokens: (batch, factor))  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------- the table
def read(table: pathlib.Path) -> list[tuple[Job, dict[str, float]]]:
    """[(SAE, its scores)]."""
    with table.open() as file:
        return [(Job.of(row), {name: float(row[name]) for name in SCORES}) for row in csv.DictReader(file)]


def asked_for(args: argparse.Namespace) -> list[Job]:
    jobs = []
    for tokens in map(parse_count, filter(None, args.tokens.split(","))):
        batch, factor = own_pace(tokens)
        factors = map(float, args.factors.split(",")) if args.factors else [round(factor, 3)]
        for factor, seed, width, k in itertools.product(factors, range(args.seeds), args.widths, args.k):
            jobs.append(Job(args.model, width, k, tokens, seed, args.batch or batch, factor))
    return jobs


def run(args: argparse.Namespace) -> None:
    """Train and measure what the table has not."""
    there = {job for job, _ in read(args.table)}
    jobs = [job for job in asked_for(args) if job not in there]
    if not jobs:
        return
    bar = tqdm(total=sum(job.tokens for job in jobs), unit="tok", unit_scale=True)
    with tempfile.NamedTemporaryFile() as file, args.table.open("a", newline="") as table, bar:
        stream = Stream(args.model, pathlib.Path(file.name), args.text and parse_count(args.text), args.held)
        writer = csv.DictWriter(table, KEY + SCORES, lineterminator="\n")
        for job in jobs:
            at_pace(job.batch, job.factor)
            start = time.process_time()
            sae = stream.train(job, bar)
            row = asdict(job) | {"cpu_s": time.process_time() - start} | stream.measure(sae)
            writer.writerow({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in row.items()})
            table.flush()


# ------------------------------------------------------------------------------------------------- the report
def budget_cell(scores: np.ndarray) -> str:
    """mean ± SD (n) over seeds."""
    if len(scores) == 1:
        return f"{scores.mean():.4f}"
    return f"{scores.mean():.4f} ± {scores.std(ddof=1):.4f} ({len(scores)})"


def report(table: pathlib.Path) -> None:
    """Tables and curve of the SAEs at the recipe's own pace: mean ± SD over seeds, and the worst step from a
    budget to the next.
    """
    groups: dict[tuple, dict[int, list[dict]]] = {}
    for job, scores in read(table):
        if job.is_recipe:
            # stdlib-l before stdlib-s
            cells = groups.setdefault((job.model[::-1], job.width, job.k), {})
            cells.setdefault(job.tokens, []).append(scores)
    budgets = sorted({tokens for cells in groups.values() for tokens in cells})
    colours = model_colours(sorted({model[::-1] for model, *_ in groups}, reverse=True))
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name, title, axis in (("r2", "R²", axes[0]), ("ce_rec", "CE_rec", axes[1]), ("alive", "alive", None)):
        rows = []
        for (model, width, k), cells in sorted(groups.items()):
            at = {b: np.array([scores[name] for scores in cells[b]]) for b in budgets if b in cells}
            means = [scores.mean() for scores in at.values()]
            row = {"model": model[::-1], "F": width, "k": k}
            row |= {readable_count(b): budget_cell(at[b]) if b in at else "" for b in budgets}
            row["worst step"] = f"{np.diff(means).min():+.4f}" if len(means) > 1 else ""
            rows.append(row)
            if axis:
                axis.plot(
                    list(at),
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
    table.with_suffix(".png").write_bytes(as_png(figure))


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument("--model", default="stdlib-s")
    parser.add_argument("--widths", type=bench.ints, default="256")
    parser.add_argument("--k", type=bench.ints, default="4,8,32")
    parser.add_argument("--tokens", default="100k,300k,1M,3M,10M")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--factors", help="on the rate, instead of the recipe's own")
    parser.add_argument("--batch", type=int, help="tokens per step, instead of the recipe's own")
    parser.add_argument("--text", help="tokens of the text that are passed over; all of them unless said")
    parser.add_argument("--held", type=int, default=48, help="held-out sequences, twice")
    parser.add_argument("--table", type=pathlib.Path, default=bench.ROOT / "bench/budgets.csv")
    args = parser.parse_args()
    if not args.table.exists():
        args.table.write_text(",".join(KEY + SCORES) + "\n")
    run(args)
    report(args.table)


if __name__ == "__main__":
    run_script(main)
