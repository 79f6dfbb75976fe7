"""Text: documents, which of them are held out, and rows of tokens packed from them. A side is "train" or "heldout"."""
import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
import sysconfig
import time
from collections.abc import Iterator

from common import readable_names
from errors import UserError, brief, said

import torch
from tqdm import tqdm

SKIP_PARTS = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"}
LOCAL_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # what `datasets` puts beside the data
ELSE = " (there is stdlib; else a local file or folder, or a hub data set)"
PAUSES = (1, 2, 4, 8)  # seconds between attempts at what the network does not give


def digest(text: str) -> bytes:
    """A hash that every machine and Python agrees on (`hash` is salted per process)."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def in_heldout(name: str) -> bool:
    """One document in ten is held out."""
    return digest(name)[0] % 10 == 0


def stdlib_documents(side: str) -> list[tuple[str, str]]:
    """(name, text) of the running Python's own library: its modules, and each pydoc topic as a document.

    Whole files go to one side by `in_heldout`, in the order of their names' hashes, so that
    any stretch of the stream is a mixture. Tests, idlelib and installed packages are left out, and so is
    `_sysconfigdata*`, which says how one machine built its Python.
    Raises UserError where the library has no source files (a zipped Python).
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    texts = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if SKIP_PARTS.isdisjoint(parts) and not path.name.startswith("_sysconfigdata") and parts != ("pydoc_data", "topics.py"):
            try:
                texts["/".join(parts)] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # two or three files in latin-1
    if not texts:
        raise UserError(f"--data stdlib: this Python keeps no source files under {root}")
    from pydoc_data.topics import topics
    texts |= {f"pydoc_data/topics/{name}": text for name, text in topics.items()}
    return [(name, texts[name]) for name in sorted(texts, key=digest) if in_heldout(name) == (side == "heldout")]


@dataclasses.dataclass(frozen=True)
class Source:
    """A text as it is now. `data` names it for the functions below; results call it `name`; `content` is what it holds:
    the SHA-256 of its documents or files, or the commit of its repository."""
    data: str
    name: str
    content: str
    stamp: tuple = ()


def stamp(data: str) -> tuple:
    """Of a local text: sizes and times of its files, which tell at no cost that somebody writes to it during a run."""
    if data == "stdlib" or not os.path.exists(data):
        return ()
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in local_files(data))


def find(data: str) -> Source:
    """The text behind --data: stdlib, a local path, or a hub data set, NAME or NAME@REVISION, held to its commit. Raises UserError."""
    if data == "stdlib":
        whole = hashlib.sha256()
        for name, text in stdlib_documents("train"):
            whole.update(digest(name) + digest(text))
        return Source(data, data, whole.hexdigest())
    if not os.path.exists(data):
        name, commit = commit_of(data)
        return Source(f"{name}@{commit}", name, commit)
    whole, now = hashlib.sha256(), stamp(data)
    files = local_files(data)
    with tqdm(total=sum(path.stat().st_size for path in files), unit="B", unit_scale=True, delay=2, leave=False, desc="hash of the text") as bar:
        for path in files:
            one = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    one.update(block)
                    bar.update(len(block))
            whole.update(path.suffix.encode() + one.digest())
    return Source(data, readable_names([data])[data], whole.hexdigest(), now)


def commit_of(data: str) -> tuple[str, str]:
    """(name, commit) of a hub data set. Raises UserError."""
    name, _, revision = data.partition("@")
    if not name or os.path.exists(name):
        raise UserError(f"--data {data}: only hub data sets have revisions, NAME@REVISION")
    for pause in (*PAUSES, None):
        try:
            commit = quiet_datasets().load_dataset_builder(name, revision=revision or None).hash
            if not re.fullmatch("[0-9a-f]{40}", str(commit)):
                raise UserError(f"it has no commit ({commit})")
            return name, commit
        except Exception as error:
            if (fault := network_fault(error)) is None or pause is None:
                raise UserError(f"--data {data}: {said(fault or error)}{ELSE}") from error
            time.sleep(pause)


