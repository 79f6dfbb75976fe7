"""Which documents of a text are held out, and the rows of tokens that are made of them.

A side is "train" or "heldout"; a row is [ctx] token ids. Documents come from `sources`.
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
from transport_geometry.models.loading import readable_names, tokenizer_hash
from transport_geometry.models.model_files import bos_of
from transport_geometry.text import sources
from transport_geometry.text.sources import Chat, Data, Document, commit_of, local_files

import numpy as np
import torch
from tqdm import tqdm

SKIP_PARTS = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"}
WINDOW = 8  # consecutive words, or token ids: near-duplicates share many windows
# a held-out file of the standard library that shares more of its windows with the training side moves there
MAX_OVERLAP = 0.2
READING_VERSION = 2  # 2: padding is no text, and runs of one token id are no window
PER_DOCUMENT = 4  # evaluation rows from one document at most
ROW_STRIDE = 5  # neighbouring rows of the training side are mostly of one document: take every fifth
# from a streamed held-out side: documents per evaluation row, and characters per token of it
POOL_FACTOR = 8


# ---------------------------------------------------------------------------------------------------- a text
@dataclasses.dataclass(frozen=True)
class Source:
    """A text and the identity of its present content."""

    data: str  # the argument of the functions below
    name: str  # its name in results
    content: str  # SHA-256 of its documents or files, or the commit of its repository
    stamp: tuple[tuple[str, int, int], ...] = ()  # see `stamp`

    @property
    def for_training(self) -> str:
        """The content and the version of this module's reading, which decides what documents an SAE saw."""
        return self.content if self.data == "stdlib" else f"{self.content} read {READING_VERSION}"


def stamp(data: str) -> tuple[tuple[str, int, int], ...]:
    """Sizes and times of a local text's files: a cheap way to see that it changed during a run."""
    if data == "stdlib" or not os.path.exists(data):
        return ()
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in local_files(data))


def find(data: str, column: str | None = None, config: str | None = None) -> Source:
    """The text of --data: stdlib, a local path, or a hub data set, NAME or NAME@REVISION, fixed to its
    commit. Prints which local files are not read. Raises UserError.
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
        at_commit = with_choices(f"{name}@{commit}", column, config)
        return Source(at_commit, name, commit + flags_in_content(column, config))
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
    """Suffix of the hash or commit: another column or configuration of the same files is another text."""
    flags = {"--config": config, "--column": column}
    return "".join(f" {flag} {value}" for flag, value in flags.items() if value)


def hash_of(files: list[pathlib.Path]) -> str:
    """SHA-256 of the files' bytes and formats, in this order; a progress bar appears after 2 s."""
    whole, size = hashlib.sha256(), sum(path.stat().st_size for path in files)
    how: dict[str, Any] = dict(unit="B", unit_scale=True, delay=2, leave=False, disable=None)
    with tqdm(total=size, desc="hash of the text", **how) as bar:
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
    """SHA-256, the same on every machine (`hash` is salted per process)."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def one_in_ten(name: str) -> bool:
    return digest(name)[0] % 10 == 0


def windows(document: Document) -> np.ndarray:
    """Hashes [n] (uint64) of every run of WINDOW words (lower case, no punctuation) or token ids.

    A shorter document is one window. Runs of one repeated id are left out unless there is nothing else:
    unrelated documents share padding. (A rolling polynomial over CRC-32 of the words, then mixed.)
    """
    if isinstance(document, str):
        text = document.lower().encode(errors="surrogatepass")
        words = list(map(zlib.crc32, re.findall(rb"[0-9a-z_\x80-\xff]+", text) or [text]))
    else:
        words = [i % 2**64 for i in document]  # `as_ids` refuses ids out of range
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
    """Whether a document is held out: one in ten is, by the smallest of its windows' hashes. Documents whose
    windows overlap by J (Jaccard) have the same smallest hash with probability J (Broder 1997), so
    near-duplicates fall on one side, in any order and at any budget.
    """
    return one_in_ten(str(windows(document).min()))


@functools.cache
def stdlib_sides() -> dict[str, list[tuple[str, str]]]:
    """{side: [(name, text)]} of the running Python's own library (`stdlib_texts`), in the order of the names'
    hashes, so that any stretch of it is a mixture. Raises UserError.

    One file in ten is held out, by its name's hash. Those that share more than MAX_OVERLAP of their windows
    with the training side move there. The embedded models were trained on the other nine tenths of Python
    3.11's library, so they have seen no held-out file of that version; another version may have moved text
    from one file to another.
    """
    texts = stdlib_texts()
    names = sorted(texts, key=digest)
    held = {name: windows(texts[name]) for name in names if one_in_ten(name)}
    shared = {name: np.zeros(len(hashes), bool) for name, hashes in held.items()}
    joining = [name for name in names if name not in held]
    while joining:  # a file that joins may have near-duplicates among those left
        theirs = [held.pop(name) if name in held else windows(texts[name]) for name in joining]
        seen = np.unique(np.concatenate(theirs))
        for name, hashes in held.items():
            nearest = np.minimum(np.searchsorted(seen, hashes), len(seen) - 1)
            shared[name] |= seen[nearest] == hashes
        joining = [name for name in held if shared[name].mean() > MAX_OVERLAP]
    return {
        "train": [(name, texts[name]) for name in names if name not in held],
        "heldout": [(name, texts[name]) for name in names if name in held],
    }


def stdlib_texts() -> dict[str, str]:
    """{name: text} of the running Python's library: its modules, and each pydoc topic as a document, without
    tests, idlelib, installed packages and `_sysconfigdata*` (how this Python was built). Raises UserError if
    the library has no source files (a zipped Python).
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
    """Documents of one side: of `stdlib` by file, of anything else by the content of each document
    (`in_heldout`). `split` is that of a hub data set, or of one that was saved with splits. Raises UserError.
    """
    no_splits = data == "stdlib" or os.path.exists(data) and not sources.has_splits(data)
    if split != "train" and no_splits:
        raise UserError(f"--split {split}: only hub data sets have splits, --data {data} is all train")
    if data == "stdlib":
        yield from (text for _, text in stdlib_documents(side))
        return
    for document in sources.documents(data, split):
        if len(document) and in_heldout(document) == (side == "heldout"):
            yield document


