"""Times the bundled models by the original sampler and by `auto`: `python -m benchmarks.model_speed`.

Writes docs/results/model-speed.json, of batches with the guidance that each model recommends, interleaved; and the
sheets of samples, docs/figures/NAME-samples.png. Both are shown by the model cards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jacobiflow as jf
from benchmarks.common import FIGURES, RESULTS, Json, latents, parser, to_json
from jacobiflow.comparison.baselines import original_sampler
from jacobiflow.data import balanced_labels
from jacobiflow.models.checkpoints.folder import list_bundled
from jacobiflow.models.memory import keep_freed_memory
from jacobiflow.plots import rows_sheet, save_png
from jacobiflow.utils.files import write_json
from jacobiflow.utils.timing import describe_machine, time_interleaved

BATCHES, ROUNDS = (1, 16), 3


def measure(name: str) -> Json:
    flow = jf.load(name)
    flow, rows = flow.guided(flow.recommended.guidance), []
    loop_name, loop = original_sampler(flow)
    for batch in BATCHES:
        z, labels = latents(flow, batch, seed=0)
        runs: dict[str, Callable[[], Any]] = {
            "original": partial(loop, flow, z, labels),
            "auto": partial(jf.sample, flow, latents=z, labels=labels, settings=None),
        }
        rows.append({"batch": batch, **to_json(time_interleaved(runs, ROUNDS)[0])})
    return {"loop": loop_name, "rows": rows}


def draw_samples(name: str) -> None:
    flow, plain = jf.load(name), jf.SamplingSettings()
    rows = [("as recommended", flow.recommended, 100)]
    if flow.recommended != plain:
        rows.insert(0, ("plain", plain, 10))
    images = []
    for caption, settings, count in rows:
        labels = balanced_labels(count, flow.config.num_classes)
        samples = jf.sample(flow, count, labels, settings=settings)
        images.append((caption, samples.images))
    save_png(rows_sheet(images), FIGURES / f"{name}-samples.png")


def main() -> None:
    parser(__doc__).parse_args()
    for name in list_bundled():
        draw_samples(name)
    models = {name: measure(name) for name in list_bundled()}
    head = {"command": "python -m benchmarks.model_speed", "machine": describe_machine(), "repeats": ROUNDS}
    write_json(RESULTS / "model-speed.json", {**head, "models": models})


if __name__ == "__main__":
    keep_freed_memory()
    main()
