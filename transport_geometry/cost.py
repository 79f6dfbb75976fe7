"""TODO cost."""

import time

from transport_geometry.errors import one_line
from transport_geometry.grid import NULLS, chosen_saes
from transport_geometry.lm import pick_device
from transport_geometry.models import EMBEDDED, pick_layer, read_config
from transport_geometry.tables import markdown, readable_count
from transport_geometry.train import CHUNK, RECIPES, trunk

import torch

# ---------------------------------------------------------------------------------------------------- cost
PYTHIA = {
    "EleutherAI/pythia-70m": (512, 6, 8),
    "EleutherAI/pythia-160m": (768, 12, 12),
    "EleutherAI/pythia-410m": (1024, 24, 16),
}
# vendors' float32 TFLOP/s, outside tensor cores
PEAK = {"M2 Max (mps)": 13.6, "A100": 19.5, "RTX 4090": 82.6, "H100": 67}
# multiplications as long as what a token costs besides them, for each SAE in training and each block
# (measured on a CPU)
OVERHEAD = 2**17
SHARE = 0.35  # of a large product's rate that the whole run reaches: a guess, for these estimates only


def shape_of(name: str, revision: str | None):
    """The model without weights (`meta` device): what its size costs, from its config alone. The presets' are
    known here.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    with one_line(f"--models {name}" + ("" if "/" in name else f" (embedded are {', '.join(EMBEDDED)})")):
        if name in PYTHIA:
            d, n_layers, heads = PYTHIA[name]
            config = transformers.GPTNeoXConfig(
                hidden_size=d,
                num_hidden_layers=n_layers,
                num_attention_heads=heads,
                intermediate_size=4 * d,
                vocab_size=50304,
            )
        else:
            config = read_config(EMBEDDED.get(name, name), revision or "main")
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)


def block_size(model) -> int:
    """Parameters of one block: what is left without the embedding and the unembedding, shared out."""
    config = model.config
    return (
        sum(p.numel() for p in model.parameters()) - 2 * config.vocab_size * config.hidden_size
    ) // config.num_hidden_layers


def cost(name: str, layer: int | None, args, more_passes: int = 0, widths: list[int] | None = None) -> dict:
    """FLOPs, bytes in memory and on disk of one hook's SAEs and their evaluation, counting matrix products.
    widths: of SAEs that exist.
    """
    model = shape_of(name, args.revision)
    layer, d = pick_layer(model, name, layer), model.config.hidden_size
    n_layers, vocab = model.config.num_hidden_layers, model.config.vocab_size
    block = block_size(model)
    head, tail = 2 * block * (layer + 1), 2 * (block * (n_layers - layer - 1) + vocab * d)
    dense = 2 * d * args.expansion * d
    runs = len(args.sinks) * len(args.k) * len(args.seeds)  # of each recipe
    trained, live, branching = 0.0, 0, False
    for recipe in args.recipe:
        for tokens in args.tokens:  # a budget on the way to another is a branch of its run
            inner = any(tokens in trunk(recipe, other, args.tokens) for other in args.tokens)
            trained += runs * tokens * (RECIPES[recipe].DECAY if inner else 1.0)
            live, branching = live + runs * (not inner), branching or inner
    saes, n_tok = len(widths or args.tokens * (runs * len(args.recipe))), args.eval_seqs * args.ctx
    # encode, and the sparse rest
    train = 0 if widths else len(args.sinks) * max(args.tokens) * head + trained * 2.5 * dense
    patches = saes + len(NULLS)
    evaluation = n_tok * (
        head
        + tail * (1 + 2 * (1 + 4) + 2 + (2 + more_passes) * patches)
        + (2 * d * sum(widths) if widths else patches * dense)
    )
    parameters = 8 * d * (max(widths) if widths else args.expansion * d)
    # then all runs of a stream live at once, with gradients and Adam's moments
    many = max(args.tokens) > CHUNK
    return dict(
        hook=f"{name}@{layer}",
        saes=saes,
        train_tokens=readable_count(round(trained)),
        tflops=(train + evaluation) / 1e12,
        memory_gb=(
            sum(p.numel() for p in model.parameters()) * 4
            + min(CHUNK, max(args.tokens)) * d * 8
            + parameters * 4 * (live // len(args.sinks) * (2 if branching else 1) if many else 1)
        )
        / 1e9,
        disk_gb=parameters * saes / 1e9,
    )


def dry_run(args, more_passes: int = 0) -> None:
    """Print the grid and what it would cost. Nothing is loaded or written, and of --sae on the hub only the
    configurations are downloaded.

    more_passes: what an experiment's own terms cost per SAE, in passes through the tail.
    """
    device = pick_device(args.device)
    a = torch.randn(2048, 2048, device=device)
    (a @ a).sum().item()
    start = time.perf_counter()
    for _ in range(5):
        b = a @ a
    b.sum().item()
    here = 5 * 2 * 2048**3 / (time.perf_counter() - start) / 1e12
    if args.sae:
        files = chosen_saes(args)
        rows = [
            {
                "sae": e["label"],
                "hook": f"{e['model']}@{e['layer']}",
                **vars(e["declared"]),
                **({"basis": args.basis} if args.basis else {}),
            }
            for e in files
        ]
        columns = ["sae", "hook", "format", "width", "ctx", "bos", "basis"]
        print(
            markdown(
                [{c: "not said" if row[c] is None else row[c] for c in columns} for row in rows], columns
            )
            + "\n"
        )
        places = dict.fromkeys((e["model"], e["layer"]) for e in files)
        rows = [
            cost(
                *place,
                args,
                more_passes,
                [e["declared"].width or 0 for e in files if (e["model"], e["layer"]) == place],
            )
            for place in places
        ]
    else:
        rows = [cost(name, layer, args, more_passes) for name, layer in args.models]
    total = sum(row["tflops"] for row in rows)
    print(markdown(rows, ["hook", "saes", "train_tokens", "tflops", "memory_gb", "disk_gb"]))
    grid = (
        f"k {args.k}, tokens {[readable_count(t) for t in args.tokens]}, seeds {args.seeds}, {args.expansion}x, recipe {args.recipe}, sinks {args.sinks}; "
        if not args.sae
        else ""
    )
    print(
        f"\n{grid}evaluation {args.eval_seqs} x {args.ctx}; {total:.3g} TFLOP, {sum(row['disk_gb'] for row in rows):.3g} GB of SAEs\n"
    )
    rates = {f"this {device.type} (measured)": here, **PEAK}
    print(
        markdown(
            [
                {"device": name, "float32 TFLOP/s": rate, "hours": total / (SHARE * rate) / 3600}
                for name, rate in rates.items()
            ],
            ["device", "float32 TFLOP/s", "hours"],
        )
    )
    print(
        f"\nHours: an estimate, at {SHARE:.0%} of the rate in the middle column (measured here, the vendor's elsewhere)."
    )
