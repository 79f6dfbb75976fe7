"""TODO results."""

import contextlib
import hashlib
import json
import os
import pathlib
import platform
import re
import socket
import subprocess
import sys

from transport_geometry import FIXED_CODE, kernels, store
from transport_geometry.errors import Damaged, UserError
from transport_geometry.grid import KEY
from transport_geometry.metrics import METRICS, metrics
from transport_geometry.stats import document_weights
from transport_geometry.store import RUN
from transport_geometry.tables import as_csv, as_npz, read_npz, read_table

import numpy as np
import torch

COLUMNS = KEY + ["n_seq", "n_tok", "n_sink"] + METRICS


# --------------------------------------------------------------------------------------------- the folder
# and pictures: made again from the others
DERIVED = ("verdict.json", "report.md", "leaderboard.csv", "deltas.csv", "audit.csv", "pairs.csv")
RESULT_FILES = ("conditions.csv", "sequences.npz", "tokens.npz", *DERIVED)


def open_output(out: pathlib.Path, settings: dict, fresh: bool, paths: dict | None = None) -> None:
    """Make `out` ready for a run with these settings, this process its only writer, or raise UserError and
    change nothing.

    A folder made with other settings, or from other weights or text, is refused, naming them. `fresh` removes
    what runs put there (run.json lists it) and nothing else. paths: where the local models and texts lie,
    which is for run.json only.
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
        raise UserError(
            f"--out {out} holds {', '.join(theirs)}, which no run.json lists: use another --out, or move them away"
        )
    if fresh:
        for part in parts(out):
            discard(part)
        store.remove(record)
    before = check_data(record).get("settings", settings)
    if differing := [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]:
        both = lambda key: (before.get(key), settings.get(key))
        only = lambda a, b: (
            {k: v for k, v in a.items() if b.get(k) != v},
            {k: v for k, v in b.items() if a.get(k) != v},
        )
        shown = {
            key: only(*both(key)) if all(isinstance(v, dict) for v in both(key)) else both(key)
            for key in differing
        }
        differences = "; ".join(f"{key}: there {there}, here {here}" for key, (there, here) in shown.items())
        raise UserError(
            f"--out {out} holds a run with other settings ({differences}): use --fresh or another --out"
        )
    import scipy
    import transformers

    versions = {m.__name__: m.__version__ for m in (torch, np, scipy, transformers)}
    store.put(
        record,
        {},
        settings=settings,
        paths=paths or {},
        command=sys.argv,
        python=platform.python_version(),
        platform=platform.platform(),
        host=socket.gethostname(),
        versions=versions,
        threads=torch.get_num_threads(),
        kernels=kernels.describe(),
        seconds=None,
        processor=processor(),
        instructions=instructions(),
    )


def processor() -> str:
    """The processor's name, as the system says it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if sys.platform == "darwin":
            said = subprocess.run(
                ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=10
            )
            return said.stdout.strip() or platform.processor()
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def instructions() -> dict:
    """What torch's own kernels use of the processor, and the variables in force that choose code in it and
    its libraries.
    """
    names = (*FIXED_CODE, "ANY_X86", "KERNELS", "MKL_ENABLE_INSTRUCTIONS", "GLIBC_TUNABLES", "LD_PRELOAD")
    return {"torch": torch.backends.cpu.get_cpu_capability()} | {
        name: os.environ[name] for name in names if name in os.environ
    }


def check_data(record: pathlib.Path) -> dict:
    """The record of a results folder, every file of which that cannot be made again from the others is as it
    was written. Raises Damaged.
    """
    there = store.load(record)
    for name in there.get("files", {}):
        if name not in DERIVED and not name.endswith(".png"):
            store.checked(record, name)
    return there


def load_results(out: pathlib.Path) -> tuple[list[dict], dict]:
    """(rows, sums) of a results folder, in the order of conditions.csv; empty where there are none yet.
    Raises Damaged.
    """
    if "conditions.csv" not in store.written(out / RUN):
        return [], {}
    rows = read_table(store.checked(out / RUN, "conditions.csv"))
    sums = read_npz(store.checked(out / RUN, "sequences.npz"))
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
        raise UserError(
            f"--from {out}: no finished run there ({', '.join(sorted(missing)) or 'some conditions'} not measured yet)"
        )
    return out, with_passes(settings, about.get("one_pass"))


