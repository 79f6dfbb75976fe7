"""What another seed does to every column of conditions.csv, for `python common.py diff` to judge reruns by.

    python expb.py --seeds 0,1,2,3,4 --out outputs/seeds && python bench/seed_sd.py outputs/seeds
    python bench/seed_sd.py outputs/seed0 outputs/seed1 ...        # or a folder for each; then their tables are compared, too
    python bench/seed_sd.py outputs/seeds outputs/expa             # grids may differ: SDs are kept per budget and k
    python bench/seed_sd.py FOLDER ... --out DIRECTORY             # where to write; outputs/reference unless said

Writes seed_sd.csv (column, scale, tokens, k, sd, df, together) and seed_sd.json beside it: where the SDs come
from, and how often two seeds are further apart than 3 of the SDs of the others. SDs are pooled over the cells
(everything but the seed) of one budget and k, and drawn a little towards the column's own (as if 4 degrees of
freedom came from there), so that a k at which five SAEs happened to agree, as with `alive` of 1, has no SD of
0.
"""

import argparse
import itertools
import math
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import run_script
from transport_geometry import rerun, store
from transport_geometry.errors import UserError
from transport_geometry.tables import as_csv, as_json, markdown, plain

import numpy as np

# how these begin: 1 is perfect, and the distance to it is a distortion
LOG_OF_1_MINUS = ("r2", "cosine", "ce_rec", "frac_")
PLAIN = ("gd_mean", "fed", "alive", "delta")
PRIOR = 4


def scale_of(column: str, values: np.ndarray) -> str:
    """The scale on which a seed's SD hardly depends on the value."""
    if column.startswith(LOG_OF_1_MINUS) and (values < 1).all():
        return "log of 1 - x"
    return "plain" if column.startswith(PLAIN) or not (values > 0).all() else "log"


def grouped(runs: list[rerun.Run]) -> list[list[rerun.Run]]:
    """Runs that differ in their seeds alone together."""
    groups = []
    for run in runs:
        group = next(
            (group for group in groups if not rerun.other_settings(group[0].settings, run.settings)[0]), None
        )
        if group is None:
            groups.append(group := [])
        group.append(run)
    return groups


def cells_of(groups: list[list[rerun.Run]], column: str) -> dict[tuple, dict]:
    """{(tokens, k, group, the rest of a cell): {seed: value}} of trained SAEs, where the column is a number
    for every seed.
    """
    found, rest = {}, [c for c in rerun.LABELS if c not in ("tokens", "k", "seed")]
    for number, group in enumerate(groups):
        for row in (row for run in group for row in run.rows if row["recipe"] != "null" and column in row):
            found.setdefault((row["tokens"], row["k"], number, *(row[c] for c in rest)), {})[row["seed"]] = (
                row[column]
            )
    return {
        key: there
        for key, there in found.items()
        if len(there) > 1 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in there.values())
    }


def spread_of(column: str, cells: dict[tuple, dict]) -> rerun.Spread:
    """SDs of 0 throughout: evaluation alone makes the column."""
    scale = scale_of(column, np.array([v for there in cells.values() for v in there.values()], dtype=float))
    bare, groups = rerun.Spread(scale, {}, {}, 1.0), {}
    for key, there in cells.items():
        values = [bare.on_scale(v) for v in there.values()]
        groups.setdefault(key[:2], []).append((np.var(values, ddof=1), len(values) - 1))
    pool = lambda group: sum(v * n for v, n in group) / sum(n for _, n in group)
    whole = pool(list(itertools.chain.from_iterable(groups.values())))
    df = {key: sum(n for _, n in group) for key, group in groups.items()}
    sd = {
        key: math.sqrt((pool(group) * df[key] + whole * PRIOR) / (df[key] + PRIOR)) if whole > 1e-16 else 0.0
        for key, group in groups.items()
    }
    spread = rerun.Spread(scale, sd, {key: n + PRIOR for key, n in df.items()}, 1.0)
    means = [
        np.mean(list(there.values())) ** 2 * len(there) for there in z_between(column, cells, spread).values()
    ]
    return rerun.Spread(scale, sd, spread.df, float(np.mean(means)) if means else 1.0)


def z_between(column: str, cells: dict[tuple, dict], spread: rerun.Spread | None = None) -> dict[tuple, dict]:
    """{pair of seeds: {cell: z}} in SDs of `spread`; without it, of the other seeds, where there are two
    others, and else of all.
    """
    out, whole = {}, spread or spread_of(column, cells)
    for i, j in itertools.combinations(sorted({seed for there in cells.values() for seed in there}), 2):
        left = {
            key: {seed: v for seed, v in there.items() if seed not in (i, j)} for key, there in cells.items()
        }
        left = {key: there for key, there in left.items() if len(there) > 1}
        others = spread_of(column, left) if left and not spread else whole
        judge = {place: others if others.sd.get(place) else whole for place in whole.sd if whole.sd[place]}
        z = {
            key: judge[key[:2]].z(whole.on_scale(there[j]) - whole.on_scale(there[i]), key[:2])
            for key, there in cells.items()
            if i in there and j in there and key[:2] in judge
        }
        out |= {(i, j): z} if z else {}
    return out


