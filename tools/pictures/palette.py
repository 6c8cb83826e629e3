"""Colours of figures, beyond those of the samplers."""

import matplotlib

FINAL_TOKEN, WAITING_TOKEN = "#a9b5c4", "#f2f2f2"  # tokens that are being swept have their sampler's colour
TOUGH_BLOCK, EASY_BLOCK = "#3d4a5c", "#a9b5c4"
ORDERED = matplotlib.colormaps["viridis"]  # for things in an order, such as segments
OTHERS = "#cccccc"  # lines that are there to be compared with