# ------------------------------------------------------------------------------------------------------ rows
def as_ids(document: Document, tokenizer: Any, data: str) -> list[int]:
    """Token ids of a document: of a string with the end-of-text token at the end; of a chat by the
    tokenizer's chat template, without BOS; token ids as they are. Raises UserError for ids of another
    tokenizer, and for a chat without a template or one that does not fit it.
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
    if least < 0 or most >= len(tokenizer):  # the model's embedding may have more rows, as padding
        raise UserError(
            f"--data {data}: token ids {least} to {most}, but the tokenizer has {len(tokenizer)}: "
            "it was tokenised for another model"
        )
    return document


def cut(ids: list[int], ctx: int, bos: int | None) -> tuple[list[list[int]], list[int]]:
    """(consecutive rows of ctx ids, the ids left over). With `bos` each row begins with it, unless its text
    does already.
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
    """One pass over a side in rows [ctx] (int64): documents joined (`as_ids`) and cut, without padding. With
    `bos` every row begins with that token and holds ctx - 1 of text.
    """
    carry: list[int] = []
    for document in documents(data, side, split):
        rows, carry = cut(carry + as_ids(document, tokenizer, data), ctx, bos)
        yield from map(torch.tensor, rows)


def kind_of(data: str, split: str) -> str:
    """What the documents are, by the first: token `ids`, `chats`, of which the tokenizer's template makes
    text, or `text`.
    """
    first = next(documents(data, "train", split), "")
    if isinstance(first, Chat):
        return "chats"
    return "text" if isinstance(first, str) else "ids"


KEPT_TOKENS = 2**23  # of a text, by `keeping_rows`
_kept: dict[tuple, list[torch.Tensor]] | None = None


@contextlib.contextmanager
def keeping_rows() -> Iterator[None]:
    """Within, the first KEPT_TOKENS tokens of a training text are made once per tokenizer, for all hooks. The
    text must not change.
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
    """`packed_rows` of the training side, beginning with the rows that `keeping_rows` has."""
    if _kept is None:
        yield from packed_rows(data, "train", tokenizer, ctx, split, bos)
        return
    known = _kept.setdefault((data, tokenizer_hash(tokenizer, of_chats=True), ctx, split, bos), [])
    from_memory = list(known)
    yield from from_memory
    rows = packed_rows(data, "train", tokenizer, ctx, split, bos)
    for i, row in enumerate(itertools.islice(rows, len(from_memory), None), len(from_memory)):
        if i == len(known) and (i + 1) * ctx <= KEPT_TOKENS:
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
    after the first pass. Raises UserError if the side is too short for one row.
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
    """[n,ctx]: every ROW_STRIDE-th row of the training side, shuffled by a fixed seed, so that a few steps
    see many documents. Raises UserError.
    """
    rows = train_rows(data, tokenizer, ctx, 1, split, bos=bos)
    chosen = torch.cat(list(itertools.islice(rows, 0, n * ROW_STRIDE, ROW_STRIDE)))
    return chosen[torch.randperm(n, generator=torch.Generator().manual_seed(0))]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Evaluation rows of one tokenizer."""

    input_ids: torch.Tensor  # [S,ctx], int64
    document: np.ndarray  # [S]: number of each row's document, the unit of every bootstrap
    sha256: str  # of the documents that were drawn


def heldout_rows(
    data: str,
    tokenizer: Any,
    *,
    ctx: int,
    n: int,
    split: str = "train",
    bos: int | None = None,
    seed: int = 0,
) -> HeldOut:
    """n evaluation rows drawn by a seed from the held-out side, at most PER_DOCUMENT of one document.

    One row of each document in the order of `drawn`, then a second of each, and so on; rows do not overlap,
    and the seed decides where in the document they lie. Documents shorter than a row are joined until they
    fill one, and count as one. `bos`: see `cut`. Raises UserError if there are fewer than n rows.
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
    """Held-out documents in random order, such that any first few are a draw without replacement in
    proportion to length: sorted by log(1 - uniform) / length (Efraimidis & Spirakis 2006). Only as many as n
    rows can need are kept. Of a hub data set only about the first POOL_FACTOR n documents take part.
    """
    endless = data != "stdlib" and not os.path.exists(data)
    # a heap of (key, name, document): the smallest key, last in the order, is removed first
    pool: list[tuple[float, bytes, Document]] = []
    size, known = 0, set()

    def enough(count: int, length: int) -> bool:
        return count >= POOL_FACTOR * n and length >= POOL_FACTOR * n * ctx

    for document in documents(data, "heldout", split):
        name = digest(f"{seed} {digest(str(document)).hex()}")
        if name in known:  # an exact copy
            continue
        known.add(name)
        uniform = int.from_bytes(name[:6]) / 2**48
        heapq.heappush(pool, (math.log1p(-uniform) / len(document), name, document))
        size += len(document)
        if endless and enough(len(pool), size):
            break
        while enough(len(pool) - 1, size - len(pool[0][2])):
            size -= len(heapq.heappop(pool)[2])
    return [document for _, _, document in sorted(pool, key=lambda one: (-one[0], one[1]))]
