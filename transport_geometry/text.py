"""Text: documents, which of them are held out, and rows of tokens packed from them. A side is "train" or
"heldout".
"""

import dataclasses
import functools
import hashlib
import heapq
import io
import itertools
import math
import os
import pathlib
import re
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterator

from transport_geometry.errors import UserError, brief, reason
from transport_geometry.models import readable_names

import numpy as np
import torch
from tqdm import tqdm

SKIP_PARTS = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"}
LOCAL_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
# what `datasets` puts beside the data
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
ELSE = " (there is stdlib; else a local file or folder, or a hub data set)"
PAUSES = (1, 2, 4, 8)  # seconds between attempts at what the network does not give
WINDOW = 8  # words, or token ids, in a row: what two documents share when one was made from the other
# a held-out file of the standard library that shares more of its windows with the training side goes there
NEAR = 0.2
# a local text of fewer documents is cut into pieces, so that its tenth is more than a handful
FEW = 100
PIECE = 8_000  # characters of a piece (of token ids a quarter)
PER_DOCUMENT = 4  # evaluation rows from one document at most
# of a stream's held-out side: documents, and characters a token, for each row that is drawn from them
POOL = 8


def digest(text: str) -> bytes:
    """A hash that every machine and Python agrees on (`hash` is salted per process)."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def one_in_ten(name: str) -> bool:
    return digest(name)[0] % 10 == 0


def windows(document: str | list[int]) -> np.ndarray:
    """Hashes [n] (uint64) of every run of WINDOW words, in lower case and without what stands between them,
    or of token ids.

    A shorter document is one window. (Rolling polynomial over CRC-32 of the words, then mixed: for equality
    only.)
    """
    if isinstance(document, str):
        text = document.lower().encode(errors="surrogatepass")
        words = list(map(zlib.crc32, re.findall(rb"[0-9a-z_\x80-\xff]+", text) or [text]))
    else:
        words = [i % 2**64 for i in document]  # what is no id is said later
    words = np.array(words, dtype=np.uint64)
    length = min(WINDOW, len(words))
    total = np.zeros(len(words) - length + 1, np.uint64)
    for i in range(length):
        total = total * np.uint64(0x9E3779B97F4A7C15) + words[i : len(words) - length + 1 + i]
    total ^= total >> np.uint64(29)
    return total * np.uint64(0xBF58476D1CE4E5B9)


def in_heldout(document: str | list[int]) -> bool:
    """One document in ten is held out, by the least of its windows' hashes: two that share a part J of their
    windows (Jaccard) have the same least one with probability J (Broder 1997), and so stand on one side,
    whatever the order and the budget.
    """
    return one_in_ten(str(windows(document).min()))


@functools.cache
def stdlib_sides() -> dict[str, list[tuple[str, str]]]:
    """{side: [(name, text)]} of the running Python's own library: its modules, and each pydoc topic as a
    document.

    One file in ten is held out, by its name's hash; of these, files that share more than NEAR of their
    windows with the training side are near-duplicates of something there, and join it (the held-out side only
    shrinks: nothing on it was seen by the embedded models, which were trained on the other nine tenths). In
    the order of their names' hashes, so that any stretch of the stream is a mixture. Tests, idlelib and
    installed packages are left out, and so is `_sysconfigdata*`, which says how one machine built its Python.
    Raises UserError where the library has no source files (a zipped Python).
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    texts = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if (
            SKIP_PARTS.isdisjoint(parts)
            and not path.name.startswith("_sysconfigdata")
            and parts != ("pydoc_data", "topics.py")
        ):
            try:
                texts["/".join(parts)] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # two or three files in latin-1
    if not texts:
        raise UserError(f"--data stdlib: this Python keeps no source files under {root}")
    from pydoc_data.topics import topics

    texts |= {f"pydoc_data/topics/{name}": text for name, text in topics.items()}
    names = sorted(texts, key=digest)
    held = {name: windows(texts[name]) for name in names if one_in_ten(name)}
    new = [name for name in names if name not in held]
    shared = {name: np.zeros(len(w), bool) for name, w in held.items()}
    while new:  # what joins the training side may have near-duplicates of its own
        seen = np.unique(
            np.concatenate([held.pop(name) if name in held else windows(texts[name]) for name in new])
        )
        for name, w in held.items():
            shared[name] |= seen[np.minimum(np.searchsorted(seen, w), len(seen) - 1)] == w
        new = [name for name in held if shared[name].mean() > NEAR]
    return {
        side: [(name, texts[name]) for name in names if (name in held) == (side == "heldout")]
        for side in ("train", "heldout")
    }


