"""Text: documents, which of them are held out, and rows of tokens packed from them."""
import hashlib
import itertools
import pathlib
import sysconfig
from collections.abc import Iterator

from common import UserError

import torch

SKIP_PARTS = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"}
LOCAL_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}


def digest(text: str) -> bytes:
    """A hash that every machine and Python agrees on (`hash` is salted per process)."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def in_heldout(name: str) -> bool:
    """One document in ten is held out."""
    return digest(name)[0] % 10 == 0


def stdlib_documents(split: str) -> list[tuple[str, str]]:
    """(name, text) of the running Python's own library: its modules, and each pydoc topic as a document.

    split is "train" or "heldout"; whole files go to one side by `in_heldout`, in the order of their names' hashes, so that
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
    return [(name, texts[name]) for name in sorted(texts, key=digest) if in_heldout(name) == (split == "heldout")]


def documents(data: str, split: str) -> Iterator[str | list[int]]:
    """Documents of one side of the split, as text, or as token ids where the data set is tokenised.

    `stdlib` splits by file; anything else by a hash of the document itself, so that a repeated document never stands on
    both sides, whatever the budget. A .txt file is cut at line ends into pieces of about 8,000 characters. Hub data sets
    and large files are streamed. Raises UserError.
    """
    if data == "stdlib":
        everything = (text for _, text in stdlib_documents(split))
    else:
        everything = (d for d in foreign_documents(data) if len(d) and in_heldout(str(d)) == (split == "heldout"))
    yield from everything


def foreign_documents(data: str) -> Iterator[str | list[int]]:
    path = pathlib.Path(data)
    files = [p for p in (sorted(path.rglob("*")) if path.is_dir() else [path]) if p.suffix in LOCAL_FORMATS and p.is_file()]
    kinds = {LOCAL_FORMATS[p.suffix] for p in files}
    if path.exists() and len(kinds) != 1:
        raise UserError(f"--data {data}: needs files of one kind out of {', '.join(LOCAL_FORMATS)}; found {sorted(kinds) or 'none'}")
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
        import datasets  # slow to import, and not needed above
        datasets.disable_progress_bars()
        source = dict(path=kinds.pop(), data_files=[str(p) for p in files]) if files else dict(path=data)
        for row in datasets.load_dataset(**source, split="train", streaming=True):
            column = next((c for c in ("tokens", "input_ids", "text") if row.get(c) is not None), None) or \
                next((c for c, value in row.items() if isinstance(value, str)), None)
            if column is None:
                raise UserError(f"--data {data}: no column of text or tokens (columns: {', '.join(row)})")
            yield row[column]
    except UserError:
        raise
    except Exception as error:  # the libraries below raise a dozen kinds for "no such data set" and "not readable"
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(f"--data {data}: {first[0]} (there is stdlib; else a local file or folder, or a hub data set)") from error


def packed_rows(data: str, split: str, tokenizer, ctx: int, seen: "hashlib._Hash | None" = None) -> Iterator[torch.Tensor]:
    """One pass of rows [ctx] (int64): documents joined by the end-of-text token and cut, no padding, no BOS, as Pythia was trained.

    `seen`, a hash object, is fed every document used.
    """
    carry: list[int] = []
    for document in documents(data, split):
        if seen is not None:
            seen.update(str(document).encode(errors="surrogatepass"))
        ids = document if not isinstance(document, str) else tokenizer(document, add_special_tokens=False).input_ids
        carry += [*ids, tokenizer.eos_token_id]
        for start in range(0, len(carry) - ctx + 1, ctx):
            yield torch.tensor(carry[start:start + ctx])
        carry = carry[len(carry) // ctx * ctx:]


def heldout_rows(data: str, tokenizer, ctx: int, n: int) -> tuple[torch.Tensor, str]:
    """([n,ctx] evaluation rows, SHA-256 of the documents they came from). Raises UserError if the held-out side is shorter."""
    seen = hashlib.sha256()
    rows = list(itertools.islice(packed_rows(data, "heldout", tokenizer, ctx, seen), n))
    if len(rows) < n:
        raise UserError(f"--eval-seqs {n}: the held-out side of {data} holds {len(rows)} sequences of {ctx} tokens"
                        + (" (too short for one sequence)" if not rows else ""))
    return torch.stack(rows), seen.hexdigest()


def train_rows(data: str, tokenizer, ctx: int, batch: int) -> Iterator[torch.Tensor]:
    """Batches [batch,ctx] of the training side, pass after pass without end."""
    while True:
        rows = packed_rows(data, "train", tokenizer, ctx)
        first = next(rows, None)
        if first is None:
            raise UserError(f"--data {data}: the training side is too short for one sequence of {ctx} tokens")
        rows = itertools.chain([first], rows)
        while chunk := list(itertools.islice(rows, batch)):
            yield torch.stack(chunk)