def documents(data: str, side: str, split: str = "train") -> Iterator[str | list[int]]:
    """Documents of one side, as text, or as token ids where the data set is tokenised.

    `stdlib` is sided by file; anything else by a hash of the document itself, so that a repeated document never stands on
    both sides, whatever the budget; of a tokenised data set a row is a document. A .txt file is cut at line ends into pieces
    of about 8,000 characters. Hub data sets and large files are streamed; `split` is the data set's own. Raises UserError.
    """
    if split != "train" and (data == "stdlib" or pathlib.Path(data).exists()):
        raise UserError(f"--split {split}: only hub data sets have splits, --data {data} is all train")
    if data == "stdlib":
        everything = (text for _, text in stdlib_documents(side))
    else:
        everything = (d for d in foreign_documents(data, split) if len(d) and in_heldout(str(d)) == (side == "heldout"))
    yield from everything


def local_files(data: str) -> list[pathlib.Path]:
    """The files of a local --data, in the order in which they are read. Raises UserError."""
    path = pathlib.Path(data)
    files = [p for p in (sorted(path.rglob("*")) if path.is_dir() else [path])
             if p.suffix in LOCAL_FORMATS and p.is_file() and p.name not in METADATA]
    kinds = {LOCAL_FORMATS[p.suffix] for p in files}
    if len(kinds) != 1:
        raise UserError(f"--data {data}: needs files of one kind out of {', '.join(LOCAL_FORMATS)}; found {sorted(kinds) or 'none'}")
    return files


def foreign_documents(data: str, split: str = "train") -> Iterator[str | list[int]]:
    files = local_files(data) if os.path.exists(data) else []
    kinds = {LOCAL_FORMATS[p.suffix] for p in files}
    for p in files:
        if p.stat().st_size == 0:
            raise UserError(f"--data {p}: the file is empty")
        if kinds & {"text", "json"} and b"\0" in p.open("rb").read(1 << 16):
            raise UserError(f"--data {p}: the file is binary, not text")
    try:
        if kinds == {"text"}:
            for p in files:
                with p.open(encoding="utf-8") as lines:
                    while piece := "".join(lines.readlines(8000)):
                        yield piece
            return
        if kinds == {"parquet"}:
            import pyarrow.parquet
            if rowless := [p for p in files if not pyarrow.parquet.read_metadata(p).num_rows]:
                raise UserError(f"--data {rowless[0]}: the file holds no rows")
        column = None
        name, _, revision = data.partition("@")
        source = dict(path=kinds.pop(), data_files=[str(p) for p in files]) if files else dict(path=name, revision=revision or None)
        for number, row in enumerate(streamed(data, split, source)):
            if column is None:
                if (column := text_column(row)) is None:
                    raise UserError(f"--data {data}: no column of text or tokens (columns: {', '.join(row)})")
                ids = isinstance(row[column], list)
            value = row.get(column)
            if value is None:
                continue
            if not (isinstance(value, list) and all(type(i) is int for i in value) if ids else isinstance(value, str)):
                raise UserError(f"--data {data}: {column} is {brief(repr(value))} in row {number}, and {'token ids' if ids else 'text'} before")
            yield value
    except UserError:
        raise
    except Exception as error:  # the libraries below raise a dozen kinds for "no such data set" and "not readable"
        raise UserError(f"--data {data}: {said(error)}{'' if files else ELSE}") from error


def text_column(row: dict) -> str | None:
    """Token ids, else `text`, which may be null in this row, else the first column of strings. (`tokens` of words are no ids.)"""
    for column in ("tokens", "input_ids"):
        if isinstance(row.get(column), list) and all(isinstance(i, int) for i in row[column]):
            return column
    if isinstance(row.get("text", 0), str | None):
        return "text"
    return next((c for c, value in row.items() if isinstance(value, str)), None)


