"""`jacobiflow convert` and `jacobiflow info`: model folders."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Annotated, Any

from typer import Argument

import jacobiflow as jf
from jacobiflow.cli import loading, options
from jacobiflow.cli.output import one_line, show_table
from jacobiflow.errors import InputError, InputValueError

_LIBRARIES = ("zuko", "nflows", "normflows", "pyro-ppl", "sbi")  # The libraries that `accelerate` supports.
_MAX_ROUND_TRIP_ERROR = 1e-3  # Largest change of a latent that is decoded and encoded again.
_NOISE = "Standard deviation of the training images' noise, which denoising removes. Default: 0; STARFlow: 0.3."
_CHECK = "Instead, check all files of a model folder, a sample folder or a training folder."
_MEMORY = (
    "Instead, show the memory that sampling takes, and the batches that fit on a GPU, or on this machine without one."
)


def convert(
    file: Annotated[Path, Argument(help="A state dict (.pth) of TarFlow, SBG, a fork of them, or STARFlow.")],
    out: Annotated[Path, options.output_option(help="New or empty folder for config.json and model.safetensors.")],
    patch_size: Annotated[
        int | None,
        options.model_option(
            help="Side of a patch in pixels, for a flow of images. Without it the flow is one over tokens."
        ),
    ] = None,
    noise_std: Annotated[float | None, options.model_option(help=_NOISE)] = None,
    encode_text: options.EncodeText = None,
) -> dict[str, Any]:
    """Make a model folder from original weights.

    The config is read from the shapes of the weights and the options. With --noise-std the model recommends denoising
    at rate 1. A STARFlow needs --encode-text for guidance, which encodes the empty text.

    Example: jacobiflow convert afhq_model_8_768_8_8_0.07.pth --patch-size 8 --noise-std 0.07 --out afhq
    """
    from jacobiflow.models.checkpoints.folder import CONFIG
    from jacobiflow.models.checkpoints.original import read_original
    from jacobiflow.utils.files import check_own

    if (out / CONFIG).exists():
        raise InputValueError(f"--out {out}: holds a model already; remove that folder first, or give another")
    check_own(out, "model")
    state = read_original(file)
    encoder = None if encode_text is None else options.load_encoder(encode_text)
    flow: jf.STARFlow | jf.TarFlow
    config: jf.STARFlowConfig | jf.TarFlowConfig | jf.TokenConfig
    if "blocks.0.sos_embed" in state:
        config = jf.STARFlow.infer_config(state, str(file), patch_size or 1)
        config = config if noise_std is None else replace(config, noise_std=noise_std)
        flow = jf.STARFlow.from_original(file, config, encoder)
        if encoder is None:
            warnings.warn(
                "without --encode-text the model has no states of the empty text, which guidance needs; to guide "
                "samples, convert again with it", stacklevel=1,
            )  # fmt: skip
    else:
        config = jf.TarFlow.infer_config(state, str(file), patch_size)
        if encoder is not None:
            raise InputValueError(f"--encode-text {encode_text}: for a STARFlow; leave it out")
        if isinstance(config, jf.TarFlowConfig):
            config = replace(config, noise_std=noise_std or 0.0)
        elif noise_std:
            raise InputValueError(f"--noise-std {noise_std:g}: for images; give --patch-size, too")
        flow = jf.TarFlow.from_original(file, config)
        if noise_std:
            flow.recommended = jf.SamplingSettings(denoise=1.0)
    flow.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    images = "" if flow.image_shape is None else f"images of {'x'.join(map(str, flow.image_shape))}, "
    reads = "texts" if flow.reads_text else f"{config.num_classes} classes"
    print(f"{parameters:,} weights, {images}{config.num_tokens} tokens of {config.token_channels} values, {reads}")
    print(f"wrote the model folder {out}")
    return {"model": str(out), **asdict(config)}


def info(
    model: options.Model = "fashion-p2",
    check: Annotated[str | None, options.model_option(help=_CHECK)] = None,
    memory: Annotated[bool, options.model_option("--memory", help=_MEMORY)] = False,
) -> dict[str, Any]:
    """Show a model and this machine, or check a folder.

    Prints the model's shape, size and recommended settings, how its exact loops run here, and versions. Please add the
    file of --json to a report of a problem. With --check, each line is a problem with its remedy, and the exit code is
    2 if there is one. For samples without a problem it also prints how many are exact and certified. With --memory the
    weights are not loaded.

    Example: jacobiflow info --model digits-p1
    """
    from importlib.metadata import distributions

    from jacobiflow import native
    from jacobiflow.utils import timing

    if check is not None:
        return _check(check)
    if memory:
        return _show_memory(model)
    flow = jf.load(model)
    config = flow.config
    model_values = {
        "model": model, "flow": flow.model_type, **asdict(config), "num_tokens": config.num_tokens,
        "token_channels": config.token_channels,
        "recommended": "none" if flow.recommended == jf.SamplingSettings() else loading.settings_text(flow.recommended),
        "classes": ", ".join(flow.classes) or "without names",
        "parameters": sum(p.numel() for p in flow.parameters()),
    }  # fmt: skip
    libraries = {each.name: each.version for each in distributions() if each.name in _LIBRARIES}
    machine_values = {"native_loops": native.describe(), **timing.describe_machine(), **libraries}
    for title, values in (("Model", model_values), ("This machine", machine_values)):
        print(title)
        show_table(("", ""), [(name, str(value)) for name, value in values.items()], text=(0, 1))
    return model_values | machine_values


def _show_memory(model: str) -> dict[str, Any]:
    """Prints what a model needs in each dtype, without loading its weights."""
    import torch

    from jacobiflow.models.memory import free_memory, memory_needs
    from jacobiflow.models.registry import load_shapes

    flow, device = load_shapes(model), torch.device(loading.pick_device("auto"))
    free, guidance = free_memory(device), flow.guidance
    needs = {name: memory_needs(flow, device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    print(f"{free / 2**30:.3g} GiB are free on {device}; guidance: {guidance or 'none'}; batches are powers of two")
    labels = ("weights", "largest block", "copy for the exact loop", "keys and values of a sample", "all of a sample")
    rows = [(label, *(_format_bytes(astuple(each)[i]) for each in needs.values())) for i, label in enumerate(labels)]
    for label, field in (("batch", "batch"), ("batch, offloaded", "offloaded_batch")):
        rows.append((label, *(str(getattr(each, field)) for each in needs.values())))
    show_table(("", *needs), rows)
    needs_by_name = {name: asdict(each) for name, each in needs.items()}
    return {"model": model, "device": str(device), "free": free, "guidance": str(guidance or "none"), **needs_by_name}


def _format_bytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _check(path: str) -> dict[str, Any]:
    """Prints the problems of a folder."""
    from jacobiflow import training
    from jacobiflow.models.checkpoints.folder import CONFIG, INDEX, WEIGHTS, list_bundled
    from jacobiflow.utils.files import MANIFEST

    folder = list_bundled().get(path, Path(path))
    kinds = {
        "a model": ((CONFIG, WEIGHTS, INDEX), _model_problems),
        "samples": ((MANIFEST,), lambda path: jf.SampleFolder.open(path).problems()),
        "a training run": (("run.json",), training.problems),
    }
    content = [name for name, (files, _) in kinds.items() if any((folder / file).exists() for file in files)]
    if not content:
        raise InputValueError(f"{path}: no model, samples or training run; give the folder of one, or a model's name")
    problems = [one_line(problem) for name in content for problem in kinds[name][1](folder)]
    print("\n".join(problems) if problems else f"{path}: no problem; checked {' and '.join(content)}")
    results: dict[str, Any] = {"path": path, "checked": content, "problems": problems}
    if "samples" in content and not problems:
        outcome = jf.SampleFolder.open(folder).outcome()
        print(outcome)
        results["outcome"] = asdict(outcome)
    return results


def _model_problems(folder: Path) -> Iterator[str]:
    """Yields problems of the files, of the reports, and of a round trip through the flow."""
    from jacobiflow.models.latents import draw_latents

    try:
        flow = jf.load(folder)
    except jf.CheckpointError as error:
        yield str(error)
        return
    for file in flow.report_files:
        kind: type[jf.CalibrationReport | jf.Tuning] = (
            jf.Tuning if file.name.startswith("tuning") else jf.CalibrationReport
        )
        try:
            kind.load(file).check(flow)
        except InputError as error:
            yield str(error)
    z = draw_latents(1, flow.config.num_tokens, flow.config.token_channels, seed=0)
    context = flow.example_context(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The line below reports an overflow.
        x = jf.decode(flow, z, context, strategy="sequential", certify=False)
    change = float((flow.encode(x, context)[0] - z).abs().max())
    if not change <= _MAX_ROUND_TRIP_ERROR:  # NaN also fails.
        yield (
            f"{folder}: a latent that is decoded and encoded again is off by {change:.1e}, more than "
            f"{_MAX_ROUND_TRIP_ERROR:g}; the weights are damaged or badly conditioned: copy the folder again, or train "
            "it on"
        )
