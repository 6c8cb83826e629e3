"""`jacobiflow convert`: a `.pth` file of the original TarFlow code as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option


def convert(
    file: Annotated[Path, Argument(help="A state dict (.pth) that the original TarFlow code saved.")],
    out: Annotated[Path, Option(help="New or empty folder for config.json and model.safetensors.")],
    patch_size: Annotated[int, Option(help="Side of a patch in pixels.")],
    noise_std: Annotated[float, Option(help="Gaussian noise of its training, which denoising needs; 0: none.")],
) -> dict[str, Any]:
    """Turn original TarFlow weights into a model folder.

    Everything but the two options is read from the shapes.

    Example: jacobiflow convert afhq_model_8_768_8_8_0.07.pth --patch-size 8 --noise-std 0.07 --out afhq
    """
    from dataclasses import asdict, replace

    from jacobiflow.files import check_own
    from jacobiflow.flows.tarflow import TarFlow
    from jacobiflow.flows.tarflow.model import infer_config, read_original

    check_own(out, "model")
    config = replace(infer_config(read_original(file), patch_size=patch_size), noise_std=noise_std)
    flow = TarFlow.from_original(file, config)
    flow.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    size, classes = f"{config.in_channels}x{config.image_size}x{config.image_size}", config.num_classes
    print(f"{parameters:,} weights, images of {size}, {config.num_tokens} tokens, {classes} classes")
    print(f"wrote the model folder {out}")
    return {"model": str(out), **asdict(config)}
