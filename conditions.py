"""Conditions: which SAEs a command asks for, what they cost, and the folder in which each has one row.

A condition is one SAE: (model, layer, sae, recipe, d_sae, k, seed, tokens). C conditions, S evaluation sequences.
"""
import hashlib
import json
import pathlib
import platform
import time

from common import (EMBEDDED, Fault, UserError, atomically, check_parity, fingerprint, load_model, markdown, open_output, pick_device,
                    pick_layer, read_table, readable_count, write_run, write_table)

import numpy as np
import torch
from tqdm import tqdm

import kernels
from proxies import VALUE_BITS, evaluate, index_bits, metrics, sequence_weights
from sae import CHUNK, RECIPES, TRAIN_VERSION, TopKSAE, get_saes, tied_init, trunk
from text import heldout_rows

KEY = ["model", "layer", "sae", "recipe", "d_sae", "k", "seed", "tokens"]
METRICS = ["r2", "r2_nosink", "r2_defl1", "r2_ln", "nmse", "nmse_tok", "mse", "cosine", "relerr", "swd_tok", "swd_seq", "swd_sampled",
           "gd_mean", "gd_abs", "ce_orig", "ce_recon", "dce", "ce_rec", "ce_rec_sinkclean", "ce_zero", "ce_mean", "frac_zero", "frac_mean",
           "kl", "alive", "l0", "bits_idx", "bits", "fed", "fed_nosink", "rho"]
COLUMNS = KEY + ["n_seq", "n_tok", "n_sink"] + METRICS
NULLS = ("null-identity", "null-mean", "null-random", "null-gaussian")


# ---------------------------------------------------------------------------------------------------- plan
def sae_name(expansion: int, sinks: str) -> str:
    return f"topk-x{expansion}" + ("-nosinks" if sinks == "drop" else "")


def plan(args, device: torch.device, script: str) -> tuple[dict, list[dict]]:
    """(settings, hooks): every model loaded (on the CPU), every argument checked against it, before anything is written."""
    loaded, hooks = {}, []
    for name, layer in args.models:
        if name not in loaded:
            model, tokenizer = load_model(name, torch.device("cpu"))
            limit = getattr(model.config, "max_position_embeddings", args.ctx)
            if args.ctx > limit:
                raise UserError(f"--ctx {args.ctx}: {name} takes {limit} tokens at most")
            rows, text = heldout_rows(args.data, tokenizer, args.ctx, args.eval_seqs)
            loaded[name] = model, tokenizer, rows, text, fingerprint(model)
        model, tokenizer, rows, text, weights = loaded[name]
        layer = pick_layer(model, name, layer)
        d = model.config.hidden_size
        if args.k[-1] > args.expansion * d:
            raise UserError(f"--k {args.k[-1]}: more than the {args.expansion * d} latents of an SAE at {args.expansion}x on {name}")
        jobs = [dict(model=name, weights=weights, layer=layer, data=args.data, text=text, ctx=args.ctx, tokens=tokens,
                     trunk=trunk(recipe, tokens, args.tokens), d_sae=args.expansion * d, k=k, seed=seed, recipe=recipe, sinks=sinks,
                     device=device.type, version=TRAIN_VERSION)
                for sinks in args.sinks for recipe in args.recipe for tokens in args.tokens for k in args.k for seed in args.seeds]
        hooks.append(dict(name=name, layer=layer, model=model, tokenizer=tokenizer, rows=rows, jobs=jobs, d=d,
                          depth=f"{(layer / model.config.num_hidden_layers):.2f}"))
    if len({(hook["name"], hook["layer"]) for hook in hooks}) < len(hooks):
        raise UserError("--models: the same model and layer twice (a name without @LAYER means the middle layer)")
    size = {name: sum(p.numel() for p in entry[0].parameters()) for name, entry in loaded.items()}
    settings = dict(
        script=script, device=device.type, data=args.data, text_sha256=loaded[hooks[0]["name"]][3],
        python=platform.python_version() if args.data == "stdlib" else None,
        models=sorted(size, key=size.get), hooks={f"{h['name']}@{h['layer']}": h["depth"] for h in hooks},
        weights={name: entry[4] for name, entry in loaded.items()}, k=args.k, seeds=args.seeds, tokens=args.tokens,
        expansion=args.expansion, recipe=args.recipe, sinks=args.sinks, eval_seqs=args.eval_seqs, ctx=args.ctx, save_tokens=args.save_tokens)
    return settings, hooks


