"""Exp-B: which cheap proxy of an SAE's quality predicts what its patch does to cross-entropy?

    python expb.py                                   # embedded models, five CPU-minutes
    python expb.py --device mps
    python expb.py --models EleutherAI/pythia-70m,EleutherAI/pythia-410m --data NeelNanda/pile-small-tokenized-2b --tokens 10M
    python expb.py --from outputs/expb               # tables, verdict and plots again, without a model

Hypothesis H2: a sensitivity-weighted proxy, SWD = E[(g.delta)^2], ranks SAEs by CE_rec better than R^2, and better than
the best Euclidean control. TopK SAEs are trained over models x layers x k, their reconstructions patched in, and every
proxy and the cross-entropy measured on the same held-out tokens. Decided by partial Spearman given k, a proxy-swap
permutation over cells, and the transfer gap across scale.
"""
import hashlib
import json
import pathlib
import platform
import time

from common import (Fault, UserError, atomically, cell, check_parity, fingerprint, heldout_rows, load_model, open_output, parse_args,
                    pick_device, pick_layer, read_table, readable_count, run_script, write_json, write_run, write_table)

import numpy as np
import torch
from tqdm import tqdm

import kernels
import stats
from proxies import EUCLIDEAN_CONTROLS, PROXIES, VALUE_BITS, evaluate, index_bits, metrics, oriented, sequence_weights
from sae import CHUNK, TRAIN_VERSION, TopKSAE, get_saes, tied_init

# 3 models x 2 layers x 6 k = 36 cells: cells, not seeds, are what the permutation test and the bootstrap count
GRID = dict(models="stdlib-s@3,stdlib-s@5,stdlib-m@3,stdlib-m@5,stdlib-l@3,stdlib-l@5", k="4,8,16,24,32,48", tokens="100k",
            expansion=4, eval_seqs=48, ctx=256)
N_RESAMPLES = 2000
KEY = ["model", "layer", "sae", "recipe", "d_sae", "k", "seed", "tokens"]
METRICS = ["r2", "r2_nosink", "r2_defl1", "r2_ln", "nmse", "nmse_tok", "mse", "cosine", "relerr", "swd_tok", "swd_seq", "swd_sampled",
           "gd_mean", "gd_abs", "ce_orig", "ce_recon", "dce", "ce_rec", "ce_rec_sinkclean", "ce_zero", "ce_mean", "frac_zero", "frac_mean",
           "kl", "alive", "l0", "bits_idx", "bits", "fed", "fed_nosink", "rho"]
COLUMNS = KEY + ["n_seq", "n_tok", "n_sink"] + METRICS
LEADERBOARD = ("proxy,target,stratum,n_cells,n_clusters,pearson,pearson_lo,pearson_hi,spearman,spearman_lo,spearman_hi,partial,partial_lo,"
               "partial_hi,diff_r2,diff_r2_lo,diff_r2_hi,p_r2,diff_control,diff_control_lo,diff_control_hi,p_control,gamma,gamma_lo,"
               "gamma_hi,in_range,same_ranks_as").split(",")


# ---------------------------------------------------------------------------------------------------- grid
def plan(args, device: torch.device) -> tuple[dict, list[dict]]:
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
                     d_sae=args.expansion * d, k=k, seed=seed, recipe="base", sinks=args.sinks, device=device.type,
                     version=TRAIN_VERSION) for tokens in args.tokens for k in args.k for seed in args.seeds]
        hooks.append(dict(name=name, layer=layer, model=model, tokenizer=tokenizer, rows=rows, jobs=jobs, d=d,
                          depth=f"{(layer / model.config.num_hidden_layers):.2f}"))
    if len({(hook["name"], hook["layer"]) for hook in hooks}) < len(hooks):
        raise UserError("--models: the same model and layer twice (a name without @LAYER means the middle layer)")
    size = {name: sum(p.numel() for p in entry[0].parameters()) for name, entry in loaded.items()}
    settings = dict(
        script="expb", device=device.type, data=args.data, text_sha256=loaded[hooks[0]["name"]][3],
        python=platform.python_version() if args.data == "stdlib" else None,
        models=sorted(size, key=size.get), hooks={f"{h['name']}@{h['layer']}": h["depth"] for h in hooks},
        weights={name: entry[4] for name, entry in loaded.items()}, k=args.k, seeds=args.seeds, tokens=args.tokens,
        expansion=args.expansion, recipe="base", sinks=args.sinks, eval_seqs=args.eval_seqs, ctx=args.ctx, save_tokens=args.save_tokens)
    return settings, hooks


