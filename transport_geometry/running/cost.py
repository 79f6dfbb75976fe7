"""What a grid costs before anything is spent: FLOPs, bytes, and time on this machine and on others."""

import functools
import time
from typing import Any

from transport_geometry import flops
from transport_geometry.errors import one_line
from transport_geometry.measuring.evaluate import DRAWS, PATCHED_RUNS
from transport_geometry.models import plant
from transport_geometry.models.gguf_models import PACKAGED
from transport_geometry.models.lm import pick_device, text_config
from transport_geometry.models.loading import EMBEDDED, SHORT_NAMES, pick_layer
from transport_geometry.models.model_files import read_config
from transport_geometry.records.condition import NULLS
from transport_geometry.records.tables import markdown, readable_count
from transport_geometry.running.grid import Command, Grid
from transport_geometry.saes import external_saes
from transport_geometry.saes.recipes import CHUNK, RECIPES, trunk
from transport_geometry.saes.train import MEMORY, held_bytes, in_passes, memory_of

import torch

PYTHIA = {  # width, blocks, heads
    "EleutherAI/pythia-70m": (512, 6, 8),
    "EleutherAI/pythia-160m": (768, 12, 12),
    "EleutherAI/pythia-410m": (1024, 24, 16),
}
# vendors' float32 TFLOP/s, outside tensor cores
PEAK = {"M2 Max (mps)": 13.6, "A100": 19.5, "RTX 4090": 82.6, "H100": 67}
SHARE = 0.35  # of a large product's rate that the whole run reaches: a guess, for these estimates only


@functools.cache
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


def cost(
    name: str,
    layer: int | None,
    grid: Grid,
    more_passes: int = 0,
    widths: list[int] | None = None,
    head: int = 0,
) -> dict[str, Any]:
    """FLOPs, bytes in memory and on disk of one hook's SAEs and their evaluation, counting matrix products:
    a row. widths: of SAEs that exist. head: blocks that the training pass runs for this hook, beyond those it
    runs for the hooks before it.
    """
    model = shape_of(name, grid.revision)
    layer, d = pick_layer(model, name, layer), text_config(model).hidden_size
    d_sae, n_tok, longest = grid.expansion * d, grid.eval_seqs * grid.ctx, max(grid.tokens)
    if widths:
        saes, trained, training, codes = len(widths), 0.0, 0.0, sum(widths)
        held = 8 * d * max(widths)
    else:
        saes = len(grid.recipes) * len(grid.tokens) * runs(grid)
        trained = trained_tokens(grid)
        training = longest * flops.of_blocks(model, head, overhead=0)
        training += trained * flops.of_training(d, d_sae, overhead=0)
        codes = (saes + len(NULLS)) * d_sae
        held = held_at(d, grid)
    passes = (PATCHED_RUNS + more_passes) * (saes + len(NULLS))
    evaluation = n_tok * flops.of_evaluation(model, layer, passes, 1 + DRAWS, codes, overhead=0)
    return dict(
        hook=f"{name}@{layer}",
        saes=saes,
        train_tokens=readable_count(round(trained)),
        tflops=(training + evaluation) / 1e12,
        memory_gb=held / 1e9,
        disk_gb=(8 * d * (max(widths) if widths else d_sae) * saes) / 1e9,
    )


def held_at(d: int, grid: Grid) -> int:
    """Bytes that a hook of width d holds while its SAEs are trained."""
    live = [
        (recipe, grid.expansion * d, runs(grid) * (2 if way else 1))
        for recipe in grid.recipes
        for way in trunks(recipe, grid).values()
    ]
    return held_bytes(d, max(grid.tokens), live)


def training_passes(grid: Grid, device: torch.device) -> list[tuple[str, list[int], float]]:
    """[(model, layers, bytes)] of every pass of a language model over the training text, and what is held in
    it: the model, what its hooks hold, and of one SAE at a time a chunk of its own and its gradients.
    """
    layers: dict[str, set[int]] = {}
    for name, layer in grid.models:
        layers.setdefault(name, set()).add(pick_layer(shape_of(name, grid.revision), name, layer))
    out = []
    for name, theirs in layers.items():
        model = shape_of(name, grid.revision)
        d = text_config(model).hidden_size
        held = held_at(d, grid)
        fixed = 4 * (sum(p.numel() for p in model.parameters()) + d * min(CHUNK, max(grid.tokens)))
        fixed += 4 * 4 * 2 * d * grid.expansion * d
        for one in in_passes(dict.fromkeys(theirs, held), MEMORY * memory_of(device)):
            out.append((name, one, fixed + held * len(one)))
    return out


def runs(grid: Grid) -> int:
    """SAEs of one recipe and budget at a hook."""
    return len(grid.sinks) * len(grid.k) * len(grid.seeds)


def trained_tokens(grid: Grid) -> float:
    """Tokens that SAEs are trained on at a hook, each SAE's counted."""
    return runs(grid) * sum(
        tokens + RECIPES[recipe].DECAY * sum(way)
        for recipe in grid.recipes
        for tokens, way in trunks(recipe, grid).items()
    )


def trunks(recipe: str, grid: Grid) -> dict[int, tuple[int, ...]]:
    """{budget: the smaller ones on its way}, of the budgets that are on no other's way."""
    ways = {tokens: trunk(recipe, tokens, grid.tokens) for tokens in grid.tokens}
    inner = {tokens for way in ways.values() for tokens in way}
    return {tokens: way for tokens, way in ways.items() if tokens not in inner}


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
        passes = training_passes(grid, device)
        heads = {
            (name, layer): layer - before
            for name, layers, _ in passes
            for before, layer in zip([-1, *layers], layers)
        }
        rows = [
            cost(name, layer, grid, more_passes, head=heads[name, layer])
            for name, layers, _ in passes
            for layer in layers
        ]
        budgets = [readable_count(tokens) for tokens in grid.tokens]
        asked = (
            f"k {list(grid.k)}, tokens {budgets}, seeds {list(grid.seeds)}, {grid.expansion}x, recipe "
            f"{list(grid.recipes)}, sinks {list(grid.sinks)}; "
        )
    total, disk = (sum(row[column] for row in rows) for column in ("tflops", "disk_gb"))
    print(markdown(rows, ["hook", "saes", "train_tokens", "tflops", "memory_gb", "disk_gb"]))
    for name, layers, held in [] if grid.saes else passes:
        hooks = f"{len(layers)} hooks" if len(layers) > 1 else "1 hook"
        print(
            f"\n{name} reads the training text once for {hooks}: up to {held / 1e9:.1f} GB of memory", end=""
        )
    print(f"\n\n{asked}evaluation {grid.eval_seqs} x {grid.ctx}; {total:.3g} TFLOP, {disk:.3g} GB of SAEs\n")
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
    chosen, refused = external_saes.choose(grid.saes, grid.models, grid.basis)
    external_saes.say(refused)
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
