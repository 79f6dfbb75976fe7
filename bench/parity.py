"""SAEs that SAELens, sparsify and dictionary_learning train and save, read here: the same forward, R^2 and
patched CE? Run by hand:

    pip install -e '.[parity]' -c constraints.txt
    python bench/parity.py

Each library trains for a few hundred steps on stdlib-s, block 3, saves with its own code, and computes h_hat
with its own code; this project reads the file. Columns: largest relative error of h_hat over tokens, and R^2
and patched CE from their h_hat and from ours.
"""

import pathlib
import tempfile
from collections.abc import Callable

import bench
import peers
from common import parse_count, run_script
from transport_geometry.formats import find_and_read
from transport_geometry.formats.computed_sae import fused
from transport_geometry.measuring.evaluate import evaluate
from transport_geometry.measuring.metrics import Sums, computed
from transport_geometry.models.lm import Hook
from transport_geometry.models.loading import load_model
from transport_geometry.records.tables import markdown
from transport_geometry.running.run import CPU
from transport_geometry.saes.train import activation_chunks
from transport_geometry.text.heldout import heldout_rows

import numpy as np
import torch

MODEL, LAYER = "stdlib-s", 3
END = (
    "{model} block {layer}, F = {width}, k = {k}, {n} activations, {seqs} x {ctx} held-out tokens, "
    "clean CE {clean:.6f} nats\n"
)


def compared(
    name: str, path: pathlib.Path, theirs: Callable[[torch.Tensor], torch.Tensor], hook: Hook, x: torch.Tensor
) -> tuple[dict, float]:
    """(row of the table, clean CE) of one SAE on input_ids x [B,T]."""
    held = hook.head(x)[:, :-1].flatten(0, 1)
    (file,) = find_and_read.find(str(path))
    sae = fused(find_and_read.read(file))
    with torch.no_grad():
        expected, got = theirs(held), sae.reconstruct(held)[2]
    reconstructions = {"theirs": lambda h, mean: theirs(h).detach(), "ours": sae}
    value = {}
    for who, result in evaluate(hook, x, reconstructions, 4).items():
        sums = Sums({q: v[None] for q, v in result.sums.items()}, np.ones((1, len(x))), held.shape[1])
        value[who] = {metric: v.item() for metric, v in computed(sums).items()}
    row = {
        "library, architecture": name,
        "forward error": ((got - expected).norm(dim=1) / expected.norm(dim=1)).max().item(),
        "L0": value["ours"]["l0"],
    }
    for metric, called in (("r2", "R2"), ("ce_recon", "CE")):
        row |= {f"{called} {who}": f"{value[who][metric]:.6f}" for who in ("theirs", "ours")}
    return row, value["ours"]["ce_orig"]


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument("--tokens", type=parse_count, default="40k", help="activations each trains on")
    parser.add_argument("--seqs", type=int, default=16, help="held-out sequences")
    parser.add_argument("--ctx", type=int, default=128)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(MODEL, CPU)
    hook = Hook(model, LAYER)
    chunks = activation_chunks(hook, "stdlib", tokenizer, args.ctx, args.tokens, "keep")
    h = torch.cat([h for h, _ in chunks])
    x = heldout_rows("stdlib", tokenizer, ctx=args.ctx, n=args.seqs).input_ids
    rows, clean = [], float("nan")
    with tempfile.TemporaryDirectory() as folder:
        everything = peers.everything(pathlib.Path(folder), h, args.width, args.k)
        for name, (path, theirs) in everything.items():
            row, clean = compared(name, path, theirs, hook, x)
            rows.append(row)
    print(END.format(model=MODEL, layer=LAYER, n=len(h), clean=clean, **vars(args)))
    print(markdown(rows, list(rows[0])))


if __name__ == "__main__":
    run_script(main)
