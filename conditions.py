"""Conditions: which SAEs a command asks for, what they cost, and the folder in which each has one row.

A condition is one SAE: (model, layer, sae, recipe, d_sae, k, seed, tokens). C conditions, S evaluation sequences.
"""
import contextlib
import hashlib
import json
import math
import os
import pathlib
import platform
import re
import socket
import subprocess
import sys
import time

from common import (ANY_X86, FIXED_CODE, EMBEDDED, check_parity, load_model, markdown, model_hash, pick_device, pick_layer, read_config, readable_count,
                    readable_names, tokenizer_hash)

import numpy as np
import torch
from tqdm import tqdm

import formats
import kernels
import ranks
import store
import text
from audit import r2_by_library
from errors import Damaged, Fault, UserError, one_line
from leaderboard import behind
from proxies import VALUE_BITS, document_weights, evaluate, hook_statistics, index_bits, metrics
from sae import CHUNK, RECIPES, TRAIN_VERSION, cache_folder, check_memory, load_sae, tied_init, train_missing, trunk
from store import RUN, read_table

KEY = ["model", "layer", "sae", "recipe", "d_sae", "k", "seed", "tokens"]
METRICS = ["r2", "r2_nosink", "r2_defl1", "r2_ln", "nmse", "nmse_tok", "mse", "cosine", "relerr", "swd_tok", "swd_seq", "swd_sampled",
           "gd_mean", "gd_abs", "ce_orig", "ce_recon", "dce", "ce_rec", "ce_rec_sinkclean", "ce_zero", "ce_mean", "frac_zero", "frac_mean",
           "kl", "alive", "l0", "bits_idx", "bits", "fed", "fed_nosink", "rho", "fed_iso_nosink", "fed_excess"]
COLUMNS = KEY + ["n_seq", "n_tok", "n_sink"] + METRICS
NULLS = ("null-identity", "null-mean", "null-random", "null-gaussian")


# ---------------------------------------------------------------------------------------------------- plan
def sae_name(expansion: int, sinks: str) -> str:
    return f"topk-x{expansion}" + ("-nosinks" if sinks == "drop" else "")


def chosen_saes(args) -> list[dict]:
    """Entries of `formats.find`, with `said`, `model` and `layer`, for the SAEs of --sae that read a hook asked for; says which do not.

    Without --models the files name the model; without @LAYER each file its layer. Raises UserError.
    """
    asked = {}
    for name, layer in args.models:
        asked.setdefault(name, set()).add(layer)
    taken, left = [], []
    for entry in tqdm([entry for spec in args.sae for entry in formats.find(spec)], desc="what SAE files say", leave=False):
        said, where = formats.describe(entry), f"--sae {entry['label']}"
        if len(asked) != 1 and said["model"] is None:
            raise UserError(f"{where}: its files name no model; name one with --models")
        name = next(iter(asked)) if len(asked) == 1 else formats.hub_name(said["model"])
        layers = asked.get(name, {None})
        layer = said["layer"] if said["layer"] is not None or len(layers) > 1 else next(iter(layers))
        if said["site"] not in (None, "resid_post"):
            left.append(f"{entry['label']} ({said['site']}, not resid_post)")
        elif asked and name not in asked:
            left.append(f"{entry['label']} (of {name})")
        elif layer is None:
            raise UserError(f"{where}: its files name no layer; name one with --models {name}@LAYER")
        elif layer not in layers and None not in layers:
            left.append(f"{entry['label']} (layer {layer})")
        else:
            taken.append(entry | {"said": said, "model": name, "layer": layer})
    if left:
        ranks.say(f"left out: {', '.join(left)}")
    if not taken:
        raise UserError(f"--sae {','.join(args.sae)}: none of its {len(left)} SAEs reads a hook that --models asks for")
    if len({entry["label"] for entry in taken}) < len(taken):
        raise UserError("--sae: two SAEs of one name; name folders apart")
    return sorted(taken, key=lambda entry: entry["label"])


