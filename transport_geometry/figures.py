"""TODO figures."""

import io

import numpy as np


def pyplot():
    """matplotlib.pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def model_colours(models: list[str]) -> dict:
    """{model: colour}, dark to light from the smallest to the largest: the same in every plot."""
    return dict(zip(models, pyplot().get_cmap("viridis")(np.linspace(0.1, 0.85, len(models)))))


def as_png(figure) -> bytes:
    """A PNG without the program's version in it: the same bytes from the same numbers."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    pyplot().close(figure)
    return image.getvalue()
