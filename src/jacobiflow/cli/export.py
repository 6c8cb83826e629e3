"""`jacobiflow export`: a TarFlow as ONNX graphs, for runtimes other than PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jacobiflow.cli import options, paths
from jacobiflow.errors import InputValueError
from jacobiflow.flows.tarflow import TarFlow


def export(
    out: Annotated[Path, typer.Option("--out", help="Folder for model.json, the weights and the graphs.")],
    model: options.Model = "fashion-p2",
    guidance: options.GuidanceWeight = 0.0,
    guidance_on: options.GuidanceOn = "both",
    constant_guidance: options.ConstantGuidance = False,
    attn_temperature: options.AttnTemperature = 1.0,
    json: options.Json = None,
) -> None:
    """Write a TarFlow as ONNX graphs: one for each block, under guidance where it is asked for, and one that denoises.

    Needs the extra: pip install 'jacobiflow[onnx]'.

    Example: jacobiflow export --model fashion-p2 --guidance 3 --out out/onnx
    """
    try:
        from jacobiflow.export import export as write
    except ModuleNotFoundError as error:
        raise InputValueError(f"no package {error.name}; pip install 'jacobiflow[onnx]'") from error
    wanted = options.parse_guidance(guidance, guidance_on, constant_guidance, attn_temperature)
    paths.check(json, out, ("model.json", "*.bin", "*.onnx"), model=model)
    flow = options.load_model(model, "cpu")
    if not isinstance(flow, TarFlow):
        raise InputValueError(f"--model {model}: is no TarFlow, and only these can be exported; give another model")
    manifest = write(flow, out, wanted)
    options.report(json, manifest)
    print(f"wrote {len(manifest['blocks'])} blocks to {out}")