def plan(args, device: torch.device, script: str) -> tuple[dict, list[dict]]:
    """(settings, hooks): every model and SAE file loaded (on the CPU), every argument checked against it, before anything is written.

    A hook is one evaluation set for the SAEs at one place: dict(name, layer, model, tokenizer, rows [S,T], document [S], d, depth, source, jobs,
    names, nulls), where names[i] is how condition i is called (KEY without model and layer), and jobs[i] what trains or finds its SAE.
    """
    files = chosen_saes(args) if args.sae else []
    source = text.find(args.data)
    loaded, rows_of, hooks = {}, {}, []
    names = list(dict.fromkeys([entry["model"] for entry in files] or [name for name, _ in args.models]))
    called = readable_names(names)
    for name in names:
        model, tokenizer = load_model(name, torch.device("cpu"), args.revision, getattr(torch, args.dtype))
        loaded[name] = model, tokenizer, dict(weights=model_hash(model), tokenizer=tokenizer_hash(tokenizer))
    for entry in files:  # no longer than the SAE was trained on; where nothing is said, trainers tokenise as the tokenizer does by itself
        tokenizer = loaded[entry["model"]][1]
        entry["ctx"] = min(args.ctx, entry["said"]["ctx"] or args.ctx)
        entry["bos"] = tokenizer("a").input_ids[0] == tokenizer.bos_token_id if entry["said"]["bos"] is None else bool(entry["said"]["bos"])
    place = lambda entry: (entry["model"], entry["layer"], entry["ctx"], entry["bos"])
    places = list(dict.fromkeys(map(place, files))) or [(*m, args.ctx, False) for m in args.models]
    for name, layer, ctx, bos in places:
        model, tokenizer, hashes = loaded[name]
        if ctx > getattr(model.config, "max_position_embeddings", ctx):
            raise UserError(f"--ctx {ctx}: {name} takes {model.config.max_position_embeddings} tokens at most")
        if (name, ctx, bos) not in rows_of:
            first = (tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id) if bos else None
            rows_of[name, ctx, bos] = text.heldout_rows(source.data, tokenizer, ctx, args.eval_seqs, args.split, first)
        held = rows_of[name, ctx, bos]
        rows = held.rows
        if rows.max() >= model.config.vocab_size:
            raise UserError(f"--models {name}: its tokenizer gives the id {rows.max()}, and it has {model.config.vocab_size} embeddings")
        hook = dict(name=called[name], layer=pick_layer(model, name, layer), model=model, tokenizer=tokenizer, rows=rows, document=held.document,
                    d=model.config.hidden_size, source=source)
        hook["depth"] = f"{(hook['layer'] / model.config.num_hidden_layers):.2f}"
        several = sum(other[:2] == (name, layer) for other in places) > 1  # SAEs of one place that want other contexts
        hook["nulls"] = [f"{null}-{'bos-' * bos}ctx{ctx}" if several else null for null in NULLS]
        if files:
            hook["jobs"] = checked([entry for entry in files if place(entry) == (name, layer, ctx, bos)], hook, args, device)
            hook["names"] = [(job["label"], job["format"], job["d_sae"], job["k"], 0, 0) for job in hook["jobs"]]
        else:
            if args.k[-1] > args.expansion * hook["d"]:
                raise UserError(f"--k {args.k[-1]}: more than the {args.expansion * hook['d']} latents of an SAE at {args.expansion}x on {name}")
            check_memory(hook["d"], args.expansion * hook["d"], device)
            # called by its own name, whatever other models the command names: the same SAE in every grid
            stream = dict(model=readable_names([name])[name], **hashes, dtype=args.dtype, layer=hook["layer"], data=source.name, data_content=source.content,
                          split=args.split, ctx=args.ctx, device=device.type, version=TRAIN_VERSION, **any_x86(device))
            hook["jobs"] = [stream | dict(tokens=tokens, trunk=trunk(recipe, tokens, args.tokens), d_sae=args.expansion * hook["d"], k=k, seed=seed,
                                          recipe=recipe, sinks=sinks)
                            for sinks in args.sinks for recipe in args.recipe for tokens in args.tokens for k in args.k for seed in args.seeds]
            hook["names"] = [(sae_name(args.expansion, j["sinks"]), j["recipe"], j["d_sae"], j["k"], j["seed"], j["tokens"]) for j in hook["jobs"]]
        hooks.append(hook)
    if not files and len({(hook["name"], hook["layer"]) for hook in hooks}) < len(hooks):
        raise UserError("--models: the same model and layer twice (a name without @LAYER means the middle layer)")
    if text.stamp(source.data) != source.stamp:
        raise UserError(f"--data {args.data} is being changed: run again when it is still")
    size = {called[name]: sum(p.numel() for p in model.parameters()) for name, (model, *_) in loaded.items()}
    settings = dict(
        script=script, device=device.type, data=source.name, text_sha256=", ".join(sorted({held.sha256 for held in rows_of.values()})),
        documents=sorted({int(held.document.max()) + 1 for held in rows_of.values()}), cut=text.is_cut(source.data),
        python=platform.python_version() if args.data == "stdlib" else None,
        models=sorted(size, key=lambda name: (size[name], name)), hooks={f"{h['name']}@{h['layer']}": h["depth"] for h in hooks},
        last_blocks=sorted({f"{h['name']}@{h['layer']}" for h in hooks if h["layer"] == h["model"].config.num_hidden_layers - 1}),
        weights={called[name]: hashes["weights"] for name, (*_, hashes) in loaded.items()},
        tokenizers={called[name]: hashes["tokenizer"] for name, (*_, hashes) in loaded.items()},
        k=args.k, seeds=args.seeds, tokens=args.tokens, expansion=args.expansion, recipe=args.recipe, sinks=args.sinks,
        eval_seqs=args.eval_seqs, ctx=args.ctx, save_tokens=args.save_tokens)
    if files:
        settings |= dict.fromkeys(("k", "seeds", "tokens", "expansion", "recipe", "sinks"))
        settings["saes"] = {job["label"]: job["said"] for hook in hooks for job in hook["jobs"]}
    else:
        settings["data_content"] = source.content
    settings |= {name: value for name, value in (("revision", args.revision), ("split", args.split), ("dtype", args.dtype))
                 if value not in (None, "train", "float32")}  # what is not the default
    return settings | any_x86(device), hooks