def quiet_datasets():
    """The library, which is slow to import and not needed for text files."""
    import datasets
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(50)  # CRITICAL: of what fails, it logs what it raises
    # 20 attempts of their own, each around the six requests of huggingface_hub (24 s), would multiply with ours to an hour
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    return datasets


def streamed(data: str, split: str, source: dict) -> Iterator[dict]:
    """Rows of load_dataset(**source). A fault of the network is waited out, and the stream goes on at the row where it was."""
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
                raise UserError(f"--data {data}: {said(fault)} (at row {given}, {failed + 1} times)") from error
            time.sleep(PAUSES[failed])
            failed += 1
            if stream is not None:
                stream.load_state_dict(stream.state_dict())


def network_fault(error: BaseException | None) -> BaseException | None:
    """What failed on the way to the hub; None where the answer came and was no: the data set is not there, or is closed."""
    import datasets
    theirs = getattr(datasets.utils.file_utils, "CONNECTION_ERRORS_TO_RETRY", ())  # those of the HTTP client, since datasets 4
    while error is not None and not datasets.config.HF_HUB_OFFLINE:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return error if status >= 500 or status in (408, 429) else None
        if isinstance(error, (ConnectionError, TimeoutError, *theirs)):
            return error.__cause__ or error
        error = error.__cause__ or error.__context__
    return None


def packed_rows(data: str, side: str, tokenizer, ctx: int, seen: "hashlib._Hash | None" = None, split: str = "train") -> Iterator[torch.Tensor]:
    """One pass of rows [ctx] (int64): documents joined by the end-of-text token and cut, no padding, no BOS, as Pythia was trained.

    Rows of token ids come packed already: they are cut anew, and nothing is put between them. `seen`, a hash object, is fed
    every document used.
    """
    carry: list[int] = []
    for document in documents(data, side, split):
        if seen is not None:
            seen.update(str(document).encode(errors="surrogatepass"))
        if isinstance(document, str):
            carry += [*tokenizer(document, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        elif 0 <= min(document) and max(document) < len(tokenizer):  # the model's own table may be padded beyond
            carry += document
        else:
            raise UserError(f"--data {data}: token ids {min(document)} to {max(document)}, but the tokenizer has {len(tokenizer)}: "
                            "it was tokenised for another model")
        for start in range(0, len(carry) - ctx + 1, ctx):
            yield torch.tensor(carry[start:start + ctx])
        carry = carry[len(carry) // ctx * ctx:]


def heldout_rows(data: str, tokenizer, ctx: int, n: int, split: str = "train", bos: int | None = None) -> tuple[torch.Tensor, str]:
    """([n,ctx] evaluation rows, SHA-256 of the documents they came from). Raises UserError if the held-out side is shorter.

    With `bos` every row begins with that token and holds ctx - 1 of text.
    """
    seen = hashlib.sha256()
    start = [] if bos is None else [bos]
    rows = [torch.tensor(start + row.tolist())
            for row in itertools.islice(packed_rows(data, "heldout", tokenizer, ctx - len(start), seen, split), n)]
    if len(rows) < n:
        raise UserError(f"--eval-seqs {n}: the held-out side of {data} holds {len(rows)} sequences of {ctx} tokens"
                        + (" (too short for one sequence)" if not rows else ""))
    return torch.stack(rows), seen.hexdigest()


def train_rows(data: str, tokenizer, ctx: int, batch: int, split: str = "train") -> Iterator[torch.Tensor]:
    """Batches [batch,ctx] of the training side, pass after pass without end."""
    while True:
        rows = packed_rows(data, "train", tokenizer, ctx, split=split)
        first = next(rows, None)
        if first is None:
            raise UserError(f"--data {data}: the training side is too short for one sequence of {ctx} tokens")
        rows = itertools.chain([first], rows)
        while chunk := list(itertools.islice(rows, batch)):
            yield torch.stack(chunk)
