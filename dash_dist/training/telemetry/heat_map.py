"""Heat map of a layer's routing: query chunks down, key chunks across, coloured by the selected share.

Knows maps of counts and colours; does not know the destination of a picture.
"""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from dash_dist.engine.selection_map import SelectionMap

# Smaller shares are drawn in this colour: every layer observed so far selects far more than one chunk in a thousand.
SMALLEST_SHARE = 1e-3


def heat_map(layer: SelectionMap, *, sequence_length: int) -> np.ndarray:
    """Return a picture of one layer, uint8 [height, width, 3]; the future of the queries stays white."""
    share = layer.share.numpy()
    figure = Figure(figsize=(6.4, 5.4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(
        np.ma.masked_invalid(share).clip(min=SMALLEST_SHARE),
        norm=LogNorm(SMALLEST_SHARE, 1.0),
        cmap="viridis",
        interpolation="nearest",
        extent=(0, sequence_length, sequence_length, 0),
    )
    axes.set(title=f"Layer {layer.layer}: selected chunks", xlabel="position of the key (tokens)")
    axes.set_ylabel("position of the query (tokens)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(np.linspace(0, sequence_length, 5), [_in_words(sequence_length * i / 4) for i in range(5)])
    bar = figure.colorbar(picture, ax=axes, extend="min")
    bar.set_label("share of (token, KV head) pairs that selected the chunk")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _in_words(tokens: float) -> str:
    """Return a number of tokens as a label: 65536 -> 64Ki, 1000 -> 1000."""
    return f"{tokens / 1024:g}Ki" if tokens >= 1024 and tokens % 512 == 0 else f"{tokens:g}"
