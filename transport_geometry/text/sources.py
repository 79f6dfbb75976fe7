"""The documents of a text: from local files, or from a data set streamed from the hub.

A document is a string, a list of token ids (where the data set is tokenised), or a chat. Held-out sides and
tokenizers are the business of `text`.
"""

import contextlib
import functools
import gzip
import io
import itertools
import json
import os
import pathlib
import re
import time
import types
from collections.abc import Iterable, Iterator
from typing import Any

from transport_geometry import torchrun
from transport_geometry.errors import UserError, brief, reason
from transport_geometry.models.loading import asking_hub

LOCAL_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
PACKED = (".gz", ".zst")  # of .txt, .json and .jsonl
HINT = " (there is stdlib; else a local file or folder, or a hub data set)"
# files that `datasets` writes beside the data
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# columns that are read even if there are others
BY_NAME = {"tokens": "token ids", "input_ids": "token ids", "text": "text", "messages": "chats"}
PEEK = 100  # rows that are read to choose the column
PAUSES = (1, 2, 4, 8)  # seconds between attempts when the network fails
# a local text of fewer documents is cut into pieces, so that the held-out tenth is more than a handful
FEW = 100
PIECE = 8_000  # characters of a piece; for token ids a quarter of it


class Data(str):
    """The value of --data, with those of --column and --config."""

    column: str | None = None
    config: str | None = None


class Chat(str):
    """The messages of a chat, as JSON."""


Document = str | list[int]


@functools.cache
def say_once(line: str) -> None:
    """Print a line the first time it is given."""
    torchrun.say(line)