def any_x86(device: torch.device) -> dict:
    """A setting of runs, and of SAEs in the cache, whose bytes are the same on every x86-64 processor; {} otherwise."""
    return {"instructions": "any x86-64"} if ANY_X86 and device.type == "cpu" else {}


def checked(entries: list[dict], hook: dict, args, device: torch.device) -> list[dict]:
    """The jobs of one hook's SAE files, each read, of the model's width, and past the basis gate. Raises UserError."""
    where = device if device.type == "cuda" else torch.device("cpu")  # MPS is not believed before its own check
    model, few = hook["model"].to(where), hook["rows"][:4].to(where)
    activations = formats.near(model, hook["layer"], few)
    model.to("cpu")
    for entry in tqdm(entries, desc=f"reading SAEs of {hook['name']} L{hook['layer']}", leave=False):
        sae = formats.read(entry).to(where)
        F, d = sae.W_enc.shape
        if d != hook["d"]:
            raise UserError(f"--sae {entry['label']}: reads {d} dimensions, and {hook['name']} has {hook['d']}")
        model = entry["said"]["model"]
        if model and os.path.isabs(model):  # where it lay on somebody's machine is nobody's business
            model = os.path.basename(model)
        said = entry["said"] | {"model": model, "basis": args.basis or entry["said"]["basis"], "ctx": entry["ctx"], "bos": entry["bos"],
                                "fingerprint": formats.sae_fingerprint(sae)}
        readings = [math.nan] if args.basis else list(formats.check_basis(sae, said, entry["label"], hook["layer"], activations).values())
        sae.centred = said["basis"] == "centred"
        h = activations[hook["layer"]]
        active = (sae.encode(h)[0] > 0).sum(1).double().mean().item()
        entry |= dict(said=said, fvu_as_said=readings[0], fvu_otherwise=min(readings[1:], default=math.nan), d_sae=F, k=sae.k or 0,
                      typical_k=max(1, round(active)), mean=h.mean(0).cpu())
    return entries


# ---------------------------------------------------------------------------------------------------- cost
PYTHIA = {"EleutherAI/pythia-70m": (512, 6, 8), "EleutherAI/pythia-160m": (768, 12, 12), "EleutherAI/pythia-410m": (1024, 24, 16)}
PEAK = {"M2 Max (mps)": 13.6, "A100": 19.5, "RTX 4090": 82.6, "H100": 67}  # vendors' float32 TFLOP/s, outside tensor cores
SAES_AT_ONCE = 4 * 10 ** 9  # bytes of SAEs evaluated together; the clean pass is computed once for each such lot
OVERHEAD = 2 ** 17  # multiplications as long as what a token costs besides them, for each SAE in training and each block (measured on a CPU)
SHARE = 0.35  # of a large product's rate that the whole run reaches: a guess, for these estimates only


