"""What the tests over hooks promise: level, power, coverage, on simulated data sets over the grids that ship.

    python bench/levels.py [n]    # n data sets per cell, default 1000; prints Markdown tables

The target is a k effect, a model effect and what the SAEs of a hook share, .9 of the rest; a proxy is the
target plus noise that correlates by ICC within a hook, and by c with the other proxy's.
"""

import itertools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import expc_fisher
from transport_geometry import stats
from transport_geometry.tables import markdown

import numpy as np

N = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
GRIDS = {"18 hooks x 3 k": (3, 6, 3), "9 hooks x 3 k": (3, 3, 3)}  # models, layers of each, k: Exp-B, Exp-C
OLD = {"6 hooks x 6 k": (2, 3, 6)}
NOISE, RESAMPLES = 0.5, 400

# 401 random patterns where all are too many, others for each data set: p < .05 is then exactly 20 of 401
all_patterns, seeds = stats.sign_patterns, itertools.count()
stats.sign_patterns = lambda G, *_, **__: all_patterns(G, 401, next(seeds))
rng = np.random.default_rng(0)


def grid(models: int, layers: int, ks: int) -> dict:
    model, layer, k = (
        v.ravel() for v in np.meshgrid(range(models), range(layers), 4 * 2.8 ** np.arange(ks), indexing="ij")
    )
    return {
        "model": model,
        "layer": layer,
        "k": k,
        "tokens": np.zeros(len(k)),
        "hook": model * layers + layer,
    }


def draw(meta: dict, icc: float, shared: float = 0.0) -> np.ndarray:
    """Normal noise [C] that correlates by `icc` within a hook; of what is left of 1, `shared` is one number
    per model.
    """
    within = lambda ids: rng.standard_normal(ids.max() + 1)[ids]
    own = rng.standard_normal(len(meta["k"]))
    return shared**0.5 * within(meta["model"]) + (1 - shared) ** 0.5 * (
        icc**0.5 * within(meta["hook"]) + (1 - icc) ** 0.5 * own
    )


def target(meta: dict) -> np.ndarray:
    return np.log2(meta["k"]) + 0.3 * (meta["model"] - 1) + draw(meta, 0.9)


def pair(meta: dict, icc: float, c: float, shared: float = 0.0, noise=(NOISE, NOISE)):
    """Target and two proxies, whose noises correlate by c."""
    y, common = target(meta), draw(meta, icc, shared)
    return y, *(y + sd * (c**0.5 * common + (1 - c) ** 0.5 * draw(meta, icc, shared)) for sd in noise)


def p_swap(y, a, b, meta, clusters=None) -> float:
    return stats.swap_test(a, b, y, meta, clusters=clusters)[1]


def p_loho(y, a, b, meta) -> float:
    """As the leaderboard has it: squared errors of log10 dCE, averaged within a hook."""
    e = [np.bincount(meta["hook"], stats.loho_errors(x, 10 ** (-0.3 * y), meta) ** 2) for x in (a, b)]
    return stats.flip_test((e[0] - e[1]) * len(e[0]) / len(y))


def p_added(meta, icc, shared=0.0) -> float:
    """C2' where the Fisher form is SWD plus noise: whatever it shares with the target, SWD has."""
    y = target(meta)
    swd = y + NOISE * draw(meta, icc, shared)
    return expc_fisher.added_value(swd + NOISE * draw(meta, icc, shared), swd, y, meta)[1]


def percent(rate: float, n: int) -> str:
    """With its standard error."""
    return f"{100 * rate:.1f} ± {100 * (rate * (1 - rate) / n) ** 0.5:.1f}"


def share(p: list) -> str:
    """How many of these p are below .05."""
    return percent(np.mean(np.array(p) < stats.ALPHA), len(p))


def show(title: str, rows: list) -> None:
    print(f"{title}\n\n{markdown(rows, list(rows[0]))}\n", flush=True)


def level() -> None:
    rows = []
    for (name, shape), icc, c in itertools.product((GRIDS | OLD).items(), (0, 0.5, 0.9), (0, 0.8, 0.95)):
        meta, cells = grid(*shape), np.arange(np.prod(shape))
        p = [
            (p_swap(*data, meta), p_loho(*data, meta), p_swap(*data, meta, cells))
            for data in (pair(meta, icc, c) for _ in range(N))
        ]
        swap, loho, by_cells = map(share, zip(*p))
        rows.append(
            {"grid": name, "ICC": icc, "c": c, "swap, hooks": swap, "loho": loho, "swap, cells": by_cells}
        )
    show("Two proxies equally good: p < .05, percent.", rows)


