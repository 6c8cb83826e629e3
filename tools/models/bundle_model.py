"""Puts a trained model into the package: `python -m tools.models.bundle_model --help`.

Writes config.json, with the recommended settings of docs/results/NAME-search.json, and half-precision weights to
src/jacobiflow/bundled/NAME; and for its card, metrics to docs/results/NAME.json.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

import jacobiflow as jf
from benchmarks import MODELS, RESULTS
from benchmarks.lib.results import Json, parser
from benchmarks.search_guidance import recommended
from jacobiflow.data import ImageDataset, Noise, Split, available_splits, load_images
from jacobiflow.evaluation import bayes_accuracy, bits_per_dim
from jacobiflow.models.flow import Flow
from jacobiflow.training import read_metrics
from jacobiflow.utils.files import write_json
from tools.models.make_images import labels_of

ACCURACY_IMAGES = 1000


def measure(flow: Flow, test: ImageDataset) -> Json:
    """Bits per dimension of all test images, and class accuracy of the first ones, with the noise of the training."""
    noise = Noise(flow.config.noise_std)
    few = replace(test, images=test.images[:ACCURACY_IMAGES], labels=labels_of(test)[:ACCURACY_IMAGES])
    return {
        "bits_per_dim_noisy" if noise.std else "bits_per_dim": bits_per_dim(flow, test, noise),
        "bayes_accuracy": bayes_accuracy(flow, few, noise),
        "accuracy_images": len(few),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("name", help="of the bundled model")
    arguments.add_argument("run", type=Path, help="folder that jacobiflow train wrote")
    arguments.add_argument("--images", required=True, help="test images, as for jacobiflow")
    arguments.add_argument("--test-name", required=True, help="description of the test images, for the card")
    arguments.add_argument("--machine", required=True, help="that trained the model, for the card")
    options = arguments.parse_args()

    folder = MODELS / options.name
    trained, search = jf.load(options.run), RESULTS / f"{options.name}-search.json"
    if search.is_file():
        trained.recommended = recommended(json.loads(search.read_text())["runs"])
    trained.save_pretrained(folder, dtype=torch.float16)
    flow = jf.load(options.name)
    metrics = read_metrics(options.run)
    channels, size, _ = flow.require_images()
    split: Split = "test" if "test" in available_splits(options.images) else "train"
    test = load_images(options.images, size, channels, split)
    result = {
        "command": "python -m tools.models.bundle_model",
        "name": options.name,
        "machine": options.machine,
        "steps": metrics[-1].step,
        "training_seconds": metrics[-1].seconds,
        "parameters": sum(p.numel() for p in flow.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "test_images": len(test),
        "test_name": options.test_name,
        **measure(flow, test),
    }
    write_json(RESULTS / f"{options.name}.json", result)
    print(f"bundled {folder}: class accuracy {result['bayes_accuracy']:.1%}")


if __name__ == "__main__":
    main()
