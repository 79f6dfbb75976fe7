"""What another seed does to every column of conditions.csv, for `python common.py diff` to judge reruns by.

    python expb.py --seeds 0,1,2,3,4 --out outputs/seeds && python bench/seed_sd.py outputs/seeds
    python bench/seed_sd.py outputs/seed0 outputs/seed1 ...   # or a folder each
    python bench/seed_sd.py outputs/seeds outputs/expa        # grids may differ: SDs are of a budget and k
    python bench/seed_sd.py FOLDER ... --out DIRECTORY        # where to write; outputs/reference unless said

Writes seed_sd.csv (column, scale, tokens, k, sd, df, together) and seed_sd.json beside it: where the SDs come
from, and how often two seeds are further apart than 3 of the SDs of the others. SDs are pooled over the cells
(everything but the seed) of one budget and k, and drawn a little towards the column's own (as if 4 degrees of
freedom came from there), so that a k at which five SAEs happened to agree, as with `alive` of 1, has no SD of
0.
"""

import itertools
import math
import pathlib
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

import bench
from common import run_script
from transport_geometry.errors import UserError
from transport_geometry.records import compare_runs, store
from transport_geometry.records.compare_runs import Run, Spread
from transport_geometry.records.tables import as_csv, as_json, markdown, plain

import numpy as np

# how these begin: 1 is perfect, and the distance to it is a distortion
LOG_OF_1_MINUS = ("r2", "cosine", "ce_rec", "frac_")
PLAIN = ("gd_mean", "fed", "kl_excess", "alive", "dense", "delta")
PRIOR = 4
Cell = tuple  # (tokens, k, number of the group of runs, the rest of a condition without its seed)
Cells = dict[Cell, dict[int, float]]  # {cell: {seed: value}} of one column
Between = dict[tuple[int, int], dict[Cell, float]]  # {pair of seeds: {cell: z}}


# ------------------------------------------------------------------------------------------------- the cells
def scale_of(column: str, values: np.ndarray) -> str:
    """The scale on which a seed's SD hardly depends on the value."""
    if column.startswith(LOG_OF_1_MINUS) and (values < 1).all():
        return "log of 1 - x"
    return "plain" if column.startswith(PLAIN) or not (values > 0).all() else "log"


def by_settings(runs: list[Run]) -> list[list[Run]]:
    """Groups of runs that differ in their seeds alone."""
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            if not compare_runs.other_settings(group[0].settings, run.settings)[0]:
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def cells_of(groups: list[list[Run]], column: str) -> Cells:
    """Of trained SAEs, where the column is a number for every one of two seeds or more."""
    found: dict[Cell, dict] = {}
    rest = [label for label in compare_runs.LABELS if label not in ("tokens", "k", "seed")]
    for number, group in enumerate(groups):
        for row in (row for run in group for row in run.rows):
            if row["recipe"] != "null" and column in row:
                cell = (row["tokens"], row["k"], number, *(row[label] for label in rest))
                found.setdefault(cell, {})[row["seed"]] = row[column]
    return {
        cell: seeds for cell, seeds in found.items() if len(seeds) > 1 and all(map(known, seeds.values()))
    }


