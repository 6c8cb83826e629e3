"""Writes the cards of the bundled models: `python benchmarks/model_cards.py`, src/jacobiflow/models/*/README.md.

They are made of docs/results/NAME.json (bundle_model.py), NAME-search.json (search_guidance.py) and model-speed.json.
`python benchmarks/model_cards.py --measure` writes the last first, and the sheets of samples. It times a batch by the
loop of the flow's original code and by `auto`, certified, in turn, with the guidance that the model recommends.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from evaluation_page import MEASURES
from filling import measured_on, table

import jacobiflow as jf
from jacobiflow.baselines import original_loop
from jacobiflow.cli.settings import settings_words
from jacobiflow.data import balanced_labels
from jacobiflow.files import write_atomically, write_json
from jacobiflow.flows.folder import bundled
from jacobiflow.flows.image_flow import ImageFlow
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import interleave, machine
from jacobiflow.memory import keep_freed_memory
from jacobiflow.plots import rows_sheet, save_png

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS, FIGURES = DOCS / "results", DOCS / "figures"
SPEED, BATCHES, REPEATS = RESULTS / "model-speed.json", (1, 16), 3
SHEET = 100

SECTIONS = """## Intended use

Trying, testing and teaching fast sampling from autoregressive flows without a download or a GPU, and measuring
samplers. Not for anything that needs good pictures.

## Training and figures

| | |
| --- | --- |
| images | {images} ({images_license}), {size}x{size}, {channels}, in [-1, 1], {noise} |
| shape | {shape}, {parameters:,} parameters, float16, {megabytes:.1f} MB |
| training | `{command}`: {steps:,} steps in {hours} on {machine} |
| bits per dimension of {measured} images | {bpd:.3f} ({test_name}, {noise}, their labels) |
| class accuracy by Bayes' rule | {accuracy:.1%} ({accuracy_images:,} of them, the same noise) |
| recommended settings | {setting} |

{units}

{trials}Training loss (mean of 50 steps):

![loss curve](../../../../docs/figures/{name}-loss.png)

Samples of all classes in turn{drawn}.

![samples](../../../../docs/figures/{name}-samples.png)

## Speed

{speed}

## Limits

{limits} Figures: docs/results/{name}.json, by `python benchmarks/bundle_model.py`; this card is made by
`python benchmarks/model_cards.py`.
"""
NOISY_UNITS = """\
Bits per dimension are in units of 8-bit pixels (-log2 p / D + log2 128) and belong to the *noisy* images that the
model was trained on; they do not compare with figures of dequantised images."""
DEQUANTISED_UNITS = """\
Bits per dimension are in units of 8-bit pixels (-log2 p / D + log2 128) of uniformly dequantised images: they bound the
code length of the 8-bit data from above."""


def shape_of(flow: ImageFlow) -> str:
    """The flow's shape."""
    config = flow.config
    size = f"(T = {config.num_tokens}, C = {config.token_channels}), {config.num_blocks} blocks x"
    if isinstance(config, jf.TarFlowConfig):
        return f"patch {config.patch_size} {size} {config.layers_per_block} layers x {config.channels} channels"
    if isinstance(config, jf.MAFConfig):
        return f"pixels {size} {config.hidden_layers} hidden layers x {config.hidden_features} units"
    raise ValueError(f"{type(flow).__name__}: no TarFlow or MAF")


def setting_of(name: str) -> str:
    """The settings that the search recommends, what they gain, and what its best point is."""
    path = RESULTS / f"{name}-search.json"
    if not path.is_file():
        return "none were searched for"
    result = json.loads(path.read_text())
    rows, best = result["rows"], result["best"]
    (measure,) = MEASURES.keys() & best.keys()
    settings = jf.SamplingSettings.from_json(result["recommended"])
    weight, temperature = (
        (0, 1) if settings.guidance is None else (settings.guidance.weight, settings.guidance.attn_temperature)
    )

    def at(weight: float, temperature: float, rate: float) -> float:
        want = {"weight": weight, "attn_temperature": temperature, "denoise": rate}
        return float(next(row for row in rows if row.items() >= want.items())[measure])

    own, plain, words = at(weight, temperature, settings.denoise), at(0, 1, 0), " ".join(settings_words(settings))
    gain = f"`{words}`: {MEASURES[measure]} {own:.3f} of {result['num']:,} samples, {plain:.3f} as drawn"
    gain = (
        gain if words != "--plain" else f"none: {MEASURES[measure]} {plain:.3f} of {result['num']:,} samples as drawn"
    )
    if best[measure] < own:
        least = f"guidance of weight {best['weight']:g}, temperature {best['attn_temperature']:g}"
        least += f", rate {best['denoise']:g}" if best["denoise"] else ""
        gain += f"; the least of the search is {best[measure]:.3f} ({least})"
    return f"{gain} (docs/evaluation.md)"


def trials_of(name: str) -> str:
    """The trials that the model was chosen by; nothing where there were none."""
    path = RESULTS / f"{name}-trials.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text())
    shared = min(trial["points"][-1]["seconds"] for trial in result["trials"].values())
    rows = []
    for title, trial in result["trials"].items():
        last, seconds = trial["points"][-1], [point["seconds"] for point in trial["points"]]
        bits = [point["bits_per_dim"] for point in trial["points"]]
        rows.append([
            title, f"{trial['num_images']:,}", f"{trial['parameters']:,}", f"{trial['images_per_second']:.1f}",
            f"{np.interp(shared, seconds, bits):.3f}", f"{last['bits_per_dim']:.3f}",
        ])  # fmt: skip
    columns = (
        "trial: images, channels x layers x blocks", "images", "parameters", "images a second",
        f"bits per dimension after {shared:.0f} s", f"after {last['images']:,} images",
    )  # fmt: skip
    return (
        f"It was chosen by trials (`{result['command']}`): the first steps of the training, bits per dimension of the "
        f"noisy training images, means of 50 steps. {measured_on(result['machine'])}\n\n{table(columns, rows)}\n\n"
    )


