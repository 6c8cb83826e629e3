"""Draws the sheets of samples of the model cards, docs/figures/NAME-samples.png: `python -m tools.pictures.sheets`."""

from __future__ import annotations

import jacobiflow as jf
from benchmarks import FIGURES
from benchmarks.lib.results import parser
from jacobiflow.data import balanced_labels
from jacobiflow.models.checkpoints.folder import list_bundled
from jacobiflow.models.contexts import class_names
from jacobiflow.plots import rows_sheet, save_png


def draw_samples(name: str, flow: jf.models.Flow) -> None:
    plain = jf.SamplingSettings()
    rows = [("as recommended", flow.recommended, 30)]
    if flow.recommended != plain:
        rows.insert(0, ("plain", plain, 10))
    names = class_names(balanced_labels(30, flow.config.num_classes), flow.classes)
    images = []
    for caption, settings, count in rows:
        labels = balanced_labels(count, flow.config.num_classes)
        samples = jf.sample(flow, count, labels, settings=settings)
        images.append((caption, samples.images))
    save_png(rows_sheet(images, names), FIGURES / f"{name}-samples.png")


if __name__ == "__main__":
    parser(__doc__).parse_args()
    for name in list_bundled():
        flow = jf.load(name)
        if flow.config.num_classes:  # benchmarks.star draws the sheet of prompts.
            draw_samples(name, flow)
