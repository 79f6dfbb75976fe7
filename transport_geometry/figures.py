"""Plots: the program that draws them, colours that mean the same in every one, and bytes that do not change.

matplotlib is imported where something is drawn, not before: it is slow, and a run without plots needs none.
"""

import io
import types
import typing
from collections.abc import Sequence

import numpy as np

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure


def pyplot() -> types.ModuleType:
    """matplotlib.pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def model_colours(models: Sequence[str]) -> dict[str, np.ndarray]:
    """{model: colour [4], RGBA}, dark to light from the first, the smallest: the same in every plot."""
    viridis = pyplot().get_cmap("viridis")
    return dict(zip(models, viridis(np.linspace(0.1, 0.85, len(models)))))


def as_png(figure: "Figure") -> bytes:
    """A PNG without the program's version in it: the same bytes from the same numbers. Closes it."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    pyplot().close(figure)
    return image.getvalue()