def with_passes(settings: dict, one_pass: list[int] | None) -> dict:
    """Settings for the report, with the tokens that a training text holds where budgets repeat it: known only
    after training.
    """
    return settings | ({"one_pass": one_pass} if one_pass else {})


def check_verdict(out: pathlib.Path) -> None:
    """Raises UserError where the folder's verdict is about other rows than it holds: it would be overwritten
    by one about these.
    """
    there = None
    # one that is no verdict is set aside when the new one comes
    with contextlib.suppress(OSError, ValueError, AttributeError):
        there = json.loads((out / "verdict.json").read_text(encoding="utf-8")).get("rows_sha256")
    if there not in (None, rows_hash(out)):
        raise UserError(
            f"--from {out}: verdict.json is about other rows (SHA-256 {str(there)[:12]}, these have {rows_hash(out)[:12]}); "
            "move it away, and it is made anew"
        )


def add_results(
    out: pathlib.Path, settings: dict, rows: list[dict], sums: dict, tokens: dict, tables: dict
) -> None:
    """Add what `run_hook` gives to a results folder, all of it or nothing; a row that is there already stays.
    Raises Fault, Damaged.

    Rows are sorted, so that the order in which hooks were run leaves no trace.
    """
    record = out / RUN
    before, before_sums = load_results(out)
    there = {condition(row) for row in before}
    new = [i for i, row in enumerate(rows) if condition(row) not in there]
    all_rows = before + [rows[i] for i in new]
    all_sums = {
        q: np.concatenate([before_sums[q], v[new]]) if before_sums else v[new] for q, v in sums.items()
    }
    order = sorted(range(len(all_rows)), key=lambda i: [all_rows[i][c] for c in KEY])
    all_rows = [all_rows[i] for i in order]
    all_sums = {q: v[order] for q, v in all_sums.items()} | {
        "condition": np.array([condition(row) for row in all_rows])
    }
    files = {
        "sequences.npz": as_npz(all_sums),
        "conditions.csv": as_csv(all_rows, COLUMNS + [c for c in all_rows[0] if c not in COLUMNS]),
    }
    known = store.written(record)
    if tokens:
        kept = read_npz(store.checked(record, "tokens.npz")) if "tokens.npz" in known else {}
        files["tokens.npz"] = as_npz(kept | tokens)
    for name, table in tables.items():
        hooks = {(row["model"], row["layer"]) for row in table}
        kept = [
            row
            for row in (read_table(store.checked(record, name)) if name in known else [])
            if (row["model"], row["layer"]) not in hooks
        ]
        files[name] = as_csv(
            sorted(kept + table, key=lambda row: (row["model"], row["layer"])), list(table[0])
        )
    store.put(record, files, settings=settings)


def parts(out: pathlib.Path) -> list[pathlib.Path]:
    """The folders in which ranks left their share, this run's or one's that was killed. Raises UserError for
    what only has such a name.
    """
    found = sorted(path for path in out.glob(".rank*") if re.fullmatch(r"\.rank\d+", path.name))
    for part in found:
        ours = part.is_dir() and not part.is_symlink()
        if not (
            ours
            and (
                store.load(part / RUN) or all(path.name.endswith(store.UNFINISHED) for path in part.iterdir())
            )
        ):
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
            tokens = (
                read_npz(store.checked(part / RUN, "tokens.npz"))
                if "tokens.npz" in store.written(part / RUN)
                else {}
            )
            tables = {
                name: read_table(store.checked(part / RUN, name))
                for name in store.written(part / RUN)
                if name.endswith(".csv") and name != "conditions.csv"
            }
            add_results(out, settings, rows, sums, tokens, tables)
        discard(part)


