"""Text: which of its documents are held out, and rows of tokens packed from them.

A side is "train" or "heldout". Where documents come from is `sources`' business. A row is [ctx] token ids.
"""

import contextlib
import dataclasses
import functools
import hashlib
import heapq
import itertools
import json
import math
import os
import pathlib
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from transport_geometry.errors import UserError, one_line
from transport_geometry.models import sources
from transport_geometry.models.loading import readable_names, tokenizer_hash
from transport_geometry.models.model_files import bos_of
from transport_geometry.models.sources import Chat, Data, Document, commit_of, local_files

import numpy as np
import torch
from tqdm import tqdm

SKIP_PARTS = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"}
WINDOW = 8  # words, or token ids, in a row: what two documents share when one was made from the other
# a held-out file of the standard library that shares more of its windows with the training side goes there
NEAR = 0.2
READING = 2  # 2: padding is no text, and runs of one token id are no window
PER_DOCUMENT = 4  # evaluation rows from one document at most
SPREAD = 5  # rows of the training side are neighbours, most of them of one document: one in so many is taken
# of a stream's held-out side: documents, and characters a token, for each row that is drawn from them
POOL = 8


# ---------------------------------------------------------------------------------------------------- a text
@dataclasses.dataclass(frozen=True)
class Source:
    """A text as it is now."""

    data: str  # names it for the functions below
    name: str  # is how results call it
    content: str  # what it holds: the SHA-256 of its documents or files, or the commit of its repository
    stamp: tuple[tuple[str, int, int], ...] = ()  # see `stamp`

    @property
    def for_training(self) -> str:
        """The content, and by which version of this module it is read: another one may take other documents
        of it, or hold out others, and an SAE in the cache is then another's.
        """
        return self.content if self.data == "stdlib" else f"{self.content} read {READING}"


def stamp(data: str) -> tuple[tuple[str, int, int], ...]:
    """Of a local text: sizes and times of its files, which tell at no cost that somebody writes to it during
    a run.
    """
    if data == "stdlib" or not os.path.exists(data):
        return ()
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in local_files(data))


def find(data: str, column: str | None = None, config: str | None = None) -> Source:
    """The text behind --data: stdlib, a local path, or a hub data set, NAME or NAME@REVISION, held to its
    commit. What of a local one is not read is said. Raises UserError.
    """
    if config and (data == "stdlib" or os.path.exists(data)):
        raise UserError(f"--config {config}: only hub data sets have configurations")
    if data == "stdlib":
        if column:
            raise UserError(f"--column {column}: stdlib has no columns")
        whole = hashlib.sha256()
        for name, text in stdlib_documents("train"):
            whole.update(digest(name) + digest(text))
        return Source(data, data, whole.hexdigest())
    if not os.path.exists(data):
        name, commit = commit_of(with_choices(data, column, config))
        return Source(
            with_choices(f"{name}@{commit}", column, config), name, commit + flags_in_content(column, config)
        )
    now = stamp(data)  # before its files are read
    sources.name_unread(data)
    if column and set(sources.by_kind(data)) == {"text"}:
        raise UserError(f"--column {column}: the files of {data} have no columns")
    content = hash_of(local_files(data)) + flags_in_content(column)
    return Source(with_choices(data, column), readable_names([data])[data], content, now)


def with_choices(data: str, column: str | None = None, config: str | None = None) -> Data:
    out = Data(data)
    out.column, out.config = column, config
    return out


def flags_in_content(column: str | None, config: str | None = None) -> str:
    """What follows the hash or commit: another column or configuration of the same files is another text."""
    flags = {"--config": config, "--column": column}
    return "".join(f" {flag} {value}" for flag, value in flags.items() if value)


def hash_of(files: list[pathlib.Path]) -> str:
    """SHA-256 of what files hold, in this order, and of their formats; a bar on what takes over 2 s."""
    whole, size = hashlib.sha256(), sum(path.stat().st_size for path in files)
    with tqdm(
        total=size, unit="B", unit_scale=True, delay=2, leave=False, disable=None, desc="hash of the text"
    ) as bar:
        for path in files:
            one = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    one.update(block)
                    bar.update(len(block))
            suffixes = path.suffixes[-2:] if path.suffix in sources.PACKED else [path.suffix]
            whole.update("".join(suffixes).encode() + one.digest())
    return whole.hexdigest()


