"""Kill runs at every step that the disk would see and at random moments; damage every kind of file that is
read again.

    python bench/attacks.py kills 200 [SEED]      # over the three scripts, and two ranks under torchrun
    python bench/attacks.py ranks 30 [SEED]       # those alone
    python bench/attacks.py corruptions 300 [SEED]
    python bench/attacks.py pairs 8               # two runs in one --out at the same time

A killed run, once or several times in a row, must end by the same command in the bytes of the unbroken one,
with nothing left behind. A damaged file must be named in one line (exit 2), or set aside and made again with
the bytes of before. Prints a table; exit 1 where anything else happened.
"""

import collections
import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import bench
import zygote
from common import run_script
from helpers import contents
from transport_geometry.records import results, store
from transport_geometry.records.tables import markdown, read_npz

GRID = "--tokens 6k --eval-seqs 6 --ctx 32 --device cpu".split()
RUNS = {
    "expa.py": ["--models", "stdlib-s,stdlib-m", "--k", "2", "--seeds", "0", *GRID, "--tokens", "2k,6k"],
    "expb.py": ["--models", "stdlib-s@1,stdlib-s", "--k", "2,4", *GRID, "--save-tokens"],
    "expc_fisher.py": ["--models", "stdlib-s", "--k", "2,4", *GRID],
}
CHECKPOINTS = f"""{zygote.CHECKPOINTS}
import expa, expb, expc_fisher
expa.N_RESAMPLES = expb.N_RESAMPLES = expc_fisher.N_RESAMPLES = 40  # few, for speed
"""
RANK = """import sys
sys.path.insert(0, {root!r})
{setup}
import common
common.run_script(expb.main)
"""
WAYS = "a bit,a bit,a bit,a byte,cut,empty,garbage,longer,a folder,gone".split(",")
STATES = "results results cache checkpoint parts".split()
Finding = tuple[str, str]  # what was done, and what went wrong: nothing, it should be


class Attack:
    """A script's unbroken run, and folders for one attack after the other."""

    def __init__(self, script: str, folder: pathlib.Path, setup: str = CHECKPOINTS):
        self.script, self.whole, self.setup = script, folder / "whole", setup
        done = self.go(self.whole, kill=10**6)
        assert done.returncode == 0, done.stderr
        self.steps = int(done.stderr.split()[-2])  # that the disk sees
        self.truth = {name: contents(self.whole / name) for name in ("out", "cache")}

    def arguments(self, at: pathlib.Path) -> list[str]:
        """Of the run whose results and cache lie at this place."""
        return [*RUNS[self.script], "--out", str(at / "out"), "--cache", str(at / "cache")]

    def go(self, at: pathlib.Path, **how: Any) -> subprocess.CompletedProcess:
        """how: when it is killed, see `zygote.run`."""
        return zygote.run(self.script, *self.arguments(at), setup=self.setup, **how)

    def wrong(self, at: pathlib.Path, kept: tuple[str, ...] = ()) -> str:
        """What differs from the unbroken run. kept: words in names that may be there besides."""
        for name, truth in self.truth.items():
            found = {
                file: content
                for file, content in contents(at / name).items()
                if not any(word in file for word in kept)
            }
            if differ := sorted(file for file in {*found, *truth} if found.get(file) != truth.get(file)):
                return f"{name}: {differ}"
        return ""

    def wrong_after(self, done: subprocess.CompletedProcess, at: pathlib.Path) -> str:
        """The same, of a run that had to end well."""
        if "Traceback" in done.stderr:
            return "traceback"
        return done.stderr if done.returncode else self.wrong(at)


# ---------------------------------------------------------------------------------------------------- kills
def kills(n: int, scripts: list[str], rng: random.Random, folder: pathlib.Path) -> Iterator[Finding]:
    attacks, at = [Attack(script, folder / script) for script in scripts], folder / "again"
    for i in range(n):
        attack, how = attacks[i % len(attacks)], []
        if i % 8 == 7 and "expb.py" in scripts:
            yield ranks(attacks[scripts.index("expb.py")], rng, at)
            continue
        # a second kill meets what the first left, often while it puts that in order
        for _ in range(rng.choice((1, 1, 2, 3))):
            kind = rng.choice(("step", "step", "early", "time"))
            if kind == "time":
                attack.go(at, after=rng.uniform(0.1, 8))
            else:
                attack.go(at, kill=rng.randrange(attack.steps if kind == "step" else 30))
            how.append(kind)
        yield f"{attack.script}, killed {len(how)} times", attack.wrong_after(attack.go(at), at)
        shutil.rmtree(at)