def level_added() -> None:
    rows = []
    for (name, shape), icc in itertools.product((GRIDS | OLD).items(), (0, 0.5, 0.9)):
        meta = grid(*shape)
        cells = meta | {"layer": np.arange(np.prod(shape))}  # each SAE a hook of its own
        hooks, by_cells = (share([p_added(m, icc) for _ in range(2 * N)]) for m in (meta, cells))
        rows.append({"grid": name, "ICC": icc, "C2', hooks": hooks, "C2', cells": by_cells})
    show("The Fisher form is SWD plus noise: p < .05, percent.", rows)


def level_models() -> None:
    """Where hooks of one model are not independent either."""
    rows = []
    for (name, shape), shared in itertools.product(GRIDS.items(), (0, 0.1, 0.3, 0.5)):
        meta = grid(*shape)
        p = [
            (p_swap(*data, meta), p_loho(*data, meta))
            for data in (pair(meta, 0.9, 0.8, shared) for _ in range(N))
        ]
        swap, loho = map(share, zip(*p))
        added = share([p_added(meta, 0.9, shared) for _ in range(2 * N)])
        rows.append({"grid": name, "shared in a model": shared, "swap": swap, "loho": loho, "C2'": added})
    show("Part of the noise is one number per model; ICC .9, c .8: p < .05, percent.", rows)


def partial(meta: dict, sd: float, icc: float = 0.9) -> float:
    """Partial Spearman of a proxy with this much noise, mean over data sets."""
    values = [(y, y + sd * draw(meta, icc)) for y in (target(meta) for _ in range(300))]
    y, x = map(np.array, zip(*values))
    return float(np.mean(stats.partial_spearman(x, y, meta)))


def power() -> None:
    """Noise that makes a partial Spearman is read off a curve; the difference shown is the simulated mean."""
    rows, sds = [], np.geomspace(0.03, 4, 24)
    for name, shape in GRIDS.items():
        meta, n = grid(*shape), max(N // 2, 1)
        curve = np.minimum.accumulate([partial(meta, sd) for sd in sds])
        noise_of = lambda rho, curve=curve: float(np.interp(-rho, -curve, sds))
        for control, c in ((0.6, 0.8), (0.8, 0.8), (0.8, 0.95)):
            row, found = {"grid": name, "control": control, "c": c}, [(0.0, 0.05)]
            for gain in (0.1, 0.17, 0.2, 0.3):
                key = f"+{gain:g}"
                if control + gain > curve[0]:
                    row[key] = "no room"
                    continue
                noise = noise_of(control + gain), noise_of(control)
                data = [
                    stats.swap_test(a, b, y, meta)
                    for y, a, b in (pair(meta, 0.9, c, noise=noise) for _ in range(n))
                ]
                differences, p = map(np.array, zip(*data))
                found.append((differences.mean(), np.mean((p < stats.ALPHA) & (differences > 0))))
                row[key] = f"{100 * found[-1][1]:.0f} ({differences.mean():.2f})"
            gains, powers = zip(*found)
            row["80% at"] = f"{np.interp(0.8, powers, gains):.2f}" if powers[-1] >= 0.8 else "not reached"
            rows.append(row)
    show("Swap test, percent found (mean difference in partial Spearman); ICC .9.", rows)


def coverage() -> None:
    """Against partial Spearman over 2,000 hooks of each of the same three models."""
    rows = []
    for icc in (0, 0.5, 0.9):
        many = grid(3, 2000, 3)
        y = target(many)
        truth, row = stats.partial_spearman(y + NOISE * draw(many, icc), y, many), {"ICC": icc}
        for name, shape in GRIDS.items():
            meta, hits, bias = grid(*shape), 0, []
            for i in range(N):
                y = target(meta)
                draws = stats.partial_draws(
                    (y + NOISE * draw(meta, icc))[None], y[None], meta, RESAMPLES, seed=i
                )
                lo, hi = stats.interval(draws[3:], fisher=True)
                hits, bias = hits + (lo <= truth <= hi), [*bias, draws[0] - truth]
            row |= {f"{name}, covered": percent(hits / N, N), f"{name}, bias": f"{np.mean(bias):+.3f}"}
        rows.append(row | {"truth": f"{truth:.3f}"})
    show("95% interval of partial Spearman, percent covered.", rows)


for part in (level, level_added, level_models, power, coverage):
    part()
