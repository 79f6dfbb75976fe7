"""The results folder: one row for each condition and the sums behind it, written as one change, and read
again for the tables.

Shapes: C conditions, S evaluation sequences, W re-weightings of their documents.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import platform
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transport_geometry import kernels
from transport_geometry.errors import Damaged, UserError, brief
from transport_geometry.machine import instructions, processor
from transport_geometry.measuring.metrics import METRICS, Metric, Sums, computed
from transport_geometry.records import store
from transport_geometry.records.condition import KEY, Condition, hook_of
from transport_geometry.records.store import RUN
from transport_geometry.records.tables import Content, as_csv, as_npz, read_npz, read_table
from transport_geometry.saes import sinks
from transport_geometry.statistics.resampling import document_weights

import numpy as np
import torch

ROW_VERSION = 2  # what a row holds: with sink_share, calm_share, kl_excess
COLUMNS = [*KEY, "n_seq", "n_tok", "n_sink", "calm_share", *(metric.name for metric in METRICS)]
# these, and the pictures, can be made again from the other files
DERIVED = (
    "verdict.json",
    "report.md",
    "report.html",
    "leaderboard.csv",
    "deltas.csv",
    "audit.csv",
    "pairs.csv",
    "rates.csv",
    "ratios.csv",
)
# where several settings differ, these are named first: others follow from them
TELLING = ("models", "saes", "script")
RESULT_FILES = ("conditions.csv", "sequences.npz", "tokens.npz", "harm.csv", "worst.csv", *DERIVED)


@dataclass(frozen=True, eq=False)
class Measurements:
    """What is added to a folder at once: some conditions of one hook, or what a rank has of several."""

    rows: list[dict]  # of conditions.csv
    sums: dict[str, np.ndarray]  # {quantity: [C,S]}, and d [C], document [C,S]
    tokens: dict[str, np.ndarray]  # {hook/condition/quantity: [S,T-1]}, where they are kept
    tables: dict[str, list[dict]]  # an experiment's own: {file name: rows}, each with model and layer


@dataclass(frozen=True, eq=False)
class Measured:
    """A finished folder, as its tables are made from it."""

    nulls: list[dict]  # rows
    saes: list[dict]  # rows of the C SAEs
    values: dict[str, np.ndarray]  # {metric: [W,C]}: all documents, the even, the odd, resamples of them
    meta: dict[str, np.ndarray]  # {name: [C]}, as `stats` wants it
    sums: dict[str, np.ndarray]  # {quantity: [C,S]}


# ------------------------------------------------------------------------------------------------ the folder
def open_output(out: pathlib.Path, settings: dict, fresh: bool, paths: dict | None = None) -> None:
    """Make `out` ready for a run with these settings, with this process its only writer. Raises UserError,
    and changes nothing then.

    A folder made with other settings, or from other weights or text, is refused, naming them. `fresh`
    removes what runs put there (run.json lists it) and nothing else. paths: where the local models and texts
    lie; only run.json keeps them.
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
            f"--out {out} holds {', '.join(theirs)}, which no run.json lists: use another --out, or move "
            "them away"
        )
    if fresh:
        for part in parts(out):
            discard(part)
        store.remove(record)
    before = check_data(record).get("settings", settings)
    if differing := [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]:
        first, *others = sorted(differing, key=lambda key: (key not in TELLING, key))
        said = difference(first, before.get(first), settings.get(first))
        also = f"; also {', '.join(others)}" if others else ""
        raise UserError(
            f"--out {out} holds a run with other settings ({said}{also}): use --fresh or another --out"
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


def next_free_folder(out: pathlib.Path, settings: dict) -> pathlib.Path:
    """The first of out, out-2, out-3, ... that is free or holds a run with these settings."""
    for number in itertools.count(1):
        folder = out if number == 1 else out.with_name(f"{out.name}-{number}")
        with contextlib.suppress(Damaged):  # `open_output` says what is wrong with it
            if store.load(folder / RUN).get("settings", settings) != settings:
                continue
        return folder
    raise AssertionError


def difference(key: str, there: Any, here: Any, names: tuple[str, str] = ("there", "here")) -> str:
    """How one setting differs, in short. Of a setting that holds several values by name: the first name that
    differs in both, else the names that only one has.
    """
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted(there.keys() & here.keys()):
            if there[name] != here[name]:
                return f"{key}: {difference(name, there[name], here[name], names)}"
        there, here = (
            few_of(sorted(one.keys() - other.keys())) for one, other in ((there, here), (here, there))
        )
    texts = [re.sub("^([0-9a-f]{12})[0-9a-f]{28,}$", r"\1", str(value)) for value in (there, here)]
    return f"{key}: {names[0]} {brief(texts[0])}, {names[1]} {brief(texts[1])}"


def few_of(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names) or "none"


def check_data(record: pathlib.Path) -> dict:
    """The record of a results folder. Raises Damaged where a file that cannot be made again from the others
    is not as it was written.
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
    if sums.pop("condition").tolist() != [str(Condition.of(row)) for row in rows]:
        raise Damaged(f"{out}: sequences.npz is about other conditions than conditions.csv")
    return rows, sums


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
    missing = settings["hooks"].keys() - set(map(hook_of, load_results(out)[0]))
    if missing or about.get("seconds") is None:
        which = ", ".join(sorted(missing)) or "some conditions"
        raise UserError(f"--from {out}: no finished run there ({which} not measured yet)")
    return out, with_training(settings, about)


def with_training(settings: dict, record: dict) -> dict:
    """Settings for the report, with what is known only after training: how many tokens the text holds, where
    a budget repeats it, and on which processors SAEs were trained, where there are several.
    """
    found = {"one_pass": record.get("one_pass")}
    if len(trained_on := record.get("trained_on", {})) > 1:
        found["trained_on"] = {name: len(saes) for name, saes in trained_on.items()}
    return settings | {name: value for name, value in found.items() if value}


def check_verdict(out: pathlib.Path) -> None:
    """Raises UserError where the folder's verdict is about other rows than it holds, since a new one would
    overwrite it.
    """
    there = None
    # a file that is no verdict is set aside when the new one is written
    with contextlib.suppress(OSError, ValueError, AttributeError):
        there = json.loads((out / "verdict.json").read_text(encoding="utf-8")).get("rows_sha256")
    if there not in (None, rows_hash(out)):
        raise UserError(
            f"--from {out}: verdict.json is about other rows (SHA-256 {str(there)[:12]}, these have "
            f"{rows_hash(out)[:12]}); move it away, and it is made anew"
        )


def add_results(out: pathlib.Path, settings: dict, new: Measurements) -> None:
    """Add measurements to a results folder, all of them or none; a row that is there already stays.

    Rows are sorted, so that files do not depend on the order in which hooks were run. Raises Fault, Damaged.
    """
    record = out / RUN
    rows, sums = load_results(out)
    there = {Condition.of(row) for row in rows}
    added = [i for i, row in enumerate(new.rows) if Condition.of(row) not in there]
    rows = rows + [new.rows[i] for i in added]
    sums = {q: np.concatenate([sums[q], v[added]]) if sums else v[added] for q, v in new.sums.items()}
    order = sorted(range(len(rows)), key=lambda i: Condition.of(rows[i]))
    rows = [rows[i] for i in order]
    sums = {q: v[order] for q, v in sums.items()}
    sums["condition"] = np.array([str(Condition.of(row)) for row in rows])
    more = [c for c in dict.fromkeys(c for row in rows for c in row) if c not in COLUMNS]
    files: dict[str, Content | None] = {
        "sequences.npz": as_npz(sums),
        "conditions.csv": as_csv([dict.fromkeys(more, "") | row for row in rows], COLUMNS + more),
    }
    known = store.written(record)
    if new.tokens:
        kept = read_npz(store.checked(record, "tokens.npz")) if "tokens.npz" in known else {}
        files["tokens.npz"] = as_npz(kept | new.tokens)
    for name, table in new.tables.items():
        old = read_table(store.checked(record, name)) if name in known else []
        if not table:
            continue
        about = KEY if set(KEY) <= table[0].keys() else KEY[:2]  # one of a hook's conditions, or the hook
        again = {tuple(row[column] for column in about) for row in table}
        both = [row for row in old if tuple(row[column] for column in about) not in again] + table
        both.sort(key=lambda row: tuple(row[column] for column in about))
        files[name] = as_csv(both, list(table[0]))
    store.put(record, files, settings=settings)


def parts(out: pathlib.Path) -> list[pathlib.Path]:
    """The folders in which ranks of this run, or of one that was killed, left their share. Raises UserError
    for anything else of such a name.
    """
    found = sorted(path for path in out.glob(".rank*") if re.fullmatch(r"\.rank\d+", path.name))
    for part in found:
        ours = part.is_dir() and not part.is_symlink()
        if ours and not store.load(part / RUN):
            ours = all(path.name.endswith(store.UNFINISHED) for path in part.iterdir())
        if not ours:
            raise UserError(f"{part}: not what a rank of this program left: move it away")
    return found


def discard(part: pathlib.Path) -> None:
    store.remove(part / RUN)
    with contextlib.suppress(OSError):  # somebody put something there
        part.rmdir()


def gather(out: pathlib.Path, settings: dict) -> None:
    """Move into the folder what ranks left in theirs. Raises UserError where theirs has other settings."""
    for part in parts(out):
        if store.load(part / RUN).get("settings", settings) != settings:
            raise UserError(f"{part}: left by a run with other settings: use --fresh or another --out")
        record = part / RUN
        store.settle(record)
        rows, sums = load_results(part)
        if rows:
            names = store.written(record)
            tokens = read_npz(store.checked(record, "tokens.npz")) if "tokens.npz" in names else {}
            own = [name for name in names if name.endswith(".csv") and name != "conditions.csv"]
            tables = {name: read_table(store.checked(record, name)) for name in own}
            add_results(out, settings, Measurements(rows, sums, tokens, tables))
        discard(part)


# --------------------------------------------------------------------------------------------- for the tables
def load_measurements(
    out: pathlib.Path, settings: dict, n_resamples: int, own: Sequence[Metric] = ()
) -> Measured:
    """A finished folder under `n_resamples` resamples of the documents. Conditions of as many documents share
    them: where models have different tokenizers, document i is still the same. own: an experiment's metrics.
    """
    rows, sums = load_results(out)
    d, document = sums.pop("d"), sums.pop("document")
    # of sequences: one where all models share a tokenizer
    patterns, which = np.unique(document, axis=0, return_inverse=True)
    values: dict[str, np.ndarray] = {}
    for i, pattern in enumerate(patterns):
        mine = np.flatnonzero(which.ravel() == i)
        weights = document_weights(int(pattern.max()) + 1, n_resamples, seed=0)[:, pattern]
        part = Sums({q: v[mine] for q, v in sums.items()}, weights, d[mine])
        for name, value in computed(part, (*METRICS, *own)).items():
            values.setdefault(name, np.empty((len(weights), len(rows))))[:, mine] = value
    for name in set(COLUMNS) - rows[0].keys():  # of a folder of an earlier version
        for i, row in enumerate(rows):
            row[name] = float(values[name][0, i]) if name in values else np.nan
    trained = np.array([row["recipe"] != "null" for row in rows])
    saes = [row for row, keep in zip(rows, trained) if keep]
    return Measured(
        [row for row, keep in zip(rows, trained) if not keep],
        saes,
        {name: value[:, trained] for name, value in values.items()},
        meta_of(saes, settings),
        {quantity: value[trained] for quantity, value in sums.items()},
    )


def subset(found: Measured, keep: np.ndarray) -> Measured:
    """Only the SAEs in keep [C] bool, for a quantity that the others do not have."""
    return Measured(
        found.nulls,
        [row for row, kept in zip(found.saes, keep) if kept],
        {name: value[:, keep] for name, value in found.values.items()},
        {name: value[keep] for name, value in found.meta.items()},
        {quantity: value[keep] for quantity, value in found.sums.items()},
    )


def meta_of(saes: list[dict], settings: dict) -> dict[str, np.ndarray]:
    """{name: [C]}: what `stats` knows of a condition."""
    names = ("model", "layer", "sae", "recipe", "k", "tokens", "seed")
    meta = {name: np.array([row[name] for row in saes]) for name in names}
    # an SAE without k is compared with those that have as many latents active, to the nearest power of two
    active = 2 ** np.round(np.log2(np.maximum([row["l0"] for row in saes], 1))).astype(int)
    meta["k"] = np.where(meta["k"] > 0, meta["k"], active)
    meta["depth"] = np.array([settings["hooks"][hook_of(row)] for row in saes])
    meta["cell"] = np.array(["-".join(str(row[c]) for c in KEY if c != "seed") for row in saes])
    return meta


def of_one_processor(out: pathlib.Path, saes: list[dict]) -> np.ndarray:
    """[C] bool: the SAEs of the processor that trained most of them.

    On another processor training ends in other weights, as from another seed, so SAEs of two processors are
    not paired.
    """
    on = store.load(out / RUN).get("trained_on", {})
    if len(on) < 2:
        return np.ones(len(saes), bool)
    most = max((set(names) for names in on.values()), key=lambda names: len(names))
    return np.array([in_record(Condition.of(row)) in most for row in saes])


def in_record(one: Condition) -> str:
    """What run.json calls an SAE."""
    return f"{one.hook} {one.within_hook}"


def rows_hash(out: pathlib.Path) -> str:
    """SHA-256 of the rows a verdict was computed from."""
    return hashlib.sha256(
        (out / "conditions.csv").read_bytes() + (out / "sequences.npz").read_bytes()
    ).hexdigest()


def label_last_block(rows: list[dict], settings: dict) -> list[dict]:
    """Rows to show, with the hook of a model's last block labelled: no attention follows it."""
    last = settings["last_blocks"]
    return [row | {"layer": f"{row['layer']} last"} if hook_of(row) in last else row for row in rows]


ABOUT = """\
## Settings

Evaluation: {sizes}, drawn across the held-out side from {behind}, which is what the intervals count; \
positions 0..T-2; sink positions (dropped in `_nosink`): {sinks}, {n_sink} \
of {n_tok} per hook.

Evaluation text SHA-256 {text_sha256}{python}.
{notes}
```
{settings}
```
"""
ELSEWHERE = """\
Computed on {device}, where a second run need not be the same to the byte: compare with \
`python common.py diff`.
"""


def about_the_run(rows: list[dict], settings: dict) -> list[str]:
    """The report's last section, in Markdown lines."""
    sizes = sorted({(row["n_seq"], row["n_tok"] // row["n_seq"] + 1) for row in rows})
    notes = [
        f"The training side holds {n:,} tokens: larger budgets repeat it.\n"
        for n in settings.get("one_pass", [])
    ]
    if on := settings.get("trained_on"):
        counted = ", ".join(f"{n} on {name}" for name, n in on.items())
        notes.append(
            f"SAEs were trained on several processors ({counted}; run.json says which). Two of them may "
            "differ as much as two seeds do.\n"
        )
    stored, begun = settings.get("stored_as", {}), settings.get("bos", {})
    notes += [f"{model}: {words} of a GGUF file, made float32.\n" for model, words in stored.items()]
    notes += [f"{model}: every row begins with BOS, token {token}.\n" for model, token in begun.items()]
    notes += notes_on_fields(settings.get("saes") or {})
    notes += [f"{hook}: the last block, so no attention follows it.\n" for hook in settings["last_blocks"]]
    python = f", the standard library of Python {settings['python']}" if settings["python"] else ""
    if column := settings.get("column"):
        notes.append(f"The text is column `{column}` of {settings['data']}.\n")
    text = ABOUT.format(
        sinks=sinks.RULE,
        sizes=" and ".join(f"{n} sequences of {ctx} tokens" for n, ctx in sizes),
        behind=describe_units(settings),
        n_sink=", ".join(sorted({str(row["n_sink"]) for row in rows})),
        n_tok=", ".join(sorted({str(row["n_tok"]) for row in rows})),
        text_sha256=settings["text_sha256"],
        python=python,
        notes="".join(f"\n{note}" for note in notes),
        settings=json.dumps(settings, indent=1, sort_keys=True),
    )
    if settings["device"] != "cpu":
        text += "\n" + ELSEWHERE.format(device=settings["device"])
    return text.split("\n")


def notes_on_fields(saes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Fields of SAEs' files that nothing is computed with, in one note for all SAEs that have the same. saes:
    {name: what settings keep of it}.
    """
    words = {"unused": "fields of training and keeping, not computed with", "ignored": "fields ignored"}
    alike: dict[tuple[str, str], list[str]] = {}
    for sae, said in saes.items():
        for kind in words:
            if named := ", ".join(said.get(kind, ())):
                alike.setdefault((kind, named), []).append(sae)
    return [f"{', '.join(of)}: {words[kind]}: {named}.\n" for (kind, named), of in alike.items()]


def describe_units(settings: dict) -> str:
    """What intervals over the evaluation text resample, in words."""
    n = " or ".join(map(str, settings["documents"]))
    if settings["cut"]:
        return f"{n} pieces of few documents, held out by piece, so that intervals are about this text"
    return f"{n} documents"
