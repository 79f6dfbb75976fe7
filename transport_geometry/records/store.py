"""Files that outlive a run: written whole or not at all, checked when they are read again, one writer at a
time.

A folder that a run writes has a record, `run.json` of results or `provenance.json` of a cached SAE. It holds
facts (settings, versions, ...), and with them

    files   {name: SHA-256} of every file that a run put there
    coming  {name: SHA-256; null: to be removed} of a change that is being made
    check   the SHA-256 of the rest, so that an edit by hand is seen

`put` changes several files as one: the new ones are written beside the old, the record says that they are
coming, then they take their places. Killed at any moment, the next `settle` finds all of the old files or all
of the new ones. What is not in the record is somebody else's: it is not removed, and renamed before its name
is taken.

In this module `record` is the path of a record, `content` the bytes of a file or what writes them, and
`digest` a SHA-256 in hex.
"""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transport_geometry.errors import Damaged, Fault, UserError, reading
from transport_geometry.records.tables import Content, as_json

import filelock

RUN, PROVENANCE = "run.json", "provenance.json"  # the records
UNFINISHED = ".unfinished-tg"  # no file of a user's ends so
LOCK = ".transport-geometry.lock"


# ------------------------------------------------------------------------------------------------- one file
@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    """Turn the error of a disk that is full or gone into a Fault. (torch and safetensors raise
    RuntimeError.)
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        strerror = error.strerror if isinstance(error, OSError) else None
        reason = strerror or " ".join(str(error).split())[:200]
        raise Fault(f"{path}: cannot be written ({reason})") from error


def sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: pathlib.Path) -> None:
    """Write the names in a folder to the disk, as fsync does the bytes of files, against a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}{UNFINISHED}")


def _write_temporary(path: pathlib.Path, content: Content) -> pathlib.Path:
    """Write the content under a hidden name beside `path`, and to the disk. With an ordinary open, so that
    the umask decides who may read it.
    """
    temporary = _temporary(path)
    with temporary.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def write(path: pathlib.Path, content: Content) -> None:
    """One file, whole or not at all. Raises Fault."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(_write_temporary(path, content), path)
            _sync(path.parent)
        finally:
            _temporary(path).unlink(missing_ok=True)


def set_aside(path: pathlib.Path, word: str) -> pathlib.Path:
    """Rename to a name that nothing has, and return it: report.kept.md, report.kept-2.md, ..."""
    stem, suffix = (path.name, "") if path.is_dir() else (path.stem, path.suffix)
    names = (path.with_name(f"{stem}.{word}{f'-{i}' if i > 1 else ''}{suffix}") for i in itertools.count(1))
    return path.rename(next(name for name in names if not os.path.lexists(name)))


# ------------------------------------------------------------------------------------ a folder and its record
def _check(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load(record: pathlib.Path) -> dict[str, Any]:
    """What a record holds, without its check; {} where there is none. Raises Damaged: edited, not one of
    ours, or about files elsewhere.
    """
    if not os.path.lexists(record):
        return {}
    with reading(record):
        facts = json.loads(record.read_text(encoding="utf-8"))
        check = facts.pop("check", None)
        if check is None:
            raise Damaged(f"{record}: not a record of this program, or one of an older version")
        if check != _check(facts):
            raise Damaged(f"{record}: damaged, or edited by hand")
        for name in {**facts.get("files", {}), **facts.get("coming", {})}:
            if name in ("", "..", record.name) or name != pathlib.PurePath(name).name:
                raise Damaged(f"{record}: names a file that is not beside it")
    return facts


def _write_record(record: pathlib.Path, facts: Mapping[str, Any]) -> None:
    write(record, as_json({**facts, "check": _check(facts)}))


def put(record: pathlib.Path, contents: Mapping[str, Content | None], **facts: Any) -> None:
    """Write files of the record's folder (None: remove), and facts of the record, as one change. Raises
    Fault, Damaged.

    A file that lies there and is not the one that was put there is the user's: it is kept under another name.
    """
    settle(record)
    before = load(record)
    coming: dict[str, str | None] = {}
    with _writing(record.parent):
        record.parent.mkdir(parents=True, exist_ok=True)
        try:
            for name, content in contents.items():
                path = record.parent / name
                coming[name] = None if content is None else sha256(_write_temporary(path, content))
            _write_record(record, before | facts | {"files": before.get("files", {}), "coming": coming})
        except BaseException:
            if load(record) == before:  # nothing was promised
                _clear(record.parent)
            raise
        _move_in(record)


def settle(record: pathlib.Path) -> None:
    """Finish or roll back an interrupted `put`. Raises Fault, Damaged."""
    with _writing(record.parent):
        if record.parent.is_dir():
            if load(record).get("coming"):
                _move_in(record)
            _clear(record.parent)


def _move_in(record: pathlib.Path) -> None:
    """Move the files that are coming to their names."""
    facts = load(record)
    files = facts.get("files", {})
    for name, digest in facts.pop("coming").items():
        path, temporary = record.parent / name, _temporary(record.parent / name)
        if digest is None or temporary.exists():
            if os.path.lexists(path) and not _has_digest(path, files.get(name)):
                print(f"{path} was changed by someone else: kept as {set_aside(path, 'kept').name}")
            if digest is None:
                path.unlink(missing_ok=True)
            else:
                os.replace(temporary, path)
        elif not _has_digest(path, digest):  # neither there nor to come: a copy that left hidden files behind
            continue
        files[name] = digest
    files = {name: digest for name, digest in sorted(files.items()) if digest}
    _sync(record.parent)
    _write_record(record, facts | {"files": files})


def _has_digest(path: pathlib.Path, digest: str | None) -> bool:
    return path.is_file() and not path.is_symlink() and sha256(path) == digest


def _clear(folder: pathlib.Path) -> None:
    """Remove what a killed write left half done."""
    for path in folder.glob(f".*{UNFINISHED}"):
        if not path.is_dir():
            path.unlink(missing_ok=True)


def checked(record: pathlib.Path, name: str) -> pathlib.Path:
    """The path of a file that is to be read again, its bytes the ones that were put there.

    Raises Damaged, and UserError where it may not be read.
    """
    path, facts = record.parent / name, load(record)
    wanted = {facts.get("files", {}).get(name), facts.get("coming", {}).get(name)} - {None}
    if not wanted:
        raise Damaged(f"{path}: not in {record.name}, so not written by this program")
    with reading(path):
        found = sha256(path)
    if found not in wanted:
        raise Damaged(
            f"{path}: not as it was written (SHA-256 {found[:12]}, {record.name} says {min(wanted)[:12]})"
        )
    return path


def written(record: pathlib.Path) -> list[str]:
    """Names of the files that were put in the record's folder."""
    return sorted(load(record).get("files", {}))


