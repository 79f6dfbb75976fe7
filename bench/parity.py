"""SAEs that SAELens, sparsify and dictionary_learning train and save, read here: the same forward, R^2 and
patched CE? Run by hand:

    pip install -e '.[parity]' -c constraints.txt
    python bench/parity.py

Each library trains for a few hundred steps on stdlib-s, block 3, saves with its own code, and computes h_hat
with its own code; this project reads the file. Columns: largest relative error of h_hat over tokens, and R^2
and patched CE from their h_hat and from ours.
"""

import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import peers  # noqa: E402
from transport_geometry import formats
from transport_geometry.evaluate import evaluate
from transport_geometry.lm import head
from transport_geometry.metrics import metrics
from transport_geometry.models import load_model
from transport_geometry.tables import markdown
from transport_geometry.text import heldout_rows
from transport_geometry.train import activation_chunks

import numpy as np  # noqa: E402
import torch  # noqa: E402

MODEL, LAYER, CTX, TOKENS, F, K = "stdlib-s", 3, 128, 40_000, 512, 16

torch.set_num_threads(1)
model, tokenizer = load_model(MODEL, torch.device("cpu"))
h = torch.cat([h for h, _ in activation_chunks(model, LAYER, "stdlib", tokenizer, CTX, TOKENS, "keep")])
rows = heldout_rows("stdlib", tokenizer, CTX, 16).rows
held = head(model, LAYER, rows)[:, :-1].flatten(0, 1)
table = []
with tempfile.TemporaryDirectory() as folder:
    for name, (path, theirs) in peers.everything(pathlib.Path(folder), h, F, K).items():
        (entry,) = formats.find(str(path))
        sae = formats.fused(formats.read(entry))
        with torch.no_grad():
            expected, got = theirs(held), sae.reconstruct(held)[2]
        results = evaluate(model, LAYER, rows, {"theirs": lambda h, mean: theirs(h).detach(), "ours": sae}, 4)
        value = {
            who: metrics({q: v[None] for q, v in result["sums"].items()}, np.ones((1, len(rows))), h.shape[1])
            for who, result in results.items()
        }
        one = lambda who, metric: f"{value[who][metric].item():.6f}"
        table.append(
            {
                "library, architecture": name,
                "forward error": ((got - expected).norm(dim=1) / expected.norm(dim=1)).max().item(),
                "L0": value["ours"]["l0"].item(),
                "R2 theirs": one("theirs", "r2"),
                "R2 ours": one("ours", "r2"),
                "CE theirs": one("theirs", "ce_recon"),
                "CE ours": one("ours", "ce_recon"),
            }
        )
print(
    f"{MODEL} block {LAYER}, F = {F}, k = {K}, {TOKENS} activations, {len(rows)} x {CTX} held-out tokens, clean CE {value['ours']['ce_orig'].item():.6f} nats\n"
)
print(markdown(table, list(table[0])))
