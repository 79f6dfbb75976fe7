"""Is an SAE that branches off a shared trunk as good as one trained by itself? Held-out R^2 and alive
fraction, paired by seed.

    python bench/trunk.py 156250,781250 --batch 64   # the numbers of steps of 10M and 50M tokens
    python bench/trunk.py 25k,80k,250k               # the recipe's own batch and rate for these budgets
"""

import bench
from common import parse_count, run_script
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import load_model
from transport_geometry.models.text import heldout_rows
from transport_geometry.records.tables import markdown, readable_count
from transport_geometry.running.run import CPU
from transport_geometry.saes.recipes import CHUNK, Statistics, Training
from transport_geometry.saes.train import activation_chunks

import numpy as np
import torch
from tqdm import tqdm

LAYER, EXPANSION, CTX = 3, 4, 256


class Trainer:
    """Trains on one stream of activations and measures on held-out ones, held [n,d]."""

    def __init__(self, chunks: list[tuple[torch.Tensor, torch.Tensor]], held: torch.Tensor):
        self.chunks, self.held = chunks, held

    def train(self, k: int, seed: int, budgets: list[int]) -> dict[int, tuple[float, float]]:
        """{budget: (R^2, alive)} of one run and its branches."""
        h, sink = self.chunks[0]
        statistics = Statistics.of(h[: budgets[0]], sink[: budgets[0]])
        runs = [Training(statistics, EXPANSION * h.shape[1], k, seed, budgets)]
        bar = tqdm(disable=True)
        for number, (h, _) in enumerate(self.chunks):
            runs = [run for training in runs for run in training.feed(h, number * CHUNK, bar, "")]
        return {run.budgets[-1]: self.measure(run) for run in runs}

    def measure(self, training: Training) -> tuple[float, float]:
        sae, held = training.finished(), self.held
        values, indices, h_hat = sae.reconstruct(held)
        r2 = 1 - ((h_hat - held).square().sum() / (held - held.mean(0)).square().sum()).item()
        return r2, len(indices[values > 0].unique()) / len(sae.W_dec)


def row_of(k: int, budget: int, branch: np.ndarray, alone: np.ndarray, before: np.ndarray) -> dict:
    """branch, alone and before (the branch of the last budget) are [seeds,2]: R^2 and alive."""
    difference = branch[:, 0] - alone[:, 0]
    return {
        "k": k,
        "tokens": readable_count(budget),
        "R2 branch": branch[:, 0].mean(),
        "R2 alone": alone[:, 0].mean(),
        "difference": difference.mean(),
        "its SE": difference.std(ddof=1) / len(difference) ** 0.5,
        "seed SD": alone[:, 0].std(ddof=1),
        "since last budget": alone[:, 0].mean() - before[:, 0].mean(),
        "alive branch": branch[:, 1].mean(),
        "alive alone": alone[:, 1].mean(),
    }


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument("budgets", help="tokens, ascending")
    parser.add_argument("--model", default="stdlib-s")
    parser.add_argument("--k", type=bench.ints, default="4,16")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--batch", type=int, help="tokens per step, instead of the recipe's own")
    parser.add_argument("--held", type=int, default=48, help="held-out sequences")
    args = parser.parse_args()
    budgets = [parse_count(budget) for budget in args.budgets.split(",")]
    if args.batch:
        pace = args.batch, 5 * (args.batch / 256) ** 0.5  # the recipe's rate for it
        Training.pace = staticmethod(lambda tokens: pace)  # type: ignore[method-assign]
    model, tokenizer = load_model(args.model, CPU)
    hook = Hook(model, LAYER)
    chunks = list(activation_chunks(hook, "stdlib", tokenizer, CTX, budgets[-1], "keep"))
    held = hook.head(heldout_rows("stdlib", tokenizer, CTX, args.held).input_ids).flatten(0, 1)
    trainer = Trainer(chunks, held)
    rows = []
    for k in args.k:
        branches, alone = [], []
        for seed in tqdm(range(args.seeds), desc=f"k={k}", leave=False):
            branches.append(trainer.train(k, seed, budgets))
            alone.append({b: trainer.train(k, seed, [b])[b] for b in budgets[1:]})
        for before, b in zip(budgets, budgets[1:]):
            branch, last = (np.array([run[at] for run in branches]) for at in (b, before))
            rows.append(row_of(k, b, branch, np.array([run[b] for run in alone]), last))
    print(markdown(rows, list(rows[0])))


if __name__ == "__main__":
    run_script(main)
