"""What the tests over hooks promise: level, power, coverage, on simulated data sets over the grids that ship;
and what intervals over documents cover.

    python bench/levels.py [n]    # n data sets per cell, default 1000; prints Markdown tables
    python bench/levels.py [n] --only claims                # the tables about the two claims alone
    python bench/levels.py [n] --only rows --rows FOLDER    # here, on the documents of a finished expb.py

The target is a k effect, a model effect and what the SAEs of a hook share, .9 of the rest; a proxy is the
target plus noise that correlates by ICC within a hook, and by c with the other proxy's. A data set has C
conditions. Along depth, hook by hook, the target's noise and the proxies' may be AR(1): `phi` of the grid.
"""

import itertools
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import bench
from common import run_script
from transport_geometry.measuring.metrics import BY_NAME, EUCLIDEAN_CONTROLS, Sums, as_score, computed
from transport_geometry.records.results import load_results, meta_of
from transport_geometry.records.store import RUN, load
from transport_geometry.records.tables import markdown
from transport_geometry.statistics import claims, hook_tests, resampling
from transport_geometry.statistics.correlations import (
    correlation,
    k_dummies,
    partial_draws,
    partial_spearman,
    rank_residual,
    weighted_design,
)
from transport_geometry.statistics.hook_dependence import (
    MIN_EFFECTIVE_HOOKS,
    autoregressive,
    dependence,
    effective_hooks,
    proxy_errors,
)
from transport_geometry.statistics.hook_tests import added_value, flip_test, loho_errors, swap_test
from transport_geometry.statistics.intervals import (
    ALPHA,
    document_interval,
    interval,
    percentiles,
    stretched_interval,
)
from transport_geometry.statistics.resampling import document_weights, mean_by_hook, seed_draws

import numpy as np

GRIDS = {"18 hooks x 3 k": (3, 6, 3), "9 hooks x 3 k": (3, 3, 3)}  # models, layers of each, k: Exp-B, Exp-C
OLD = {"6 hooks x 6 k": (2, 3, 6)}
NOISE, RESAMPLES, PATTERNS = 0.5, 400, 401
Meta = dict[str, np.ndarray]
rng = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------- data sets
def grid(models: int, layers: int, ks: int, phi: float = 0.0) -> Meta:
    axes = np.meshgrid(range(models), range(layers), 4 * 2.8 ** np.arange(ks), indexing="ij")
    model, layer, k = (axis.ravel() for axis in axes)
    hook = model * layers + layer
    meta = {"model": model, "layer": layer, "k": k, "tokens": np.zeros(len(k)), "hook": hook}
    return meta | {"phi": np.array(phi), "layers": np.array(layers)}


def draw(meta: Meta, icc: float, shared: float = 0.0) -> np.ndarray:
    """Normal noise [C] that correlates by `icc` within a hook; of what is left of 1, `shared` is one number
    per model.
    """

    def one_each(ids: np.ndarray) -> np.ndarray:
        return rng.standard_normal(ids.max() + 1)[ids]

    own = rng.standard_normal(len(meta["k"]))
    by_model, by_hook = one_each(meta["model"]), rng.standard_normal(meta["hook"].max() + 1)
    layers, models = int(meta["layers"]), int(meta["model"].max()) + 1
    by_hook = autoregressive(by_hook, float(meta["phi"]), (layers,) * models)[meta["hook"]]
    return shared**0.5 * by_model + (1 - shared) ** 0.5 * (icc**0.5 * by_hook + (1 - icc) ** 0.5 * own)


def target(meta: Meta) -> np.ndarray:
    return np.log2(meta["k"]) + 0.3 * (meta["model"] - 1) + draw(meta, 0.9)