def shape_of(name: str, revision: str | None):
    """The model without weights (`meta` device): what its size costs, from its config alone. The presets' are known here."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    with one_line(f"--models {name}" + ("" if "/" in name else f" (embedded are {', '.join(EMBEDDED)})")):
        if name in PYTHIA:
            d, n_layers, heads = PYTHIA[name]
            config = transformers.GPTNeoXConfig(hidden_size=d, num_hidden_layers=n_layers, num_attention_heads=heads, intermediate_size=4 * d,
                                                vocab_size=50304)
        else:
            config = read_config(EMBEDDED.get(name, name), revision or "main")
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)


def block_size(model) -> int:
    """Parameters of one block: what is left without the embedding and the unembedding, shared out."""
    config = model.config
    return (sum(p.numel() for p in model.parameters()) - 2 * config.vocab_size * config.hidden_size) // config.num_hidden_layers


def cost(name: str, layer: int | None, args, more_passes: int = 0, widths: list[int] | None = None) -> dict:
    """FLOPs, bytes in memory and on disk of one hook's SAEs and their evaluation, counting matrix products. widths: of SAEs that exist."""
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
    train = 0 if widths else len(args.sinks) * max(args.tokens) * head + trained * 2.5 * dense  # encode, and the sparse rest
    patches = saes + len(NULLS)
    evaluation = n_tok * (head + tail * (1 + 2 * (1 + 4) + 2 + (2 + more_passes) * patches) + (2 * d * sum(widths) if widths else patches * dense))
    parameters = 8 * d * (max(widths) if widths else args.expansion * d)
    many = max(args.tokens) > CHUNK  # then all runs of a stream live at once, with gradients and Adam's moments
    return dict(hook=f"{name}@{layer}", saes=saes, train_tokens=readable_count(round(trained)), tflops=(train + evaluation) / 1e12,
                memory_gb=(sum(p.numel() for p in model.parameters()) * 4 + min(CHUNK, max(args.tokens)) * d * 8
                           + parameters * 4 * (live // len(args.sinks) * (2 if branching else 1) if many else 1)) / 1e9,
                disk_gb=parameters * saes / 1e9)


def dry_run(args, more_passes: int = 0) -> None:
    """Print the grid and what it would cost. Nothing is loaded or written, and of --sae on the hub only the configurations are downloaded.

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
    if args.sae:
        files = chosen_saes(args)
        rows = [{"sae": e["label"], "hook": f"{e['model']}@{e['layer']}", **e["said"], **({"basis": args.basis} if args.basis else {})} for e in files]
        columns = ["sae", "hook", "format", "width", "ctx", "bos", "basis"]
        print(markdown([{c: "not said" if row[c] is None else row[c] for c in columns} for row in rows], columns) + "\n")
        places = dict.fromkeys((e["model"], e["layer"]) for e in files)
        rows = [cost(*place, args, more_passes, [e["said"]["width"] or 0 for e in files if (e["model"], e["layer"]) == place]) for place in places]
    else:
        rows = [cost(name, layer, args, more_passes) for name, layer in args.models]
    total = sum(row["tflops"] for row in rows)
    print(markdown(rows, ["hook", "saes", "train_tokens", "tflops", "memory_gb", "disk_gb"]))
    grid = (f"k {args.k}, tokens {[readable_count(t) for t in args.tokens]}, seeds {args.seeds}, {args.expansion}x, recipe {args.recipe}, sinks {args.sinks}; "
            if not args.sae else "")
    print(f"\n{grid}evaluation {args.eval_seqs} x {args.ctx}; {total:.3g} TFLOP, {sum(row['disk_gb'] for row in rows):.3g} GB of SAEs\n")
    rates = {f"this {device.type} (measured)": here, **PEAK}
    print(markdown([{"device": name, "float32 TFLOP/s": rate, "hours": total / (SHARE * rate) / 3600} for name, rate in rates.items()],
                   ["device", "float32 TFLOP/s", "hours"]))
    print(f"\nHours: an estimate, at {SHARE:.0%} of the rate in the middle column (measured here, the vendor's elsewhere).")


# ----------------------------------------------------------------------------------------------------- run
def eval_batch(model, ctx: int, device: torch.device) -> int:
    """Sequences at a time: 8 MB of logits on the CPU (more leaves the cache, and malloc returns it page by page), 256 MB elsewhere."""
    return max(1, 2 ** (21 if device.type == "cpu" else 26) // (ctx * model.config.vocab_size))


def null_rows(hook: dict, trained: torch.nn.Module) -> dict:
    """What a score must be seen beside: nothing lost, everything lost, an untrained dictionary, and an error without direction.

    The random dictionary and the Gaussian error (same norm per token) take the middle SAE of the grid as their model.
    """
    job = hook["jobs"][len(hook["jobs"]) // 2]
    b_dec = job["mean"].to(trained.b_dec.device) if "mean" in job else trained.b_dec  # another's may be of normalised activations
    random = tied_init(hook["d"], len(trained.W_dec), trained.k or job["typical_k"], 10 ** 6, b_dec).requires_grad_(False)
    noise = torch.Generator().manual_seed(10 ** 6)

    def gaussian(h, mean):
        error = trained.reconstruct(h)[2] - h
        direction = torch.randn(h.shape, generator=noise).to(h.device)
        return h + direction * (torch.linalg.vector_norm(error, dim=1) / torch.linalg.vector_norm(direction, dim=1))[:, None]

    shape = {"null-random": (len(random.W_dec), random.k)}
    made = {"null-identity": lambda h, mean: h, "null-mean": lambda h, mean: mean.expand_as(h), "null-random": random, "null-gaussian": gaussian}
    return {(name, "null", *shape.get(null, (0, 0)), 0, 0): made[null] for null, name in zip(NULLS, hook["nulls"])}


def load(hook: dict, i: int, args) -> torch.nn.Module:
    """SAE i of the hook, on the CPU."""
    job = hook["jobs"][i]
    if not args.sae:
        return load_sae(cache_folder(args.cache, job), torch.device("cpu"))
    sae = formats.read(job)
    sae.centred = job["said"]["basis"] == "centred"
    return formats.fused(sae)


def run_hook(hook: dict, args, device: torch.device, which: list[int], with_nulls: bool, terms=None, own_metrics=None, study=None) -> tuple:
    """Evaluate SAEs `which` of one hook, and its null rows: (rows, sums {quantity: [C,S]}, per-token arrays, own tables).

    An experiment's own: terms, see `proxies.evaluate`; own_metrics(sums, weights) -> {column: [W,C]} from their sums;
    study(hook, middle SAE, device) -> {name of a table: rows}, each row with the hook's model and layer; it comes with the null rows.
    """
    model, middle = hook["model"], len(hook["jobs"]) // 2
    if device.type != "cpu":
        check_parity(model, hook["layer"], hook["rows"][:2], device)
    model.to(device)
    reconstructions = {hook["names"][i]: load(hook, i, args).to(device) for i in which}
    trained = load(hook, middle, args).to(device) if with_nulls else None
    if with_nulls:
        reconstructions |= null_rows(hook, trained)
    n_seq, ctx = hook["rows"].shape
    batch = eval_batch(model, ctx, device)
    shared = hook_statistics(model, hook["layer"], hook["rows"], batch)
    results = evaluate(model, hook["layer"], hook["rows"], reconstructions, batch, keep_tokens=args.save_tokens, what=f"{hook['name']} L{hook['layer']}",
                       terms=terms, shared=shared, document=hook["document"])
    tables = study(hook, trained, device) if study and with_nulls else {}
    definitions = r2_by_library(shared, reconstructions, device) if args.sae else {}
    model.to("cpu")
    names = list(reconstructions)
    sums = {q: np.stack([results[name]["sums"][q] for name in names]) for q in results[names[0]]["sums"]}
    point = metrics(sums, np.ones((1, n_seq)), hook["d"]) | (own_metrics(sums, np.ones((1, n_seq))) if own_metrics else {})
    rows = []
    for i, name in enumerate(names):
        row = dict(zip(KEY, (hook["name"], hook["layer"], *name)))
        row |= {"n_seq": n_seq, "n_tok": n_seq * (ctx - 1), "n_sink": results[name]["n_sink"], "alive": np.nan, "bits_idx": np.nan, "bits": np.nan}
        row |= {metric: float(value[0, i]) for metric, value in point.items()}
        fired = results[name]["fired"]
        if not isinstance(fired, int):
            row["alive"] = float((fired.sum(0) > 0).double().mean())
            row["bits_idx"] = index_bits(fired.numpy(), np.bincount(hook["document"] % 2, minlength=2) * (ctx - 1))
            row["bits"] = row["bits_idx"] + VALUE_BITS * row["l0"]
        if args.sae:
            job = hook["jobs"][which[i]] if i < len(which) else {}
            row |= definitions[name] | {column: job.get(column, np.nan) for column in ("fvu_as_said", "fvu_otherwise")}
        rows.append(row)
    sums["d"] = np.full(len(names), hook["d"])
    sums["document"] = np.tile(hook["document"], (len(names), 1))
    tokens = {f"{hook['name']}@{hook['layer']}/" + "-".join(map(str, name)) + f"/{q}": v
              for name in names for q, v in results[name]["tokens"].items()}
    return rows, sums, tokens, tables


def run(args, script: str, terms=None, own_metrics=None, study=None, more_passes: int = 0) -> tuple[pathlib.Path, dict] | None:
    """Everything up to the results folder: (folder, settings), or None after --dry-run and for all ranks of torchrun but the first.

    Conditions that the folder already has are kept; --from takes a finished folder and runs nothing. Raises UserError.
    """
    if (args.from_dir or args.dry_run) and ranks.RANK:
        return None
    if args.from_dir:
        done = finished_run(args.from_dir, script)
        check_verdict(args.from_dir)
        return done
    if args.dry_run:
        return dry_run(args, more_passes)
    device = pick_device(args.device)
    ranks.join(device)
    ranks.say(kernels.describe())
    settings, hooks = plan(args, device, script)
    if device.type == "mps" and args.device == "auto":
        try:
            check_parity(hooks[0]["model"], hooks[0]["layer"], hooks[0]["rows"][:2], device)
        except Fault as why:
            print(f"{why}; going on with the CPU")
            device = torch.device("cpu")
            settings, hooks = plan(args, device, script)
    start = time.time()
    if ranks.RANK == 0:
        paths = {name: str(pathlib.Path(name).resolve()) for name, _ in [*args.models, (args.data, None)] if os.path.exists(name)}
        open_output(args.out, settings, args.fresh, paths)
        gather(args.out, settings)
    ranks.wait()
    missing = not_measured(hooks, args.out)
    if not args.sae:
        train(missing, args, device)
    ranks.wait()
    part = args.out / f".rank{ranks.RANK}" if ranks.WORLD > 1 else args.out
    for hook, which, with_nulls in tqdm(shares(missing), desc="hooks", leave=False):
        add_results(part, settings, *run_hook(hook, args, device, which, with_nulls, terms, own_metrics, study))
    ranks.leave()
    if ranks.RANK:
        return None
    gather(args.out, settings)
    if lost := sum(len(which) + with_nulls for _, which, with_nulls in not_measured(hooks, args.out)):
        raise Fault(f"{lost} of the results are not in {args.out}: do all ranks write to the same --out?")
    passes = set(store.load(args.out / RUN).get("one_pass", []))
    for folder in [] if args.sae else [cache_folder(args.cache, job) for hook in hooks for job in hook["jobs"]]:
        passes |= {store.load(folder / store.PROVENANCE).get("one_pass")} - {None}
    store.put(args.out / RUN, {}, ranks=ranks.WORLD, seconds=round(time.time() - start, 1), one_pass=sorted(passes))
    return args.out, with_passes(settings, sorted(passes))


def not_measured(hooks: list[dict], out: pathlib.Path) -> list[tuple]:
    """[(hook, indices of SAEs, null rows?)]: what the results folder has no rows of."""
    there = {tuple(row[c] for c in KEY) for row in load_results(out)[0]}
    nulls = {key[:3] for key in there}
    return [(hook, [i for i, name in enumerate(hook["names"]) if (hook["name"], hook["layer"], *name) not in there],
             (hook["name"], hook["layer"], hook["nulls"][0]) not in nulls) for hook in hooks]


def train(missing: list[tuple], args, device: torch.device) -> None:
    """Train this rank's share of the SAEs that the missing rows need and the cache has not; budgets of one trunk stay together."""
    families = {}
    for number, (hook, which, with_nulls) in enumerate(missing):
        for i in sorted({*which, *([len(hook["jobs"]) // 2] if with_nulls else [])}):
            job = hook["jobs"][i]
            families.setdefault((number, job["sinks"], job["recipe"], job["k"], job["seed"]), []).append(job)
    mine = ranks.share(list(families.items()), [sum(job["tokens"] * (job["d_sae"] * missing[key[0]][0]["d"] + OVERHEAD) for job in jobs)
                                                for key, jobs in families.items()])
    for number, (hook, *_) in enumerate(missing):
        for sinks in args.sinks:
            jobs = [job for key, family in mine if key[:2] == (number, sinks) for job in family]
            if jobs:
                if device.type != "cpu":
                    check_parity(hook["model"], hook["layer"], hook["rows"][:2], device)
                train_missing(hook["model"].to(device), hook["tokenizer"], jobs, args.cache, hook["source"])
        hook["model"].to("cpu")


def shares(missing: list[tuple]) -> list[tuple]:
    """This rank's share of the missing rows, [(hook, indices of SAEs, null rows?)], cut where the SAEs would fill the memory."""
    items = [(number, i) for number, (_, which, with_nulls) in enumerate(missing) for i in which + [None] * with_nulls]

    def tail(hook: dict) -> float:
        """What a token costs from the hook on, in multiplications."""
        config = hook["model"].config
        return (config.num_hidden_layers - 1 - hook["layer"]) * (block_size(hook["model"]) + OVERHEAD) + config.vocab_size * (hook["d"] + 64)

    out, filled = [], 0
    mine = ranks.share(items, [tail(missing[number][0]) * (1 if i is not None else len(NULLS)) for number, i in items])
    for number, i in mine:
        hook = missing[number][0]
        size = 8 * hook["d"] * hook["jobs"][i if i is not None else 0]["d_sae"]
        if not out or out[-1][0] is not hook or filled + size > SAES_AT_ONCE:
            out.append((hook, [], []))
            filled = 0
        out[-1][1 if i is not None else 2].append(i)
        filled += size
    return [(hook, which, bool(nulls)) for hook, which, nulls in out]


# --------------------------------------------------------------------------------------------- the folder
DERIVED = ("verdict.json", "report.md", "leaderboard.csv", "deltas.csv", "audit.csv", "pairs.csv")  # and pictures: made again from the others
RESULT_FILES = ("conditions.csv", "sequences.npz", "tokens.npz", *DERIVED)


def open_output(out: pathlib.Path, settings: dict, fresh: bool, paths: dict | None = None) -> None:
    """Make `out` ready for a run with these settings, this process its only writer, or raise UserError and change nothing.

    A folder made with other settings, or from other weights or text, is refused, naming them. `fresh` removes what runs put there
    (run.json lists it) and nothing else. paths: where the local models and texts lie, which is for run.json only.
    """
    store.writable(out, "--out")
    store.claim(out)
    record = out / RUN
    try:
        store.settle(record)
        listed = store.written(record)
    except Damaged as why:
        raise UserError(f"{why}: use another --out, or move that folder away") from why
    if theirs := [name for name in RESULT_FILES if name not in listed and os.path.lexists(out / name)]:
        raise UserError(f"--out {out} holds {', '.join(theirs)}, which no run.json lists: use another --out, or move them away")
    if fresh:
        for part in parts(out):
            discard(part)
        store.remove(record)
    before = check_data(record).get("settings", settings)
    if differing := [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]:
        both = lambda key: (before.get(key), settings.get(key))
        only = lambda a, b: ({k: v for k, v in a.items() if b.get(k) != v}, {k: v for k, v in b.items() if a.get(k) != v})
        shown = {key: only(*both(key)) if all(isinstance(v, dict) for v in both(key)) else both(key) for key in differing}
        differences = "; ".join(f"{key}: there {there}, here {here}" for key, (there, here) in shown.items())
        raise UserError(f"--out {out} holds a run with other settings ({differences}): use --fresh or another --out")
    import scipy
    import transformers
    versions = {m.__name__: m.__version__ for m in (torch, np, scipy, transformers)}
    store.put(record, {}, settings=settings, paths=paths or {}, command=sys.argv, python=platform.python_version(), platform=platform.platform(),
              host=socket.gethostname(), versions=versions, threads=torch.get_num_threads(), kernels=kernels.describe(), seconds=None,
              processor=processor(), instructions=instructions())


def processor() -> str:
    """The processor's name, as the system says it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            said = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=10)
            return said.stdout.strip() or platform.processor()
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def instructions() -> dict:
    """What torch's own kernels use of the processor, and the variables in force that choose code in it and its libraries."""
    names = (*FIXED_CODE, "ANY_X86", "KERNELS", "MKL_ENABLE_INSTRUCTIONS", "GLIBC_TUNABLES", "LD_PRELOAD")
    return {"torch": torch.backends.cpu.get_cpu_capability()} | {name: os.environ[name] for name in names if name in os.environ}


def check_data(record: pathlib.Path) -> dict:
    """The record of a results folder, every file of which that cannot be made again from the others is as it was written. Raises Damaged."""
    there = store.load(record)
    for name in there.get("files", {}):
        if name not in DERIVED and not name.endswith(".png"):
            store.checked(record, name)
    return there


def load_results(out: pathlib.Path) -> tuple[list[dict], dict]:
    """(rows, sums) of a results folder, in the order of conditions.csv; empty where there are none yet. Raises Damaged."""
    if "conditions.csv" not in store.written(out / RUN):
        return [], {}
    rows = read_table(store.checked(out / RUN, "conditions.csv"))
    sums = store.read_npz(store.checked(out / RUN, "sequences.npz"))
    if sums.pop("condition").tolist() != [condition(row) for row in rows]:
        raise Damaged(f"{out}: sequences.npz is about other conditions than conditions.csv")
    return rows, sums


def condition(row: dict) -> str:
    """The key of a row as one word."""
    return " ".join(str(row[c]) for c in KEY)


def finished_run(out: pathlib.Path, script: str) -> tuple[pathlib.Path, dict]:
    """(folder, settings) of a finished run of this script, this process its only writer. Raises UserError."""
    record = out / RUN
    about = store.load(record)
    if not about.get("settings"):
        raise UserError(f"--from {out}: no finished run there (conditions.csv, sequences.npz, run.json)")
    settings = about["settings"]
    if settings["script"] != script:
        raise UserError(f"--from {out}: a run of {settings['script']}.py, not of {script}.py")
    store.writable(out, "--from")
    store.claim(out)
    store.settle(record)
    check_data(record)
    missing = settings["hooks"].keys() - {f"{row['model']}@{row['layer']}" for row in load_results(out)[0]}
    if missing or about.get("seconds") is None:
        raise UserError(f"--from {out}: no finished run there ({', '.join(sorted(missing)) or 'some conditions'} not measured yet)")
    return out, with_passes(settings, about.get("one_pass"))


def with_passes(settings: dict, one_pass: list[int] | None) -> dict:
    """Settings for the report, with the tokens that a training text holds where budgets repeat it: known only after training."""
    return settings | ({"one_pass": one_pass} if one_pass else {})


def check_verdict(out: pathlib.Path) -> None:
    """Raises UserError where the folder's verdict is about other rows than it holds: it would be overwritten by one about these."""
    there = None
    with contextlib.suppress(OSError, ValueError, AttributeError):  # one that is no verdict is set aside when the new one comes
        there = json.loads((out / "verdict.json").read_text(encoding="utf-8")).get("rows_sha256")
    if there not in (None, rows_hash(out)):
        raise UserError(f"--from {out}: verdict.json is about other rows (SHA-256 {str(there)[:12]}, these have {rows_hash(out)[:12]}); "
                        "move it away, and it is made anew")


def add_results(out: pathlib.Path, settings: dict, rows: list[dict], sums: dict, tokens: dict, tables: dict) -> None:
    """Add what `run_hook` gives to a results folder, all of it or nothing; a row that is there already stays. Raises Fault, Damaged.

    Rows are sorted, so that the order in which hooks were run leaves no trace.
    """
    record = out / RUN
    before, before_sums = load_results(out)
    there = {condition(row) for row in before}
    new = [i for i, row in enumerate(rows) if condition(row) not in there]
    all_rows = before + [rows[i] for i in new]
    all_sums = {q: np.concatenate([before_sums[q], v[new]]) if before_sums else v[new] for q, v in sums.items()}
    order = sorted(range(len(all_rows)), key=lambda i: [all_rows[i][c] for c in KEY])
    all_rows = [all_rows[i] for i in order]
    all_sums = {q: v[order] for q, v in all_sums.items()} | {"condition": np.array([condition(row) for row in all_rows])}
    files = {"sequences.npz": store.as_npz(all_sums),
             "conditions.csv": store.as_csv(all_rows, COLUMNS + [c for c in all_rows[0] if c not in COLUMNS])}
    known = store.written(record)
    if tokens:
        kept = store.read_npz(store.checked(record, "tokens.npz")) if "tokens.npz" in known else {}
        files["tokens.npz"] = store.as_npz(kept | tokens)
    for name, table in tables.items():
        hooks = {(row["model"], row["layer"]) for row in table}
        kept = [row for row in (read_table(store.checked(record, name)) if name in known else []) if (row["model"], row["layer"]) not in hooks]
        files[name] = store.as_csv(sorted(kept + table, key=lambda row: (row["model"], row["layer"])), list(table[0]))
    store.put(record, files, settings=settings)


def parts(out: pathlib.Path) -> list[pathlib.Path]:
    """The folders in which ranks left their share, this run's or one's that was killed. Raises UserError for what only has such a name."""
    found = sorted(path for path in out.glob(".rank*") if re.fullmatch(r"\.rank\d+", path.name))
    for part in found:
        ours = part.is_dir() and not part.is_symlink()
        if not (ours and (store.load(part / RUN) or all(path.name.endswith(store.UNFINISHED) for path in part.iterdir()))):
            raise UserError(f"{part}: not what a rank of this program left: move it away")
    return found


def discard(part: pathlib.Path) -> None:
    store.remove(part / RUN)
    with contextlib.suppress(OSError):  # somebody put something there
        part.rmdir()


def gather(out: pathlib.Path, settings: dict) -> None:
    """Into the folder what ranks left in theirs. Raises UserError where theirs is of other settings."""
    for part in parts(out):
        if store.load(part / RUN).get("settings", settings) != settings:
            raise UserError(f"{part}: left by a run with other settings: use --fresh or another --out")
        store.settle(part / RUN)
        rows, sums = load_results(part)
        if rows:
            tokens = store.read_npz(store.checked(part / RUN, "tokens.npz")) if "tokens.npz" in store.written(part / RUN) else {}
            tables = {name: read_table(store.checked(part / RUN, name)) for name in store.written(part / RUN)
                      if name.endswith(".csv") and name != "conditions.csv"}
            add_results(out, settings, rows, sums, tokens, tables)
        discard(part)


def measured(out: pathlib.Path, settings: dict, n_resamples: int, own_metrics=None) -> tuple[list[dict], list[dict], dict, dict, dict]:
    """(null rows, rows of the C SAEs, {metric: [W,C]}, meta {name: [C]}, sums {quantity: [C,S]}) of a finished folder.

    W: all documents, the even, the odd, and `n_resamples` resamples of them, shared by all conditions (as `stats` wants them): of one text
    drawn for models of different tokenizers, document i is the same.
    """
    rows, sums = load_results(out)
    d, document = sums.pop("d"), sums.pop("document")
    by_document = document_weights(int(document.max()) + 1, n_resamples, seed=0)
    patterns, which = np.unique(document, axis=0, return_inverse=True)  # of sequences: one where all models share a tokenizer
    values = {}
    for i, pattern in enumerate(patterns):
        mine, weights = np.flatnonzero(which.ravel() == i), by_document[:, pattern]
        part = {q: v[mine] for q, v in sums.items()}
        with np.errstate(invalid="ignore"):
            for name, value in (metrics(part, weights, d[mine]) | (own_metrics(part, weights) if own_metrics else {})).items():
                values.setdefault(name, np.empty((len(weights), len(rows))))[:, mine] = value
    trained = np.array([row["recipe"] != "null" for row in rows])
    saes = [row for row, keep in zip(rows, trained) if keep]
    meta = {name: np.array([row[name] for row in saes]) for name in ("model", "layer", "sae", "recipe", "k", "tokens", "seed")}
    # given k, an SAE without one is compared with those that have as many latents active, to the nearest power of two
    meta["k"] = np.where(meta["k"] > 0, meta["k"], 2 ** np.round(np.log2(np.maximum([row["l0"] for row in saes], 1))).astype(int))
    meta["depth"] = np.array([settings["hooks"][f"{row['model']}@{row['layer']}"] for row in saes])
    meta["cell"] = np.array(["-".join(str(row[c]) for c in KEY if c != "seed") for row in saes])
    return ([row for row in rows if row["recipe"] == "null"], saes, {name: value[:, trained] for name, value in values.items()}, meta,
            {quantity: value[trained] for quantity, value in sums.items()})


def rows_hash(out: pathlib.Path) -> str:
    """SHA-256 of the rows a verdict was computed from."""
    return hashlib.sha256((out / "conditions.csv").read_bytes() + (out / "sequences.npz").read_bytes()).hexdigest()


def marked(rows: list[dict], settings: dict) -> list[dict]:
    """Rows to show, the hook of a model's last block marked: no attention follows it."""
    return [row | {"layer": f"{row['layer']} last" if f"{row['model']}@{row['layer']}" in settings["last_blocks"] else row["layer"]} for row in rows]


def about_the_run(rows: list[dict], settings: dict) -> list[str]:
    """The report's last section, in Markdown lines."""
    sizes = " and ".join(f"{n} sequences of {ctx} tokens" for n, ctx in sorted({(row["n_seq"], row["n_tok"] // row["n_seq"] + 1) for row in rows}))
    seen = lambda column: ", ".join(sorted({str(row[column]) for row in rows}))
    lines = ["## Settings", "", f"Evaluation: {sizes}, drawn across the held-out side from {behind(settings)}, which is what the intervals count; "
             f"positions 0..T-2; sink positions (dropped in `_nosink`): position 0 and norms above 10 medians, {seen('n_sink')} of {seen('n_tok')} per hook.", "",
            f"Evaluation text SHA-256 {settings['text_sha256']}" + (f", the standard library of Python {settings['python']}" if settings["python"] else "") + ".", "",
             *(f"The training side holds {n:,} tokens: larger budgets repeat it.\n" for n in settings.get("one_pass", [])),
             *(f"{hook}: the last block, so no attention follows it.\n" for hook in settings["last_blocks"]),
            "```", json.dumps(settings, indent=1, sort_keys=True), "```", ""]
    if settings["device"] != "cpu":
        lines += [f"Computed on {settings['device']}, where a second run need not be the same to the byte: compare with `python common.py diff`.", ""]
    return lines
