"""Exp-C: does the pullback Fisher, error measured where the model is sensitive, say more about patched
cross-entropy than SWD?

    python expc_fisher.py                                   # embedded models, seven CPU-minutes
    python expc_fisher.py --models EleutherAI/pythia-70m,EleutherAI/pythia-410m --data NeelNanda/pile-small-tokenized-2b --tokens 10M
    python expc_fisher.py --from outputs/expc_fisher        # tables, verdict and plots again, without a model

Hypothesis H2': delta^T G delta, G = J^T F J, adds predictive value beyond SWD, its one-label, data-label
estimate. The form is exact (one forward-mode pass through the tail for all positions, `fisher.py`), beside it
the other two choices of block. A local quadratic form is only believed inside its radius, so it is
calibrated: against the measured KL at h + a delta for several a.
"""

import itertools
import pathlib

from common import parse_args, run_script
from transport_geometry import fisher, leaderboard, stats, store
from transport_geometry.evaluate import DRAWS, hook_statistics
from transport_geometry.figures import as_png, model_colours, pyplot
from transport_geometry.flag import FLAG_COLUMNS, FLAG_TEXT, flagged
from transport_geometry.grid import KEY
from transport_geometry.leaderboard import (
    LEADERBOARD,
    MAGNITUDE,
    gate,
    how_to_read,
    leaderboard_plot,
    leaderboard_table,
    read_verdict,
)
from transport_geometry.lm import clean_pass, cross_entropy, head, kl_divergence, log_probs, tail
from transport_geometry.metrics import EUCLIDEAN_CONTROLS, PROXIES, oriented
from transport_geometry.results import about_the_run, marked, measured, rows_hash
from transport_geometry.run import eval_batch, run
from transport_geometry.tables import (
    as_csv,
    as_json,
    markdown,
    plain,
    read_table,
    readable_count,
    signed,
    span,
)

import numpy as np
import torch
from scipy.linalg import eigh

# 9 hooks: three depths of each model; what is measured once per hook is most of the cost
GRID = dict(
    models=",".join(f"stdlib-{size}@{layer}" for size in "sml" for layer in (1, 3, 5)),
    k="4,12,32",
    tokens="100k",
    expansion=4,
    eval_seqs=24,
    ctx=256,
)
N_RESAMPLES = 2000
FISHER = ("fisher_seq", "fisher_tok", "fisher_same", "half_var")
ALPHAS = (0.1, 0.3, 1.0)  # how far along delta the quadratic model is checked
RADIUS = 0.2  # it holds where KL is within this share of it
MIN_ADDED = 0.2  # C2': partial Spearman of the Fisher form with CE_rec given SWD
SHAPE = ("trace", "pr", "top1", "pr_sigma", "overlap1", "overlap4", "overlap16", "alignment")
TABLES = ("geometry.csv", "estimators.csv", "path.csv")
# of `terms` through the tail: two in forward mode, about three each, and two patches
MORE_PASSES = 8
LADDER = (
    ("delta_sq", "‖δ‖²", "how large the error is"),
    ("fisher_seq", "½δᵀGδ", "its direction weighed"),
    ("half_var", "½Var_p(Δz)", "the network's nonlinearity"),
    ("kl", "KL", "the softmax"),
    ("dce", "ΔCE", "the labels"),
)


# ------------------------------------------------------------------------------------------- measurement
def terms(model, layer: int, x, h, delta, p, log_p, log_q) -> dict:
    """Per predicted position [B,T-1]: two blocks of the exact form, the variance of the real logit change, KL
    and dCE on the way.
    """
    out = {
        "fisher_seq": fisher.sequence_form(model, layer, x, h, delta, p),
        "fisher_same": fisher.same_form(model, layer, x, h, delta, p),
        "half_var": fisher.variance(p, log_q - log_p) / 2,
    }
    for alpha in ALPHAS[:-1]:
        log_a = log_probs(tail(model, layer, x, h + alpha * delta))
        out |= {f"kl_{alpha}": kl_divergence(p, log_p, log_a), f"ce_{alpha}": cross_entropy(log_a, x)}
    return out