def known(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


# ------------------------------------------------------------------------------------------------- their SDs
def pooled(variances: Iterable[tuple[float, int]]) -> float:
    """One variance of several (variance, degrees of freedom)."""
    known = list(variances)
    return sum(v * df for v, df in known) / sum(df for _, df in known)


def spread_of(column: str, cells: Cells) -> Spread:
    """SDs of 0 throughout: evaluation alone makes the column."""
    scale = scale_of(column, np.array([v for seeds in cells.values() for v in seeds.values()], dtype=float))
    bare = Spread(scale, {}, {}, 1.0)
    places: dict[tuple, list[tuple[float, int]]] = {}
    for cell, seeds in cells.items():
        values = [bare.on_scale(v) for v in seeds.values()]
        places.setdefault(cell[:2], []).append((float(np.var(values, ddof=1)), len(values) - 1))
    whole = pooled(itertools.chain.from_iterable(places.values()))
    df = {place: sum(n for _, n in variances) for place, variances in places.items()}
    sd = dict.fromkeys(places, 0.0)
    if whole > 1e-16:
        for place, variances in places.items():
            n = df[place]
            sd[place] = math.sqrt((pooled(variances) * n + whole * PRIOR) / (n + PRIOR))
    df = {place: n + PRIOR for place, n in df.items()}
    between = z_between(column, cells, Spread(scale, sd, df, 1.0))
    squares = [np.mean(list(z.values())) ** 2 * len(z) for z in between.values()]
    return Spread(scale, sd, df, float(np.mean(squares)) if squares else 1.0)


def z_between(column: str, cells: Cells, spread: Spread | None = None) -> Between:
    """In SDs of `spread`; without it, of the other seeds, where there are two others, and else of all."""
    out: Between = {}
    whole = spread or spread_of(column, cells)
    places = [place for place in whole.sd if whole.sd[place]]
    for i, j in itertools.combinations(sorted({seed for seeds in cells.values() for seed in seeds}), 2):
        others = whole if spread else spread_without(column, cells, i, j) or whole
        z = {}
        for cell, seeds in cells.items():
            place = cell[:2]
            if i in seeds and j in seeds and place in places:
                judge = others if others.sd.get(place) else whole
                z[cell] = judge.z(whole.on_scale(seeds[j]) - whole.on_scale(seeds[i]), place)
        if z:
            out[i, j] = z
    return out


def spread_without(column: str, cells: Cells, *left_out: int) -> Spread | None:
    """Of the other seeds; None where no cell has two of them."""
    others = {
        cell: {seed: v for seed, v in seeds.items() if seed not in left_out} for cell, seeds in cells.items()
    }
    others = {cell: seeds for cell, seeds in others.items() if len(seeds) > 1}
    return spread_of(column, others) if others else None


# ------------------------------------------------------------------------------------------------- the report
@dataclass(frozen=True, eq=False)
class Column:
    name: str
    spread: Spread
    between: Between  # each pair of seeds in SDs of the others

    def rows(self) -> list[dict]:
        """Of seed_sd.csv."""
        return [
            {"column": self.name, "scale": self.spread.scale, "tokens": tokens, "k": k, "sd": sd}
            | {"df": self.spread.df[tokens, k], "together": self.spread.together}
            for (tokens, k), sd in sorted(self.spread.sd.items())
        ]

    def shown(self) -> dict:
        """Its row of the table that is printed."""
        z, sds = np.abs(all_z(self.between)), self.spread.sd.values()
        return {
            "column": self.name,
            "scale": self.spread.scale,
            "sd, least": min(sds),
            "sd, most": max(sds),
            "rms z": float(np.sqrt(np.mean(z**2))) if len(z) else math.nan,
            "largest": float(z.max()) if len(z) else math.nan,
            "|z| > 3": int((z > compare_runs.FAR).sum()),
            "of": len(z),
            "together": self.spread.together,
        }


def all_z(between: Between) -> np.ndarray:
    return np.array([z for cells in between.values() for z in cells.values()])


def column_of(name: str, groups: list[list[Run]]) -> Column | None:
    """None where no cell has the column for two seeds."""
    cells = cells_of(groups, name)
    if not cells:
        return None
    spread = spread_of(name, cells)
    return Column(name, spread, z_between(name, cells) if any(spread.sd.values()) else {})


def checked(folder: pathlib.Path) -> Run:
    """Raises UserError for what no run left as it is."""
    run = compare_runs.read(folder)
    if not run.record:
        raise UserError(f"{run.folder}: no run.json, so no run to measure by")
    if edited := compare_runs.not_as_written(run):
        raise UserError(edited[0])
    if not run.settings.get("tokens"):
        raise UserError(f"{run.folder}: SAEs that nobody trained there")
    return run


def listed(values: Iterable) -> str:
    """Each once, as they come."""
    return ", ".join(dict.fromkeys(map(str, values)))


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=compare_runs.SEED_SD.parent)
    args = parser.parse_args()
    runs = [checked(folder) for folder in args.folders]
    groups = by_settings(runs)
    names = dict.fromkeys(name for run in runs for name in run.rows[0])
    measured = [
        column_of(name, groups)
        for name in names
        if name not in compare_runs.EXACT and name not in compare_runs.LABELS
    ]
    columns = [column for column in measured if column]
    largest: dict[tuple, float] = {}  # {(pair of seeds, cell): |z| in any column}
    for column in columns:
        for pair, cells in column.between.items():
            for cell, z in cells.items():
                largest[pair, cell] = max(largest.get((pair, cell), 0.0), abs(z))
    beyond = sum(z > compare_runs.FAR for z in largest.values())
    if not largest:
        raise UserError(f"{listed(args.folders)}: no cell with two seeds")
    every = {
        name: sorted({value for run in runs for value in run.settings[name]})
        for name in ("models", "hooks", "tokens", "k")
    }
    seeds = sorted({seed for pair, _ in largest for seed in pair})
    n_cells = len({cell for _, cell in largest})
    git = ["git", "-C", str(bench.ROOT), "describe", "--always", "--dirty"]
    processor = listed(run.record.get("processor") or run.record.get("platform") for run in runs)
    scripts = listed(f"{run.settings['script']}.py" for run in runs)
    said = f"{len(seeds)} seeds of {n_cells} cells, {scripts}, tokens {listed(every['tokens'])}, "
    said += f"k {listed(every['k'])}, {processor}"
    record = {
        "said": said,
        **every,
        "seeds": seeds,
        "cells": n_cells,
        # of conditions, with two more counted than were seen, so that none is not taken for never
        "conditions_beyond_3": (beyond + 2) / (len(largest) + 4),
        "pairs": len(largest),
        "largest_z": max(largest.values()),
        "processor": processor,
        "versions": runs[0].record["versions"],
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "settings": [group[0].settings for group in groups],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "seed_sd.csv"
    rows = [row for column in columns for row in column.rows()]
    store.write(path, as_csv(rows, list(rows[0])))
    store.write(args.out / "seed_sd.json", as_json(plain(record)))
    print(markdown([column.shown() for column in columns]))
    print(f"---\n{said}\nbeyond 3 SDs in some column: {beyond} of {len(largest)} pairs", end="; ")
    print(f"largest |z| {max(largest.values()):.2f}\n{path}")


if __name__ == "__main__":
    run_script(main)