# ----------------------------------------------------------------------------------------------------- sides
def digest(text: str) -> bytes:
    """A hash that every machine and Python agrees on (`hash` is salted per process)."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def one_in_ten(name: str) -> bool:
    return digest(name)[0] % 10 == 0


def windows(document: Document) -> np.ndarray:
    """Hashes [n] (uint64) of every run of WINDOW words, in lower case and without what stands between them,
    or of token ids.

    A shorter document is one window. Where there are others, runs of one id are left out: padding is shared
    by documents that have nothing in common. (Rolling polynomial over CRC-32 of the words, then mixed: for
    equality only.)
    """
    if isinstance(document, str):
        text = document.lower().encode(errors="surrogatepass")
        words = list(map(zlib.crc32, re.findall(rb"[0-9a-z_\x80-\xff]+", text) or [text]))
    else:
        words = [i % 2**64 for i in document]  # what is no id is said later
    terms = np.array(words, np.uint64)
    length = min(WINDOW, len(terms))
    n = len(terms) - length + 1
    total = np.zeros(n, np.uint64)
    for i in range(length):
        total = total * np.uint64(0x9E3779B97F4A7C15) + terms[i : n + i]
    if not isinstance(document, str):
        changes = np.r_[0, np.cumsum(terms[1:] != terms[:-1])]
        varied = changes[length - 1 :] > changes[:n]
        total = total[varied] if varied.any() else total
    total = total ^ total >> np.uint64(29)
    return total * np.uint64(0xBF58476D1CE4E5B9)


def in_heldout(document: Document) -> bool:
    """One document in ten is held out, by the least of its windows' hashes: two that share a part J of their
    windows (Jaccard) have the same least one with probability J (Broder 1997), and so stand on one side,
    whatever the order and the budget.
    """
    return one_in_ten(str(windows(document).min()))


@functools.cache
def stdlib_sides() -> dict[str, list[tuple[str, str]]]:
    """{side: [(name, text)]} of the running Python's own library: see `stdlib_texts`.

    One file in ten is held out, by its name's hash; of these, files that share more than NEAR of their
    windows with the training side are near-duplicates of something there, and join it (the held-out side only
    shrinks: nothing on it was seen by the embedded models, which were trained on the other nine tenths of
    Python 3.11's; in another version a file may hold what stood in one of those). In the order of their
    names' hashes, so that any stretch of the stream is a mixture. Raises UserError.
    """
    texts = stdlib_texts()
    names = sorted(texts, key=digest)
    held = {name: windows(texts[name]) for name in names if one_in_ten(name)}
    shared = {name: np.zeros(len(hashes), bool) for name, hashes in held.items()}
    joining = [name for name in names if name not in held]
    while joining:  # what joins the training side may have near-duplicates of its own
        theirs = [held.pop(name) if name in held else windows(texts[name]) for name in joining]
        seen = np.unique(np.concatenate(theirs))
        for name, hashes in held.items():
            nearest = np.minimum(np.searchsorted(seen, hashes), len(seen) - 1)
            shared[name] |= seen[nearest] == hashes
        joining = [name for name in held if shared[name].mean() > NEAR]
    return {
        "train": [(name, texts[name]) for name in names if name not in held],
        "heldout": [(name, texts[name]) for name in names if name in held],
    }


def stdlib_texts() -> dict[str, str]:
    """{name: text} of the running Python's library: its modules, and each pydoc topic as a document. Tests,
    idlelib and installed packages are left out, and so is `_sysconfigdata*`, which says how one machine built
    its Python. Raises UserError where the library has no source files (a zipped Python).
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    texts = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        left_out = path.name.startswith("_sysconfigdata") or name == "pydoc_data/topics.py"
        if left_out or not SKIP_PARTS.isdisjoint(name.split("/")):
            continue
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # two or three files in latin-1
    if not texts:
        raise UserError(f"--data stdlib: this Python keeps no source files under {root}")
    from pydoc_data.topics import topics

    return texts | {f"pydoc_data/topics/{name}": text for name, text in topics.items()}


def stdlib_documents(side: str) -> list[tuple[str, str]]:
    """(name, text) of one side of `stdlib_sides`."""
    return stdlib_sides()[side]


def documents(data: str, side: str, split: str = "train") -> Iterator[Document]:
    """Documents of one side.

    `stdlib` is sided by file, anything else by the content of a document (`in_heldout`); of a tokenised data
    set a row is a document, and of text a file or a row. Few of them in a local text are cut into pieces,
    which are then the documents. Hub data sets and large files are streamed; `split` is that of a hub data
    set, or of one that was saved with splits. Raises UserError.
    """
    if split != "train" and (
        data == "stdlib" or pathlib.Path(data).exists() and not sources.has_splits(data)
    ):
        raise UserError(f"--split {split}: only hub data sets have splits, --data {data} is all train")
    if data == "stdlib":
        yield from (text for _, text in stdlib_documents(side))
        return
    for document in sources.documents(data, split):
        if len(document) and in_heldout(document) == (side == "heldout"):
            yield document


# ------------------------------------------------------------------------------------------------------ rows
def as_ids(document: Document, tokenizer: Any, data: str) -> list[int]:
    """Token ids, ended by the end-of-text token; those of a tokenised data set as they are, and of a chat
    those of the tokenizer's template, but for the token before all. Raises UserError for ids of another
    tokenizer, and where there is no template or the chat does not fit it.
    """
    if isinstance(document, Chat):
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(f"--data {data}: its rows are chats, and the tokenizer has no chat template")
        with one_line(f"--data {data}: chat template"):
            whole = tokenizer.apply_chat_template(json.loads(document), tokenize=False)
            ids = tokenizer(whole, add_special_tokens=False).input_ids
        return ids[1:] if ids and ids[0] == bos_of(tokenizer) else ids
    if isinstance(document, str):
        return [*tokenizer(document, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    least, most = min(document), max(document)
    if least < 0 or most >= len(tokenizer):  # the model's own table may be padded beyond
        raise UserError(
            f"--data {data}: token ids {least} to {most}, but the tokenizer has {len(tokenizer)}: "
            "it was tokenised for another model"
        )
    return document


def cut(ids: list[int], ctx: int, bos: int | None) -> tuple[list[list[int]], list[int]]:
    """(rows of ctx ids, those left over): one after another, each begun with `bos` where it is given and does
    not stand there already.
    """
    rows: list[list[int]] = []
    at = 0
    while True:
        start = [] if bos is None or ids[at : at + 1] == [bos] else [bos]
        end = at + ctx - len(start)
        if end > len(ids):
            return rows, ids[at:]
        rows.append(start + ids[at:end])
        at = end


def packed_rows(
    data: str, side: str, tokenizer: Any, ctx: int, split: str = "train", bos: int | None = None
) -> Iterator[torch.Tensor]:
    """One pass of rows [ctx] (int64): documents joined by the end-of-text token and cut, no padding.

    With `bos` every row begins with that token, as evaluation rows do, and holds ctx - 1 of text; within a
    row documents follow each other without it. Rows of token ids come packed already: they are cut anew, and
    nothing is put between them.
    """
    carry: list[int] = []
    for document in documents(data, side, split):
        rows, carry = cut(carry + as_ids(document, tokenizer, data), ctx, bos)
        yield from map(torch.tensor, rows)


def tokenised(data: str, split: str) -> bool:
    """Does the text come as token ids?"""
    return not isinstance(next(documents(data, "train", split), ""), str)


ROWS = 2**23  # tokens that `keeping_rows` keeps of a text
_kept: dict[tuple, list[torch.Tensor]] | None = None


@contextlib.contextmanager
def keeping_rows() -> Iterator[None]:
    """Within, the first ROWS tokens of a training text are made once for each tokenizer, however many hooks
    are trained on them. The text must stay as it is.
    """
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def one_pass(
    data: str, tokenizer: Any, ctx: int, split: str, bos: int | None = None
) -> Iterator[torch.Tensor]:
    """`packed_rows` of the training side, its beginning from what `keeping_rows` has."""
    if _kept is None:
        yield from packed_rows(data, "train", tokenizer, ctx, split, bos)
        return
    known, given = _kept.setdefault((data, tokenizer_hash(tokenizer), ctx, split, bos), []), 0
    for row in known:
        given += 1
        yield row
    for i, row in enumerate(packed_rows(data, "train", tokenizer, ctx, split, bos)):
        if i < given:
            continue
        if i == len(known) and (i + 1) * ctx <= ROWS:
            known.append(row)
        yield row


def train_rows(
    data: str,
    tokenizer: Any,
    ctx: int,
    batch: int,
    split: str = "train",
    once: Callable[[int], object] | None = None,
    bos: int | None = None,
) -> Iterator[torch.Tensor]:
    """Batches [batch,ctx] of the training side, pass after pass without end; once(tokens in a pass) is called
    where the second begins. Raises UserError where the side is too short for one row.
    """
    for number in itertools.count():
        given = 0
        rows = one_pass(data, tokenizer, ctx, split, bos)
        while chunk := list(itertools.islice(rows, batch)):
            given += len(chunk) * ctx
            yield torch.stack(chunk)
        if not given:
            raise UserError(f"--data {data}: the training side is too short for one sequence of {ctx} tokens")
        if once and number == 0:
            once(given)


def spread_rows(
    data: str, tokenizer: Any, ctx: int, n: int, split: str = "train", bos: int | None = None
) -> torch.Tensor:
    """[n,ctx]: every SPREAD-th row of the training side, in an order set by a seed: for few steps, that must
    not be about few documents. Raises UserError.
    """
    rows = itertools.islice(train_rows(data, tokenizer, ctx, 1, split, bos=bos), 0, n * SPREAD, SPREAD)
    return torch.cat(list(rows))[torch.randperm(n, generator=torch.Generator().manual_seed(0))]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Evaluation rows of one tokenizer."""

    input_ids: torch.Tensor  # [S,ctx], int64
    document: np.ndarray  # [S]: the number of the one that each row comes from, the unit of every bootstrap
    sha256: str  # of the documents that were drawn


def heldout_rows(
    data: str, tokenizer: Any, ctx: int, n: int, split: str = "train", bos: int | None = None, seed: int = 0
) -> HeldOut:
    """n evaluation rows, drawn by a seed across the held-out side, at most PER_DOCUMENT of one document.

    One of each document in the order of `drawn`, then a second of each, and so on: windows that do not
    overlap, at a place of the seed's choice. Documents shorter than a row are joined until they fill one, and
    count as one. With `bos` every row begins with that token, see `cut`. Raises UserError where the held-out
    side gives fewer.
    """
    length = ctx - (bos is not None)
    used = hashlib.sha256()
    carry: list[int] = []
    # rounds[i]: the i-th row of each document that has one, as (number of the document, ids)
    rounds: list[list[tuple[int, list[int]]]] = [[] for _ in range(PER_DOCUMENT)]
    for document in drawn(data, split, seed, n, ctx):
        number = len(rounds[0])
        if number == n:
            break
        used.update(digest(str(document)))
        ids = as_ids(document, tokenizer, data)
        if len(ids) < length:
            carry += ids
            if len(carry) < length:
                continue
            ids, carry = carry[:length], []
        rng = np.random.default_rng([seed, *digest(str(document))[:8]])
        phase = rng.integers(len(ids) % length + 1)
        its_rows, _ = cut(ids[phase:], ctx, bos)
        for one_round, i in zip(rounds, rng.permutation(len(its_rows))):
            one_round.append((number, its_rows[i]))
    rows = sorted(itertools.islice(itertools.chain(*rounds), n), key=lambda row: row[0])
    if len(rows) < n:
        too_short = "" if rows else " (too short for one sequence)"
        raise UserError(
            f"--eval-seqs {n}: the held-out side of {data} gives {len(rows)} sequences of {ctx} tokens, "
            f"at most {PER_DOCUMENT} of a document{too_short}"
        )
    return HeldOut(
        input_ids=torch.tensor([ids for _, ids in rows]),
        document=np.array([number for number, _ in rows]),
        sha256=used.hexdigest(),
    )


def drawn(data: str, split: str, seed: int, n: int, ctx: int) -> list[Document]:
    """Held-out documents in the order of a race in which each runs as fast as it is long (Efraimidis &
    Spirakis 2006), so that any first few are drawn without replacement in proportion to length. Only the
    first that n rows can need are kept.

    The whole held-out side takes part, of a hub data set the first POOL n documents of it.
    """
    endless = data != "stdlib" and not os.path.exists(data)
    # a heap of (- time of arrival, name, document): the last to arrive is the first out
    pool: list[tuple[float, bytes, Document]] = []
    size, known = 0, set()

    def enough(count: int, length: int) -> bool:
        return count >= POOL * n and length >= POOL * n * ctx

    for document in documents(data, "heldout", split):
        name = digest(f"{seed} {digest(str(document)).hex()}")
        if name in known:  # a second copy is no second document
            continue
        known.add(name)
        uniform = int.from_bytes(name[:6]) / 2**48
        heapq.heappush(pool, (math.log1p(-uniform) / len(document), name, document))
        size += len(document)
        if endless and enough(len(pool), size):
            break
        while enough(len(pool) - 1, size - len(pool[0][2])):
            size -= len(heapq.heappop(pool)[2])
    return [document for _, _, document in sorted(pool, key=lambda runner: (-runner[0], runner[1]))]