# ---------------------------------------------------------------------------------------------------- cost
PYTHIA = {"EleutherAI/pythia-70m": (512, 6, 8), "EleutherAI/pythia-160m": (768, 12, 12), "EleutherAI/pythia-410m": (1024, 24, 16)}
PEAK = {"M2 Max (mps)": 13.6, "A100": 19.5, "RTX 4090": 82.6, "H100": 67}  # vendors' float32 TFLOP/s, outside tensor cores
SHARE = 0.35  # of a large product's rate that the whole run reaches: a guess, for these estimates only


def shape_of(name: str):
    """The model without weights (`meta` device): what its size costs, from its config alone. The presets' are known here."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    try:
        if name in PYTHIA:
            d, n_layers, heads = PYTHIA[name]
            config = transformers.GPTNeoXConfig(hidden_size=d, num_hidden_layers=n_layers, num_attention_heads=heads, intermediate_size=4 * d,
                                                vocab_size=50304)
        else:
            config = transformers.AutoConfig.from_pretrained(EMBEDDED.get(name, name))
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise UserError(f"--models {name}: {str(error).strip().splitlines()[0]} (embedded: {', '.join(EMBEDDED)})") from error


def cost(name: str, layer: int | None, args, more_passes: int = 0) -> dict:
    """FLOPs, bytes in memory and on disk of one hook's SAEs and their evaluation, counting matrix products."""
    model = shape_of(name)
    layer, d = pick_layer(model, name, layer), model.config.hidden_size
    n_layers, vocab = model.config.num_hidden_layers, model.config.vocab_size
    block = (sum(p.numel() for p in model.parameters()) - 2 * vocab * d) // n_layers
    head, tail = 2 * block * (layer + 1), 2 * (block * (n_layers - layer - 1) + vocab * d)
    dense = 2 * d * args.expansion * d
    runs = len(args.sinks) * len(args.k) * len(args.seeds)  # of each recipe
    trained, live, branching = 0.0, 0, False
    for recipe in args.recipe:
        for tokens in args.tokens:  # a budget on the way to another is a branch of its run
            inner = any(tokens in trunk(recipe, other, args.tokens) for other in args.tokens)
            trained += runs * tokens * (RECIPES[recipe].DECAY if inner else 1.0)
            live, branching = live + runs * (not inner), branching or inner
    saes, n_tok = runs * len(args.recipe) * len(args.tokens), args.eval_seqs * args.ctx
    train = len(args.sinks) * max(args.tokens) * head + trained * 2.5 * dense  # encode, and the sparse rest
    patches = saes + len(NULLS)
    evaluation = n_tok * (head + tail * (1 + 2 * (1 + 4) + 2 + (2 + more_passes) * patches) + patches * dense)
    parameters = 2 * d * args.expansion * d * 4
    many = max(args.tokens) > CHUNK  # then all runs of a stream live at once, with gradients and Adam's moments
    return dict(hook=f"{name}@{layer}", saes=saes, train_tokens=readable_count(round(trained)), tflops=(train + evaluation) / 1e12,
                memory_gb=(sum(p.numel() for p in model.parameters()) * 4 + min(CHUNK, max(args.tokens)) * d * 8
                           + parameters * 4 * (live // len(args.sinks) * (2 if branching else 1) if many else 1)) / 1e9,
                disk_gb=parameters * saes / 1e9)


def dry_run(args, more_passes: int = 0) -> None:
    """Print the grid and what it would cost. Nothing is loaded, downloaded or written.

    more_passes: what an experiment's own terms cost per SAE, in passes through the tail.
    """
    device = pick_device(args.device)
    a = torch.randn(2048, 2048, device=device)
    (a @ a).sum().item()
    start = time.perf_counter()
    for _ in range(5):
        b = a @ a
    b.sum().item()
    here = 5 * 2 * 2048 ** 3 / (time.perf_counter() - start) / 1e12
    rows = [cost(name, layer, args, more_passes) for name, layer in args.models]
    total = sum(row["tflops"] for row in rows)
    print(markdown(rows, ["hook", "saes", "train_tokens", "tflops", "memory_gb", "disk_gb"]))
    print(f"\nk {args.k}, tokens {[readable_count(t) for t in args.tokens]}, seeds {args.seeds}, {args.expansion}x, recipe {args.recipe}, sinks "
          f"{args.sinks}; evaluation {args.eval_seqs} x {args.ctx}; {total:.3g} TFLOP, {sum(row['disk_gb'] for row in rows):.3g} GB of SAEs\n")
    rates = {f"this {device.type} (measured)": here, **PEAK}
    print(markdown([{"device": name, "float32 TFLOP/s": rate, "hours": total / (SHARE * rate) / 3600} for name, rate in rates.items()],
                   ["device", "float32 TFLOP/s", "hours"]))
    print(f"\nHours: an estimate, at {SHARE:.0%} of the rate in the middle column (measured here, the vendor's elsewhere).")


# ----------------------------------------------------------------------------------------------------- run
def eval_batch(model, ctx: int, device: torch.device) -> int:
    """Sequences at a time: 8 MB of logits on the CPU (more leaves the cache, and malloc returns it page by page), 256 MB elsewhere."""
    return max(1, 2 ** (21 if device.type == "cpu" else 26) // (ctx * model.config.vocab_size))


def null_rows(hook: dict, saes: list[TopKSAE]) -> dict:
    """What a score must be seen beside: nothing lost, everything lost, an untrained dictionary, and an error without direction.

    The random dictionary and the Gaussian error (same norm per token) take the middle SAE of the grid as their model.
    """
    trained = saes[len(saes) // 2]
    random = tied_init(hook["d"], len(trained.W_dec), trained.k, 10 ** 6, trained.b_dec).requires_grad_(False)
    noise = torch.Generator().manual_seed(10 ** 6)

    def gaussian(h, mean):
        error = trained.decode(*trained.encode(h)) - h
        direction = torch.randn(h.shape, generator=noise).to(h.device)
        return h + direction * (torch.linalg.vector_norm(error, dim=1) / torch.linalg.vector_norm(direction, dim=1))[:, None]

    return {"null-identity": lambda h, mean: h, "null-mean": lambda h, mean: mean.expand_as(h), "null-random": random,
            "null-gaussian": gaussian}


def run_hook(hook: dict, args, device: torch.device, terms=None, own_metrics=None, study=None) -> tuple[list[dict], dict, dict, dict]:
    """Train (or find) the SAEs of one hook and evaluate them: (rows, sums {quantity: [C,S]}, per-token arrays, own tables).

    An experiment's own: terms, see `proxies.evaluate`; own_metrics(sums, weights) -> {column: [W,C]} from their sums;
    study(hook, saes, device) -> {name of a table: rows}, each row with the hook's model and layer.
    """
    model, jobs = hook["model"], hook["jobs"]
    if device.type != "cpu":
        check_parity(model, hook["layer"], hook["rows"][:2], device)
    model.to(device)
    saes = [sae for sinks in args.sinks
            for sae in get_saes(model, hook["tokenizer"], [job for job in jobs if job["sinks"] == sinks], args.cache)]
    names = [(sae_name(args.expansion, j["sinks"]), j["recipe"], j["d_sae"], j["k"], j["seed"], j["tokens"]) for j in jobs]
    nulls = null_rows(hook, saes)
    random = nulls["null-random"]
    names += [(name, "null", *((len(random.W_dec), random.k) if name == "null-random" else (0, 0)), 0, 0) for name in NULLS]
    reconstructions = dict(zip(names, [*saes, *nulls.values()]))
    results = evaluate(model, hook["layer"], hook["rows"], reconstructions, eval_batch(model, args.ctx, device), keep_tokens=args.save_tokens,
                       what=f"{hook['name']} L{hook['layer']}", terms=terms)
    tables = study(hook, saes, device) if study else {}
    model.to("cpu")
    n_seq, per_seq = len(hook["rows"]), args.ctx - 1
    sums = {q: np.stack([results[name]["sums"][q] for name in names]) for q in results[names[0]]["sums"]}
    point = metrics(sums, np.ones((1, n_seq)), hook["d"]) | (own_metrics(sums, np.ones((1, n_seq))) if own_metrics else {})
    rows = []
    for i, name in enumerate(names):
        row = dict(zip(KEY, (hook["name"], hook["layer"], *name)))
        row |= {"n_seq": n_seq, "n_tok": n_seq * per_seq, "n_sink": results[name]["n_sink"], "alive": np.nan, "bits_idx": np.nan, "bits": np.nan}
        row |= {metric: float(value[0, i]) for metric, value in point.items()}
        fired = results[name]["fired"]
        if not isinstance(fired, int):
            row["alive"] = float((fired.sum(0) > 0).double().mean())
            row["bits_idx"] = index_bits(fired.numpy(), n_seq, per_seq)
            row["bits"] = row["bits_idx"] + VALUE_BITS * row["l0"]
        rows.append(row)
    sums["d"] = np.full(len(names), hook["d"])
    tokens = {f"{hook['name']}@{hook['layer']}/" + "-".join(map(str, name)) + f"/{q}": v
              for name in names for q, v in results[name]["tokens"].items()}
    return rows, sums, tokens, tables


def run(args, script: str, terms=None, own_metrics=None, study=None, more_passes: int = 0) -> tuple[pathlib.Path, dict] | None:
    """Everything up to the results folder: (folder, settings), or None after --dry-run.

    Hooks that the folder already has are kept; --from takes a finished folder and runs nothing. Raises UserError.
    """
    if args.from_dir:
        return finished_run(args.from_dir, script)
    if args.dry_run:
        return dry_run(args, more_passes)
    print(kernels.describe())
    settings, hooks = plan(args, pick_device(args.device), script)
    if settings["device"] == "mps" and args.device == "auto":
        try:
            check_parity(hooks[0]["model"], hooks[0]["layer"], hooks[0]["rows"][:2], torch.device("mps"))
        except Fault as why:
            print(f"{why}; going on with the CPU")
            settings, hooks = plan(args, torch.device("cpu"), script)
    open_output(args.out, settings, args.fresh)
    start = time.time()
    rows, sums = load_results(args.out)
    done = {(row["model"], row["layer"]) for row in rows}
    for hook in tqdm([h for h in hooks if (h["name"], h["layer"]) not in done], desc="hooks", leave=False):
        new_rows, new_sums, tokens, tables = run_hook(hook, args, torch.device(settings["device"]), terms, own_metrics, study)
        rows += new_rows
        sums = {q: np.concatenate([sums[q], v]) if sums else v for q, v in new_sums.items()}
        if args.save_tokens:
            save_tokens(args.out, tokens)
        for name, table in tables.items():  # before the rows that say that this hook is done
            there = [row for row in (read_table(args.out / name) if (args.out / name).exists() else [])
                     if (row["model"], row["layer"]) != (hook["name"], hook["layer"])]
            write_table(args.out / name, sorted(there + table, key=lambda row: (row["model"], row["layer"])), list(table[0]))
        save_results(args.out, rows, sums)
    write_run(args.out, settings, seconds=round(time.time() - start, 1))
    return args.out, settings


# --------------------------------------------------------------------------------------------- the folder
def load_results(out: pathlib.Path) -> tuple[list[dict], dict]:
    """(rows, sums) of a results folder, in the order of conditions.csv; empty where there are none.

    Empty too where a run was killed between writing the one and the other: the rows are then measured again.
    """
    if not (out / "sequences.npz").exists() or not (out / "conditions.csv").exists():
        return [], {}
    rows = read_table(out / "conditions.csv")
    with np.load(out / "sequences.npz") as file:
        sums = dict(file)
    return (rows, sums) if len(rows) == len(sums["d"]) else ([], {})


def finished_run(out: pathlib.Path, script: str) -> tuple[pathlib.Path, dict]:
    """(folder, settings) of a finished run of this script. Raises UserError."""
    rows, _ = load_results(out)
    if not rows or not (out / "run.json").exists():
        raise UserError(f"--from {out}: no finished run there (conditions.csv, sequences.npz, run.json)")
    settings = json.loads((out / "run.json").read_text())["settings"]
    if settings["script"] != script:
        raise UserError(f"--from {out}: a run of {settings['script']}.py, not of {script}.py")
    if missing := settings["hooks"].keys() - {f"{row['model']}@{row['layer']}" for row in rows}:
        raise UserError(f"--from {out}: no finished run there ({', '.join(sorted(missing))} not measured yet)")
    return out, settings


def save_results(out: pathlib.Path, rows: list[dict], sums: dict) -> None:
    """conditions.csv and sequences.npz in one order; sorted, so that the order in which hooks were run leaves no trace."""
    order = sorted(range(len(rows)), key=lambda i: [rows[i][c] for c in KEY])
    with atomically(out / "sequences.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **{q: v[order] for q, v in sorted(sums.items())})
    write_table(out / "conditions.csv", [rows[i] for i in order], COLUMNS + [c for c in rows[0] if c not in COLUMNS])


def save_tokens(out: pathlib.Path, tokens: dict) -> None:
    path = out / "tokens.npz"
    if path.exists():
        with np.load(path) as file:
            tokens = dict(file) | tokens
    with atomically(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **dict(sorted(tokens.items())))


def measured(out: pathlib.Path, settings: dict, n_resamples: int, own_metrics=None) -> tuple[list[dict], list[dict], dict, dict, dict]:
    """(null rows, rows of the C SAEs, {metric: [W,C]}, meta {name: [C]}, sums {quantity: [C,S]}) of a finished folder.

    W: all sequences, the even, the odd, and `n_resamples` resamples of them, shared by all conditions (as `stats` wants them).
    """
    rows, sums = load_results(out)
    d = sums.pop("d")
    with np.errstate(invalid="ignore"):
        weights = sequence_weights(settings["eval_seqs"], n_resamples, seed=0)
        values = metrics(sums, weights, d) | (own_metrics(sums, weights) if own_metrics else {})
    trained = np.array([row["recipe"] != "null" for row in rows])
    saes = [row for row, keep in zip(rows, trained) if keep]
    meta = {name: np.array([row[name] for row in saes]) for name in ("model", "layer", "sae", "recipe", "k", "tokens", "seed")}
    meta["depth"] = np.array([settings["hooks"][f"{row['model']}@{row['layer']}"] for row in saes])
    meta["cell"] = np.array(["-".join(str(row[c]) for c in KEY if c != "seed") for row in saes])
    return ([row for row in rows if row["recipe"] == "null"], saes, {name: value[:, trained] for name, value in values.items()}, meta,
            {quantity: value[trained] for quantity, value in sums.items()})


def rows_hash(out: pathlib.Path) -> str:
    """SHA-256 of the rows a verdict was computed from."""
    return hashlib.sha256((out / "conditions.csv").read_bytes() + (out / "sequences.npz").read_bytes()).hexdigest()


def about_the_run(rows: list[dict], settings: dict) -> list[str]:
    """The report's last section, in Markdown lines."""
    text = ["## Settings", "", f"Evaluation: {settings['eval_seqs']} sequences of {settings['ctx']} tokens, positions 0..T-2; sink positions (dropped in `_nosink`): "
            f"position 0 and norms above 10 medians, {', '.join(sorted({str(row['n_sink']) for row in rows}))} of {rows[0]['n_tok']} per hook.", "",
            f"Evaluation text SHA-256 {settings['text_sha256']}" + (f", the standard library of Python {settings['python']}" if settings["data"] == "stdlib" else "") + ".", "",
            "```", json.dumps(settings, indent=1, sort_keys=True), "```", ""]
    if settings["device"] != "cpu":
        text += [f"Computed on {settings['device']}, where a second run need not be the same to the byte: compare with `python common.py diff`.", ""]
    return text