def own_metrics(sums: dict, weights: np.ndarray) -> dict:
    """The columns that Exp-C appends, per evaluated token: {metric: [W,C]}."""
    total = {
        q: weights @ sums[q].T
        for q in (
            "n",
            "sse",
            "fisher",
            "fisher_seq",
            "fisher_same",
            "half_var",
            "kl",
            *(f"kl_{a}" for a in ALPHAS[:-1]),
        )
    }
    with np.errstate(divide="ignore", invalid="ignore"):
        forms = {
            "fisher_seq": total["fisher_seq"] / total["n"],
            "fisher_tok": total["fisher"] / total["n"],
            "fisher_same": total["fisher_same"] / total["n"],
            "half_var": total["half_var"] / total["n"],
            "delta_sq": total["sse"] / total["n"],
        }
        kl = lambda alpha: total["kl" if alpha == 1 else f"kl_{alpha}"]
        return forms | {
            f"locality_{alpha:g}": kl(alpha) / (alpha**2 * total["fisher_seq"] / 2) for alpha in ALPHAS
        }


def study(hook: dict, sae: torch.nn.Module, device: torch.device) -> dict:
    """What is measured once per hook, on few sequences or without an SAE: {table: rows}. sae: the middle one
    of the grid.
    """
    model, layer, rows = hook["model"], hook["layer"], hook["rows"]
    batch = eval_batch(model, rows.shape[1], device)
    name, condition = (
        {"model": hook["name"], "layer": layer},
        dict(zip(KEY[2:], hook["names"][len(hook["names"]) // 2])),
    )
    which = name | {key: condition[key] for key in ("recipe", "k", "seed", "tokens")}
    few = rows[:batch].to(device)
    return {
        "geometry.csv": [name | row for row in geometry(model, layer, rows, batch, hook["document"])],
        "estimators.csv": [which | row for row in estimators(model, layer, few, sae)],
        "path.csv": [which | row for row in path(model, layer, few, sae)],
    }


def geometry(model, layer: int, rows: torch.Tensor, batch: int, document: np.ndarray) -> list[dict]:
    """G and the activations' covariance Sigma, over all positions and without sinks: one row each, intervals
    over documents [S].

    G = E_t[G_t], the all-downstream block averaged over positions, from gradients with sampled labels: E[g_y
    g_y^T] (d x d, float64).
    """
    device, draws = next(model.parameters()).device, 2 * DRAWS
    uniforms = torch.rand(len(rows), draws, rows.shape[1] - 1, generator=torch.Generator().manual_seed(1))
    shared = hook_statistics(model, layer, rows, batch)
    h_all, sink, d = shared["h"], shared["sink"], shared["h"].shape[-1]
    # of documents: what the bootstrap draws, so that d x d sums stay few
    blocks = min(int(document.max()) + 1, 24)
    sums = {
        sinks: dict(
            n=np.zeros(blocks),
            first=np.zeros((blocks, d)),
            second=np.zeros((blocks, d, d)),
            gram=np.zeros((blocks, d, d)),
        )
        for sinks in ("in", "out")
    }
    for start in range(0, len(rows), batch):
        x = rows[start : start + batch].to(device)
        _, (_, *gradients) = clean_pass(
            model,
            layer,
            x,
            h_all[start : start + batch].to(device),
            uniforms[start : start + batch].transpose(0, 1).to(device),
        )
        g = torch.stack([gradient[:, :-1].cpu() for gradient in gradients], 1).double()  # [B,m,T-1,d]
        for i in range(len(x)):
            for sinks, keep in (("in", torch.ones_like(sink[0])), ("out", ~sink[start + i])):
                into, at = sums[sinks], document[start + i] % blocks
                h, gi = h_all[start + i, :-1][keep].double(), g[i][:, keep].flatten(0, 1)
                into["n"][at] += len(h)
                into["first"][at] += h.sum(0).numpy()
                into["second"][at] += (h.T @ h).numpy()
                into["gram"][at] += (gi.T @ gi).numpy() / draws
    weights = np.random.default_rng(0).multinomial(blocks, np.full(blocks, 1 / blocks), 100)
    out = []
    for sinks, part in sums.items():
        shapes = []
        for w in (np.ones(blocks), *weights):
            total = {key: np.tensordot(w, v, 1) for key, v in part.items()}
            with np.errstate(invalid="ignore"):  # no positions but sinks
                mean = total["first"] / total["n"]
                shapes.append(
                    shape_of_g(
                        total["gram"] / total["n"], total["second"] / total["n"] - np.outer(mean, mean)
                    )
                )
        row = dict(sinks=sinks, d=d)
        for key, value in shapes[0].items():
            row[key], (row[f"{key}_lo"], row[f"{key}_hi"]) = (
                value,
                stats.interval(np.array([shape[key] for shape in shapes[1:]])),
            )
        out.append(row)
    return out


def estimators(model, layer: int, x: torch.Tensor, sae) -> list[dict]:
    """Other ways to the quadratic form of one SAE (all positions together), over the exact form: mean, its
    SE, SD of one estimate.

    The research log's subsampled Jacobian with diagonal F, from S rows of the vocabulary per token, each a
    backward pass of its own; and labels sampled from p, one backward pass for all tokens.
    """
    h, delta, p = reconstruction_error(model, layer, x, sae)
    with torch.no_grad():
        u = fisher.push_forward(model, layer, x, h, delta)
    exact, vocab, repeats = fisher.variance(p, u).sum().item(), p.shape[-1], 50
    generator, rows = torch.Generator().manual_seed(2), []
    p, u = p.cpu(), u.cpu()

    def add(name, backwards, draws):
        draws = np.asarray(draws) / (exact or np.nan)
        sd = draws.std(ddof=1) if len(draws) > 1 else np.nan
        rows.append(
            {
                "estimator": name,
                "backward passes": backwards,
                "repeats": len(draws),
                "mean": draws.mean(),
                "se": sd / len(draws) ** 0.5,
                "sd": sd,
            }
        )

    for size in (32, 256):
        drawn = {
            "uniform rows": lambda: torch.randint(vocab, (*p.shape[:2], size), generator=generator),
            "rows from p": lambda: torch.multinomial(
                p.flatten(0, 1), size, replacement=True, generator=generator
            ).view(*p.shape[:2], size),
        }
        for (name, draw), centred in itertools.product(drawn.items(), (True, False)):
            add(
                f"diagonal F, {name}, {'centred' if centred else 'as proposed, uncentred'}",
                f"{size} a token",
                [
                    fisher.subsampled_form(p, u, draw(), name == "rows from p", centred).sum().item()
                    for _ in range(repeats)
                ],
            )
    uniforms = torch.rand(2 * repeats, *p.shape[:2], generator=generator).to(x.device)
    _, (g, *gradients) = clean_pass(model, layer, x, h, uniforms)
    draws = fisher.sampled_form(gradients, delta)[1].sum(1).cpu().numpy()
    add("sampled labels (true Fisher)", "1", draws)
    add("sampled labels (true Fisher)", f"{DRAWS}", draws.reshape(-1, DRAWS).mean(1))
    add("the data's labels (swd_seq)", "1", [fisher.sampled_form([g], delta)[1].sum().item()])
    return rows


def path(model, layer: int, x: torch.Tensor, sae) -> list[dict]:
    """dCE of one SAE as the integral of g.delta from h to h_hat (exact by the fundamental theorem):
    Gauss-Legendre with m nodes against measured.

    m = 0 is the plain first-order term g(h).delta, which every gradient proxy starts from.
    """
    h, delta, p = reconstruction_error(model, layer, x, sae)
    with torch.no_grad():
        ce = [
            cross_entropy(log_probs(tail(model, layer, x, h + a * delta)), x).cpu().double().mean().item()
            for a in (0, 1)
        ]
    measured, rows = ce[1] - ce[0], []
    slope = lambda a: (
        (clean_pass(model, layer, x, h + a * delta)[1][0] * delta).cpu().double().sum().item()
        / p[..., 0].numel()
    )
    for m in (0, 1, 2, 4, 8):
        nodes, w = np.polynomial.legendre.leggauss(m) if m else (np.array([-1.0]), np.array([2.0]))
        integral = sum(weight / 2 * slope((node + 1) / 2) for node, weight in zip(nodes, w))
        rows.append(
            {
                "nodes": m,
                "integral": integral,
                "measured": measured,
                "error": abs(integral - measured) / abs(measured) if measured else np.nan,
            }
        )
    return rows


def reconstruction_error(
    model, layer: int, x: torch.Tensor, sae
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h [B,T,d], delta [B,T,d] (0 at the last position), p [B,T-1,V] of the clean run."""
    h = head(model, layer, x)
    with torch.no_grad():
        delta = sae.reconstruct(h.flatten(0, 1))[2].view_as(h) - h
        delta[:, -1] = 0
        return h, delta, log_probs(tail(model, layer, x, h)).exp()


def shape_of_g(G: np.ndarray, sigma: np.ndarray) -> dict:
    """Of two symmetric [d,d]: trace and participation ratio of G, its top share, how its top directions lie
    to Sigma's.

    pr = (tr G)^2 / tr G^2; overlap_r = |U_r(G)^T U_r(Sigma)|_F^2 / r, the mean squared cosine of the
    principal angles (chance r/d); alignment = tr(G Sigma) d / (tr G tr Sigma): 1 without alignment, below 1
    where the model does not care for the directions in which h varies most. All nan where no position is
    left, or one of the two is 0.
    """
    d, trace = len(G), np.trace(G)
    if not (np.isfinite([G, sigma]).all() and trace > 0 and np.trace(sigma) > 0):
        return dict.fromkeys(SHAPE, np.nan)
    (values, of_g), (_, of_sigma) = (eigh(A, subset_by_index=[max(d - 16, 0), d - 1]) for A in (G, sigma))
    of_g, of_sigma = of_g[:, ::-1], of_sigma[:, ::-1]
    return {
        "trace": trace,
        "pr": trace**2 / (G**2).sum(),
        "top1": values[-1] / trace,
        "pr_sigma": np.trace(sigma) ** 2 / (sigma**2).sum(),
        "alignment": (G * sigma).sum() * d / (trace * np.trace(sigma)),
    } | {f"overlap{r}": ((of_g[:, :r].T @ of_sigma[:, :r]) ** 2).sum() / r for r in (1, 4, 16)}


# ---------------------------------------------------------------------------------------------- analysis
def added_value(x: np.ndarray, base: np.ndarray, y: np.ndarray, meta: dict) -> tuple[float, float]:
    """C2': partial Spearman of x with y given base, k and budget, and its p by sign flips over hooks. x,
    base, y [C].

    What y has beyond the rest changes its sign in whole hooks (Freedman and Lane 1983, with the wild
    bootstrap's signs instead of a permutation, since SAEs of a hook move together). Two-sided. nan below 6
    hooks.
    """
    if not np.isfinite([x, base, y]).all():
        return np.nan, np.nan
    ids, (x, base, y) = stats.cluster_ids(meta), map(stats.rankdata, (x, base, y))
    Z = np.column_stack([stats.given(meta), base])
    residual = np.eye(len(Z)) - Z @ np.linalg.pinv(Z)
    rx, ry = residual @ x, residual @ y
    if (
        ids.max() + 1 < stats.MIN_CLUSTERS
        or min(rx @ rx, ry @ ry) < 1e-9
        or len(Z) - np.linalg.matrix_rank(Z) < 2
    ):
        return np.nan, np.nan
    e = (stats.sign_patterns(ids.max() + 1)[:, ids] * ry) @ residual
    r = e @ rx / np.sqrt((e * e).sum(1) * (rx @ rx))
    return float(r[0]), stats.p_value(r)


def out_of_hook_gain(
    x: np.ndarray, base: np.ndarray, y: np.ndarray, meta: dict, n_resamples: int = 2000
) -> tuple[float, float, float]:
    """How much less of y's variance is left when x joins base, k and budget in a linear model, each hook
    predicted by the others.

    (share, lo, hi), hooks resampled. nan below 6 hooks, or where leaving one out leaves the larger model
    without a degree of freedom.
    """
    Z, ids = np.column_stack([stats.given(meta), base]), stats.cluster_ids(meta)
    G, errors = ids.max() + 1, []
    for design in (Z, np.column_stack([Z, x])):
        e = np.empty(len(y))
        for hook in range(G):
            out = ids == hook
            if (
                G < stats.MIN_CLUSTERS
                or np.linalg.matrix_rank(design[~out]) < design.shape[1]
                or (~out).sum() <= design.shape[1]
            ):
                return np.nan, np.nan, np.nan
            e[out] = y[out] - design[out] @ np.linalg.lstsq(design[~out], y[~out], rcond=None)[0]
        errors.append(np.bincount(ids, e**2))
    w = np.vstack([np.ones(G), np.random.default_rng(0).multinomial(G, np.full(G, 1 / G), n_resamples)])
    gain = 1 - (w @ errors[1]) / (w @ errors[0])
    return float(gain[0]), *stats.interval(gain[1:])


def ladder(values: dict, meta: dict) -> list[dict]:
    """Partial Spearman with dCE given k of every rung between |delta|^2 and dCE, what each step up wins, with
    the leaderboard's intervals.
    """
    rho = [
        stats.partial_draws(oriented(name, values[name]), -values["dce"], meta, N_RESAMPLES)
        for name, _, _ in LADDER[:-1]
    ] + [np.ones(3 + N_RESAMPLES)]
    rows = []
    for (_, symbol, what), here, below in zip(LADDER, rho, [None, *rho]):
        step = here - below if below is not None else np.full(4, np.nan)
        rows.append(
            {"rung": symbol, "what joins": what, "rho": float(here[0]), "step": float(step[0])}
            | dict(zip(("step_lo", "step_hi"), stats.interval(step[3:])))
        )
    return rows


def calibration(sums: dict, meta: dict) -> list[dict]:
    """Per hook and alpha, over (SAE, sequence): slope of measured KL on alpha^2 delta^T G delta / 2, and of
    dCE on first plus second order.

    Slope through the origin; r2 = 1 - sum (measured - predicted)^2 / sum (measured - mean)^2, no parameter
    fitted.
    """
    rows = []
    for model, layer in sorted(set(zip(meta["model"], meta["layer"]))):
        here = (meta["model"] == model) & (meta["layer"] == layer)
        s = {q: v[here] / sums["n"][here] for q, v in sums.items()}
        for alpha in ALPHAS:
            tag = "" if alpha == 1 else f"_{alpha}"
            kl, dce = s["kl" + tag], s["ce_recon" if alpha == 1 else "ce" + tag] - s["ce_orig"]
            quadratic = alpha**2 * s["fisher_seq"] / 2
            row = {"model": str(model), "layer": int(layer), "alpha": alpha}
            for name, y, x in (("kl", kl, quadratic), ("dce", dce, alpha * s["gd"] + quadratic)):
                with np.errstate(divide="ignore", invalid="ignore"):
                    row |= {
                        f"{name}_slope": float((x * y).sum() / (x * x).sum()),
                        f"{name}_r2": float(1 - ((y - x) ** 2).sum() / ((y - y.mean()) ** 2).sum()),
                    }
            rows.append(row)
    return rows


def radius(row: dict) -> float:
    """The largest alpha up to which KL stays within RADIUS of the quadratic form; 0 where it never does, nan
    where that is 0.
    """
    if not np.isfinite(row[f"locality_{ALPHAS[0]:g}"]):
        return np.nan
    inside = [abs(row[f"locality_{alpha:g}"] - 1) <= RADIUS for alpha in ALPHAS]
    return max((alpha for i, alpha in enumerate(ALPHAS) if all(inside[: i + 1])), default=0.0)


def analyse(out: pathlib.Path, settings: dict, exp_a: dict | None) -> dict:
    """leaderboard.csv, verdict.json, report.md and the plots: a pure function of conditions.csv,
    sequences.npz, geometry.csv and the gate.
    """
    nulls, saes, values, meta, sums = measured(out, settings, N_RESAMPLES, own_metrics)
    scores = {name: oriented(name, values[name]) for name in (*PROXIES, *FISHER)}
    targets = {"ce_rec": values["ce_rec"], "kl": oriented("kl", values["kl"])}
    board = []
    for name, target in targets.items():
        board += leaderboard.board(
            scores,
            target,
            values[MAGNITUDE[name]],
            meta,
            settings["models"],
            target_name=name,
            controls=EUCLIDEAN_CONTROLS,
            n_resamples=N_RESAMPLES,
        )
    leaf, gate_text = gate(exp_a, settings)
    h2 = leaderboard.verdict_h2(
        [row for row in board if row["target"] == "ce_rec"],
        scores,
        targets["ce_rec"],
        values["dce"],
        meta,
        settings["models"],
        controls=EUCLIDEAN_CONTROLS,
        gate=leaf,
        n_resamples=N_RESAMPLES,
    )
    added, p = added_value(scores["fisher_seq"][0], scores["swd_tok"][0], targets["ce_rec"][0], meta)
    gain = out_of_hook_gain(scores["fisher_seq"][0], scores["swd_tok"][0], targets["ce_rec"][0], meta)
    open_gate = h2["leaf"] == "supported"
    ungated = (
        "undecided"
        if np.isnan(added)
        else "supported"
        if added >= MIN_ADDED and p < stats.ALPHA
        else "rejected"
    )
    rungs = ladder(values, meta)
    shown = [row for row in rungs[1:-1] if row["step_lo"] > 0 or row["step_hi"] < 0]
    lost = max(shown, key=lambda row: abs(row["step"]), default=None)
    verdict = dict(
        leaf=ungated if open_gate else "gated",
        leaf_if_ungated=ungated,
        gate=h2["leaf"],
        gate_text=gate_text,
        h2=h2,
        added=added,
        p=p,
        gain=dict(zip(("value", "lo", "hi"), gain)),
        ladder=rungs,
        lost_at=lost and lost["rung"],
        locality={f"{a:g}": float(np.median(values[f"locality_{a:g}"][0])) for a in ALPHAS},
        radius=[{c: row[c] for c in KEY} | {"radius": radius(row)} for row in saes],
        thresholds=dict(min_added=MIN_ADDED, alpha=stats.ALPHA, radius=RADIUS),
        settings=settings,
        rows_sha256=rows_hash(out),
    )
    verdict = plain(verdict)
    tables = {name: read_table(store.checked(out / store.RUN, name)) for name in TABLES} | {
        "calibration": calibration(sums, meta)
    }
    store.put(
        out / store.RUN,
        {
            "leaderboard.csv": as_csv(board, LEADERBOARD),
            "verdict.json": as_json(verdict),
            "report.md": report(nulls, flagged(saes, values), board, verdict, tables, settings),
            **plots(sums, meta, board, settings),
        },
    )
    return verdict


def sentence(verdict: dict) -> str:
    """The verdict in words."""
    shown = (
        "undefined"
        if verdict["added"] is None
        else f"partial Spearman with CE_rec given SWD and k {verdict['added']:+.2f}, p = {verdict['p']:.3f}"
    )
    text = {
        "supported": "The pullback Fisher predicts CE_rec beyond SWD",
        "rejected": "The pullback Fisher is not shown to predict CE_rec beyond SWD",
        "undecided": "This grid cannot decide",
    }[verdict["leaf_if_ungated"]]
    if verdict["leaf"] == "gated":
        return f"H2': gated (H2 is {verdict['gate']}; {verdict['gate_text']}). Ungated it would read: {verdict['leaf_if_ungated']}. {text} ({shown})."
    return f"H2': {verdict['leaf']}. {text} ({shown})."


# ------------------------------------------------------------------------------------------ report, plots
def report(nulls, saes, board, verdict: dict, tables: dict, settings: dict) -> bytes:
    gain, table = verdict["gain"], tables["calibration"]
    rungs = [
        {
            "rung": row["rung"],
            "what joins": row["what joins"],
            "partial Spearman": signed(row["rho"]),
            "step": span(row["step"], row["step_lo"], row["step_hi"])
            if row is not verdict["ladder"][0]
            else "",
        }
        for row in verdict["ladder"]
    ]
    flags = [
        row | {"tokens": readable_count(row["tokens"]), "radius": radius(row)}
        for row in marked(saes, settings)
    ]

    def of(row: dict, key: str) -> str:
        value, lo, hi = (
            f"{row[name]:.3g}" if np.isfinite(row[name]) else "undefined"
            for name in (key, f"{key}_lo", f"{key}_hi")
        )
        return (
            value
            if value == "undefined"
            else f"{value} [undefined]"
            if "undefined" in (lo, hi)
            else f"{value} [{lo}, {hi}]"
        )

    shapes = [
        row | {key: of(row, key) for key in SHAPE} | {"pr / d": row["pr"] / row["d"]}
        for row in tables["geometry.csv"]
    ]
    left_none = any(row["trace"] == "undefined" for row in shapes)
    cheap, integral = tables["estimators.csv"], tables["path.csv"]
    text = [
        "# Exp-C: does the pullback Fisher add anything beyond SWD?",
        "",
        f"**{sentence(verdict)}**",
        "",
        f"p: what CE_rec has beyond SWD changes its sign in whole hooks, {verdict['h2']['n_clusters']} of them. Beside it, descriptive: a linear model of CE_rec on k and SWD, each "
        f"hook predicted from the others, leaves {span(gain['value'], gain['lo'], gain['hi'])} less variance with the Fisher form in it (1 = all of it; negative: it "
        "predicts worse; hooks resampled).",
        "",
        "![calibration](calibration.png)",
        "",
        "## Leaderboard, target CE_rec",
        "",
        leaderboard_table(board, "ce_rec", "pooled"),
        "",
        "fisher_seq: δᵀGδ with all positions moved together, exact (half of it is KL for small δ); fisher_tok: each position's δ alone on all it reaches, from "
        f"{DRAWS} draws of sampled labels; fisher_same: on its own prediction only, exact; half_var: ½Var_p of the real logit change.",
        "",
        *how_to_read(verdict["h2"], settings),
        "![leaderboard](leaderboard.png)",
        "",
        "## The ladder from ‖δ‖² to ΔCE",
        "",
        markdown(rungs, list(rungs[0])),
        "",
        "Partial Spearman with ΔCE given k; steps with 95% intervals as in the leaderboard. "
        + (
            f"The largest step that the interval shows is at {verdict['lost_at']}: there the rank correlation changes."
            if verdict["lost_at"]
            else "No step's interval leaves out 0, so this grid names no rung at which the rank correlation is lost."
        ),
        "",
        "## Calibration",
        "",
        markdown(table, list(table[0])),
        "",
        "Over (SAE, sequence), patching h + αδ. kl_slope: KL = slope · α²½δᵀGδ; dce_slope: ΔCE = slope · (α g·δ + α²½δᵀGδ); r2 of the prediction with slope 1. "
        f"The quadratic model is believed up to the α where KL stays within {RADIUS:.0%} of it (`radius` below); beyond it ranks only. Median KL / quadratic: "
        + ", ".join(f"α = {a}: {signed(v)}" for a, v in verdict["locality"].items())
        + ".",
        "",
        "## The shape of G",
        "",
        markdown(shapes, ["model", "layer", "sinks", *SHAPE[:2], "pr / d", *SHAPE[2:]]),
        "",
        "G averaged over positions (all-downstream block, sampled labels), with sink positions in and out. pr: participation ratio of G (pr / d = 1 for an isotropic one), pr_sigma of the covariance; "
        "overlap_r: mean squared cosine between the top r directions of G and of the covariance; alignment: 1 = G does not know the covariance, below 1 = the model "
        "cares less for the directions in which h varies most. Intervals over documents."
        + (" `undefined`: no positions are left without the sinks." if left_none else ""),
        "",
        "## Cheaper estimators of δᵀGδ",
        "",
        markdown(cheap, list(cheap[0])),
        "",
        "Of one SAE of each hook on a few sequences, over the exact form; sd of one estimate, se of the mean. A mean further from 1 than its se explains is bias: the uncentred "
        "diagonal F adds (E_p u)², and is not even defined up to a shift of all logits. Rows drawn uniformly meet p's mass less often than rows drawn from p: their sd. "
        "A row of the Jacobian is a backward pass of its own for every token, a set of sampled labels one for all of them; the data's labels are "
        "one draw that cannot be repeated.",
        "",
        "## ΔCE as an integral along h → ĥ",
        "",
        markdown(integral, list(integral[0])),
        "",
        "The upper anchor of any gradient proxy: nodes of Gauss-Legendre until the integral of g·δ is the measured ΔCE (nats per token); 0 nodes: first order at h.",
        "",
        "## Every SAE",
        "",
        markdown(
            flags,
            [
                "model",
                "layer",
                "sae",
                "recipe",
                "k",
                "seed",
                "tokens",
                "r2",
                "swd_tok",
                "fisher_seq",
                "fisher_tok",
                "fisher_same",
                "kl",
                "ce_rec",
                "locality_0.1",
                "locality_1",
                "radius",
                "fed",
                *FLAG_COLUMNS,
            ],
        ),
        "",
        FLAG_TEXT,
        "",
        "## Null rows (never in a correlation)",
        "",
        markdown(
            marked(nulls, settings),
            [
                "model",
                "layer",
                "sae",
                "r2",
                "fisher_seq",
                "fisher_same",
                "kl",
                "ce_rec",
                "rho",
                "fed_nosink",
                "fed_iso_nosink",
                "fed_excess",
            ],
        ),
        "",
        "`undefined`: the identity has no error, so fed, rho and the excess are 0/0.",
        "",
        *about_the_run(saes, settings),
    ]
    return "\n".join(text).encode()


def plots(sums: dict, meta: dict, board, settings: dict) -> dict[str, bytes]:
    """{file: PNG}."""
    plt = pyplot()
    colours = model_colours(settings["models"])
    figure, axes = plt.subplots(1, len(ALPHAS), figsize=(4 * len(ALPHAS) + 0.5, 3.8), layout="constrained")
    for axis, alpha in zip(axes, ALPHAS):
        x = alpha**2 * sums["fisher_seq"].sum(1) / sums["n"].sum(1) / 2
        y = sums["kl" if alpha == 1 else f"kl_{alpha}"].sum(1) / sums["n"].sum(1)
        for model in settings["models"]:
            here = meta["model"] == model
            axis.scatter(
                x[here],
                y[here],
                s=12 + 2.5 * meta["k"][here],
                color=colours[model],
                alpha=0.75,
                edgecolor="white",
                linewidth=0.5,
                label=model,
            )
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axis.plot(ends, ends, color="0.4", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="α² ½ δᵀGδ per token", title=f"α = {alpha:g}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL per token, measured at h + αδ")
    axes[0].legend(title="size = k", fontsize=8)
    return {"leaderboard.png": leaderboard_plot(board), "calibration.png": as_png(figure)}


# ---------------------------------------------------------------------------------------------------- main
def main() -> None:
    args = parse_args(__doc__, **GRID)
    exp_a = read_verdict(args.verdict)
    if (done := run(args, "expc_fisher", terms, own_metrics, study, MORE_PASSES)) is None:
        return
    out, settings = done
    verdict = analyse(out, settings, exp_a)
    print(leaderboard_table(read_table(out / "leaderboard.csv"), "ce_rec", "pooled"))
    print(f"---\n{sentence(verdict)}\nreport: {out / 'report.md'}")


if __name__ == "__main__":
    run_script(main)
