"""What a grid costs before anything is spent: FLOPs, bytes, and time on this machine and on others."""

import time
from typing import Any

from transport_geometry import given, plant
from transport_geometry.condition import NULLS
from transport_geometry.errors import one_line
from transport_geometry.evaluate import DRAWS
from transport_geometry.gguf_models import PACKAGED
from transport_geometry.grid import Command, Grid
from transport_geometry.lm import HEADS, blocks, pick_device, text_config
from transport_geometry.model_files import read_config
from transport_geometry.models import EMBEDDED, SHORT_NAMES, pick_layer
from transport_geometry.tables import markdown, readable_count
from transport_geometry.train import CHUNK, RECIPES, trunk

import torch

PYTHIA = {  # width, blocks, heads
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


def shape_of(name: str, revision: str | None) -> Any:
    """The model without weights (`meta` device): what its size costs, from its config alone. The presets' are
    known here. Raises UserError.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    name, _ = plant.split(name)
    hint = "" if "/" in name else f" (known by name are {SHORT_NAMES})"
    with one_line(f"--models {name}{hint}"):
        if name in PYTHIA:
            d, n_layers, heads = PYTHIA[name]
            config = transformers.GPTNeoXConfig(
                hidden_size=d,
                num_hidden_layers=n_layers,
                num_attention_heads=heads,
                intermediate_size=4 * d,
                vocab_size=50304,
            )
        elif name in PACKAGED:
            config = transformers.AutoConfig.for_model(**PACKAGED[name].shape)
        else:
            config = read_config(str(EMBEDDED.get(name, name)), revision or "main")
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)


def block_size(model: Any) -> int:
    """Parameters of one block."""
    parts = blocks(model)
    return sum(p.numel() for part in parts for p in part.parameters()) // len(parts)


def blocks_run(layer: int, before: int, activations: int) -> int:
    """Blocks that a hook's head runs on a training text: those since the model's hook before it, where that
    one's activations (so many numbers) are kept.
    """
    return layer - before if before < layer and 4 * activations <= HEADS else layer + 1


def token_flops(d: int, d_sae: int, overhead: int = OVERHEAD) -> float:
    """Of a token in the training of an SAE: the encode, and the sparse rest."""
    return 5 * d * d_sae + 2 * overhead


def evaluation_flops(model: Any, layer: int, passes: int, codes: int, overhead: int = 0) -> float:
    """Of a token in a hook's evaluation: the head; the clean run, and through the blocks after the hook one
    backward pass for each set of labels, through the unembedding one for all, which the losses meet again;
    `passes` through the tail; the encoders of `codes` latents. overhead: multiplications as long as what a
    block costs besides them.
    """
    config = text_config(model)
    d, vocab = config.hidden_size, config.vocab_size
    block, after = block_size(model) + overhead, config.num_hidden_layers - 1 - layer
    runs_of_blocks = layer + 1 + after * (2 + DRAWS + passes)
    return 2 * (block * runs_of_blocks + vocab * d * (3 + passes) + d * codes)


def cost(
    name: str,
    layer: int | None,
    grid: Grid,
    more_passes: int = 0,
    widths: list[int] | None = None,
    before: int = -1,
) -> dict[str, Any]:
    """FLOPs, bytes in memory and on disk of one hook's SAEs and their evaluation, counting matrix products:
    a row. widths: of SAEs that exist. before: the layer of the model's hook before this one.
    """
    model = shape_of(name, grid.revision)
    layer, d = pick_layer(model, name, layer), text_config(model).hidden_size
    d_sae, n_tok, longest = grid.expansion * d, grid.eval_seqs * grid.ctx, max(grid.tokens)
    if widths:
        saes, trained, training, live, codes = len(widths), 0.0, 0.0, 1, sum(widths)
    else:
        saes = len(grid.recipes) * len(grid.tokens) * runs(grid)
        trained, live = training_work(grid)
        head = 2 * block_size(model) * blocks_run(layer, before, longest * d)
        training = len(grid.sinks) * longest * head + trained * token_flops(d, d_sae, overhead=0)
        codes = (saes + len(NULLS)) * d_sae
    passes = (2 + more_passes) * (saes + len(NULLS))  # each patch once more, sinks clean
    evaluation = n_tok * evaluation_flops(model, layer, passes, codes)
    parameters = 4 * 2 * d * (max(widths) if widths else d_sae)  # bytes
    return dict(
        hook=f"{name}@{layer}",
        saes=saes,
        train_tokens=readable_count(round(trained)),
        tflops=(training + evaluation) / 1e12,
        memory_gb=(
            sum(p.numel() for p in model.parameters()) * 4
            + min(CHUNK, longest) * d * 8
            + parameters * 4 * live
        )
        / 1e9,
        disk_gb=parameters * saes / 1e9,
    )


def runs(grid: Grid) -> int:
    """SAEs of one recipe and budget at a hook."""
    return len(grid.sinks) * len(grid.k) * len(grid.seeds)


def training_work(grid: Grid) -> tuple[float, int]:
    """(tokens that SAEs are trained on at a hook, SAEs that are held at once, with gradients and moments)."""
    trained, live, branching = 0.0, 0, False
    for recipe in grid.recipes:
        for tokens in grid.tokens:  # a budget on the way to another is a branch of its run
            inner = any(tokens in trunk(recipe, other, grid.tokens) for other in grid.tokens)
            trained += runs(grid) * tokens * (RECIPES[recipe].DECAY if inner else 1.0)
            live, branching = live + runs(grid) * (not inner), branching or inner
    if max(grid.tokens) <= CHUNK:  # one after the other
        return trained, 1
    return trained, live // len(grid.sinks) * (2 if branching else 1)


def measured_rate(device: torch.device) -> float:
    """TFLOP/s of a large float32 product."""
    a = torch.randn(2048, 2048, device=device)
    (a @ a).sum().item()
    start = time.perf_counter()
    for _ in range(5):
        b = a @ a
    b.sum().item()
    return 5 * 2 * 2048**3 / (time.perf_counter() - start) / 1e12


def readable_time(seconds: float) -> str:
    """0.2 -> '0.2 s', 180 -> '3 min', 5040 -> '1.4 h', 259200 -> '3 days': two digits, of an estimate."""
    if seconds < 0.01:
        return "< 0.01 s"
    units = {"days": 86400, "h": 3600, "min": 60, "s": 1}
    for unit, length in units.items():
        count = float(f"{seconds / length:.2g}")
        if count >= (2 if unit == "days" else 1):
            break
    return f"{count:g} {unit}"


def dry_run(command: Command, more_passes: int = 0) -> None:
    """Print the grid and what it would cost. Nothing is loaded or written, and of --sae on the hub only the
    configurations are downloaded.

    more_passes: what an experiment's own terms cost per SAE, in passes through the tail.
    """
    grid, device = command.grid, pick_device(command.device)
    here, asked = measured_rate(device), ""
    if grid.saes:
        rows = dry_run_of_files(grid, more_passes)
    else:
        rows, before = [], dict[str, int]()
        for name, layer in grid.models:
            rows.append(cost(name, layer, grid, more_passes, before=before.get(name, -1)))
            before[name] = int(rows[-1]["hook"].rpartition("@")[2])
        budgets = [readable_count(tokens) for tokens in grid.tokens]
        asked = (
            f"k {list(grid.k)}, tokens {budgets}, seeds {list(grid.seeds)}, {grid.expansion}x, recipe "
            f"{list(grid.recipes)}, sinks {list(grid.sinks)}; "
        )
    total, disk = (sum(row[column] for row in rows) for column in ("tflops", "disk_gb"))
    print(markdown(rows, ["hook", "saes", "train_tokens", "tflops", "memory_gb", "disk_gb"]))
    print(f"\n{asked}evaluation {grid.eval_seqs} x {grid.ctx}; {total:.3g} TFLOP, {disk:.3g} GB of SAEs\n")
    rates = {f"this {device.type} (measured)": here, **PEAK}
    times = [
        {"device": name, "float32 TFLOP/s": rate, "time": readable_time(total / (SHARE * rate))}
        for name, rate in rates.items()
    ]
    print(markdown(times, list(times[0])))
    print(
        f"\nTime: an estimate, at {SHARE:.0%} of the rate in the middle column (measured here, the vendor's "
        "elsewhere)."
    )


def dry_run_of_files(grid: Grid, more_passes: int) -> list[dict[str, Any]]:
    """Print what the files of --sae say; what evaluating them costs, a row a hook."""
    columns = ["sae", "hook", "format", "width", "ctx", "bos", "basis"]
    chosen, refused = given.choose(grid.saes, grid.models, grid.basis)
    given.say(refused)
    rows = []
    for one in chosen:
        row = {"sae": one.file.label, "hook": f"{one.model}@{one.layer}"} | vars(one.declared)
        row["basis"] = one.basis or row["basis"]
        rows.append({c: "not said" if row[c] is None else row[c] for c in columns})
    print(markdown(rows, columns) + "\n")
    places: dict[tuple[str, int], list[int]] = {}
    for one in chosen:
        places.setdefault((one.model, one.layer), []).append(one.declared.width or 0)
    return [cost(name, layer, grid, more_passes, widths) for (name, layer), widths in places.items()]
