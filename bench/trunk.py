"""Is an SAE that branches off a shared trunk as good as one trained by itself? Held-out R^2 and alive fraction, paired by seed.

    python bench/trunk.py [stdlib-s] [25k,80k,250k] [6 seeds]
"""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from common import head, load_model, markdown, parse_count, readable_count

import numpy as np
import torch
from tqdm import tqdm

from sae import Training, activation_chunks
from text import heldout_rows

name, budgets, n_seeds = (sys.argv[1:] + ["stdlib-s", "25k,80k,250k", "6"][len(sys.argv) - 1:])
budgets, layer, expansion = [parse_count(b) for b in budgets.split(",")], 3, 4
model, tokenizer = load_model(name, torch.device("cpu"))
(h, sink), = activation_chunks(model, layer, "stdlib", tokenizer, 256, budgets[-1], "keep")
held = head(model, layer, heldout_rows("stdlib", tokenizer, 256, 48)[0]).flatten(0, 1)
sst = (held - held.mean(0)).square().sum()


def measure(training):
    sae = training.finished()
    values, indices = sae.encode(held)
    alive = len(indices[values > 0].unique()) / len(sae.W_dec)
    return 1 - ((sae.decode(values, indices) - held).square().sum() / sst).item(), alive


def train(k, seed, budgets):
    """{budget: (R^2, alive)} of one run and its branches."""
    statistics = Training.describe(h[:budgets[0]], sink[:budgets[0]])
    runs = Training(statistics, expansion * held.shape[1], k, seed, budgets).feed(h, 0, tqdm(disable=True), "")
    return {run.budgets[-1]: measure(run) for run in runs}


rows = []
for k in (4, 8, 16, 32):
    shared, alone = {b: [] for b in budgets}, {b: [] for b in budgets}
    for seed in tqdm(range(int(n_seeds)), desc=f"k={k}", leave=False):
        for b, value in train(k, seed, budgets).items():
            shared[b].append(value)
        for b in budgets[1:]:
            alone[b].append(train(k, seed, [b])[b])
    for b in budgets[1:]:
        s, a = np.array(shared[b]).T, np.array(alone[b]).T
        difference = (s - a)[0]
        rows.append({"model": name, "k": k, "tokens": readable_count(b), "R2 branch": s[0].mean(), "R2 alone": a[0].mean(),
                     "difference": difference.mean(), "its SE": difference.std(ddof=1) / len(difference) ** 0.5,
                     "seed SD": a[0].std(ddof=1), "alive branch": s[1].mean(), "alive alone": a[1].mean()})
print(markdown(rows, list(rows[0])))
