"""Kill runs at every step that the disk would see and at random moments; damage every kind of file that is
read again.

    python bench/attacks.py kills 200 [SEED]           # over the three scripts, and two ranks under torchrun (`ranks 30`: these alone)
    python bench/attacks.py corruptions 300 [SEED]
    python bench/attacks.py pairs 8                    # two runs in one --out at the same time

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

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import zygote  # noqa: E402
from transport_geometry import results, store
from transport_geometry.tables import markdown, read_npz

GRID = ["--tokens", "6k", "--eval-seqs", "6", "--ctx", "32", "--device", "cpu"]
RUNS = {
    "expa.py": ["--models", "stdlib-s,stdlib-m", "--k", "2", "--seeds", "0", *GRID, "--tokens", "2k,6k"],
    "expb.py": ["--models", "stdlib-s@1,stdlib-s", "--k", "2,4", *GRID, "--save-tokens"],
    "expc_fisher.py": ["--models", "stdlib-s", "--k", "2,4", *GRID],
}
CHECKPOINTS = (
    zygote.CHECKPOINTS
    + """import expa, expb, expc_fisher
expa.N_RESAMPLES = expb.N_RESAMPLES = expc_fisher.N_RESAMPLES = 40
"""
)  # few, for speed


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


class Attack:
    """A script's unbroken run, and folders for one attack after the other."""

    def __init__(self, script: str, folder: pathlib.Path, setup: str = CHECKPOINTS):
        self.script, self.whole, self.setup = script, folder / "whole", setup
        done = self.go(self.whole, kill=10**6)
        assert done.returncode == 0, done.stderr
        self.steps = int(done.stderr.split()[-2])  # that the disk sees
        self.truth = {name: contents(self.whole / name) for name in ("out", "cache")}

    def go(self, where: pathlib.Path, **how) -> subprocess.CompletedProcess:
        return zygote.run(
            self.script,
            *RUNS[self.script],
            "--out",
            where / "out",
            "--cache",
            where / "cache",
            setup=self.setup,
            **how,
        )

    def wrong(self, where: pathlib.Path, kept=()) -> str:
        """What differs from the unbroken run: nothing, it should be. kept: prefixes of names that may be
        there besides.
        """
        for name, truth in self.truth.items():
            found = {
                file: content
                for file, content in contents(where / name).items()
                if not any(word in file for word in kept)
            }
            if found != truth:
                return f"{name}: {sorted(file for file in {*found, *truth} if found.get(file) != truth.get(file))}"
        return ""


# ---------------------------------------------------------------------------------------------------- kills
def only_ranks(n: int, rng: random.Random, folder: pathlib.Path):
    attack = Attack("expb.py", folder / "expb.py")
    for _ in range(n):
        yield ranks(attack, rng, folder / "again")


def kills(n: int, rng: random.Random, folder: pathlib.Path):
    attacks = [Attack(script, folder / script) for script in RUNS]
    for i in range(n):
        if i % 8 == 7:
            yield ranks(attacks[1], rng, folder / "again")
            continue
        attack, where, how = attacks[i % 3], folder / "again", []
        # a second kill meets what the first left, often while it puts that in order
        for _ in range(rng.choice((1, 1, 2, 3))):
            kind = rng.choice(("step", "step", "early", "time"))
            kill = {"step": rng.randrange(attack.steps), "early": rng.randrange(30)}.get(kind)
            attack.go(where, kill=kill, after=rng.uniform(0.1, 8) if kind == "time" else None)
            how.append(kind)
        done = attack.go(where)
        yield (
            f"{attack.script}, killed {len(how)} times",
            "traceback"
            if "Traceback" in done.stderr
            else done.stderr
            if done.returncode
            else attack.wrong(where),
        )
        shutil.rmtree(where)


