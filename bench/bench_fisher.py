"""What the exact Fisher form of one SAE costs beside its patched forward: CPU time, one thread, interleaved.

OMP_NUM_THREADS=1 python bench/bench_fisher.py [stdlib-l | EleutherAI/pythia-70m]      # the latter: its shape, random weights
"""

import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from transport_geometry import fisher
from transport_geometry.cost import PYTHIA, shape_of
from transport_geometry.lm import head, log_probs, tail
from transport_geometry.models import load_model
from transport_geometry.run import eval_batch
from transport_geometry.text import heldout_rows

import torch

name, ctx = (sys.argv[1:] + ["stdlib-l"])[0], 256
if name in PYTHIA:
    model = shape_of(name).to_empty(device="cpu").eval().requires_grad_(False)
    model.init_weights()
    x = torch.randint(model.config.vocab_size, (2, ctx), generator=torch.Generator().manual_seed(0))
else:
    model, tokenizer = load_model(name, torch.device("cpu"))
    x = heldout_rows("stdlib", tokenizer, ctx, eval_batch(model, ctx, torch.device("cpu"))).rows
layer = model.config.num_hidden_layers // 2
h = head(model, layer, x)
delta = 0.3 * h.std() * torch.randn(h.shape, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    p = log_probs(tail(model, layer, x, h)).exp()
    jobs = {
        "patched forward": lambda: log_probs(tail(model, layer, x, h + delta)),
        "sequence form": lambda: fisher.sequence_form(model, layer, x, h, delta, p),
        "same form": lambda: fisher.same_form(model, layer, x, h, delta, p),
    }
    times = {job: [] for job in jobs}
    for _ in range(15):
        for job, f in jobs.items():
            start = time.process_time()
            f()
            times[job].append(time.process_time() - start)
base = statistics.median(times["patched forward"])
for job, values in times.items():
    print(
        f"{name} layer {layer}, {tuple(h.shape)}: {job:16} {statistics.median(values) * 1e3:7.1f} ms, {statistics.median(values) / base:.2f} x the patched forward"
    )