def stdlib_documents(side: str) -> list[tuple[str, str]]:
    """(name, text) of one side of `stdlib_sides`."""
    return stdlib_sides()[side]


@dataclasses.dataclass(frozen=True)
class Source:
    """A text as it is now. `data` names it for the functions below; results call it `name`; `content` is what
    it holds: the SHA-256 of its documents or files, or the commit of its repository.
    """

    data: str
    name: str
    content: str
    stamp: tuple = ()


def stamp(data: str) -> tuple:
    """Of a local text: sizes and times of its files, which tell at no cost that somebody writes to it during
    a run.
    """
    if data == "stdlib" or not os.path.exists(data):
        return ()
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in local_files(data))


def find(data: str) -> Source:
    """The text behind --data: stdlib, a local path, or a hub data set, NAME or NAME@REVISION, held to its
    commit. Raises UserError.
    """
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
    with tqdm(
        total=sum(path.stat().st_size for path in files),
        unit="B",
        unit_scale=True,
        delay=2,
        leave=False,
        desc="hash of the text",
    ) as bar:
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
                raise UserError(f"--data {data}: {reason(fault or error)}{ELSE}") from error
            time.sleep(pause)


def documents(data: str, side: str, split: str = "train") -> Iterator[str | list[int]]:
    """Documents of one side, as text, or as token ids where the data set is tokenised.

    `stdlib` is sided by file, anything else by the content of a document (`in_heldout`); of a tokenised data
    set a row is a document, and of text a file or a row. Fewer than FEW of them in a local text are cut into
    pieces, which are then the documents. Hub data sets and large files are streamed; `split` is the data
    set's own. Raises UserError.
    """
    if split != "train" and (data == "stdlib" or pathlib.Path(data).exists()):
        raise UserError(f"--split {split}: only hub data sets have splits, --data {data} is all train")
    if data == "stdlib":
        everything = (text for _, text in stdlib_documents(side))
    else:
        everything = (
            d for d in foreign_documents(data, split) if len(d) and in_heldout(d) == (side == "heldout")
        )
    yield from everything


def is_cut(data: str) -> bool:
    """Is this a local text of so few documents that pieces of them stand on the two sides? Raises
    UserError.
    """
    if data == "stdlib" or not os.path.exists(data):
        return False
    files = local_files(data)
    if files[0].suffix == ".txt":
        return len(files) < FEW
    return len(list(itertools.islice(raw_documents(data), FEW))) < FEW


