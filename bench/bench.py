"""What the scripts of this folder share. Import it first: it puts the checkout and tests/ on the path."""

import argparse
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is the script's docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def ints(text: str) -> list[int]:
    """'4,8' -> [4, 8], for a flag's `type`."""
    return [int(part) for part in text.split(",")]


def take_turns(
    jobs: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 0,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """{job: median seconds}. The jobs run one after the other, round by round, so that whatever else the
    machine does meets them all; the first `warm_up` rounds do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(warm_up + rounds):
        for name, job in jobs.items():
            start = clock()
            job()
            if number >= warm_up:
                seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
