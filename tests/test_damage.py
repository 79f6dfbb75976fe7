"""What is read back is checked: a damaged SAE or checkpoint is set aside and made again, damaged results are
one line.
"""

import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys

import zygote
from helpers import ROOT, contents, one_line, script
from transport_geometry.errors import Damaged
from transport_geometry.records import store
from transport_geometry.records.results import load_results
from transport_geometry.records.store import LOCK
from transport_geometry.records.tables import as_npz, read_npz

import pytest
import torch
from safetensors.torch import load_file, save

SIZE = "--eval-seqs 6 --ctx 64".split()
GRID = [*"--models stdlib-s --k 2,4 --tokens 6k --save-tokens".split(), *SIZE]


def expb(folder, *arguments, **how):
    folders = ["--out", folder / "out", "--cache", folder / "cache"]
    return script("expb.py", *GRID, *folders, *arguments, setup=zygote.CHECKPOINTS + zygote.UNDRAWN, **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    expb(folder)
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run killed in the midst of training, and its checkpoints."""
    folder, steps = tmp_path_factory.mktemp("half"), 40
    while not list(folder.rglob("checkpoint.pt")):
        expb(folder, check=-9, kill=steps)
        steps -= 3
    return folder


def flip(path: pathlib.Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


def weight(path: pathlib.Path) -> None:
    """One bit of one number of b_dec, in a file that is as well-formed as before: R^2 .2307 became .2256."""
    tensors = load_file(path)
    tensors["b_dec"][3] *= 2
    path.write_bytes(save(tensors))


def other_k(path: pathlib.Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"k": 1}))


def half_of(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name, harm",
    [
        ("sae.safetensors", weight),
        ("cfg.json", other_k),
        ("cfg.json", pathlib.Path.unlink),
        ("provenance.json", lambda path: flip(path, 0.5)),
    ],
)
def test_a_damaged_sae_is_set_aside_and_made_again(whole, tmp_path, name, harm):
    """By name it is refused."""
    shutil.copytree(whole / "cache", tmp_path / "cache")
    victim = sorted((tmp_path / "cache").iterdir())[0]
    harm(victim / name)
    harmed = contents(victim)
    command = ["--models", "stdlib-s", "--sae", victim, *SIZE, "--out", tmp_path / "named"]
    assert f"{victim.name}: {name}" in script("expb.py", *command, check=2).stderr
    printed = expb(tmp_path).stdout
    aside = tmp_path / "cache" / f"{victim.name}.damaged"
    assert f"{victim / name}: " in printed and f"set aside as {aside.name}, trained again" in printed
    assert contents(aside) == harmed
    shutil.rmtree(aside)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("harm", [lambda path: flip(path, 0.6), lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_is_set_aside_and_training_starts_anew(whole, half, tmp_path, harm):
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    checkpoint = next(tmp_path.rglob("checkpoint.pt"))
    harm(checkpoint)
    printed = expb(tmp_path).stdout
    aside = next(tmp_path.rglob("checkpoint*damaged*"))
    assert f"{checkpoint}: " in printed and f"set aside as {aside.name}; training starts anew" in printed
    aside.unlink()
    assert contents(tmp_path) == contents(whole)


def test_a_checkpoint_runs_no_code(whole, half, tmp_path):
    """Even one whose checksum somebody made right."""
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    checkpoint = next(tmp_path.rglob("checkpoint.pt"))
    code = pickle.dumps(Code(str(tmp_path / "ran")))
    assert pickle.loads(code) is None and (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    torch.save(Code(str(tmp_path / "ran")), tmp_path / "code.pt")
    store.put(checkpoint.parent / store.PROVENANCE, {"checkpoint.pt": (tmp_path / "code.pt").read_bytes()})
    printed = expb(tmp_path).stdout
    assert "damaged" in printed and "training starts anew" in printed and not (tmp_path / "ran").exists()


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({self.path!r}, 'w')",)


def edit(path: pathlib.Path) -> None:
    """One number of one SAE."""
    row = next(line for line in path.read_text().splitlines() if ",base," in line)
    path.write_text(path.read_text().replace(row.split(",")[11], "0.99"))


@pytest.mark.parametrize(
    "name, harm",
    [
        ("conditions.csv", edit),
        ("sequences.npz", lambda path: flip(path, 0.7)),
        ("tokens.npz", half_of),
        ("run.json", lambda path: (path.unlink(), path.mkdir())),
    ],
)
def test_damaged_or_edited_results_are_one_line(whole, tmp_path, name, harm):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "out" / name
    harm(path)
    before = contents(tmp_path)
    for arguments in (["--from", tmp_path / "out"], []):
        assert one_line(expb(tmp_path, *arguments, check=2)).startswith(f"expb.py: {path}: ")
    assert contents(tmp_path) == before


def test_a_verdict_about_other_rows_is_not_written_over(whole, tmp_path):
    shutil.copytree(whole / "out", tmp_path / "out")
    verdict = tmp_path / "out/verdict.json"
    verdict.write_text(re.sub(r'("rows_sha256": ")[0-9a-f]{64}', r"\g<1>" + "0" * 64, verdict.read_text()))
    refused = expb(tmp_path, "--from", tmp_path / "out", check=2).stderr
    assert "verdict.json is about other rows (SHA-256 000000000000" in refused
    verdict.unlink()
    expb(tmp_path, "--from", tmp_path / "out")
    assert (tmp_path / "out/verdict.json").read_bytes() == (whole / "out/verdict.json").read_bytes()


def test_rows_and_sums_are_of_the_same_conditions(whole, tmp_path):
    shutil.copytree(whole / "out", tmp_path / "out")
    sums = read_npz(tmp_path / "out/sequences.npz")
    turned = as_npz({name: value[::-1] for name, value in sums.items()})
    store.put(tmp_path / "out/run.json", {"sequences.npz": turned})
    with pytest.raises(Damaged, match="other conditions"):
        load_results(tmp_path / "out")


BOUND = f"""{zygote.UNDRAWN}
import ctypes, os
if os.geteuid() == 0:  # permissions bind root once it has given up its capabilities
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0
"""


@pytest.mark.skipif(os.geteuid() == 0 and sys.platform != "linux", reason="permissions do not bind root")
def test_a_cache_that_is_only_read_serves_what_it_has(whole, tmp_path):
    """A colleague's cache: nothing to train, so nothing to write."""
    cache = pathlib.Path(shutil.copytree(whole / "cache", tmp_path / "cache"))
    # of a run that was killed, or trains another
    (cache / f".{next(cache.iterdir()).name}{LOCK}").touch()
    before = contents(cache)
    for path in [*cache.rglob("*"), cache]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    command = [*GRID, "--cache", cache]
    script("expb.py", *command, "--out", tmp_path / "out", setup=BOUND)
    assert contents(tmp_path / "out") == contents(whole / "out") and contents(cache) == before
    for more, words in ((["--seeds", "1"], "--cache"), (["--out", cache / "out"], "--out")):
        line = one_line(script("expb.py", *command, "--out", tmp_path / "new", *more, setup=BOUND, check=2))
        assert words in line and "not writable (Permission denied)" in line
    victim = next(path for path in cache.iterdir() if path.is_dir())
    (victim / "sae.safetensors").chmod(0)
    done = script("expb.py", *command, "--out", tmp_path / "unreadable", setup=BOUND, check=2)
    assert "Permission denied" in done.stderr and "Traceback" not in done.stderr


GONE = """
import shutil, sys
from transport_geometry.running import run
load_sae = run.load_sae  # to evaluate it: trained it is, or was
def vanish(*a):
    shutil.rmtree(sys.argv[sys.argv.index("--cache") + 1], ignore_errors=True)
    return load_sae(*a)
run.load_sae = vanish
"""


def test_a_cache_that_goes_away_is_one_line(whole, tmp_path):
    shutil.copytree(whole / "cache", tmp_path / "cache")
    command = [*GRID, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    done = script("expb.py", *command, setup=GONE, check=2)
    said = done.stderr.replace("\r", "\n").splitlines()
    assert [line.startswith("expb.py: ") for line in said].count(True) == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_locale_without_our_letters(whole, tmp_path):
    shutil.copytree(whole / "out", tmp_path / "out")
    environment = dict(PATH="/usr/bin:/bin", PYTHONPATH=str(ROOT), LC_ALL="POSIX")
    environment |= dict(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    command = [sys.executable, str(ROOT / "expb.py"), "--from", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=ROOT)
    assert done.returncode == 0 and b"---" in done.stdout, done.stderr.decode(errors="replace")[-2000:]
    before, after = contents(whole / "out"), contents(tmp_path / "out")
    drawn = {name for name in before if name.endswith((".png", ".html"))}  # here, and not there: see `expb`
    assert {name for name in before if after[name] != before[name]} == drawn and after.keys() == before.keys()