def ranks(attack: Attack, rng: random.Random, where: pathlib.Path):
    """Two ranks under torchrun, one or both of them killed; then one process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {CHECKPOINTS.strip().replace(chr(10), '; ')}; import common, expb; common.run_script(expb.main)"
    script = where.parent / "ranks.py"
    script.write_text(code)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        str(script),
        *RUNS["expb.py"],
        "--out",
        str(where / "out"),
        "--cache",
        str(where / "cache"),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 90
    while (
        not list((where / "cache").glob("*/provenance.json"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
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
    done = attack.go(where)
    wrong = (
        "traceback" if "Traceback" in done.stderr else done.stderr if done.returncode else attack.wrong(where)
    )
    shutil.rmtree(where)
    return f"expb.py on two ranks, {'both' if both else 'one'} killed", wrong


def running(script: pathlib.Path) -> dict[int, str]:
    """{process: its rank, "" for torchrun} of what runs this script."""
    found = {}
    for task in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            # a dead one has none
            if task.name.isdecimal() and str(script).encode() in (task / "cmdline").read_bytes():
                found[int(task.name)] = dict(
                    pair.partition("=")[::2] for pair in (task / "environ").read_text().split("\0")
                ).get("RANK", "")
    return found


# ---------------------------------------------------------------------------------------------- corruptions
def damage(path: pathlib.Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    way = rng.choice(
        ("a bit", "a bit", "a bit", "a byte", "cut", "empty", "garbage", "longer", "a folder", "gone")
    )
    place = rng.randrange(len(content))
    path.unlink()
    if way == "a folder":
        path.mkdir()
    elif way != "gone":
        if way == "a bit":
            content[place] ^= 1 << rng.randrange(8)
        elif way == "a byte":
            content[place] = (content[place] + rng.randrange(1, 256)) % 256
        path.write_bytes(
            {
                "cut": content[:place],
                "empty": b"",
                "garbage": rng.randbytes(len(content)),
                "longer": content + b"\n1",
            }.get(way, content)
        )
    return way


def corruptions(n: int, rng: random.Random, folder: pathlib.Path):
    attacks = {script: Attack(script, folder / script) for script in RUNS}
    half = folder / "half"  # a run that was killed in the midst of training: its checkpoints
    for attack in attacks.values():
        steps = 2
        while len(list((half / attack.script / "cache").rglob("checkpoint.pt"))) < 1:
            shutil.rmtree(half / attack.script, ignore_errors=True)
            attack.go(half / attack.script, kill=steps)
            steps += 3
    parts = folder / "parts"  # and one whose second rank's share was not gathered yet
    shutil.copytree(attacks["expb.py"].whole, parts)
    settings, (rows, sums) = (
        store.load(parts / "out/run.json")["settings"],
        results.load_results(parts / "out"),
    )
    results.add_results(parts / "out/.rank1", settings, rows, sums, read_npz(parts / "out/tokens.npz"), {})
    for i in range(n):
        attack, where = attacks[list(RUNS)[i % 3]], folder / "again"
        state = rng.choice(("results", "results", "cache", "checkpoint", "parts", "verdict"))
        source = {"checkpoint": half / attack.script, "parts": parts}.get(state, attack.whole)
        attack = attacks["expb.py"] if state in ("parts", "verdict") else attack
        source = attack.whole if state == "verdict" else source
        shutil.copytree(source, where)
        below = {"results": "out", "parts": "out/.rank1", "verdict": "out"}.get(state, "cache")
        files = [
            p
            for p in (where / below).rglob("*")
            if p.is_file() and (state != "checkpoint" or p.name in ("checkpoint.pt", "provenance.json"))
        ]
        verdict = []
        if state == "cache":
            shutil.rmtree(where / "out")  # what is measured already does not ask for its SAE
        elif state == "verdict":
            shutil.copytree(attacks["expa.py"].whole / "out", where / "expa")
            files, verdict = [where / "expa/verdict.json"], ["--verdict", where / "expa/verdict.json"]
        path = rng.choice(files)
        way = damage(path, rng)
        again = (
            ["--from", where / "out"]
            if state in ("results", "verdict") and rng.random() < 0.7
            else [*RUNS[attack.script], "--out", where / "out"]
        )
        done = zygote.run(attack.script, *again, "--cache", where / "cache", *verdict, setup=CHECKPOINTS)
        said = [
            line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith(attack.script)
        ]
        if "Traceback" in done.stderr or done.returncode not in (0, 2):
            wrong = f"traceback: {done.stderr[-600:]}"
        elif done.returncode == 2:
            wrong = "" if len(said) == 1 else f"{len(said)} lines: {said}"
        else:
            wrong = attack.wrong(where, kept=(".kept", ".damaged", "expa/"))
            wrong = f"used: {wrong}" if wrong else ""
            if (
                not wrong
                and state == "cache"
                and way not in ("a bit", "a byte")
                and ".damaged" not in done.stdout
                and path.name != "sae.safetensors"
            ):
                wrong = "not said"
        kind = path.name if path.suffix != ".png" else "*.png"
        outcome = (
            "named, exit 2"
            if done.returncode
            else "made again"
            if "set aside" in done.stdout or "kept as" in done.stdout or way == "gone"
            else "same bytes"
        )
        yield f"{kind} ({state}): {outcome}", wrong and f"{way} of {path}: {wrong}"
        shutil.rmtree(where)


# ---------------------------------------------------------------------------------------------------- pairs
def pairs(n: int, rng: random.Random, folder: pathlib.Path):
    attack = Attack("expb.py", folder / "expb.py", setup="")
    for _ in range(n):
        where = folder / "again"
        command = [
            sys.executable,
            str(ROOT / "expb.py"),
            *RUNS["expb.py"],
            "--out",
            str(where / "out"),
            "--cache",
            str(where / "cache"),
        ]
        both = []
        for _ in range(2):
            both.append(
                subprocess.Popen(
                    command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
            )
            time.sleep(rng.uniform(0, 2))
        said = [process.communicate()[1] for process in both]
        status = sorted(process.returncode for process in both)
        refused = status == [0, 2] and any("in use by process" in text for text in said)
        yield (
            "two runs in one --out: one refused" if refused else "two runs in one --out: one after the other",
            "" if refused or status == [0, 0] else f"{status} {said}",
        )
        yield "... the bytes of one run", attack.wrong(where)
        shutil.rmtree(where)


def main() -> None:
    what, n, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    counted, bad = collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for i, (kind, wrong) in enumerate(
            {"kills": kills, "ranks": only_ranks, "corruptions": corruptions, "pairs": pairs}[what](
                n, random.Random(seed), pathlib.Path(folder)
            )
        ):
            counted[kind] += 1
            if wrong:
                bad.append((kind, wrong))
                print(f"{i}: {kind}: {wrong}", flush=True)
    print(
        markdown(
            [{"what": kind, "times": times} for kind, times in sorted(counted.items())], ["what", "times"]
        )
    )
    print(f"{sum(counted.values())} {what}, {len(bad)} wrong (seed {seed})")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