def pair(
    meta: Meta, icc: float, c: float, shared: float = 0.0, noise: tuple[float, float] = (NOISE, NOISE)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Target and two proxies, whose noises correlate by c."""
    y, common = target(meta), draw(meta, icc, shared)
    a, b = (y + sd * (c**0.5 * common + (1 - c) ** 0.5 * draw(meta, icc, shared)) for sd in noise)
    return y, a, b


# ------------------------------------------------------------------------------------------------- the tests
def p_swap(
    y: np.ndarray, a: np.ndarray, b: np.ndarray, meta: Meta, clusters: np.ndarray | None = None
) -> float:
    return swap_test(a, b, y, meta, clusters=clusters)[1]


def p_loho(y: np.ndarray, a: np.ndarray, b: np.ndarray, meta: Meta) -> float:
    """As the leaderboard has it: squared errors of log10 dCE, averaged within a hook."""
    e = [np.bincount(meta["hook"], loho_errors(x, 10 ** (-0.3 * y), meta) ** 2) for x in (a, b)]
    return flip_test((e[0] - e[1]) * len(e[0]) / len(y))


def p_added(meta: Meta, icc: float, shared: float = 0.0) -> float:
    """C2' where the Fisher form is SWD plus noise: whatever it shares with the target, SWD has."""
    y = target(meta)
    swd = y + NOISE * draw(meta, icc, shared)
    return added_value(swd + NOISE * draw(meta, icc, shared), swd, y, meta)[1]


def percent(rate: float, n: int) -> str:
    """With its standard error."""
    return f"{100 * rate:.1f} ± {100 * (rate * (1 - rate) / n) ** 0.5:.1f}"


def share(p: Sequence[float]) -> str:
    """How many of these p are below .05."""
    return percent(float(np.mean(np.array(p) < ALPHA)), len(p))


# ------------------------------------------------------------------------------------------------- the tables
def show(title: str, rows: list[dict]) -> None:
    print(f"{title}\n\n{markdown(rows, list(rows[0]))}\n", flush=True)


def level(n: int) -> None:
    rows = []
    for (name, shape), icc, c in itertools.product((GRIDS | OLD).items(), (0, 0.5, 0.9), (0, 0.8, 0.95)):
        meta, cells = grid(*shape), np.arange(np.prod(shape))
        p = []
        for _ in range(n):
            data = pair(meta, icc, c)
            p.append((p_swap(*data, meta), p_loho(*data, meta), p_swap(*data, meta, cells)))
        swap, loho, by_cells = map(share, zip(*p))
        rows.append(
            {"grid": name, "ICC": icc, "c": c, "swap, hooks": swap, "loho": loho, "swap, cells": by_cells}
        )
    show("Two proxies equally good: p < .05, percent.", rows)


def level_added(n: int) -> None:
    rows = []
    for (name, shape), icc in itertools.product((GRIDS | OLD).items(), (0, 0.5, 0.9)):
        meta = grid(*shape)
        cells = meta | {"layer": np.arange(np.prod(shape))}  # each SAE a hook of its own
        hooks, by_cells = (share([p_added(m, icc) for _ in range(2 * n)]) for m in (meta, cells))
        rows.append({"grid": name, "ICC": icc, "C2', hooks": hooks, "C2', cells": by_cells})
    show("The Fisher form is SWD plus noise: p < .05, percent.", rows)


def level_models(n: int) -> None:
    """Where hooks of one model are not independent either."""
    rows = []
    for (name, shape), shared in itertools.product(GRIDS.items(), (0, 0.1, 0.3, 0.5)):
        meta, p = grid(*shape), []
        for _ in range(n):
            data = pair(meta, 0.9, 0.8, shared)
            p.append((p_swap(*data, meta), p_loho(*data, meta)))
        swap, loho = map(share, zip(*p))
        added = share([p_added(meta, 0.9, shared) for _ in range(2 * n)])
        rows.append({"grid": name, "shared in a model": shared, "swap": swap, "loho": loho, "C2'": added})
    show("Part of the noise is one number per model; ICC .9, c .8: p < .05, percent.", rows)


def partial(meta: Meta, sd: float, n: int, icc: float = 0.9) -> float:
    """Partial Spearman of a proxy with this much noise, mean over n data sets."""
    found = []
    for _ in range(n):
        y = target(meta)
        found.append(partial_spearman(y + sd * draw(meta, icc), y, meta))
    return float(np.mean(found))


def power(n: int) -> None:
    """Noise that makes a partial Spearman is read off a curve; the difference shown is the simulated mean."""
    rows, sds = [], np.geomspace(0.03, 4, 24)
    for name, shape in GRIDS.items():
        meta = grid(*shape)
        curve = np.minimum.accumulate([partial(meta, sd, min(n, 300)) for sd in sds])
        for control, c in ((0.6, 0.8), (0.8, 0.8), (0.8, 0.95)):
            row, found = {"grid": name, "control": control, "c": c}, [(0.0, 0.05)]
            for gain in (0.1, 0.17, 0.2, 0.3):
                if control + gain > curve[0]:
                    row[f"+{gain:g}"] = "no room"
                    continue
                better, worse = (float(np.interp(-rho, -curve, sds)) for rho in (control + gain, control))
                data = []
                for _ in range(max(n // 2, 1)):
                    y, a, b = pair(meta, 0.9, c, noise=(better, worse))
                    data.append(swap_test(a, b, y, meta))
                differences, p = np.array(data).T
                found.append((differences.mean(), np.mean((p < ALPHA) & (differences > 0))))
                row[f"+{gain:g}"] = f"{100 * found[-1][1]:.0f} ({differences.mean():.2f})"
            gains, powers = zip(*found)
            row["80% at"] = f"{np.interp(0.8, powers, gains):.2f}" if powers[-1] >= 0.8 else "not reached"
            rows.append(row)
    show("Swap test, percent found (mean difference in partial Spearman); ICC .9.", rows)


def coverage(n: int) -> None:
    """Against partial Spearman over 2,000 hooks of each of the same three models."""
    rows = []
    for icc in (0, 0.5, 0.9):
        many = grid(3, 2000, 3)
        y = target(many)
        truth = partial_spearman(y + NOISE * draw(many, icc), y, many)
        row: dict = {"ICC": icc}
        for name, shape in GRIDS.items():
            meta, hits, bias = grid(*shape), 0, 0.0
            for i in range(n):
                y = target(meta)
                x = y + NOISE * draw(meta, icc)
                draws = partial_draws(x[None], y[None], meta, RESAMPLES, seed=i)
                lo, hi = interval(draws[resampling.RESAMPLES], fisher=True)
                hits += lo <= truth <= hi
                bias += (draws[0] - truth) / n
            row |= {f"{name}, covered": percent(hits / n, n), f"{name}, bias": f"{bias:+.3f}"}
        rows.append(row | {"truth": f"{truth:.3f}"})
    show("95% interval of partial Spearman, percent covered.", rows)


# ----------------------------------------------------------------------------- in general: hooks along depth
ALONG = {"1 x 12": (1, 12, 3), "1 x 18": (1, 18, 3), "2 x 12": (2, 12, 3), "3 x 6, the default": (3, 6, 3)}
PHIS = (0.0, 0.5, 0.8, 0.9)
BETTER = (0.15, 0.7)  # noise of two proxies of which one is better


@dataclass(frozen=True)
class Tested:
    """p of one data set by order and by size; nan: no verdict."""

    as_independent: tuple[float, float]
    stretched: tuple[float, float]  # as the leaderboard does
    blocks: float  # by order, traded in blocks of neighbouring hooks


def tested(y: np.ndarray, a: np.ndarray, b: np.ndarray, meta: Meta) -> Tested:
    errors = [loho_errors(x, 10 ** (-0.3 * y), meta) for x in (a, b)]
    d = np.subtract(*(mean_by_hook(e**2, meta["hook"]) for e in errors))
    order = [dependence(proxy_errors(x, y, meta), meta) for x in (a, b)]
    size = [dependence(e, meta) for e in errors]
    by_order, by_size = (np.max([one.stretch for one in both]) for both in (order, size))
    return Tested(
        (p_swap(y, a, b, meta), flip_test(d)),
        (swap_test(a, b, y, meta, stretch=by_order)[1], flip_test(d, stretch=by_size)),
        p_blocks(y, a, b, meta, min(one.n_effective for one in order)),
    )


def p_blocks(y: np.ndarray, a: np.ndarray, b: np.ndarray, meta: Meta, n_effective: float) -> float:
    """Swap test in blocks of neighbours, as long as leaves no more blocks than effective hooks."""
    hooks, layers = meta["hook"].max() + 1, int(meta["layers"])
    if n_effective < MIN_EFFECTIVE_HOOKS:
        return np.nan
    length = int(np.ceil(hooks / n_effective - 1e-9))
    blocks = meta["model"] * layers + meta["layer"] // length
    return p_swap(y, a, b, meta, clusters=blocks)


def rejected(p: np.ndarray) -> tuple[str, str, str]:
    """(no verdict, p < .05 of all data sets, p < .05 given a verdict) in percent."""
    judged = ~np.isnan(p)
    below = share(np.nan_to_num(p, nan=1.0))
    return f"{100 * (1 - judged.mean()):.0f}", below, share(p[judged]) if judged.any() else "none"


def level_along_depth(n: int) -> None:
    rows, better = [], []
    for (name, shape), phi in itertools.product(ALONG.items(), PHIS):
        meta = grid(*shape, phi)
        found = [tested(*pair(meta, 0.9, 0.8), meta) for _ in range(n)]
        free, ours = (np.array([getattr(t, of) for t in found]) for of in ("as_independent", "stretched"))
        in_blocks = np.array([t.blocks for t in found])
        row: dict = {"hooks": name, "φ": phi}
        row["effective"] = f"{effective_hooks(phi, (shape[1],) * shape[0]):.1f}"
        for i, test in enumerate(("swap", "loho")):
            row[f"{test}, hooks independent"] = share(free[:, i])
            labels = (f"{test}: no verdict", f"{test}: p < .05", f"{test}: given a verdict")
            row |= dict(zip(labels, rejected(ours[:, i])))
        row["swap in blocks: p < .05"], row["given a verdict"] = rejected(in_blocks)[1:]
        rows.append(row)
        found = [tested(*pair(meta, 0.9, 0.8, noise=BETTER), meta) for _ in range(max(n // 4, 1))]
        ours = np.array([t.stretched for t in found])
        in_blocks, free = np.array([t.blocks for t in found]), np.array([t.as_independent for t in found])
        better.append(
            {"hooks": name, "φ": phi, "swap, hooks independent": share(free[:, 0])}
            | dict(zip(("no verdict", "swap: found", "given a verdict"), rejected(ours[:, 0])))
            | {"loho: found": rejected(ours[:, 1])[1], "swap in blocks: found": rejected(in_blocks)[1]}
        )
    show("In general, two proxies equally good, noise AR(1) along depth; ICC .9, c .8. Percent.", rows)
    show("In general, one proxy better (noise .15 against .7): percent found.", better)


def coverage_along_depth(n: int) -> None:
    """Of partial Spearman and of the difference of two, against 4,000 hooks of each of the same models."""
    rows = []
    for (name, shape), phi in itertools.product(ALONG.items(), PHIS):
        meta, many = grid(*shape, phi), grid(shape[0], 4000, 3, phi)
        y, a, b = pair(many, 0.9, 0.8, noise=BETTER)
        truth = np.array([partial_spearman(x, y, many) for x in (a, b)])
        hits: list[list[float]] = []
        for i in range(n):
            y, a, b = pair(meta, 0.9, 0.8, noise=BETTER)
            hooks = [dependence(proxy_errors(x, y, meta), meta) for x in (a, b)]
            draws = [partial_draws(x[None], y[None], meta, RESAMPLES, seed=i) for x in (a, b)]
            wide = [one.stretch for one in hooks]
            ends = [
                interval(draws[1][resampling.RESAMPLES], fisher=True),
                stretched_interval(draws[1][0], draws[1][resampling.RESAMPLES], wide[1], fisher=True),
                stretched_interval(
                    (draws[0] - draws[1])[0], (draws[0] - draws[1])[resampling.RESAMPLES], np.max(wide)
                ),
            ]
            true = (truth[1], truth[1], truth[0] - truth[1])
            hits.append([np.nan if np.isnan(lo) else lo <= t <= hi for (lo, hi), t in zip(ends, true)])
        covered = np.array(hits, dtype=float)
        row: dict = {"hooks": name, "φ": phi}
        for label, column in zip(("hooks independent", "stretched", "difference, stretched"), covered.T):
            known = column[~np.isnan(column)]
            row[label] = f"{percent(known.mean(), len(known))} of {len(known)}" if len(known) else "none"
        rows.append(row)
    show("In general: 95% interval of partial Spearman, percent covered where there is one.", rows)


# ----------------------------------------------------------------------------- here: intervals over documents
DOCUMENTS = 32


def here_draws(values: np.ndarray, y: np.ndarray, meta: Meta) -> dict[str, tuple[np.ndarray, dict, int]]:
    """{statistic: (draws, sources, ranked)} of proxies values [2, W, C] and the target y [W, C], as `claims`
    forms them.
    """
    draws = seed_draws(meta, len(y))
    design = weighted_design(draws.weights, k_dummies(meta))
    units = [rank_residual(v[draws.documents], design) for v in (y, *values)]
    partial = [correlation(u, units[0]) for u in units[1:]]
    pairs = claims.clear_pairs(y, meta)
    found = {
        "partial": (partial[0], draws.sources, y.shape[1]),
        "difference": (partial[0] - partial[1], draws.sources, 0),
    }
    if len(pairs.a):
        right = [claims.share_right(v, y, pairs, draws) for v in values]
        found["pairs"] = right[0], draws.sources, 0
        found["pairs, difference"] = right[0] - right[1], draws.sources, 0
    return found


def covered_here(
    draw_data: Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Meta, int]], n: int
) -> dict[str, str]:
    """Percent covered, ours and (percentiles). draw_data: (proxies [2, W, C], target [W, C], both as they
    truly are [2, C] and [C], meta, documents).
    """
    hits: dict[str, list] = {}
    for _ in range(n):
        values, y, true_values, true_y, meta, documents = draw_data()
        truth = true_statistics(true_values, true_y, claims.clear_pairs(y, meta), meta)
        for name, (draws, sources, ranked) in here_draws(values, y, meta).items():
            lo, hi = document_interval(draws, sources, documents, ranked)
            plain = percentiles(draws[sources["documents"]])
            t = truth[name]
            hits.setdefault(name, []).append(
                [lo - 1e-9 <= t <= hi + 1e-9, plain[0] - 1e-9 <= t <= plain[1] + 1e-9]
            )
    rates = {name: np.mean(both, axis=0) for name, both in hits.items()}
    return {name: f"{100 * ours:.0f} ({100 * plain:.0f})" for name, (ours, plain) in rates.items()}


def true_statistics(
    values: np.ndarray, y: np.ndarray, pairs: claims.SAEPairs, meta: Meta
) -> dict[str, float]:
    """Of what documents without end would give: values [2, C], y [C]."""
    partial = [partial_spearman(v, y, meta) for v in values]
    agree = [np.sign(pairs.difference(v)) == np.sign(pairs.difference(y)) for v in values]
    right = [float(a.mean()) if len(a) else np.nan for a in agree]
    return {
        "partial": partial[0],
        "difference": partial[0] - partial[1],
        "pairs": right[0],
        "pairs, difference": right[0] - right[1],
    }


def here_of_documents(n: int) -> None:
    """SAEs whose proxies and target are means over documents, with noise that both share in part."""
    rows = []
    for (layers, seeds), noise, alike in itertools.product(
        ((12, 1), (2, 1), (12, 3)), (0.02, 0.1, 0.3), (0.0, 0.7)
    ):
        meta = grid(1, layers, 3)
        meta = {name: np.repeat(meta[name], seeds) for name in ("model", "layer", "k", "tokens", "hook")}
        meta["seed"] = np.tile(np.arange(seeds), layers * 3)
        meta |= {"phi": np.array(0.0), "layers": np.array(layers)}

        def draw_data(
            meta: Meta = meta, seeds: int = seeds, noise: float = noise, alike: float = alike
        ) -> tuple:
            one = {name: v[::seeds] if v.ndim else v for name, v in meta.items()}
            y, a, b = (np.repeat(v, seeds) for v in pair(one, 0.9, 0.5, noise=(0.3, 0.6)))
            cells = np.stack([y, a, b])
            # what a seed does to all SAEs of it, and to each
            saes = cells + (0.2 * rng.standard_normal(cells.shape) if seeds > 1 else 0)
            own = rng.standard_normal((DOCUMENTS, *cells.shape))
            own = (1 - alike) ** 0.5 * own + alike**0.5 * own[:, :1]
            documents = saes + noise * DOCUMENTS**0.5 * own
            weights = document_weights(DOCUMENTS, RESAMPLES, int(rng.integers(2**31)))
            means = np.tensordot(weights / weights.sum(1, keepdims=True), documents, 1).transpose(1, 0, 2)
            # MARGIN is of CE_rec, which has about a tenth of this spread
            return means[1:] / 10, means[0] / 10, saes[1:] / 10, saes[0] / 10, meta, DOCUMENTS

        rows.append(
            {"SAEs": f"{layers} x 3 k x {seeds} seed{'s' * (seeds > 1)}", "noise": noise, "alike": alike}
            | covered_here(draw_data, n)
        )
    show(
        "Here: 95% interval over 32 documents, percent covered (by percentiles). noise: of a mean over "
        "documents, where SAEs of one k have a spread of 1; alike: its correlation between proxy and target.",
        rows,
    )


def here_on_rows(n: int, folder: pathlib.Path) -> None:
    """A finished run's documents are the population: data sets are drawn from them, and resampled again."""
    settings = load(folder / RUN)["settings"]
    all_rows, sums = load_results(folder)
    kept = np.array([row["recipe"] != "null" for row in all_rows])
    saes = [row for row, keep in zip(all_rows, kept) if keep]
    d, document = sums.pop("d")[kept], sums.pop("document")[0]
    sums = {name: v[kept] for name, v in sums.items() if name != "condition"}
    meta, D = meta_of(saes, settings), int(document.max()) + 1

    def scores(weights: np.ndarray, keep: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        """([2, W, C] of the proxy and of R², [W, C] of CE_rec)."""
        found = computed(
            Sums({q: v[keep] for q, v in sums.items()}, weights[:, document], d[keep]),
            [BY_NAME[one] for one in (name, "r2", "ce_rec")],
        )
        two = [as_score(one, found[one]) for one in (name, "r2")]
        return np.stack(two), found["ce_rec"]

    table = []
    everything = np.ones(len(saes), bool)
    parts = {"all": everything} | {model: meta["model"] == model for model in settings["models"]}
    for which, keep in parts.items():
        part = {name: v[keep] for name, v in meta.items()}
        for name in ("swd_tok", "gd_abs", "swd_seq", *EUCLIDEAN_CONTROLS):
            true, true_y = scores(np.ones((1, D)), keep, name)

            def draw_data(
                keep: np.ndarray = keep, part: Meta = part, name: str = name, true: tuple = (true, true_y)
            ) -> tuple:
                drawn = rng.multinomial(D, np.full(D, 1 / D)).astype(float)
                again = rng.multinomial(D, drawn / D, size=RESAMPLES)
                values, y = scores(np.vstack([drawn, drawn, drawn, again]), keep, name)
                return values, y, true[0][:, 0], true[1][0], part, D

            table.append({"SAEs": which, "proxy": name} | covered_here(draw_data, n))
    show(
        f"Here, on the documents of {folder}: percent covered (by percentiles); differences are to R².", table
    )


PARTS: dict[str, tuple[Callable[[int], None], ...]] = {
    "levels": (level, level_added, level_models, power, coverage),
    "claims": (level_along_depth, coverage_along_depth, here_of_documents),
}


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument("n", nargs="?", type=int, default=1000)
    parser.add_argument("--only", choices=(*PARTS, "rows"), help="some of the tables")
    parser.add_argument("--rows", type=pathlib.Path, help="a finished folder of expb.py")
    args = parser.parse_args()
    # random patterns where all are too many, others for each data set: p < .05 is then exactly 20 of 401
    all_patterns, seeds = hook_tests.sign_patterns, itertools.count()
    hook_tests.sign_patterns = lambda G, *_, **__: all_patterns(G, PATTERNS, next(seeds))
    for name, parts in PARTS.items():
        for part in parts if args.only in (None, name) else ():
            part(args.n)
    if args.rows:
        here_on_rows(args.n, args.rows)


if __name__ == "__main__":
    run_script(main)