def pieces(file: io.TextIOBase) -> Iterator[str]:
    """A text in pieces of PIECE characters, each up to the end of its line where that is not far."""
    while piece := file.read(PIECE):
        yield piece if piece.endswith("\n") else piece + file.readline(PIECE // 8)


def foreign_documents(data: str, split: str = "train") -> Iterator[str | list[int]]:
    """`raw_documents`, cut where they are few."""
    cut = is_cut(data)
    for document in raw_documents(data, split):
        if not cut:
            yield document
        elif isinstance(document, list):
            yield from (document[i : i + PIECE // 4] for i in range(0, len(document), PIECE // 4))
        else:
            yield from pieces(io.StringIO(document))


def local_files(data: str) -> list[pathlib.Path]:
    """The files of a local --data, in the order in which they are read. Raises UserError."""
    path = pathlib.Path(data)
    files = [
        p
        for p in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if p.suffix in LOCAL_FORMATS and p.is_file() and p.name not in METADATA
    ]
    kinds = {LOCAL_FORMATS[p.suffix] for p in files}
    if len(kinds) != 1:
        raise UserError(
            f"--data {data}: needs files of one kind out of {', '.join(LOCAL_FORMATS)}; found {sorted(kinds) or 'none'}"
        )
    return files


def raw_documents(data: str, split: str = "train") -> Iterator[str | list[int]]:
    """What a local text or a hub data set holds: files, or rows. Raises UserError."""
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
                with p.open(encoding="utf-8") as file:
                    # a single file may be larger than memory
                    yield from pieces(file) if len(files) < FEW else [file.read()]
            return
        if kinds == {"parquet"}:
            import pyarrow.parquet

            if rowless := [p for p in files if not pyarrow.parquet.read_metadata(p).num_rows]:
                raise UserError(f"--data {rowless[0]}: the file holds no rows")
        column = None
        name, _, revision = data.partition("@")
        source = (
            dict(path=kinds.pop(), data_files=[str(p) for p in files])
            if files
            else dict(path=name, revision=revision or None)
        )
        for number, row in enumerate(streamed(data, split, source)):
            if column is None:
                if (column := text_column(row)) is None:
                    raise UserError(f"--data {data}: no column of text or tokens (columns: {', '.join(row)})")
                ids = isinstance(row[column], list)
            value = row.get(column)
            if value is None:
                continue
            if not (
                isinstance(value, list) and all(type(i) is int for i in value)
                if ids
                else isinstance(value, str)
            ):
                raise UserError(
                    f"--data {data}: {column} is {brief(repr(value))} in row {number}, and {'token ids' if ids else 'text'} before"
                )
            yield value
    except UserError:
        raise
    # the libraries below raise a dozen kinds for "no such data set" and "not readable"
    except Exception as error:
        raise UserError(f"--data {data}: {reason(error)}{'' if files else ELSE}") from error


def text_column(row: dict) -> str | None:
    """Token ids, else `text`, which may be null in this row, else the first column of strings. (`tokens` of
    words are no ids.)
    """
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
    # 20 attempts of their own, each around the six requests of huggingface_hub (24 s), would multiply with
    # ours to an hour
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    return datasets


def streamed(data: str, split: str, source: dict) -> Iterator[dict]:
    """Rows of load_dataset(**source). A fault of the network is waited out, and the stream goes on at the row
    where it was.
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
                raise UserError(
                    f"--data {data}: {reason(fault)} (at row {given}, {failed + 1} times)"
                ) from error
            time.sleep(PAUSES[failed])
            failed += 1
            if stream is not None:
                stream.load_state_dict(stream.state_dict())


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


def as_ids(document: str | list[int], tokenizer, data: str) -> list[int]:
    """Token ids, ended by the end-of-text token; those of a tokenised data set as they are. Raises UserError
    for ids of another tokenizer.
    """
    if isinstance(document, str):
        return [*tokenizer(document, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    if 0 <= min(document) and max(document) < len(tokenizer):  # the model's own table may be padded beyond
        return document
    raise UserError(
        f"--data {data}: token ids {min(document)} to {max(document)}, but the tokenizer has {len(tokenizer)}: "
        "it was tokenised for another model"
    )


def packed_rows(data: str, side: str, tokenizer, ctx: int, split: str = "train") -> Iterator[torch.Tensor]:
    """One pass of rows [ctx] (int64): documents joined by the end-of-text token and cut, no padding, no BOS,
    as Pythia was trained.

    Rows of token ids come packed already: they are cut anew, and nothing is put between them.
    """
    carry: list[int] = []
    for document in documents(data, side, split):
        carry += as_ids(document, tokenizer, data)
        for start in range(0, len(carry) - ctx + 1, ctx):
            yield torch.tensor(carry[start : start + ctx])
        carry = carry[len(carry) // ctx * ctx :]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Evaluation rows of one tokenizer."""

    input_ids: torch.Tensor  # [S,ctx], int64
    document: np.ndarray  # [S]: the number of the one that each row comes from, the unit of every bootstrap
    sha256: str  # of the documents that were drawn


def drawn(data: str, split: str, seed: int, n: int, ctx: int) -> list:
    """Held-out documents in the order of a race in which each runs as fast as it is long (Efraimidis &
    Spirakis 2006), so that any first few are drawn without replacement in proportion to length. Only the
    first that n rows can need are kept.

    The whole held-out side takes part, of a hub data set the first POOL n documents of it.
    """
    pool, size, known, endless = [], 0, set(), data != "stdlib" and not os.path.exists(data)
    for document in documents(data, "heldout", split):
        name = digest(f"{seed} {digest(str(document)).hex()}")
        if name in known:  # a second copy is no second document
            continue
        known.add(name)
        key = -math.log1p(-int.from_bytes(name[:6]) / 2**48) / len(document)
        heapq.heappush(pool, (-key, name, document))
        size += len(document)
        enough = lambda rest, length: rest >= POOL * n and length >= POOL * n * ctx
        if endless and enough(len(pool), size):
            break
        while enough(len(pool) - 1, size - len(pool[0][2])):
            size -= len(heapq.heappop(pool)[2])
    return [document for *_, document in sorted(pool, key=lambda entry: (-entry[0], entry[1]))]


def heldout_rows(
    data: str, tokenizer, ctx: int, n: int, split: str = "train", bos: int | None = None, seed: int = 0
) -> HeldOut:
    """n evaluation rows, drawn by a seed across the held-out side, at most PER_DOCUMENT of one document.

    One of each document in the order of `drawn`, then a second of each, and so on: windows that do not
    overlap, at a place of the seed's choice. Documents shorter than a row are joined until they fill one, and
    count as one. With `bos` every row begins with that token and holds ctx - 1 of text. Raises UserError
    where the held-out side gives fewer.
    """
    start = [] if bos is None else [bos]
    length, used, carry = ctx - len(start), hashlib.sha256(), []
    rounds: list[list[tuple]] = [[] for _ in range(PER_DOCUMENT)]  # of (document, row)
    for document in drawn(data, split, seed, n, ctx):
        if len(rounds[0]) == n:
            break
        used.update(digest(str(document)))
        ids = as_ids(document, tokenizer, data)
        if len(ids) < length:
            carry += ids
            if len(carry) < length:
                continue
            ids, carry = carry[:length], []
        places = np.random.default_rng([seed, *digest(str(document))[:8]])
        phase, number = places.integers(len(ids) % length + 1), len(rounds[0])
        for into, i in zip(rounds, places.permutation(len(ids) // length)):
            into.append((number, ids[phase + i * length : phase + (i + 1) * length]))
    rows = sorted(itertools.islice(itertools.chain(*rounds), n), key=lambda entry: entry[0])
    if len(rows) < n:
        raise UserError(
            f"--eval-seqs {n}: the held-out side of {data} gives {len(rows)} sequences of {ctx} tokens, at most {PER_DOCUMENT} "
            "of a document" + (" (too short for one sequence)" if not rows else "")
        )
    return HeldOut(
        torch.tensor([start + row for _, row in rows]),
        np.array([document for document, _ in rows]),
        used.hexdigest(),
    )


def train_rows(
    data: str,
    tokenizer,
    ctx: int,
    batch: int,
    split: str = "train",
    once: Callable[[int], None] = lambda tokens: None,
) -> Iterator[torch.Tensor]:
    """Batches [batch,ctx] of the training side, pass after pass without end; once(tokens in a pass) is called
    where the second begins.
    """
    for number in itertools.count():
        given = 0
        rows = packed_rows(data, "train", tokenizer, ctx, split=split)
        while chunk := list(itertools.islice(rows, batch)):
            given += len(chunk) * ctx
            yield torch.stack(chunk)
        if not given:
            raise UserError(f"--data {data}: the training side is too short for one sequence of {ctx} tokens")
        if not number:
            once(given)