def speed_of(name: str) -> str:
    """The table of seconds."""
    result = json.loads(SPEED.read_text())
    found = result["models"][name]
    rows = [
        [str(row["batch"]), f"{row['original']['median']:.3g}", f"{row['auto']['median']:.3g}",
         f"{row['original']['median'] / row['auto']['median']:.1f}x"]
        for row in found["rows"]
    ]  # fmt: skip
    columns = ("batch", f"the original code's loop ({found['loop']})", "`auto`, certified", "")
    return (
        f"Seconds to solve a batch under the recommended settings, before denoising; medians of {result['repeats']} "
        f"rounds in turn, {'measured while the machine was shared' if result['shared'] else 'on an idle machine'} "
        f"(docs/results/{SPEED.name}). {measured_on(result['machine'])} A GPU was not measured.\n\n"
        f"{table(columns, rows)}"
    )


def card(name: str) -> str:
    """The card of a bundled model."""
    flow, figures = jf.load(name), json.loads((RESULTS / f"{name}.json").read_text())
    config, seconds = flow.config, figures["training_seconds"]
    gaussian = config.noise_std > 0
    sections = SECTIONS.format(
        name=name, size=config.image_size,
        channels=f"{config.in_channels} channel{'s' * (config.in_channels > 1)}",
        noise=f"Gaussian noise of standard deviation {config.noise_std}" if gaussian else "uniformly dequantised",
        shape=shape_of(flow), megabytes=figures["bytes"] / 1e6, setting=setting_of(name), speed=speed_of(name),
        trials=trials_of(name),
        hours=f"{seconds / 3600:.2f} h" if seconds >= 360 else f"{seconds:.0f} s",
        measured="noisy" if gaussian else "dequantised",
        bpd=figures["bits_per_dim_noisy" if gaussian else "bits_per_dim"], accuracy=figures["bayes_accuracy"],
        units=NOISY_UNITS if gaussian else DEQUANTISED_UNITS,
        drawn="" if flow.recommended == jf.SamplingSettings() else ", plain, and as recommended; the first are of the "
        "same latents",
        **{key: figures[key] for key in (
            "images", "images_license", "parameters", "command", "steps", "machine", "test_name", "accuracy_images",
            "limits",
        )},
    )  # fmt: skip
    description = (
        f"A {type(flow).__name__} of {figures['images']}, class-conditional over {config.num_classes} classes. It "
        "comes with [jacobiflow](https://pypi.org/project/jacobiflow/), `pip install jacobiflow`."
    )
    made = flow.generate_model_card(
        name=name,
        description=description,
        license="apache-2.0",
        datasets=figures["datasets"],
        sections=sections.rstrip(),
    )
    return f"{str(made).rstrip()}\n"


def draw(name: str) -> None:
    """The sheet of samples, plain and as recommended."""
    flow, plain = jf.load(name), jf.SamplingSettings()
    rows = [("as recommended", flow.recommended, SHEET)]
    if flow.recommended != plain:
        rows.insert(0, ("plain", plain, 10))
    drawn = [
        (caption, jf.sample(flow, num, balanced_labels(num, flow.config.num_classes), guidance=settings.guidance,
                            denoise=settings.denoise).images)
        for caption, settings, num in rows
    ]  # fmt: skip
    save_png(rows_sheet(drawn), FIGURES / f"{name}-samples.png")


def measure(name: str) -> dict[str, Any]:
    """Seconds of a model by batch size."""
    flow = jf.load(name)
    loop_name, loop = original_loop(flow)
    guidance, rows = flow.recommended.guidance, []
    for batch in BATCHES:
        z = draw_latents(batch, flow.config.num_tokens, flow.config.token_channels, 0)
        labels = balanced_labels(batch, flow.config.num_classes)
        runs: dict[str, Callable[[], Any]] = {
            "original": partial(loop, flow, z, labels, guidance),
            "auto": partial(jf.sample, flow, latents=z, labels=labels, guidance=guidance, progress=False),
        }
        timings, _ = interleave(runs, REPEATS)
        rows.append({"batch": batch, **{run: asdict(timing) for run, timing in timings.items()}})
    return {"loop": loop_name, "rows": rows}


def main() -> None:
    """Measure if asked to, and write all cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="draw and time the models first, on an idle machine")
    parser.add_argument("--shared", action="store_true", help="say that the machine was not idle")
    arguments = parser.parse_args()
    if arguments.measure:
        for name in bundled():
            draw(name)
        models = {name: measure(name) for name in bundled()}
        head = {"command": "python benchmarks/model_cards.py --measure", "machine": machine(), "repeats": REPEATS}
        write_json(SPEED, {**head, "shared": arguments.shared, "models": models})
    for name, folder in bundled().items():
        write_atomically(folder / "README.md", card(name).encode())


if __name__ == "__main__":
    keep_freed_memory()  # for all that is compared
    main()
