"""The scripts as their users run them, without importing torch for each: a process that has imported
everything forks one per command.

    done = run("expb.py", "--k", "8", "--out", folder)             # as subprocess.run: returncode, stdout, stderr
    done = run("expb.py", ..., kill=7)                             # dies by SIGKILL before its 7th step that the disk would see
"""

import atexit
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = (
    (os, "replace"),
    (os, "fsync"),
    (pathlib.Path, "unlink"),
    (pathlib.Path, "rename"),
    (pathlib.Path, "mkdir"),
    (pathlib.Path, "rmdir"),
)

# for `setup`: small chunks, and a checkpoint after each, so that there is something to kill and to damage
CHECKPOINTS = """
import itertools, types, sae
sae.CHUNK = 2048
sae.time = types.SimpleNamespace(monotonic=itertools.count(step=100.0).__next__, perf_counter=lambda: 0.0)
"""


def run(
    script: str, *arguments, kill: int | None = None, after: float | None = None, setup: str = ""
) -> subprocess.CompletedProcess:
    """kill: at this step; after: so many seconds from the start; setup: what the process executes before the
    script.
    """
    server, folder = _server()
    out, err = folder / "out", folder / "err"
    command = dict(
        script=script,
        arguments=[str(a) for a in arguments],
        out=str(out),
        err=str(err),
        kill=kill,
        after=after,
        setup=setup,
    )
    server.stdin.write(json.dumps(command) + "\n")
    server.stdin.flush()
    status = int(server.stdout.readline())
    return subprocess.CompletedProcess(
        [script, *arguments], status, *(p.read_bytes().decode(errors="replace") for p in (out, err))
    )


_running: list = []


def _server():
    if not _running:
        folder = tempfile.TemporaryDirectory()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(server.communicate)
        _running.append((server, folder))
    server, folder = _running[0]
    return server, pathlib.Path(folder.name)


def serve() -> None:
    import common
    import expa
    import expb
    import expc_fisher
    from transport_geometry import formats

    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import scipy.stats  # noqa: F401
    import transformers  # noqa: F401

    mains = {
        "expa.py": expa.main,
        "expb.py": expb.main,
        "expc_fisher.py": expc_fisher.main,
        "formats.py": formats.main,
        "common.py": common.main,
    }
    for line in sys.stdin:
        command = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(child(command, mains[command["script"]], common.run_script))
        if command["after"] is not None:
            _kill_after(pid, command["after"])
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _kill_after(pid: int, seconds: float) -> None:
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)  # a child that has ended and was not waited for takes it in silence


def child(command: dict, main, run_script) -> int:
    import traceback

    for handle, name in ((1, command["out"]), (2, command["err"])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [command["script"], *command["arguments"]]
    exec(command["setup"], {})
    left = iter(range(command["kill"] or 0))
    if command["kill"] is not None:
        for where, name in STEPS:
            setattr(where, name, _mortal(getattr(where, name), left))
    status = 0
    try:
        run_script(main)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    if command["kill"] is not None:
        print(f"not killed after {command['kill'] - len(list(left))} steps", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _mortal(function, left):
    def step(*args, **kwargs):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return step


if __name__ == "__main__":
    serve()
