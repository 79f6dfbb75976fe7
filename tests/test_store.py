"""Files that outlive a run: all of a change or nothing of it, at whatever moment it is killed; nothing of a
user's touched.
"""

import os
import pathlib
import shutil
import stat
import subprocess
import sys
import threading

import helpers
import zygote
from helpers import ROOT, process
from transport_geometry.errors import Damaged, Fault, UserError
from transport_geometry.records import store
from transport_geometry.records.results import gather, open_output
from transport_geometry.records.tables import as_npz
from transport_geometry.saes.sae import save_sae, tied_init

import numpy as np
import pytest
import torch

RECORD = store.RUN


class Killed(BaseException):
    """As SIGKILL: nothing that handles exceptions runs after it (see `dies`)."""


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return helpers.contents(folder, but="")  # the records too


def dies(monkeypatch, moment: int, act) -> bool:
    """True where `act` ends. Else the process died before its `moment`-th step that the disk would see, and
    did nothing more.
    """
    steps = iter(range(10**6))

    def dying(function):
        def step(*args, **kwargs):
            if next(steps) >= moment:
                raise Killed
            return function(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        for owner, name in zygote.STEPS:
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            act()
        except Killed:
            return False
    return True


OLD = {"a.csv": b"old a", "b.npz": b"old b", "gone.csv": b"old c"}
NEW = {"a.csv": b"new a", "b.npz": b"new b", "gone.csv": None, "more.csv": b"new d"}


@pytest.mark.parametrize("old, twice", [(OLD, False), (OLD, True), ({}, False)])
def test_a_change_killed_at_any_step_is_whole_or_not_at_all(tmp_path, monkeypatch, old, twice):
    """twice: killed again while the next process puts in order what the first left."""
    new, seen = {name: content for name, content in NEW.items() if content or old}, set()
    for moment in range(100):
        folder = tmp_path / str(moment)
        store.put(folder / RECORD, old, colour="old")
        finished = dies(monkeypatch, moment, lambda: store.put(folder / RECORD, new, colour="new"))
        for again in range(40 if twice else 0):
            if dies(monkeypatch, again, lambda: store.settle(folder / RECORD)):
                break
        store.settle(folder / RECORD)
        files = {name: (folder / name).read_bytes() for name in store.written(folder / RECORD)}
        assert files in (old, {name: content for name, content in new.items() if content}), moment
        assert (store.load(folder / RECORD)["colour"] == "new") == (files != old)
        assert set(contents(folder)) == {*files, RECORD}, moment  # and no temporary file is left
        assert all(store.checked(folder / RECORD, name) for name in files)
        seen.add(files == old)
        if finished:
            break
    assert finished and moment > 8 and seen == {False, True}


def test_what_is_not_as_it_was_written_is_refused(tmp_path):
    store.put(tmp_path / RECORD, {"a.csv": b"some bytes", "b.csv": b"more"}, settings={"k": [4]})
    store.checked(tmp_path / RECORD, "a.csv")
    for change in (b"some bytez", b"", b"some bytes "):
        (tmp_path / "a.csv").write_bytes(change)
        with pytest.raises(Damaged, match="a.csv: not as it was written"):
            store.checked(tmp_path / RECORD, "a.csv")
    (tmp_path / "a.csv").unlink()
    with pytest.raises(Damaged, match="a.csv: No such file"):
        store.checked(tmp_path / RECORD, "a.csv")
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(Damaged, match="a.csv: Is a directory"):
        store.checked(tmp_path / RECORD, "a.csv")
    (tmp_path / "mine.csv").write_bytes(b"mine")
    with pytest.raises(Damaged, match="not written by this program"):
        store.checked(tmp_path / RECORD, "mine.csv")


def test_every_flipped_bit_of_a_record_is_seen(tmp_path):
    """Or changes nothing: a blank of another kind."""
    store.put(tmp_path / RECORD, {"a.csv": b"x"}, settings={"k": [4], "models": ["s"]}, seconds=None)
    whole, before = (tmp_path / RECORD).read_bytes(), store.load(tmp_path / RECORD)
    seen = 0
    for i in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[i // 8] ^= 1 << i % 8
        (tmp_path / RECORD).write_bytes(flipped)
        try:
            assert store.load(tmp_path / RECORD) == before, i
        except Damaged:
            seen += 1
    assert seen > 0.8 * 8 * len(whole)
    for text in ("", "[]", "null", "3", "{}", '{"settings": {}}', "[" * 10**5, "\0"):
        (tmp_path / RECORD).write_text(text)
        with pytest.raises(Damaged):
            store.load(tmp_path / RECORD)


def test_a_file_that_a_user_changed_or_put_there_is_kept(tmp_path, capsys):
    store.put(tmp_path / RECORD, {"report.md": b"ours", "plot.png": b"ours"})
    (tmp_path / "report.md").write_bytes(b"ours, with notes")
    (tmp_path / "new.csv").write_bytes(b"theirs")
    (tmp_path / "plot.png").unlink()
    store.put(tmp_path / RECORD, {"report.md": b"again", "new.csv": b"ours too", "plot.png": b"again"})
    store.put(tmp_path / RECORD, {"report.md": b"ours", "new.csv": None})
    assert "report.md was changed by someone else: kept as report.kept.md" in capsys.readouterr().out
    (tmp_path / "report.md").write_bytes(b"notes again")
    store.remove(tmp_path / RECORD)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        "report.kept.md": b"ours, with notes",
        "new.kept.csv": b"theirs",
        "report.kept-2.md": b"notes again",
    }


def test_fresh_removes_what_runs_wrote_and_nothing_else(tmp_path):
    """holiday.png and .rankings/ went, once."""
    for name in ("holiday.png", "notes.txt", ".rankings/list", "unlisted.csv"):
        store.write(tmp_path / name, b"mine")
    theirs = contents(tmp_path)
    for fresh in (False, True):
        open_output(tmp_path, {"k": [1]}, fresh)
        store.put(tmp_path / RECORD, {"conditions.csv": b"1", "learning.png": b"2"}, settings={"k": [1]})
        store.put(tmp_path / ".rank1" / RECORD, {"conditions.csv": b"1"}, settings={"k": [1]})
    with pytest.raises(UserError, match=r"k: there \[1\], here \[2\]"):
        open_output(tmp_path, {"k": [2]}, fresh=False)
    assert contents(tmp_path).items() > theirs.items() and (tmp_path / "conditions.csv").exists()
    open_output(tmp_path, {"k": [2]}, fresh=True)
    left = contents(tmp_path)
    assert set(left) == {*theirs, RECORD, store.LOCK} and left.items() > theirs.items()
    store.release(tmp_path)


@pytest.mark.parametrize("name", ["../mine", "{tmp}/mine", "..", "", "run.json", "below/mine"])
@pytest.mark.parametrize("part", ["files", "coming"])
def test_a_record_speaks_of_its_own_folder_only(tmp_path, part, name):
    """Results are shared: a stranger's record must not have --fresh, or a mere resume, reach for other
    files.
    """
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    name = name.replace("{tmp}", str(tmp_path))
    listed = {name: store.sha256(tmp_path / "mine")}
    store._write_record(tmp_path / "out" / RECORD, {"files": {}, "coming": {}, part: listed})
    before = contents(tmp_path)
    for act in (store.load, store.settle, store.remove, store.written):
        with pytest.raises(Damaged, match="not beside it"):
            act(tmp_path / "out" / RECORD)
    assert contents(tmp_path) == before


def test_a_copy_without_hidden_files_is_still_the_old_results(tmp_path, monkeypatch):
    store.put(tmp_path / RECORD, {"a.csv": b"old"})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(store, "_move_in", lambda record: (_ for _ in ()).throw(Killed))
        store.put(tmp_path / RECORD, {"a.csv": b"new"})
    store._temporary(tmp_path / "a.csv").unlink()
    store.settle(tmp_path / RECORD)
    assert store.checked(tmp_path / RECORD, "a.csv").read_bytes() == b"old"


def test_what_may_not_be_read_is_not_damaged(tmp_path, monkeypatch):
    """A colleague's file without permission, a network file system that is away: nothing to set aside."""
    store.put(tmp_path / RECORD, {"a.csv": b"old"})
    monkeypatch.setattr(
        store, "sha256", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(UserError, match="a.csv: Permission denied") as caught:
        store.checked(tmp_path / RECORD, "a.csv")
    assert not isinstance(caught.value, Damaged)


def test_a_folder_with_results_that_nobody_lists_is_refused(tmp_path):
    (tmp_path / "report.md").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(UserError, match="report.md, which no run.json lists"):
            open_output(tmp_path, {}, fresh)
    # of another program, or an older version of this one
    (tmp_path / RECORD).write_text('{"settings": {}, "command": []}')
    for fresh in (False, True):
        with pytest.raises(UserError, match="run.json: not a record of this program"):
            open_output(tmp_path, {}, fresh)
    assert (tmp_path / "report.md").read_text() == "mine"
    store.release(tmp_path)
    store.put(tmp_path / "out" / RECORD, {"conditions.csv": b"1"}, settings={})
    (tmp_path / "out/deltas.csv").write_text("mine")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="deltas.csv, which no run.json lists"):
        open_output(tmp_path / "out", {}, fresh=True)
    assert contents(tmp_path / "out").items() >= before.items()  # refused before anything is removed
    store.release(tmp_path / "out")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("mine"),
        lambda path: path.symlink_to(path.parent / "else"),
        lambda path: shutil.copytree(path.parent / "else", path),
    ],
)
def test_a_rank_folder_that_is_none_is_left_alone(tmp_path, make):
    (tmp_path / "else").mkdir()
    (tmp_path / "else/mine").write_text("mine")
    make(tmp_path / ".rank0")
    with pytest.raises(UserError, match=".rank0: not what a rank of this program left"):
        gather(tmp_path, {})
    with pytest.raises(UserError, match=".rank0: not what a rank of this program left"):
        open_output(tmp_path, {}, fresh=True)
    assert os.path.lexists(tmp_path / ".rank0") and (tmp_path / "else/mine").read_text() == "mine"
    store.release(tmp_path)


