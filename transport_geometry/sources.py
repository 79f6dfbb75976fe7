"""Documents of a text, wherever it lies: files on this machine, or a data set that is streamed from the hub.

A document is a string, or a list of token ids where the data set is tokenised. Nothing here knows of held-out
sides or tokenizers: see `text`.
"""

import io
import itertools
import os
import pathlib
import re
import time
import types
from collections.abc import Iterable, Iterator
from typing import Any

from transport_geometry.errors import UserError, brief, reason
from transport_geometry.models import asking_hub

Document = str | list[int]

LOCAL_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
# what `datasets` puts beside the data
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
ELSE = " (there is stdlib; else a local file or folder, or a hub data set)"
PAUSES = (1, 2, 4, 8)  # seconds between attempts at what the network does not give
# a local text of fewer documents is cut into pieces, so that its tenth is more than a handful
FEW = 100
PIECE = 8_000  # characters of a piece (of token ids a quarter)


# ------------------------------------------------------------------------------------------------- documents
def documents(data: str, split: str = "train") -> Iterator[Document]:
    """`whole_documents`, cut into pieces where they are few."""
    cut = is_cut(data)
    for document in whole_documents(data, split):
        if not cut:
            yield document
        elif isinstance(document, list):
            yield from (document[i : i + PIECE // 4] for i in range(0, len(document), PIECE // 4))
        else:
            yield from pieces(io.StringIO(document))


def is_cut(data: str) -> bool:
    """Is this a local text of so few documents that pieces of them stand on the two sides? Raises
    UserError.
    """
    if data == "stdlib" or not os.path.exists(data):
        return False
    files = local_files(data)
    if files[0].suffix == ".txt":
        return len(files) < FEW
    return len(list(itertools.islice(whole_documents(data), FEW))) < FEW


def pieces(file: io.TextIOBase) -> Iterator[str]:
    """A text in pieces of PIECE characters, each up to the end of its line where that is not far."""
    while piece := file.read(PIECE):
        yield piece if piece.endswith("\n") else piece + file.readline(PIECE // 8)


def whole_documents(data: str, split: str = "train") -> Iterator[Document]:
    """What a local text or a hub data set holds: files, or rows. Raises UserError."""
    files = local_files(data) if os.path.exists(data) else []
    kind = LOCAL_FORMATS[files[0].suffix] if files else ""
    check_files(files, kind)
    try:
        if kind == "text":
            yield from in_text_files(files)
        elif files:
            if kind == "parquet":
                check_parquet(files)
            source = dict(path=kind, data_files=[str(path) for path in files])
            yield from in_rows(streamed(data, split, source), data)
        else:
            name, _, revision = data.partition("@")
            yield from in_rows(streamed(data, split, dict(path=name, revision=revision or None)), data)
    except UserError:
        raise
    # the libraries below raise a dozen kinds for "no such data set" and "not readable"
    except Exception as error:
        raise UserError(f"--data {data}: {reason(error)}{'' if files else ELSE}") from error


# ----------------------------------------------------------------------------------------------- local files
def local_files(data: str) -> list[pathlib.Path]:
    """The files of a local --data, in the order in which they are read. Raises UserError."""
    root = pathlib.Path(data)
    files = [
        path
        for path in (sorted(root.rglob("*")) if root.is_dir() else [root])
        if path.suffix in LOCAL_FORMATS and path.is_file() and path.name not in METADATA
    ]
    kinds = {LOCAL_FORMATS[path.suffix] for path in files}
    if len(kinds) != 1:
        raise UserError(
            f"--data {data}: needs files of one kind out of {', '.join(LOCAL_FORMATS)}; "
            f"found {sorted(kinds) or 'none'}"
        )
    return files


def check_files(files: Iterable[pathlib.Path], kind: str) -> None:
    """Raises UserError for files that hold nothing, and for binary ones called text."""
    for path in files:
        if path.stat().st_size == 0:
            raise UserError(f"--data {path}: the file is empty")
        if kind in ("text", "json"):
            with path.open("rb") as file:
                if b"\0" in file.read(1 << 16):
                    raise UserError(f"--data {path}: the file is binary, not text")


def check_parquet(files: Iterable[pathlib.Path]) -> None:
    """Raises UserError for a file without rows, which `datasets` would pass over."""
    import pyarrow.parquet

    for path in files:
        if not pyarrow.parquet.read_metadata(path).num_rows:
            raise UserError(f"--data {path}: the file holds no rows")


def in_text_files(files: list[pathlib.Path]) -> Iterator[str]:
    """What text files hold, in pieces where they are few: a single file may be larger than memory."""
    for path in files:
        with path.open(encoding="utf-8") as file:
            if len(files) < FEW:
                yield from pieces(file)
            else:
                yield file.read()


# --------------------------------------------------------------------------------------- rows of a data set
def in_rows(rows: Iterable[dict[str, Any]], data: str) -> Iterator[Document]:
    """The column of text, or of token ids, of a data set's rows, where it is not null. Raises UserError."""
    column, tokenised = None, False
    for number, row in enumerate(rows):
        if column is None:
            column = text_column(row)
            if column is None:
                raise UserError(f"--data {data}: no column of text or tokens (columns: {', '.join(row)})")
            tokenised = isinstance(row[column], list)
        value = row.get(column)
        if value is None:
            continue
        if not (is_ids(value) if tokenised else isinstance(value, str)):
            before = "token ids" if tokenised else "text"
            raise UserError(
                f"--data {data}: {column} is {brief(repr(value))} in row {number}, and {before} before"
            )
        yield value


def text_column(row: dict[str, Any]) -> str | None:
    """Token ids, else `text`, which may be null in this row, else the first column of strings. (`tokens` of
    words are no ids.)
    """
    for column in ("tokens", "input_ids"):
        if isinstance(row.get(column), list) and all(isinstance(i, int) for i in row[column]):
            return column
    if isinstance(row.get("text", 0), str | None):
        return "text"
    return next((column for column, value in row.items() if isinstance(value, str)), None)


def is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int for i in value)


def quiet_datasets() -> types.ModuleType:
    """The library, which is slow to import and not needed for text files."""
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(50)  # CRITICAL: of what fails, it logs what it raises
    # its own 20 attempts, of a lost connection only, would multiply with ours to an hour: see `streamed`
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    return datasets


# ----------------------------------------------------------------------- what the network does not give
def streamed(data: str, split: str, source: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of load_dataset(**source). A fault of the network is waited out, and the stream goes on at the row
    where it was. Raises UserError where it stays.

    The libraries alone do not go so far (datasets 5.2 and huggingface_hub 2.4, against a hub that fails on
    demand): a request for bytes is repeated five times within 23 s, but the one that asks what a data set is
    (`/api/datasets/NAME`, at every opening) not once; and of what then still fails, `datasets` tries a lost
    connection, 429 and 504 again, not 500, 502 and 503, which end the stream.
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
    """(name, commit) of a hub data set, NAME or NAME@REVISION; a fault of the network is waited out as in
    `streamed`. Raises UserError.
    """
    name, _, revision = data.partition("@")
    if not name or os.path.exists(name):
        raise UserError(f"--data {data}: only hub data sets have revisions, NAME@REVISION")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise UserError(f"--data {data}: no such file or folder{ELSE}")
    asking_hub(data)
    failed = 0
    while True:
        try:
            commit = quiet_datasets().load_dataset_builder(name, revision=revision or None).hash
            if not re.fullmatch("[0-9a-f]{40}", str(commit)):
                raise UserError(f"it has no commit ({commit})")
            return name, commit
        except Exception as error:
            fault = network_fault(error)
            if fault is None or failed == len(PAUSES):
                raise UserError(f"--data {data}: {reason(fault or error)}{ELSE}") from error
            time.sleep(PAUSES[failed])
            failed += 1


def network_fault(error: BaseException | None) -> BaseException | None:
    """What failed on the way to the hub; None where the answer came and was no: the data set is not there, or
    is closed.
    """
    import datasets

    # those of the HTTP client, since datasets 4
    theirs = getattr(datasets.utils.file_utils, "CONNECTION_ERRORS_TO_RETRY", ())
    while error is not None and not datasets.config.HF_HUB_OFFLINE:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return error if status >= 500 or status in (408, 429) else None
        if isinstance(error, (ConnectionError, TimeoutError, *theirs)):
            return error.__cause__ or error
        error = error.__cause__ or error.__context__
    return None
