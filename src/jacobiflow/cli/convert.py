"""`jacobiflow convert`: a `.pth` file of the original TarFlow code as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option


def convert(
    file: Annotated[Path, Argument(help="A state dict (.pth) that the TarFlow code, SBG's or a fork saved.")],
    out: Annotated[Path, Option(help="New or empty folder for config.json and model.safetensors.")],
    patch_size: Annotated[
        int | None, Option(help="Side of a patch in pixels, for a flow over images; else it is one over tokens.")
    ] = None,
    noise_std: Annotated[float, Option(help="Gaussian noise of the training images, which denoising needs.")] = 0.0,
) -> dict[str, Any]:
    """Turn TarFlow weights into a model folder.

    Everything but the two options is read from the shapes.

    Example: jacobiflow convert afhq_model_8_768_8_8_0.07.pth --patch-size 8 --noise-std 0.07 --out afhq
    """
    from dataclasses import asdict, replace

    from jacobiflow.errors import InputValueError
    from jacobiflow.flows.tarflow import TarFlow
    from jacobiflow.flows.tarflow.original import infer_config, read_original
    from jacobiflow.locking import check_own

    check_own(out, "model")
    config = infer_config(read_original(file), str(file), patch_size)
    if noise_std and patch_size is None:
        raise InputValueError(f"noise_std={noise_std:g}: for images; give patch_size, too")
    config = replace(config, noise_std=noise_std) if noise_std else config
    flow = TarFlow.from_original(file, config)
    flow.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    images = "" if flow.image_shape is None else f"images of {'x'.join(map(str, flow.image_shape))}, "
    tokens = f"{config.num_tokens} tokens of {config.token_channels} values, {config.num_classes} classes"
    print(f"{parameters:,} weights, {images}{tokens}")
    print(f"wrote the model folder {out}")
    return {"model": str(out), **asdict(config)}
