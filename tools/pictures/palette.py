"""Colours of figures, beyond those of the samplers."""

import matplotlib
from matplotlib.colors import to_hex, to_rgb

FINAL_TOKEN, WAITING_TOKEN = "#a9b5c4", "#f2f2f2"  # tokens that are being swept have their sampler's colour
ORDERED = matplotlib.colormaps["viridis"]  # for things in an order, such as segments


def readable(color: str) -> str:
    """Returns the colour, darkened for text on white to a contrast of at least 4.5."""
    red, green, blue = to_rgb(color)
    light = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    factor = min(1.0, (0.17 / max(light, 1e-9)) ** (1 / 2.2))
    return str(to_hex((factor * red, factor * green, factor * blue)))