def measured(
    out: pathlib.Path, settings: dict, n_resamples: int, own_metrics=None
) -> tuple[list[dict], list[dict], dict, dict, dict]:
    """(null rows, rows of the C SAEs, {metric: [W,C]}, meta {name: [C]}, sums {quantity: [C,S]}) of a
    finished folder.

    W: all documents, the even, the odd, and `n_resamples` resamples of them, shared by all conditions (as
    `stats` wants them): of one text drawn for models of different tokenizers, document i is the same.
    """
    rows, sums = load_results(out)
    d, document = sums.pop("d"), sums.pop("document")
    by_document = document_weights(int(document.max()) + 1, n_resamples, seed=0)
    # of sequences: one where all models share a tokenizer
    patterns, which = np.unique(document, axis=0, return_inverse=True)
    values = {}
    for i, pattern in enumerate(patterns):
        mine, weights = np.flatnonzero(which.ravel() == i), by_document[:, pattern]
        part = {q: v[mine] for q, v in sums.items()}
        with np.errstate(invalid="ignore"):
            for name, value in (
                metrics(part, weights, d[mine]) | (own_metrics(part, weights) if own_metrics else {})
            ).items():
                values.setdefault(name, np.empty((len(weights), len(rows))))[:, mine] = value
    trained = np.array([row["recipe"] != "null" for row in rows])
    saes = [row for row, keep in zip(rows, trained) if keep]
    meta = {
        name: np.array([row[name] for row in saes])
        for name in ("model", "layer", "sae", "recipe", "k", "tokens", "seed")
    }
    # given k, an SAE without one is compared with those that have as many latents active, to the nearest
    # power of two
    meta["k"] = np.where(
        meta["k"] > 0,
        meta["k"],
        2 ** np.round(np.log2(np.maximum([row["l0"] for row in saes], 1))).astype(int),
    )
    meta["depth"] = np.array([settings["hooks"][f"{row['model']}@{row['layer']}"] for row in saes])
    meta["cell"] = np.array(["-".join(str(row[c]) for c in KEY if c != "seed") for row in saes])
    return (
        [row for row in rows if row["recipe"] == "null"],
        saes,
        {name: value[:, trained] for name, value in values.items()},
        meta,
        {quantity: value[trained] for quantity, value in sums.items()},
    )


def rows_hash(out: pathlib.Path) -> str:
    """SHA-256 of the rows a verdict was computed from."""
    return hashlib.sha256(
        (out / "conditions.csv").read_bytes() + (out / "sequences.npz").read_bytes()
    ).hexdigest()


def marked(rows: list[dict], settings: dict) -> list[dict]:
    """Rows to show, the hook of a model's last block marked: no attention follows it."""
    return [
        row
        | {
            "layer": f"{row['layer']} last"
            if f"{row['model']}@{row['layer']}" in settings["last_blocks"]
            else row["layer"]
        }
        for row in rows
    ]


def about_the_run(rows: list[dict], settings: dict) -> list[str]:
    """The report's last section, in Markdown lines."""
    sizes = " and ".join(
        f"{n} sequences of {ctx} tokens"
        for n, ctx in sorted({(row["n_seq"], row["n_tok"] // row["n_seq"] + 1) for row in rows})
    )
    seen = lambda column: ", ".join(sorted({str(row[column]) for row in rows}))
    lines = [
        "## Settings",
        "",
        f"Evaluation: {sizes}, drawn across the held-out side from {behind(settings)}, which is what the intervals count; "
        f"positions 0..T-2; sink positions (dropped in `_nosink`): position 0 and norms above 10 medians, {seen('n_sink')} of {seen('n_tok')} per hook.",
        "",
        f"Evaluation text SHA-256 {settings['text_sha256']}"
        + (f", the standard library of Python {settings['python']}" if settings["python"] else "")
        + ".",
        "",
        *(
            f"The training side holds {n:,} tokens: larger budgets repeat it.\n"
            for n in settings.get("one_pass", [])
        ),
        *(f"{hook}: the last block, so no attention follows it.\n" for hook in settings["last_blocks"]),
        "```",
        json.dumps(settings, indent=1, sort_keys=True),
        "```",
        "",
    ]
    if settings["device"] != "cpu":
        lines += [
            f"Computed on {settings['device']}, where a second run need not be the same to the byte: compare with `python common.py diff`.",
            "",
        ]
    return lines


def behind(settings: dict) -> str:
    """What intervals over the evaluation text count, in words."""
    n = " or ".join(map(str, settings["documents"]))
    return (
        f"{n} pieces of few documents, held out by piece, so that intervals are about this text"
        if settings["cut"]
        else f"{n} documents"
    )