# ------------------------------------------------------------------------------------------------- documents
def documents(data: str, split: str = "train") -> Iterator[Document]:
    """`whole_documents`, cut into pieces if they are few. Raises UserError."""
    cut, tokenised = is_cut(data, split), None
    for document in whole_documents(data, split, cut):
        if tokenised not in (None, isinstance(document, list)):
            raise UserError(f"--data {data}: token ids in some of its files, text in others")
        tokenised = isinstance(document, list)
        if not cut:
            yield document
        elif isinstance(document, list):
            yield from (document[i : i + PIECE // 4] for i in range(0, len(document), PIECE // 4))
        else:
            yield from pieces(io.StringIO(document))


def is_cut(data: str, split: str = "train") -> bool:
    """Whether this is a local text of so few documents that pieces of them are held out instead. (Chats are
    never cut.) Raises UserError.
    """
    if data == "stdlib" or not os.path.exists(data):
        return False
    files, _ = local_parts(data)
    if all(kind_of(path) == "text" for path in files):
        return len(files) < FEW
    first = list(itertools.islice(whole_documents(data, split), FEW))
    return len(first) < FEW and not any(isinstance(one, Chat) for one in first)


def pieces(file: io.TextIOBase) -> Iterator[str]:
    """A text in pieces of PIECE characters, each continued to the end of its line if that is near."""
    while piece := file.read(PIECE):
        yield piece if piece.endswith("\n") else piece + file.readline(PIECE // 8)


def whole_documents(data: str, split: str = "train", cut: bool = False) -> Iterator[Document]:
    """The rows of a local text or hub data set, then its text files (in pieces if `cut`: a file may be larger
    than memory). Raises UserError.
    """
    with as_user_error(data):
        for rows in row_streams(data, split):
            yield from in_rows(rows, data)
        texts = by_kind(data).get("text", []) if os.path.exists(data) else []
        check_files(texts, "text")
        for path in texts:
            with io.TextIOWrapper(opened(path), encoding="utf-8") as file:
                yield from pieces(file) if cut else [file.read()]


def columns_read(data: str, split: str = "train") -> str | None:
    """The column, or columns, that documents come from; None for text files. Raises UserError."""
    if data == "stdlib":
        return None
    with as_user_error(data):
        found = {column_of(list(itertools.islice(rows, PEEK)), data) for rows in row_streams(data, split)}
    return ", ".join(sorted(found)) or None


@contextlib.contextmanager
def as_user_error(data: str) -> Iterator[None]:
    """Turn any exception of the libraries into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        hint = "" if os.path.exists(data) else HINT
        raise UserError(f"--data {data}: {reason(error)}{hint}") from error


def row_streams(data: str, split: str) -> Iterator[Iterator[dict[str, Any]]]:
    """The rows of a hub data set, or of the local files of each kind. Raises UserError."""
    if not os.path.exists(data):
        name, _, revision = data.partition("@")
        config = getattr(data, "config", None)
        yield streamed(data, split, dict(path=name, name=config, revision=revision or None))
        return
    for kind, files in by_kind(data).items():
        if kind == "saved":
            yield from (saved_rows(folder, split) for folder in files)
        elif kind != "text":
            check_files(files, kind)
            yield streamed(data, split, dict(path=kind, data_files=[str(path) for path in files]))


# ----------------------------------------------------------------------------------------------- local files
def local_parts(data: str) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """(what is read: files, and folders that `save_to_disk` wrote, in order; files that are not read) of a
    local --data. Raises UserError.
    """
    root, seen = pathlib.Path(data), set[str]()
    read: list[pathlib.Path] = []
    unread: list[pathlib.Path] = []

    def look(path: pathlib.Path) -> None:
        # `map` and `filter` of `datasets` leave cache files beside the data
        not_data = path != root and (path.name in METADATA or path.match("cache-*.arrow"))
        if not path.is_dir() and (not_data or not path.is_file() or not kind_of(path)):
            unread.append(path)
        elif (real := os.path.realpath(path)) not in seen:  # a link to it may come again, or loop
            seen.add(real)
            if is_saved(path):
                read.append(path)
                used = {os.path.realpath(one) for one in saved_files(path)}
                there = (one for one in sorted(path.rglob("*")) if one.is_file() and one.name not in METADATA)
                unread.extend(one for one in there if os.path.realpath(one) not in used)
            elif path.is_dir():
                for one in sorted(path.iterdir()):
                    look(one)
            else:
                read.append(path)

    try:
        look(root)
    except OSError as error:
        raise UserError(f"--data {data}: {reason(error)}") from error
    if not read:
        known = ", ".join(LOCAL_FORMATS)
        raise UserError(
            f"--data {data}: needs files of {known} (text and json also as .gz, .zst); found none"
        )
    return read, unread


def kind_of(path: pathlib.Path) -> str | None:
    """The format of a file or folder; None if it is not read."""
    if path.is_dir():
        return "saved"
    if path.suffix not in PACKED:
        return LOCAL_FORMATS.get(path.suffix)
    kind = LOCAL_FORMATS.get(path.with_suffix("").suffix)
    return kind if kind in ("text", "json") else None


def by_kind(data: str) -> dict[str, list[pathlib.Path]]:
    """{format: files or folders} of a local --data. Raises UserError."""
    out: dict[str, list[pathlib.Path]] = {}
    for path in local_parts(data)[0]:
        out.setdefault(str(kind_of(path)), []).append(path)
    return out


def local_files(data: str) -> list[pathlib.Path]:
    """The files that a local --data is read from, in order. Raises UserError."""
    parts, _ = local_parts(data)
    return [file for path in parts for file in (saved_files(path) if path.is_dir() else [path])]


def name_unread(data: str) -> None:
    """Say which files of a local --data are not read, and, if there are several formats, how many files of
    each are. Raises UserError.
    """
    if len(kinds := by_kind(data)) > 1:
        counted = ", ".join(f"{len(files)} of {kind}" for kind, files in kinds.items())
        say_once(f"--data {data}: files of several kinds are read: {counted}")
    left = [os.path.relpath(path, data) for path in local_parts(data)[1]]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        files = "1 file is" if len(left) == 1 else f"{len(left)} files are"
        say_once(f"--data {data}: {files} not read: {', '.join(map(brief, left[:5]))}{more}")


def opened(path: pathlib.Path) -> Any:
    """A file of bytes, decompressed as it is read."""
    if path.suffix == ".gz":
        return gzip.open(path)
    return unpacked_zst(path.open("rb")) if path.suffix == ".zst" else path.open("rb")


def unpacked_zst(file: Any, **how: Any) -> io.BufferedReader:
    """All frames of a .zst file. Unlike zstandard's reader, which fsspec uses, pyarrow's does not stop after
    the first frame and raises OSError if the file is cut short.
    """
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return io.BufferedReader(stream, 1 << 16)


def check_files(files: Iterable[pathlib.Path], kind: str) -> None:
    """Raises UserError for empty files, for Parquet files without rows (`datasets` skips them), and for
    binary files with the name of a text file.
    """
    for path in files:
        with opened(path) as file:
            start = file.read(1 << 16)
        if not start:
            raise UserError(f"--data {path}: the file is empty")
        if kind in ("text", "json") and b"\0" in start:
            raise UserError(f"--data {path}: the file is binary, not text")
        if kind == "parquet":
            import pyarrow.parquet

            if not pyarrow.parquet.read_metadata(path).num_rows:
                raise UserError(f"--data {path}: the file holds no rows")


# ------------------------------------------------------------------------- folders that `save_to_disk` wrote
def is_saved(path: pathlib.Path) -> bool:
    return has_splits(path) or all((path / name).is_file() for name in ("state.json", "dataset_info.json"))


def has_splits(path: str | pathlib.Path) -> bool:
    return pathlib.Path(path, "dataset_dict.json").is_file()


def saved_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a saved data set, of every split, by the list in the folder: `map` and `filter` leave
    others beside them. Raises UserError.
    """
    with as_user_error(str(folder)):
        if has_splits(folder):
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return [file for split in splits for file in saved_files(folder / split)]
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state.get("_indices_data_files"):  # of 2021; `datasets` ignores them now
            raise UserError(f"--data {folder}: saved with indices, by an old `datasets`: save it anew")
        return [folder / one["filename"] for one in state["_data_files"]]


def saved_rows(folder: pathlib.Path, split: str) -> Iterator[dict[str, Any]]:
    """The rows of one split of a saved data set. Raises UserError if there is no such split."""
    saved = quiet_datasets().load_from_disk(str(folder))
    if has_splits(folder):
        if split not in saved:
            raise UserError(f"--split {split}: {folder} has {', '.join(saved)}")
        if others := [name for name in saved if name != split]:
            say_once(f"--data {folder}: split {split} is read, not {', '.join(others)}")
        saved = saved[split]
    yield from saved.with_format(None)


# --------------------------------------------------------------------------------------- rows of a data set
def in_rows(rows: Iterator[dict[str, Any]], data: str) -> Iterator[Document]:
    """The text, token ids or chat of each row that has one. Raises UserError."""
    first = list(itertools.islice(rows, PEEK))
    column, kind, number, without = column_of(first, data), None, -1, 0
    for number, row in enumerate(itertools.chain(first, rows)):
        value = row.get(column)
        if value in (None, "", []):
            without += 1
            continue
        kind = kind or value_kind(value)
        if not kind or value_kind(value) != kind:
            before = f"and {kind} before" if kind else "neither text nor token ids"
            raise UserError(f"--data {data}: {column} is {brief(repr(value))} in row {number}, {before}")
        if kind == "token ids":
            yield without_padding(row, value, number, data)
        else:
            yield Chat(json.dumps(value, ensure_ascii=False)) if kind == "chats" else value
    if without:
        say_once(f"--data {data}: {without:,} of {number + 1:,} rows have no {column} and are not read")


def value_kind(value: object) -> str | None:
    """text, token ids or chats; None for anything else."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    if all(type(i) is int for i in value):
        return "token ids"
    chat = all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in value)
    return "chats" if chat else None


def column_of(rows: list[dict[str, Any]], data: str) -> str:
    """The column that documents are read from: --column; else one of BY_NAME, if it holds what is expected
    there; else the only one of strings or chats. Says which others are not read. Raises UserError if none or
    several qualify.
    """
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    kinds = {
        name: next((value_kind(row[name]) for row in rows if row.get(name) not in (None, "", [])), "nulls")
        for name in columns
    }
    column = getattr(data, "column", None)
    if column and not kinds.get(column):
        what = "neither text, token ids nor chats" if column in kinds else "no such column"
        raise UserError(f"--column {column}: {what} in {data} (columns: {', '.join(columns)})")
    named = [name for name, kind in BY_NAME.items() if kinds.get(name) == kind]
    if kinds.get("text") == "nulls":  # in these rows; it may hold text later
        named.append("text")
    others = [name for name in columns if kinds[name] in ("text", "chats")]
    found = [column] if column else named or others
    if not found:
        raise UserError(f"--data {data}: no column of text or tokens (columns: {', '.join(columns)})")
    if len(found) > 1:
        raise UserError(f"--data {data}: which column? --column {' or '.join(found)}")
    read = [*found, "attention_mask"] if kinds[found[0]] == "token ids" else found
    if left := [name for name in columns if name not in read]:
        say_once(f"--data {data}: column {found[0]} is read, not {', '.join(map(brief, left))}")
    return found[0]


def without_padding(row: dict[str, Any], ids: list[int], number: int, data: str) -> list[int]:
    """The ids where the row's `attention_mask`, if any, is 1. Raises UserError."""
    if "attention_mask" not in row:
        return ids
    mask = row["attention_mask"]
    if value_kind(mask) != "token ids" or len(mask) != len(ids) or not set(mask) <= {0, 1}:
        raise UserError(f"--data {data}: attention_mask in row {number} is not a 0 or 1 for each token id")
    return [i for i, is_text in zip(ids, mask) if is_text]


def quiet_datasets() -> types.ModuleType:
    """The library `datasets`: slow to import, and not needed for text files."""
    import datasets
    import fsspec.compression

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(50)  # CRITICAL: it raises the errors that it logs
    # its own 20 attempts after a lost connection would multiply with ours to an hour: see `streamed`
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    fsspec.compression.register_compression("zstd", unpacked_zst, "zst", force=True)
    return datasets


# ------------------------------------------------------------------------------------ faults of the network
def streamed(data: str, split: str, source: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of load_dataset(**source). After a network fault it waits and continues at the same row. Raises
    UserError if the fault persists.

    The libraries do less (datasets 5.2, huggingface_hub 2.4): a request for bytes is repeated five times
    within 23 s, but `/api/datasets/NAME`, asked at every opening, is not; then `datasets` tries again after a
    lost connection, 429 and 504, but 500, 502 and 503 end the stream.
    """
    datasets, stream, given, failed = quiet_datasets(), None, 0, 0
    while True:
        try:
            stream = stream or datasets.load_dataset(**source, split=split, streaming=True)
            for row in stream:
                given, failed = given + 1, 0
                yield row
            return
        except Exception as error:
            if (fault := network_fault(error)) is None:
                raise
            if failed == len(PAUSES):
                times = f"at row {given}, {failed + 1} times"
                raise UserError(f"--data {data}: {reason(fault)} ({times})") from error
            time.sleep(PAUSES[failed])
            failed += 1
            if stream is not None:
                stream.load_state_dict(stream.state_dict())


def commit_of(data: str) -> tuple[str, str]:
    """(name, commit) of a hub data set, NAME or NAME@REVISION; network faults are waited out. Raises
    UserError.
    """
    name, _, revision = data.partition("@")
    if not name or os.path.exists(name):
        raise UserError(f"--data {data}: only hub data sets have revisions, NAME@REVISION")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise UserError(f"--data {data}: no such file or folder{HINT}")
    asking_hub(data)
    config, commit = getattr(data, "config", None), None
    for pause in (*PAUSES, None):
        try:
            commit = quiet_datasets().load_dataset_builder(name, config, revision=revision or None).hash
            break
        except Exception as error:
            fault = network_fault(error)
            if fault is None or pause is None:
                hint = " (--config NAME)" if "onfig name is missing" in str(error) else HINT
                raise UserError(f"--data {data}: {reason(fault or error)}{hint}") from error
            time.sleep(pause)
    if not re.fullmatch("[0-9a-f]{40}", str(commit)):
        raise UserError(f"--data {data}: it has no commit ({commit}){HINT}")
    return name, str(commit)


def network_fault(error: BaseException | None) -> BaseException | None:
    """The network error behind an exception; None if the hub answered (no such data set, or no access)."""
    import datasets

    # errors of the HTTP client, since datasets 4
    theirs = getattr(datasets.utils.file_utils, "CONNECTION_ERRORS_TO_RETRY", ())
    while error is not None and not datasets.config.HF_HUB_OFFLINE:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return error if status >= 500 or status in (408, 429) else None
        if isinstance(error, (ConnectionError, TimeoutError, *theirs)):
            return error.__cause__ or error
        error = error.__cause__ or error.__context__
    return None
