"""What the tests over hooks promise: level, power, coverage, on simulated data sets over the grids that ship.

    python bench/levels.py [n]    # n data sets per cell, default 1000; prints Markdown tables

The target is a k effect, a model effect and what the SAEs of a hook share, .9 of the rest; a proxy is the
target plus noise that correlates by ICC within a hook, and by c with the other proxy's. A data set has C
conditions.
"""

import itertools
from collections.abc import Sequence

import bench
from common import run_script
from transport_geometry import stats
from transport_geometry.tables import markdown

import numpy as np

GRIDS = {"18 hooks x 3 k": (3, 6, 3), "9 hooks x 3 k": (3, 3, 3)}  # models, layers of each, k: Exp-B, Exp-C
OLD = {"6 hooks x 6 k": (2, 3, 6)}
NOISE, RESAMPLES, PATTERNS = 0.5, 400, 401
Meta = dict[str, np.ndarray]
rng = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------- data sets
def grid(models: int, layers: int, ks: int) -> Meta:
    axes = np.meshgrid(range(models), range(layers), 4 * 2.8 ** np.arange(ks), indexing="ij")
    model, layer, k = (axis.ravel() for axis in axes)
    hook = model * layers + layer
    return {"model": model, "layer": layer, "k": k, "tokens": np.zeros(len(k)), "hook": hook}


def draw(meta: Meta, icc: float, shared: float = 0.0) -> np.ndarray:
    """Normal noise [C] that correlates by `icc` within a hook; of what is left of 1, `shared` is one number
    per model.
    """

    def one_each(ids: np.ndarray) -> np.ndarray:
        return rng.standard_normal(ids.max() + 1)[ids]

    own = rng.standard_normal(len(meta["k"]))
    by_model, by_hook = one_each(meta["model"]), one_each(meta["hook"])
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
    return stats.swap_test(a, b, y, meta, clusters=clusters)[1]


def p_loho(y: np.ndarray, a: np.ndarray, b: np.ndarray, meta: Meta) -> float:
    """As the leaderboard has it: squared errors of log10 dCE, averaged within a hook."""
    e = [np.bincount(meta["hook"], stats.loho_errors(x, 10 ** (-0.3 * y), meta) ** 2) for x in (a, b)]
    return stats.flip_test((e[0] - e[1]) * len(e[0]) / len(y))


def p_added(meta: Meta, icc: float, shared: float = 0.0) -> float:
    """C2' where the Fisher form is SWD plus noise: whatever it shares with the target, SWD has."""
    y = target(meta)
    swd = y + NOISE * draw(meta, icc, shared)
    return stats.added_value(swd + NOISE * draw(meta, icc, shared), swd, y, meta)[1]


def percent(rate: float, n: int) -> str:
    """With its standard error."""
    return f"{100 * rate:.1f} ± {100 * (rate * (1 - rate) / n) ** 0.5:.1f}"


def share(p: Sequence[float]) -> str:
    """How many of these p are below .05."""
    return percent(float(np.mean(np.array(p) < stats.ALPHA)), len(p))


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
        found.append(stats.partial_spearman(y + sd * draw(meta, icc), y, meta))
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
                    data.append(stats.swap_test(a, b, y, meta))
                differences, p = np.array(data).T
                found.append((differences.mean(), np.mean((p < stats.ALPHA) & (differences > 0))))
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
        truth = stats.partial_spearman(y + NOISE * draw(many, icc), y, many)
        row: dict = {"ICC": icc}
        for name, shape in GRIDS.items():
            meta, hits, bias = grid(*shape), 0, 0.0
            for i in range(n):
                y = target(meta)
                x = y + NOISE * draw(meta, icc)
                draws = stats.partial_draws(x[None], y[None], meta, RESAMPLES, seed=i)
                lo, hi = stats.interval(draws[3:], fisher=True)
                hits += lo <= truth <= hi
                bias += (draws[0] - truth) / n
            row |= {f"{name}, covered": percent(hits / n, n), f"{name}, bias": f"{bias:+.3f}"}
        rows.append(row | {"truth": f"{truth:.3f}"})
    show("95% interval of partial Spearman, percent covered.", rows)


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument("n", nargs="?", type=int, default=1000)
    n = parser.parse_args().n
    # random patterns where all are too many, others for each data set: p < .05 is then exactly 20 of 401
    all_patterns, seeds = stats.sign_patterns, itertools.count()
    stats.sign_patterns = lambda G, *_, **__: all_patterns(G, PATTERNS, next(seeds))
    for part in (level, level_added, level_models, power, coverage):
        part(n)


if __name__ == "__main__":
    run_script(main)