def remove(record: pathlib.Path) -> None:
    """Remove all that was put in the record's folder, and the record; what was changed since stays under
    another name.
    """
    settle(record)
    put(record, dict.fromkeys(written(record)))
    with _writing(record):
        record.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------ one writer at a time
def writable(folder: pathlib.Path, flag: str) -> None:
    """Raises UserError before any work is done for a folder that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{flag} {folder}: not writable ({error.strerror})") from error


_held: dict[pathlib.Path, filelock.FileLock] = {}


def claim(folder: pathlib.Path, name: str = LOCK, wait: Callable[[str], object] | None = None) -> None:
    """This process alone writes here, until `release` or its end; a dead process holds nothing. name: of the
    lock, in that folder.

    Another holder: wait(who) is called and its end awaited, or, without `wait`, UserError names it.
    """
    path = folder.resolve() / name
    if path in _held:
        return
    with _writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path, mode=0o666)  # a colleague may find it where a killed run left it
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            if wait is None:
                raise UserError(f"{folder}: in use by {_holder(path)}") from None
            wait(_holder(path))
            lock.acquire()
        path.write_text(
            f"process {os.getpid()} on {socket.gethostname()}: {' '.join(sys.argv)}\n", encoding="utf-8"
        )
        _held[path] = lock


def _holder(path: pathlib.Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").strip() or "another run"
    return "another run"


@atexit.register
def release(folder: pathlib.Path | None = None, name: str = LOCK) -> None:
    """Give up the lock of one folder, or all that this process holds."""
    for path in [folder.resolve() / name] if folder else list(_held):
        if lock := _held.pop(path, None):
            # while it is held: who waits for it sees that it has no name, and opens it anew
            path.unlink(missing_ok=True)
            lock.release()