def tables_between(runs: list[rerun.Run]) -> list[dict]:
    """What the tables of two seeds have in common, for every pair of folders of one seed each."""
    rows = []
    for a, b in itertools.combinations(runs, 2):
        if a.settings.get("seeds") != b.settings.get("seeds") and len(a.settings["seeds"]) == len(
            b.settings["seeds"]
        ):
            out, n = rerun.outside(a, b)
            rows.append(
                {
                    "seeds": f"{a.settings['seeds']} {b.settings['seeds']}",
                    "outside": len(out),
                    "estimates": n,
                    "share": len(out) / max(n, 1),
                    "ranks": rerun.rank_correlation(a, b)[0],
                    "same leaf": not rerun.other_leaf(a, b)[0],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=rerun.SEED_SD.parent)
    args = parser.parse_args()
    runs = [rerun.read(folder) for folder in args.folders]
    for run in runs:
        if not run.record:
            raise UserError(f"{run.folder}: no run.json, so no run to measure by")
        if edited := rerun.not_as_written(run):
            raise UserError(edited[0])
        if not run.settings.get("tokens"):
            raise UserError(f"{run.folder}: SAEs that nobody trained there")
    groups = grouped(runs)
    columns = [
        c
        for c in dict.fromkeys(c for run in runs for c in run.rows[0])
        if c not in rerun.EXACT and c not in rerun.LABELS
    ]
    table, shown, beyond, largest = [], [], {}, 0.0
    for column in columns:
        cells = cells_of(groups, column)
        if not cells:
            continue
        spread = spread_of(column, cells)
        table += [
            {
                "column": column,
                "scale": spread.scale,
                "tokens": tokens,
                "k": k,
                "sd": sd,
                "df": spread.df[tokens, k],
                "together": spread.together,
            }
            for (tokens, k), sd in sorted(spread.sd.items())
        ]
        z = z_between(column, cells) if any(spread.sd.values()) else {}
        flat = [v for there in z.values() for v in there.values()]
        largest = max([largest, *map(abs, flat)])
        for pair, there in z.items():
            for key, value in there.items():
                beyond[pair, key] = beyond.get((pair, key), False) or abs(value) > rerun.FAR
        shown.append(
            {
                "column": column,
                "scale": spread.scale,
                "sd, least": min(spread.sd.values()),
                "sd, most": max(spread.sd.values()),
                "rms z": float(np.sqrt(np.mean(np.square(flat)))) if flat else math.nan,
                "largest": max(map(abs, flat), default=math.nan),
                "|z| > 3": int(sum(abs(v) > rerun.FAR for v in flat)),
                "of": len(flat),
                "together": spread.together,
            }
        )
    if not beyond:
        raise UserError(f"{', '.join(map(str, args.folders))}: no cell with two seeds")
    # of conditions, with two more counted than were seen, so that none is not taken for never
    share = (sum(beyond.values()) + 2) / (len(beyond) + 4)
    every = lambda name: sorted({value for run in runs for value in run.settings[name]})
    seeds, cells = sorted({seed for pair, _ in beyond for seed in pair}), len({key for _, key in beyond})
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    processor = ", ".join(
        dict.fromkeys(run.record.get("processor") or run.record.get("platform") for run in runs)
    )
    scripts = ", ".join(dict.fromkeys(f"{run.settings['script']}.py" for run in runs))
    said = (
        f"{len(seeds)} seeds of {cells} cells, {scripts}, tokens {', '.join(map(str, every('tokens')))}, "
        f"k {', '.join(map(str, every('k')))}, {processor}"
    )
    about = dict(
        said=said,
        models=every("models"),
        hooks=every("hooks"),
        tokens=every("tokens"),
        k=every("k"),
        seeds=seeds,
        cells=cells,
        conditions_beyond_3=share,
        pairs=len(beyond),
        largest_z=largest,
        processor=processor,
        versions=runs[0].record["versions"],
        commit=commit,
        settings=[group[0].settings for group in groups],
        tables=[row for group in groups for row in tables_between(group)],
    )
    args.out.mkdir(parents=True, exist_ok=True)
    store.write(args.out / "seed_sd.csv", as_csv(table, list(table[0])))
    store.write(args.out / "seed_sd.json", as_json(plain(about)))
    print(markdown(shown, list(shown[0])))
    if about["tables"]:
        print("\n" + markdown(about["tables"], list(about["tables"][0])))
    print(
        f"---\n{said}\nbeyond 3 SDs in some column: {sum(beyond.values())} of {len(beyond)} pairs; largest |z| {largest:.2f}\n{args.out / 'seed_sd.csv'}"
    )


if __name__ == "__main__":
    run_script(main)
