"""Is an SAE that branches off a shared trunk as good as one trained by itself? Held-out R^2 and alive
fraction, paired by seed.

    python bench/trunk.py 156250,781250 --batch 64   # the numbers of steps of 10M and 50M tokens
    python bench/trunk.py 25k,80k,250k               # the recipe's own batch and rate for these budgets
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from common import parse_count
from transport_geometry.lm import head
from transport_geometry.models import load_model
from transport_geometry.tables import markdown, readable_count
from transport_geometry.text import heldout_rows
from transport_geometry.train import CHUNK, Training, activation_chunks

import numpy as np
import torch
from tqdm import tqdm

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("budgets")
parser.add_argument("--model", default="stdlib-s")
parser.add_argument("--k", default="4,16")
parser.add_argument("--seeds", type=int, default=6)
parser.add_argument("--batch", type=int, help="tokens per step, instead of the recipe's own")
args = parser.parse_args()
budgets, layer, expansion = [parse_count(b) for b in args.budgets.split(",")], 3, 4
if args.batch:
    # the recipe's rate for it
    Training.pace = staticmethod(lambda tokens: (args.batch, 5 * (args.batch / 256) ** 0.5))
model, tokenizer = load_model(args.model, torch.device("cpu"))
chunks = list(activation_chunks(model, layer, "stdlib", tokenizer, 256, budgets[-1], "keep"))
held = head(model, layer, heldout_rows("stdlib", tokenizer, 256, 48).rows).flatten(0, 1)
sst = (held - held.mean(0)).square().sum()


def measure(training):
    sae = training.finished()
    values, indices = sae.encode(held)
    return 1 - ((sae.decode(values, indices) - held).square().sum() / sst).item(), len(
        indices[values > 0].unique()
    ) / len(sae.W_dec)


def train(k, seed, budgets):
    """{budget: (R^2, alive)} of one run and its branches."""
    first = budgets[0]
    runs = [
        Training(
            Training.describe(*(x[:first] for x in chunks[0])), expansion * held.shape[1], k, seed, budgets
        )
    ]
    for number, (h, _) in enumerate(chunks):
        runs = [run for training in runs for run in training.feed(h, number * CHUNK, tqdm(disable=True), "")]
    return {run.budgets[-1]: measure(run) for run in runs}


rows = []
for k in map(int, args.k.split(",")):
    shared, alone = {b: [] for b in budgets}, {b: [] for b in budgets}
    for seed in tqdm(range(args.seeds), desc=f"k={k}", leave=False):
        for b, value in train(k, seed, budgets).items():
            shared[b].append(value)
        for b in budgets[1:]:
            alone[b].append(train(k, seed, [b])[b])
    for before, b in zip(budgets, budgets[1:]):
        s, a = np.array(shared[b]).T, np.array(alone[b]).T
        difference = (s - a)[0]
        rows.append(
            {
                "k": k,
                "tokens": readable_count(b),
                "R2 branch": s[0].mean(),
                "R2 alone": a[0].mean(),
                "difference": difference.mean(),
                "its SE": difference.std(ddof=1) / len(difference) ** 0.5,
                "seed SD": a[0].std(ddof=1),
                "since last budget": a[0].mean() - np.mean(shared[before], 0)[0],
                "alive branch": s[1].mean(),
                "alive alone": a[1].mean(),
            }
        )
print(markdown(rows, list(rows[0])))
