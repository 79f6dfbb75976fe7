"""The scripts as their users run them, without importing torch for each: a process that has imported
everything forks one per command.

    done = run("expb.py", "--k", "8", "--out", folder)   # as subprocess.run: returncode, stdout, stderr
    done = run("expb.py", ..., kill=7)                   # killed before its 7th step that a disk sees
    done = run("expb.py", ..., environment=hub.environment(cache))   # each environment has a process

Not for what is read when a program starts (KERNELS, a locale, RANK): that wants a process of its own, see
`helpers.process`.
"""

import atexit
import functools
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = [(os, "replace"), (os, "fsync")]
STEPS += [(pathlib.Path, name) for name in ("unlink", "rename", "mkdir", "rmdir")]
# no network, and a cache that nothing is ever in
EMPTY = os.path.join(tempfile.gettempdir(), "transport-geometry-offline")
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": EMPTY}

# for `setup`:
# small chunks, and a checkpoint after each, so that there is something to kill and to damage
CHECKPOINTS = """
import itertools, types
from transport_geometry.saes import recipes, train
recipes.CHUNK = 2048
train.time = types.SimpleNamespace(monotonic=itertools.count(step=100.0).__next__, perf_counter=lambda: 0.0)
"""
# a figure costs more than a small run; what is drawn is looked at elsewhere
UNDRAWN = """
import base64, matplotlib.figure
ONE_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
NO_PATH = '<svg xmlns="http://www.w3.org/2000/svg"/>'
matplotlib.figure.Figure.savefig = lambda figure, file, format, **how: file.write(
    NO_PATH if format == "svg" else ONE_PIXEL
)
"""


# -------------------------------------------------------------------------------------- in the test's process
def run(
    script: str,
    *arguments,
    kill: int | None = None,
    when: tuple | None = None,
    after: float | None = None,
    setup: str = "",
    environment: dict[str, str] = OFFLINE,
    folder: pathlib.Path = ROOT,
) -> subprocess.CompletedProcess:
    """kill: by SIGKILL at this step; when: as soon as (folder, pattern, n) n paths match; after: so many
    seconds later, or from the start.

    setup: what the process executes before the script; folder: the one it runs in.
    """
    server, files = _server(environment)
    out, err = files / "out", files / "err"
    command = dict(script=script, arguments=arguments, out=out, err=err, setup=setup, folder=folder)
    command |= dict(kill=kill, when=when, after=after)
    server.stdin.write(json.dumps(command, default=str) + "\n")
    server.stdin.flush()
    status = int(server.stdout.readline())
    said = (path.read_bytes().decode(errors="replace") for path in (out, err))
    return subprocess.CompletedProcess([script, *arguments], status, *said)


_running: dict = {}  # environment -> (server, its folder)


def _server(environment: dict[str, str]) -> tuple[subprocess.Popen, pathlib.Path]:
    key = frozenset(environment.items())
    if key not in _running:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        path = {**environment, "PYTHONPATH": str(ROOT)}
        server = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=path, **pipes)
        _running[key] = server, tempfile.TemporaryDirectory()
    server, folder = _running[key]
    return server, pathlib.Path(folder.name)


def end(environment: dict[str, str]) -> None:
    """Stop the process that serves it: a few hundred MB."""
    if found := _running.pop(frozenset(environment.items()), None):
        server, folder = found
        server.communicate()
        folder.cleanup()


@atexit.register
def _end_all() -> None:
    for environment in list(_running):
        end(dict(environment))


# ------------------------------------------------------------------------------------ in the server's process
def serve() -> None:
    import importlib

    import common
    from transport_geometry.formats import __main__ as sae_commands
    from transport_geometry.text import heldout

    import datasets  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import scipy.stats  # noqa: F401

    # what a model's first loading would import
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM  # noqa: F401

    heldout.stdlib_sides()  # the embedded text is read once, too
    mains = {
        **{path.name: importlib.import_module(path.stem).main for path in ROOT.glob("exp*.py")},
        "formats.py": sae_commands.main,  # python -m transport_geometry.formats
        "common.py": common.main,
    }
    for line in sys.stdin:
        command = json.loads(line)
        pid = os.fork()
        if pid == 0:
            main = mains.get(command["script"]) or functools.partial(program, command["script"])
            os._exit(child(command, main, common.run_script))
        print(wait(pid, command["when"], command["after"]), flush=True)


def program(script: str) -> None:
    """As `python SCRIPT` would, for those of bench/."""
    sys.path.insert(0, str((ROOT / script).parent))
    runpy.run_path(str(ROOT / script), run_name="__main__")


def wait(pid: int, when: list | None, after: float | None) -> int:
    """The exit status of a child, killed as `run` says."""
    ended, status = os.waitpid(pid, 0 if when is None and after is None else os.WNOHANG)
    begun = None
    while not ended:
        if begun is None and (when is None or len(list(pathlib.Path(when[0]).glob(when[1]))) >= when[2]):
            begun = time.monotonic()
        if begun is not None and time.monotonic() >= begun + (after or 0):
            os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0)
        else:
            time.sleep(0.01)
            ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status)


def child(command: dict, main, run_script) -> int:
    for handle, name in ((1, command["out"]), (2, command["err"])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(command["folder"])
    sys.argv = [command["script"], *map(str, command["arguments"])]
    exec(command["setup"], {})
    left = iter(range(command["kill"] or 0))
    if command["kill"] is not None:
        for owner, name in STEPS:
            setattr(owner, name, _mortal(getattr(owner, name), left))
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