def test_the_umask_decides_who_reads(tmp_path):
    before = os.umask(0o022)
    try:
        save_sae(tmp_path / "sae", tied_init(4, 8, 2, 0, torch.zeros(4)), {"k": 2})
        store.put(tmp_path / RECORD, {"c.npz": as_npz({"x": np.ones(3)})})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()} == {0o644}


def test_a_write_that_fails_leaves_the_old_and_says_so(tmp_path):
    store.put(tmp_path / RECORD, {"a.csv": b"old"})
    before = contents(tmp_path)

    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(Fault, match="cannot be written .No space left on device"):
        store.put(tmp_path / RECORD, {"b.csv": b"new", "a.csv": full})
    assert contents(tmp_path) == before
    with pytest.raises(Fault):
        store.write(tmp_path / "a.csv", full)
    assert contents(tmp_path) == before


LIMITED = """
import contextlib, pathlib, resource, sys
from transport_geometry.records import store
from transport_geometry.errors import run_script
from transport_geometry.records.tables import as_npz
import numpy, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # a disk that takes no more
for content in (
    b"x" * 9000,
    lambda file: torch.save(torch.zeros(9000), file),
    as_npz({"x": numpy.random.default_rng(0).random(9000)}),
):
    try:
        run_script(lambda: store.put(pathlib.Path(sys.argv[1]) / "run.json", {"a.bin": content}))
    except SystemExit as end:
        assert end.code == 1
"""


