"""`jacobiflow convert`: a model folder from original weights."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jacobiflow as jf
from jacobiflow.cli import options
from jacobiflow.errors import InputValueError

if TYPE_CHECKING:
    from jacobiflow.models.config import FlowConfig


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(options.Config):
    """Make a model folder from original weights.

    Reads the config from the shapes of the weights, and the patch size and the noise from the file name. If the noise
    is known, the model recommends denoising at rate 1. For guidance, a STARFlow needs --encode-text to encode the empty
    text.

    Example: jacobiflow convert afhq_model_8_768_8_8_0.07.pth --out afhq

    Attributes:
        file: Weights of TarFlow, SBG, a fork of them, or STARFlow: a state dict (.pth), or a checkpoint that holds one,
            such as Lightning's (.ckpt).
        patch_size: Side of a patch in pixels. Default: that in an original name, such as 8 above. With neither,
            the flow is over tokens, unless its shapes are those of colour images.
        noise_std: Standard deviation of the training images' noise, which denoising removes. Default: that in an
            original name, such as 0.07 above, or 0; STARFlow: 0.3.
        out: New or empty folder for config.json and model.safetensors.
    """

    file: Annotated[Path, options.MODEL, options.EXISTING] = field(kw_only=False)
    patch_size: Annotated[int | None, options.MODEL, options.within(1)] = None
    noise_std: Annotated[float | None, options.MODEL, options.within(0)] = None
    encode_text: options.EncodeText = None
    out: Annotated[Path, options.OUTPUT]
    folder_kind = "model"

    def check_options(self) -> None:
        """Also refuses a folder that holds a model."""
        if (self.out / "config.json").exists():
            raise InputValueError(f"--out {self.out}: holds a model already; remove that folder first, or give another")
        super().check_options()


@dataclass(frozen=True)
class ConvertResult:
    """A model folder.

    Attributes:
        description: Number of weights, size of the images, tokens and classes.
        config: The config of the flow.
    """

    description: str
    config: FlowConfig


def run(config: ConvertConfig) -> ConvertResult:
    """Converts the weights, and writes the model folder."""
    from jacobiflow.models.checkpoints.original import read_original

    state = read_original(config.file)
    if "cond_embed.atom_embed.weight" in state:
        raise InputValueError(
            f"{config.file}: weights of a Prose, a flow of peptides; read them in Python: jf.Prose.from_original(file)"
        )
    flow = (_convert_starflow if "blocks.0.sos_embed" in state else _convert_tarflow)(config, state)
    flow.save_pretrained(config.out)
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    shape, noise = flow.image_shape, flow.config.noise_std
    images = "" if shape is None else f"images of {'x'.join(map(str, shape))} with noise {noise:g}, "
    reads = "texts" if isinstance(flow, jf.STARFlow) else f"{flow.config.num_classes} classes"
    tokens = f"{flow.config.num_tokens} tokens of {flow.config.token_dim} values"
    return ConvertResult(f"{parameters:,} weights, {images}{tokens}, {reads}", flow.config)


def _convert_starflow(config: ConvertConfig, state: dict[str, Any]) -> jf.STARFlow:
    if config.encode_text is None:
        warnings.warn(
            "without --encode-text the model has no states of the empty text, which guidance needs; to guide samples, "
            "convert again with it", stacklevel=1,
        )  # fmt: skip
    flow_config = jf.STARFlow.infer_config(state, str(config.file), config.patch_size or 1)
    if config.noise_std is not None:
        flow_config = replace(flow_config, noise_std=config.noise_std)
    if config.encode_text is None:
        return jf.STARFlow.from_original(config.file, flow_config)
    encoder = options.load_encoder(config.encode_text, flow_config)
    if not options.names_function(config.encode_text):  # A model folder does not name code that runs.
        flow_config = replace(flow_config, text_encoder=config.encode_text)
    return jf.STARFlow.from_original(config.file, flow_config, encoder)


def _convert_tarflow(config: ConvertConfig, state: dict[str, Any]) -> jf.TarFlow:
    if config.encode_text is not None:
        raise InputValueError(f"--encode-text {config.encode_text}: for a STARFlow; leave it out")
    flow_config = jf.TarFlow.infer_config(state, str(config.file), config.patch_size)
    num_tokens, token_dim = flow_config.num_tokens, flow_config.token_dim
    patch_size = math.isqrt(token_dim // 3)
    are_patches = math.isqrt(num_tokens) ** 2 == num_tokens and 3 * patch_size**2 == token_dim > 3
    image_config = flow_config if isinstance(flow_config, jf.TarFlowConfig) else None
    if are_patches and image_config is None:
        raise InputValueError(
            f"{config.file}: seems to be a flow of colour images, whose patch size and noise are not in the name; give "
            f"--patch-size {patch_size} --noise-std S. If it is one over tokens, use jf.TarFlow.from_original in Python"
        )
    if are_patches and image_config is not None and image_config.patch_size != patch_size:
        warnings.warn(
            f"{config.file}: made a flow of {image_config.in_channels} channels, which draws no pictures; if it is one "
            f"of colour images, convert it again with --patch-size {patch_size} --noise-std S", stacklevel=1,
        )  # fmt: skip
    elif image_config is None and math.isqrt(num_tokens) ** 2 == num_tokens:
        warnings.warn(
            f"{config.file}: made a flow over tokens, which draws no pictures; if it is one of images, convert it "
            "again with --patch-size P --noise-std S", stacklevel=1,
        )  # fmt: skip
    elif image_config is not None and config.noise_std is None and not image_config.noise_std:
        warnings.warn(
            f"{config.file}: its name gives no noise, so samples will not be denoised; if the training images had "
            "noise, as TarFlow's do, convert it again with --noise-std S", stacklevel=1,
        )  # fmt: skip
    if config.noise_std is not None and image_config is not None:
        flow_config = replace(image_config, noise_std=config.noise_std)
    elif config.noise_std:
        raise InputValueError(f"--noise-std {config.noise_std:g}: for images; give --patch-size, too")
    return jf.TarFlow.from_original(config.file, flow_config)


def show(config: ConvertConfig, result: ConvertResult) -> None:
    """Prints the shape of the flow, its folder, and how to draw from it."""
    print(f"{result.description}\nwrote the model folder {config.out}: jacobiflow sample --model {config.out}")
