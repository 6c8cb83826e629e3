"""`jacobiflow convert`: a `.pth` file of the original TarFlow code as a model folder."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from jacobiflow.cli import options, paths
from jacobiflow.errors import InputValueError
from jacobiflow.flows.fingerprint import fingerprint, fingerprint_of
from jacobiflow.flows.folder import CONFIG, REPORTS, WEIGHTS, holding, locked_folder, write_model
from jacobiflow.flows.tarflow import TarFlow
from jacobiflow.flows.tarflow.original import infer_config, read_original


def convert(
    file: Annotated[Path, typer.Argument(help="A state dict (.pth) that the original TarFlow code saved.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for config.json and model.safetensors.")],
    patch_size: Annotated[int, typer.Option("--patch-size", help="Side of a patch in pixels.")],
    noise_std: Annotated[
        float, typer.Option("--noise-std", help="Gaussian noise of its training, which denoising needs; 0: none.")
    ],
    json: options.Json = None,
) -> None:
    """Turn published TarFlow weights into a model folder; everything but the two options is read from the shapes.

    Example: jacobiflow convert afhq_model_8_768_8_8_0.07.pth --patch-size 8 --noise-std 0.07 --out afhq
    """
    paths.check(json, out, (CONFIG, WEIGHTS, *REPORTS), file=file)
    config = replace(infer_config(read_original(file), patch_size=patch_size), noise_std=noise_std)
    flow = TarFlow.from_original(file, config)
    with locked_folder(out):
        _check_free(out, flow)
        write_model(flow, out)
    options.report(json, {"model": str(out), **asdict(config)})
    print(f"wrote the model folder {out}")


def _check_free(out: Path, flow: TarFlow) -> None:
    """**Raises** `ValueError` where the folder holds another model than `flow`."""
    model = holding(out)
    if model is not None and (
        model.model_type != flow.model_type
        or model.config(flow.config_type) != flow.config
        or fingerprint_of(model.state()) != fingerprint(flow)
    ):
        raise InputValueError(f"{out}: holds another model; give another folder, or move it away")