def test_a_full_disk_is_one_line(tmp_path):
    """Of bytes, and of what torch and numpy write themselves.

    numpy 2.0 leaves a file that it could not write to the garbage collector, which has a word of its own.
    """
    lines = process("-c", LIMITED, tmp_path).stderr.splitlines()
    said = [line for line in lines if line.startswith("-c: ")]
    assert len(said) == 3 and all("cannot be written" in line for line in said) and not contents(tmp_path)


# ------------------------------------------------------------------------------------ one writer at a time
HOLD = """
import pathlib, sys
from transport_geometry.records import store
store.claim(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def hold(folder: pathlib.Path) -> subprocess.Popen:
    """A process that holds the folder until it hears something."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_one_writer_at_a_time_and_a_dead_one_holds_nothing(tmp_path):
    first = hold(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {first.pid} on "):
        store.claim(tmp_path)
    first.kill()
    first.communicate()
    assert (tmp_path / store.LOCK).exists()
    store.claim(tmp_path)
    store.claim(tmp_path)  # what this process holds it may claim again
    store.release(tmp_path)
    assert not (tmp_path / store.LOCK).exists()
    hold(tmp_path).communicate("")
    assert not (tmp_path / store.LOCK).exists()  # its end gave it up


def test_who_waits_goes_on_when_the_other_ends(tmp_path):
    first, waited = hold(tmp_path), []

    def wait(who: str) -> None:
        waited.append(who)
        threading.Timer(0.3, first.communicate, [""]).start()

    store.claim(tmp_path, wait=wait)
    assert len(waited) == 1 and f"process {first.pid} on" in waited[0] and (tmp_path / store.LOCK).exists()
    store.release(tmp_path)
