"""Figures, drawn with matplotlib, as PNG."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, VERMILION, GREY = "#0072b2", "#d55e00", "#999999"  # told apart by the colour-blind too (Okabe and Ito 2008)


def new_figure(width: float, height: float, layout: str | None = None) -> "Figure":
    """Return an empty figure, width and height in inches, in the default style, ignoring any matplotlibrc."""
    import matplotlib  # takes 0.2 s, and is needed only where figures are drawn
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()
    return Figure(figsize=(width, height), layout=layout)  # type: ignore[arg-type]


def as_png(figure: "Figure") -> bytes:
    """Return a figure as a PNG of 120 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
