"""The progress line of a run: how much of its work is done, and how long the rest will take.

Work is counted in estimated FLOPs (`cost`), training and evaluation alike. On a terminal it is a bar;
elsewhere a plain line for each finished hook, without escape codes.
"""

import contextlib
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

LINE = "{what}: {share:.0%} of the run, {gone} gone, about {left} to go"


class Progress:
    """The line. `phase` begins a part of the work with units of its own (tokens, sequences)."""

    def __init__(self, total: float):
        self.start, self.total, self.done = time.monotonic(), total, 0.0
        self.bar = tqdm(
            total=total,
            disable=None,  # where stderr is no terminal
            leave=False,
            smoothing=0,  # the rate since the start: phases differ more than seconds do
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}, {desc}{postfix}",
        )

    def phase(self, what: str, work: float, units: float) -> "Progress":
        """Begin `work` FLOPs, in `units` of `update`."""
        self.bar.set_description_str(what)
        self.bar.set_postfix_str("", refresh=False)
        self.what, self.begins, self.ends = what, self.done, self.done + work
        self.per_unit = work / max(units, 1)
        return self

    def update(self, units: float) -> None:
        self.advance(min(self.done + units * self.per_unit, self.ends))

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.bar.set_postfix_str(text, refresh=refresh)

    def end(self) -> None:
        """End the phase, whatever the estimate said."""
        self.advance(self.ends)
        if self.ends > self.begins and not sys.stderr.isatty():
            gone = time.monotonic() - self.start
            share = min(self.done / self.total, 1.0) if self.total else 1.0
            left = gone * (1 - share) / share if share else 0.0
            gone, left = (tqdm.format_interval(seconds) for seconds in (gone, left))
            print(LINE.format(what=self.what, share=share, gone=gone, left=left), flush=True)

    def advance(self, to: float) -> None:
        self.bar.update(to - self.done)
        self.done = to

    def close(self) -> None:
        self.bar.close()


@contextlib.contextmanager
def line(bar: Progress | None, what: str, units: float) -> Iterator[Progress]:
    """The run's line or, without one, a line for these `units` alone."""
    own = bar or Progress(units).phase(what, units, units)
    try:
        yield own
    finally:
        if bar is None:
            own.close()