def only_ranks(n: int, scripts: list[str], rng: random.Random, folder: pathlib.Path) -> Iterator[Finding]:
    attack = Attack("expb.py", folder / "expb.py")
    for _ in range(n):
        yield ranks(attack, rng, folder / "again")


def ranks(attack: Attack, rng: random.Random, at: pathlib.Path) -> Finding:
    """Two ranks under torchrun, one or both of them killed; then one process."""
    script = at.parent / "ranks.py"
    script.write_text(RANK.format(root=str(bench.ROOT), setup=CHECKPOINTS))
    torchrun = "-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0"
    process = subprocess.Popen(
        [sys.executable, *torchrun.split(), str(script), *attack.arguments(at)],
        cwd=bench.ROOT,
        env={**os.environ, "PYTHONPATH": str(bench.ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        if list((at / "cache").glob("*/provenance.json")):
            break
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 4))
    both = rng.random() < 0.5
    for pid, rank in running(script).items():
        if both or rank == "1":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
    while running(script):
        time.sleep(0.01)
    wrong = attack.wrong_after(attack.go(at), at)
    shutil.rmtree(at)
    return f"expb.py on two ranks, {'both' if both else 'one'} killed", wrong


def running(script: pathlib.Path) -> dict[int, str]:
    """{process: its rank, "" for torchrun} of what runs this script."""
    found = {}
    for task in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            # a dead one has none
            if task.name.isdecimal() and str(script).encode() in (task / "cmdline").read_bytes():
                pairs = (pair.partition("=") for pair in (task / "environ").read_text().split("\0"))
                found[int(task.name)] = {name: value for name, _, value in pairs}.get("RANK", "")
    return found


# ---------------------------------------------------------------------------------------------- corruptions
def damage(path: pathlib.Path, rng: random.Random) -> str:
    """-> the way in which the file was damaged."""
    content = bytearray(path.read_bytes())
    way, place = rng.choice(WAYS), rng.randrange(len(content))
    path.unlink()
    if way == "a bit":
        content[place] ^= 1 << rng.randrange(8)
    elif way == "a byte":
        content[place] = (content[place] + rng.randrange(1, 256)) % 256
    elif way == "cut":
        del content[place:]
    elif way == "empty":
        content.clear()
    elif way == "garbage":
        content[:] = rng.randbytes(len(content))
    elif way == "longer":
        content += b"\n1"
    if way == "a folder":
        path.mkdir()
    elif way != "gone":
        path.write_bytes(content)
    return way


def interrupted(attack: Attack, at: pathlib.Path) -> pathlib.Path:
    """A run that was killed in the midst of training: its checkpoints."""
    while not list((at / "cache").rglob("checkpoint.pt")):  # it may have gone on before it was killed
        shutil.rmtree(at, ignore_errors=True)
        attack.go(at, when=(at / "cache", "*/checkpoint.pt", 1))
    return at


def with_a_part(whole: pathlib.Path, at: pathlib.Path) -> pathlib.Path:
    """A finished run with a second rank's share, not gathered yet."""
    shutil.copytree(whole, at)
    rows, sums = results.load_results(at / "out")
    share = results.Measurements(rows, sums, read_npz(at / "out/tokens.npz"), {})
    results.add_results(at / "out/.rank1", store.load(at / "out/run.json")["settings"], share)
    return at


def corruptions(n: int, scripts: list[str], rng: random.Random, folder: pathlib.Path) -> Iterator[Finding]:
    attacks, at = {script: Attack(script, folder / script) for script in RUNS}, folder / "again"
    half = {script: interrupted(attack, folder / "half" / script) for script, attack in attacks.items()}
    parts = with_a_part(attacks["expb.py"].whole, folder / "parts")
    for i in range(n):
        state = rng.choice(STATES)
        script = "expb.py" if state == "parts" else list(RUNS)[i % 3]
        source = {"checkpoint": half[script], "parts": parts}.get(state, attacks[script].whole)
        shutil.copytree(source, at)
        if state == "cache":
            shutil.rmtree(at / "out")  # what is measured already does not ask for its SAE
        yield corruption(attacks[script], state, at, rng)
        shutil.rmtree(at)


def files_of(state: str, at: pathlib.Path) -> list[pathlib.Path]:
    """What is damaged in this state."""
    below = {"results": "out", "parts": "out/.rank1"}.get(state, "cache")
    files = [path for path in (at / below).rglob("*") if path.is_file()]
    if state == "checkpoint":
        return [path for path in files if path.name in ("checkpoint.pt", "provenance.json")]
    return files


def corruption(attack: Attack, state: str, at: pathlib.Path, rng: random.Random) -> Finding:
    """One file damaged, and the command that reads it."""
    path = rng.choice(files_of(state, at))
    way = damage(path, rng)
    arguments = attack.arguments(at)
    if state == "results" and rng.random() < 0.7:
        arguments = ["--from", str(at / "out"), "--cache", str(at / "cache")]
    done = zygote.run(attack.script, *arguments, setup=CHECKPOINTS)
    lines = done.stderr.replace("\r", "\n").splitlines()
    said = [line for line in lines if line.startswith(attack.script)]
    wrong = ""
    if "Traceback" in done.stderr or done.returncode not in (0, 2):
        wrong = f"traceback: {done.stderr[-600:]}"
    elif done.returncode == 2:
        wrong = "" if len(said) == 1 else f"{len(said)} lines: {said}"
    elif differs := attack.wrong(at, kept=(".kept", ".damaged")):
        wrong = f"used: {differs}"
    elif state == "cache" and path.name != "sae.safetensors" and ".damaged" not in done.stdout:
        wrong = "not said" if way not in ("a bit", "a byte") else ""
    outcome = "same bytes"
    if done.returncode:
        outcome = "named, exit 2"
    elif "set aside" in done.stdout or "kept as" in done.stdout or way == "gone":
        outcome = "made again"
    kind = path.name if path.suffix != ".png" else "*.png"
    return f"{kind} ({state}): {outcome}", wrong and f"{way} of {path}: {wrong}"


# ---------------------------------------------------------------------------------------------------- pairs
def pairs(n: int, scripts: list[str], rng: random.Random, folder: pathlib.Path) -> Iterator[Finding]:
    attack, at = Attack("expb.py", folder / "expb.py", setup=""), folder / "again"
    command = [sys.executable, str(bench.ROOT / "expb.py"), *attack.arguments(at)]
    for _ in range(n):
        both = []
        for _ in range(2):
            both.append(
                subprocess.Popen(
                    command, cwd=bench.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
            )
            time.sleep(rng.uniform(0, 2))
        said = [process.communicate()[1] for process in both]
        status = sorted(process.returncode for process in both)
        refused = status == [0, 2] and any("in use by process" in text for text in said)
        well = refused or status == [0, 0]
        yield (
            f"two runs in one --out: one {'refused' if refused else 'after the other'}",
            "" if well else f"{status} {said}",
        )
        yield "... the bytes of one run", attack.wrong(at)
        shutil.rmtree(at)


CAMPAIGNS = {"kills": kills, "ranks": only_ranks, "corruptions": corruptions, "pairs": pairs}


def main() -> None:
    parser = bench.parser_of(__doc__)
    parser.add_argument("what", choices=CAMPAIGNS)
    parser.add_argument("n", type=int)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--scripts", default=",".join(RUNS), help="that kills are over")
    args = parser.parse_args()
    counted: collections.Counter = collections.Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        campaign = CAMPAIGNS[args.what]
        found = campaign(args.n, args.scripts.split(","), random.Random(args.seed), pathlib.Path(folder))
        for i, (kind, problem) in enumerate(found):
            counted[kind] += 1
            if problem:
                wrong += 1
                print(f"{i}: {kind}: {problem}", flush=True)
    rows = [{"what": kind, "times": times} for kind, times in sorted(counted.items())]
    print(markdown(rows, ["what", "times"]))
    print(f"{sum(counted.values())} {args.what}, {wrong} wrong (seed {args.seed})")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    run_script(main)