def eval_batch(model, ctx: int, device: torch.device) -> int:
    """Sequences at a time: 8 MB of logits on the CPU (more leaves the cache, and malloc returns it page by page), 256 MB elsewhere."""
    return max(1, 2 ** (21 if device.type == "cpu" else 26) // (ctx * model.config.vocab_size))


def cost(hook: dict, args) -> dict:
    """FLOPs, bytes in memory and on disk of one hook's SAEs and their evaluation, counting matrix products."""
    model, d, layer = hook["model"], hook["d"], hook["layer"]
    n_layers, vocab = model.config.num_hidden_layers, model.config.vocab_size
    block = (sum(p.numel() for p in model.parameters()) - 2 * vocab * d) // n_layers
    head, tail = 2 * block * (layer + 1), 2 * (block * (n_layers - layer - 1) + vocab * d)
    dense = 2 * d * args.expansion * d
    jobs, n_tok = hook["jobs"], args.eval_seqs * args.ctx
    train = max(args.tokens) * head + sum(j["tokens"] for j in jobs) * 2.5 * dense  # encode, and the sparse rest
    patches = len(jobs) + len(NULLS)
    evaluation = n_tok * (head + tail * (1 + 2 * (1 + 4) + 2 + 2 * patches) + patches * dense)
    parameters = 2 * d * args.expansion * d * 4
    return dict(hook=f"{hook['name']}@{layer}", saes=len(jobs), tflops=(train + evaluation) / 1e12,
                memory_gb=(sum(p.numel() for p in model.parameters()) * 4 + min(CHUNK, max(args.tokens)) * d * 8
                           + parameters * 4 * (len(jobs) if max(args.tokens) > CHUNK else 1)) / 1e9,
                disk_gb=parameters * len(jobs) / 1e9)


def dry_run(settings: dict, hooks: list[dict], args) -> None:
    device = torch.device(settings["device"])
    a = torch.randn(2048, 2048, device=device)
    (a @ a).sum().item()
    start = time.perf_counter()
    for _ in range(5):
        b = a @ a
    b.sum().item()
    rate = 5 * 2 * 2048 ** 3 / (time.perf_counter() - start)
    rows = [cost(hook, args) for hook in hooks]
    total = sum(row["tflops"] for row in rows)
    print(markdown([row | {"minutes": row["tflops"] * 1e12 / (0.35 * rate) / 60} for row in rows],
                   ["hook", "saes", "tflops", "memory_gb", "disk_gb", "minutes"]))
    print(f"k {args.k}, tokens {[readable_count(t) for t in args.tokens]}, seeds {args.seeds}, {args.expansion}x; evaluation "
          f"{args.eval_seqs} x {args.ctx}\n{total:.3g} TFLOP; about {total * 1e12 / (0.35 * rate) / 60:.1f} minutes on this "
          f"{device.type} (35% of its measured {rate / 1e9:.0f} GFLOP/s)")


# ----------------------------------------------------------------------------------------------------- run
NULLS = ("null-identity", "null-mean", "null-random", "null-gaussian")


def null_rows(hook: dict, saes: list[TopKSAE], device: torch.device) -> dict:
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


def run_hook(hook: dict, args, device: torch.device) -> tuple[list[dict], dict, dict]:
    """Train (or find) the SAEs of one hook and evaluate them: (rows, sums {quantity: [C,S]}, per-token arrays)."""
    model, jobs = hook["model"], hook["jobs"]
    if device.type != "cpu":
        check_parity(model, hook["layer"], hook["rows"][:2], device)
    model.to(device)
    saes = get_saes(model, hook["tokenizer"], jobs, args.cache)
    names = [(f"topk-x{args.expansion}", "base", j["d_sae"], j["k"], j["seed"], j["tokens"]) for j in jobs]
    nulls = null_rows(hook, saes, device)
    random = nulls["null-random"]
    names += [(name, "null", *((len(random.W_dec), random.k) if name == "null-random" else (0, 0)), 0, 0) for name in NULLS]
    reconstructions = dict(zip(names, [*saes, *nulls.values()]))
    results = evaluate(model, hook["layer"], hook["rows"], reconstructions, eval_batch(model, args.ctx, device), keep_tokens=args.save_tokens,
                       what=f"{hook['name']} L{hook['layer']}")
    model.to("cpu")
    n_seq, per_seq = len(hook["rows"]), args.ctx - 1
    sums = {q: np.stack([results[name]["sums"][q] for name in names]) for q in results[names[0]]["sums"]}
    point = metrics(sums, np.ones((1, n_seq)), hook["d"])
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
    return rows, sums, tokens


def load_results(out: pathlib.Path) -> tuple[list[dict], dict]:
    """(rows, sums) of a results folder, in the order of conditions.csv; empty where there are none."""
    if not (out / "sequences.npz").exists() or not (out / "conditions.csv").exists():
        return [], {}
    with np.load(out / "sequences.npz") as file:
        return read_table(out / "conditions.csv"), dict(file)


def save_results(out: pathlib.Path, rows: list[dict], sums: dict) -> None:
    """conditions.csv and sequences.npz in one order; sorted, so that the order in which hooks were run leaves no trace."""
    order = sorted(range(len(rows)), key=lambda i: [rows[i][c] for c in KEY])
    with atomically(out / "sequences.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **{q: v[order] for q, v in sorted(sums.items())})
    write_table(out / "conditions.csv", [rows[i] for i in order], COLUMNS)


def save_tokens(out: pathlib.Path, tokens: dict) -> None:
    path = out / "tokens.npz"
    if path.exists():
        with np.load(path) as file:
            tokens = dict(file) | tokens
    with atomically(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **dict(sorted(tokens.items())))


# ------------------------------------------------------------------------------------- tables and verdict
def read_gate(path: pathlib.Path, settings: dict) -> tuple[str | None, str]:
    """(Exp-A's leaf or None, what to say): its verdict counts only for the same models, data and recipe."""
    if not path.exists():
        return None, "no Exp-A verdict yet"
    raw = path.read_bytes()
    there = json.loads(raw)
    differing = [key for key in ("models", "data", "recipe") if there.get("settings", {}).get(key) != settings[key]]
    if differing:
        return None, f"the Exp-A verdict at {path} is about other {', '.join(differing)}"
    return there["leaf"], f"Exp-A says {there['leaf']} (sha256 {hashlib.sha256(raw).hexdigest()[:12]})"


def analyse(out: pathlib.Path, settings: dict, verdict_path: pathlib.Path) -> dict:
    """leaderboard.csv, verdict.json, report.md and the plots: a pure function of conditions.csv, sequences.npz and the gate."""
    rows, sums = load_results(out)
    trained = np.array([row["recipe"] != "null" for row in rows])
    d = sums.pop("d")
    weights = sequence_weights(settings["eval_seqs"], N_RESAMPLES, seed=0)
    with np.errstate(invalid="ignore"):
        values = metrics(sums, weights, d)
    mine = [row for row, keep in zip(rows, trained) if keep]
    column = lambda name: np.array([row[name] for row in mine])
    meta = {name: column(name) for name in ("model", "layer", "k", "tokens", "seed")}
    meta["depth"] = np.array([settings["hooks"][f"{row['model']}@{row['layer']}"] for row in mine])
    meta["cell"] = np.array(["-".join(str(row[c]) for c in KEY if c != "seed") for row in mine])
    scores = {name: oriented(name, values[name][:, trained]) for name in PROXIES}
    targets = {"ce_rec": values["ce_rec"][:, trained], "kl": oriented("kl", values["kl"][:, trained])}
    board = []
    for target_name, target in targets.items():
        board += stats.leaderboard(scores, target, meta, settings["models"], target_name=target_name, controls=EUCLIDEAN_CONTROLS,
                                   n_resamples=N_RESAMPLES)
    write_table(out / "leaderboard.csv", board, LEADERBOARD)
    leaf, gate_text = read_gate(verdict_path, settings)
    verdict = stats.verdict_h2([row for row in board if row["target"] == "ce_rec"], scores, targets["ce_rec"], meta, settings["models"],
                               controls=EUCLIDEAN_CONTROLS, gate=leaf, n_resamples=N_RESAMPLES)
    verdict = {key: None if isinstance(v, float) and not np.isfinite(v) else v for key, v in verdict.items()}
    verdict |= {"settings": settings, "gate_text": gate_text,
                "rows_sha256": hashlib.sha256((out / "conditions.csv").read_bytes() + (out / "sequences.npz").read_bytes()).hexdigest()}
    write_json(out / "verdict.json", verdict)
    fed = values["fed_nosink"][:, trained]
    interval = np.percentile(fed[3:], [2.5, 97.5], axis=0)
    plots(out, rows, mine, board, settings)
    write_report(out, rows, mine, interval, board, verdict, settings)
    return verdict


def flag(lo: float, hi: float) -> str:
    """The plain sentence about one SAE: the 95% interval of its Fisher-Euclidean deviation without sink positions."""
    return "R² flatters this SAE" if lo > 0 else "R² underrates it" if hi < 0 else "no difference shown"


def sentence(verdict: dict) -> str:
    """The verdict on H2 in words."""
    leaf = verdict["leaf_if_ungated"] if verdict["leaf"] == "gated" else verdict["leaf"]
    text = {
        "supported": "SWD ranks SAEs by CE_rec better than the best Euclidean control, and transfers across scale better.",
        "beats-r2-only": "SWD beats R², but not the best Euclidean control: no case for a sensitivity-weighted geometry.",
        "rejected": "SWD is not shown to predict CE_rec better than the best Euclidean control.",
        "not-transferable": "SWD ranks better than the best control, but the models' ranges of the proxy hardly meet, so whether it "
                            "transfers across scale cannot be judged.",
        "undecided": "This grid cannot decide: fewer than 6 cells, or an undefined statistic.",
    }[leaf]
    return f"H2: {leaf}. {text}" if verdict["leaf"] != "gated" else f"H2: gated ({verdict['gate_text']}). Ungated it would read: {leaf}. {text}"


# ------------------------------------------------------------------------------------------ report, plots
def markdown(rows: list[dict], columns: list[str]) -> str:
    """A table that reads as text and renders as Markdown."""
    short = lambda v: f"{v:.3g}" if isinstance(v, float) and np.isfinite(v) else cell(v)
    table = [columns] + [[short(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    lines = ["| " + " | ".join(f"{v:<{w}}" for v, w in zip(line, widths)) + " |" for line in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def leaderboard_table(board: list[dict], target: str, stratum: str) -> str:
    span = lambda row, name: (f"{row[name]:+.2f} [{row[name + '_lo']:+.2f}, {row[name + '_hi']:+.2f}]" if np.isfinite(row[name]) else "undefined")
    chosen = [row for row in board if row["target"] == target and row["stratum"] == stratum]
    chosen.sort(key=lambda row: -np.nan_to_num(row["partial"], nan=-2))
    return markdown([{"proxy": row["proxy"], "partial Spearman | k": span(row, "partial"), "Spearman": f"{row['spearman']:+.2f}",
                      "Pearson": f"{row['pearson']:+.2f}", "minus r2": span(row, "diff_r2"), "p_r2": row["p_r2"],
                      "minus best control": span(row, "diff_control"), "p_ctl": row["p_control"], "transfer gap": span(row, "gamma"),
                      "in range": row["in_range"], "same ranks as": row["same_ranks_as"] or ""} for row in chosen],
                    ["proxy", "partial Spearman | k", "Spearman", "Pearson", "minus r2", "p_r2", "minus best control", "p_ctl",
                     "transfer gap", "in range", "same ranks as"]).replace("Spearman | k", "Spearman given k")


def write_report(out: pathlib.Path, rows, mine, interval, board, verdict: dict, settings: dict) -> None:
    number = lambda v, digits=2: "undefined" if v is None else f"{v:.{digits}f}"
    text = [
        "# Exp-B: which proxy predicts patched cross-entropy?", "", f"**{sentence(verdict)}**", "",
        "![R² and SWD against CE_rec](swd_r2.png)", "",
        "## Leaderboard, all conditions, target CE_rec", "", leaderboard_table(board, "ce_rec", "pooled"), "",
        "Larger is better for every proxy. Partial Spearman given k (and budget) is the primary statistic. Intervals: 95%, cells resampled "
        "within each model together with the evaluation sequences; the differences to the best control are on half of the sequences, the "
        "control being chosen on the other half. p: proxy-swap permutation over cells. Transfer gap: CE_rec of the largest model minus what "
        "the smallest model's curve says at that value of the proxy, averaged with the reverse.", "",
        "![leaderboard](leaderboard.png)", "",
        f"Noise ceiling of the target: rho_max {number(verdict['rho_max'], 3)}. Smallest difference to the best control that this grid could have "
        f"shown (80% power): {number(verdict['smallest_detectable'])}. With the (model, layer) as the cluster instead of the cell: "
        f"p {number(verdict['p_control_by_layer'], 3)} against the control, {number(verdict['p_r2_by_layer'], 3)} against R².", "",
        "## Target KL", "", leaderboard_table(board, "kl", "pooled"), "",
    ]
    for model in settings["models"]:
        text += [f"## Within {model}", "", leaderboard_table(board, "ce_rec", model), ""]
    shown = ["model", "layer", "k", "seed", "tokens", "r2", "r2_nosink", "cosine", "swd_tok", "ce_rec", "frac_zero", "kl", "alive", "bits", "rho",
             "fed", "fed_nosink", "interval", "flag"]
    flags = [row | {"interval": f"[{lo:+.2f}, {hi:+.2f}]", "flag": flag(lo, hi), "tokens": readable_count(row["tokens"])}
             for row, lo, hi in zip(mine, *interval)]
    nulls = [row for row in rows if row["recipe"] == "null"]
    text += ["## Every SAE", "", markdown(flags, shown), "",
             "fed = log of how much larger the error is in Fisher than in Euclidean geometry, relative to the activations; the interval and the flag "
             "are of fed without sink positions. rho: how much more the model cares about the error's direction than about a random one.", "",
             "## Null rows (never in a correlation)", "", markdown(nulls, ["model", "layer", "sae", "r2", "cosine", "swd_tok", "dce", "ce_rec", "kl"]), "",
             "`undefined`: the identity has no error, so fed and rho are 0/0; a reconstruction without a code has no alive, l0 and bits.", "",
             "![every proxy](proxies.png)", "",
             "## Settings", "", f"Evaluation: {settings['eval_seqs']} sequences of {settings['ctx']} tokens, positions 0..T-2; sink positions (dropped in `_nosink`): "
             f"position 0 and norms above 10 medians, {', '.join(sorted({str(row['n_sink']) for row in rows}))} of {rows[0]['n_tok']} per hook.", "",
             f"Evaluation text SHA-256 {settings['text_sha256']}" + (f", the standard library of Python {settings['python']}" if settings["data"] == "stdlib" else "") + ".", "",
             "```", json.dumps(settings, indent=1, sort_keys=True), "```", ""]
    if settings["device"] != "cpu":
        text += [f"Computed on {settings['device']}, where a second run need not be the same to the byte: compare with `python common.py diff`.", ""]
    with atomically(out / "report.md") as temporary:
        temporary.write_text("\n".join(text))


def plots(out: pathlib.Path, rows, mine, board, settings: dict) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colours = dict(zip(settings["models"], plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(settings["models"])))))

    def panel(axis, proxy):
        for model in settings["models"]:
            here = [row for row in mine if row["model"] == model]
            x = oriented(proxy, np.array([row[proxy] for row in here]))
            axis.scatter(x, [row["ce_rec"] for row in here], s=[12 + 2.5 * row["k"] for row in here], color=colours[model], alpha=0.75,
                         edgecolor="white", linewidth=0.5, label=model)
        axis.set_xlabel({"gd_mean": "−gd_mean"}.get(proxy, f"−log10({'1 − ' if proxy.startswith('r2') or proxy == 'cosine' else ''}{proxy})"))
        axis.set_ylabel("CE_rec")
        axis.grid(alpha=0.3)

    def save(figure, name):
        with atomically(out / name) as temporary:
            figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
        plt.close(figure)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axis, proxy in zip(axes, ("r2", "swd_tok")):
        panel(axis, proxy)
    axes[0].legend(title="size = k", fontsize=8)
    save(figure, "swd_r2.png")

    columns = 4
    figure, axes = plt.subplots(-(-len(PROXIES) // columns), columns, figsize=(13, 11), sharey=True, layout="constrained")
    for axis in axes.flat[len(PROXIES):]:
        axis.set_visible(False)
    for axis, proxy in zip(axes.flat, PROXIES):
        panel(axis, proxy)
    axes.flat[0].legend(title="size = k", fontsize=8)
    save(figure, "proxies.png")

    pooled = sorted((row for row in board if row["target"] == "ce_rec" and row["stratum"] == "pooled"),
                    key=lambda row: np.nan_to_num(row["partial"], nan=-2))
    figure, axis = plt.subplots(figsize=(7, 0.32 * len(pooled) + 1), layout="constrained")
    for y, row in enumerate(pooled):
        kind = "C1" if row["proxy"].startswith(("swd", "gd")) else "C0" if row["proxy"] in EUCLIDEAN_CONTROLS else "0.4"
        axis.plot([row["partial_lo"], row["partial_hi"]], [y, y], color=kind)
        axis.plot(row["partial"], y, "o", color=kind)
    axis.set_yticks(range(len(pooled)), [row["proxy"] for row in pooled])
    axis.set_xlabel("partial Spearman with CE_rec given k, 95% interval\n(orange: gradient-weighted; blue: Euclidean controls)")
    axis.grid(alpha=0.3, axis="x")
    save(figure, "leaderboard.png")


# ---------------------------------------------------------------------------------------------------- main
def main() -> None:
    args = parse_args(__doc__, **GRID)
    if args.from_dir:
        rows, _ = load_results(args.from_dir)
        if not rows or not (args.from_dir / "run.json").exists():
            raise UserError(f"--from {args.from_dir}: no finished run there (conditions.csv, sequences.npz, run.json)")
        out, settings = args.from_dir, json.loads((args.from_dir / "run.json").read_text())["settings"]
    else:
        out = args.out
        print(kernels.describe())
        settings, hooks = plan(args, pick_device(args.device))
        if settings["device"] == "mps" and args.device == "auto":
            try:
                check_parity(hooks[0]["model"], hooks[0]["layer"], hooks[0]["rows"][:2], torch.device("mps"))
            except Fault as why:
                print(f"{why}; going on with the CPU")
                settings, hooks = plan(args, torch.device("cpu"))
        if args.dry_run:
            return dry_run(settings, hooks, args)
        open_output(out, settings, args.fresh)
        start, device = time.time(), torch.device(settings["device"])
        rows, sums = load_results(out)
        done = {(row["model"], row["layer"]) for row in rows}
        for hook in tqdm([h for h in hooks if (h["name"], h["layer"]) not in done], desc="hooks", leave=False):
            new_rows, new_sums, tokens = run_hook(hook, args, device)
            rows += new_rows
            sums = {q: np.concatenate([sums[q], v]) if sums else v for q, v in new_sums.items()}
            if args.save_tokens:
                save_tokens(out, tokens)
            save_results(out, rows, sums)
        write_run(out, settings, seconds=round(time.time() - start, 1))
    verdict = analyse(out, settings, args.verdict)
    board = read_table(out / "leaderboard.csv")
    print(leaderboard_table(board, "ce_rec", "pooled"))
    print(f"---\n{sentence(verdict)}\nreport: {out / 'report.md'}")


if __name__ == "__main__":
    run_script(main)
