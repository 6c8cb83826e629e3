"""What flows over images share: a stack of affine blocks over tokens, its likelihood, and its model folder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobiflow.checks import check_count, check_floating, check_kind, check_on, check_path, check_rows, short
from jacobiflow.errors import InputError, InputValueError
from jacobiflow.flows.base import FlowBlock
from jacobiflow.flows.card import model_card
from jacobiflow.flows.config import MOST, MOST_CHANNELS, FlowConfig
from jacobiflow.flows.folder import ModelFolder, save_model
from jacobiflow.flows.labels import Labels, as_labels, check_labels
from jacobiflow.flows.permutation import Permutation
from jacobiflow.flows.settings import SamplingSettings
from jacobiflow.flows.weights import CheckpointError, build, floating

if TYPE_CHECKING:
    from typing_extensions import Self


class Step(NamedTuple):
    """What a block does to the tokens in an encoding pass; tensors (N, T, C) are in the block's causal order.

    z = (x - shift) exp(-log_scale), so that `x` is the exact inverse of `block` at `z`.
    """

    block: int
    x: Float[Tensor, "n t d"]
    log_scale: Float[Tensor, "n t d"]
    shift: Float[Tensor, "n t d"]
    z: Float[Tensor, "n t d"]


class ImageFlow(
    nn.Module, PyTorchModelHubMixin, ABC, library_name="jacobiflow", tags=["normalizing-flow"],
    pipeline_tag="unconditional-image-generation",
):  # fmt: skip
    """A stack of affine blocks over the tokens of an image, alternately in raster and in reverse order.

    A flow derives from it and is registered by `jacobiflow.flows.register`. It has:

    - `model_type`: its name in model folders and on the command line.
    - `config_type`: the class of its config.
    - `block_type`: the class of its blocks, called with the config and a `Permutation`.
    - `to_tokens` and `to_images`, which say what a token is, and `config_from_options`.

    Every flow has `var`, the prior's variance (T, C); `recommended`, the `SamplingSettings` that suit it best, of
    which there are none by default; and `report_files`, the reports in the model folder that it was read from: the
    strategy "auto" plans by that of the guidance which is sampled with.
    """

    model_type: ClassVar[str] = ""
    config_type: ClassVar[type[FlowConfig]]
    block_type: ClassVar[type[FlowBlock]]
    config: FlowConfig
    blocks: Sequence[FlowBlock]
    var: Tensor
    recommended: SamplingSettings = SamplingSettings()
    report_files: tuple[Path, ...] = ()

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        check_kind("config", config, self.config_type, f"a {self.config_type.__name__}")
        for name in ("in_channels", "image_size", "num_blocks", "num_tokens", "token_channels"):
            check_count(name, getattr(config, name), most=MOST.get(name, MOST_CHANNELS))
        self.config = config
        orders = (Permutation("identity"), Permutation("flip"))
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            self.block_type(config, orders[i % 2]) for i in range(config.num_blocks)
        )
        self.register_buffer("var", torch.ones(config.num_tokens, config.token_channels))

    @classmethod
    @abstractmethod
    def config_from_options(
        cls, *, in_channels: int, image_size: int, num_classes: int, channels: int, blocks: int, layers: int
    ) -> FlowConfig:
        """A config from what `jacobiflow train` lets a user choose of any flow.

        A flow may have more of its options as keyword arguments with a default: `patch_size`, `head_dim`,
        `volume_preserving`, and `noise_std` where it can be trained on images with Gaussian noise.
        """

    @classmethod
    def config_from_shapes(cls, state: Mapping[str, Tensor], config: Any) -> FlowConfig:
        """The config that the shapes of a state dict say, with the values of `config` for what they do not.

        By default they say nothing. A flow that overrides this gives better errors for weights that do not fit.

        **Raises** `jacobiflow.InputError` where `state` is of no such flow.
        """
        return config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub: Any) -> Self:
        """The flow that `save_pretrained` or `push_to_hub` wrote, in eval mode, its parameters with gradients.

        **Arguments:**

        - `pretrained_model_name_or_path`: a bundled model's name, a folder, or a hub id "owner/name".
        - `hub`: for a hub id, `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        **Raises** `CheckpointError`, a `ValueError`, where that is no model, one of another class, or a broken one.
        """
        check_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        return cls.from_folder(ModelFolder.open(pretrained_model_name_or_path, **hub))

    @classmethod
    def from_folder(cls, folder: ModelFolder) -> Self:
        """The flow in a model folder; see `from_pretrained`."""
        if folder.model_type != cls.model_type:
            raise CheckpointError(
                f"{folder.path}: model_type {folder.model_type!r}, which is no {cls.__name__}; jacobiflow.load finds "
                "the class"
            )
        flow = cls.from_state(folder.config(cls.config_type), folder.state(), str(folder.path))
        flow.recommended, flow.report_files = folder.recommended, folder.report_files
        return flow

    @classmethod
    def from_state(cls, config: FlowConfig, state: dict[str, Tensor], source: str) -> Self:
        """The flow with exactly the tensors of `state`, which is emptied, in eval mode; half becomes float32.

        **Raises** `CheckpointError` that names `source` where they do not fit `config`.
        """
        try:
            found = cls.config_from_shapes(state, config)
        except InputError as error:
            raise CheckpointError(f"{source}: {error}") from None
        differing = [
            f"{field.name}={getattr(found, field.name)} rather than {getattr(config, field.name)}"
            for field in fields(config)
            if getattr(found, field.name) != getattr(config, field.name)
        ]
        if differing:  # before anything is built by the config: it may ask for far too much
            raise CheckpointError(f"{source}: does not fit the config: the shapes say {', '.join(differing)}")
        return build(partial(cls, config), state, source)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        config: FlowConfig | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Write a model folder, in `dtype` (by default the flow's own); what was there stays until then.

        The flow's `recommended` settings go into config.json. Its reports are copied where they are of the weights that
        are written, and a model card is made where there is no README.md. `push_to_hub` calls this with `config`, which
        can only be the flow's own.

        **Raises** `CheckpointError`, a `ValueError`, where a weight is not finite, the folder cannot be written, or it
        has a config.json or weights that are not of a model of this library; `FolderInUseError`, a `ValueError`, where
        another process writes to it.
        """
        if config is not None and config != self.config:
            raise InputValueError(f"config={short(config)}: leave it out, the flow's own is saved")
        check_path("save_directory", save_directory)
        check_kind("dtype", dtype, str | torch.dtype | None, "a dtype, such as torch.float64, its name, or None")
        check_kind("config", config, type(self.config) | None, "the flow's own, or None")
        check_kind("recommended", self.recommended, SamplingSettings, "SamplingSettings")
        save_model(self, Path(save_directory), floating(dtype), model_card_kwargs)

    def push_to_hub(self, repo_id: str, **hub: Any) -> str:
        """Upload a model folder, as `save_pretrained` writes it, to the hub; `hub` as huggingface_hub takes it.

        The card's values are in `model_card_kwargs`, see `generate_model_card`.
        """
        card = {"name": repo_id, **(hub.pop("model_card_kwargs", None) or {})}
        return str(super().push_to_hub(repo_id, **hub, model_card_kwargs=card))

    def generate_model_card(self, **values: Any) -> ModelCard:
        """The card that is written beside the weights; `values` are those of `jacobiflow.flows.card.model_card`."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        data, kind = self._hub_mixin_info.model_card_data, type(self).__name__
        return model_card(data, kind, self.config, self.recommended, parameters, **values)

    @property
    def learns_prior(self) -> bool:
        """Whether training also moves the prior's variance `var`, towards the mean of z^2."""
        return False

    @abstractmethod
    def to_tokens(self, images: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n t d"], Float[Tensor, " n"]]:
        """Images as tokens in raster order, and log|det| of that map in nats."""

    @abstractmethod
    def to_images(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n c h w"]:
        """Inverse of `to_tokens`."""

    def initialize(self, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"] | None = None) -> None:
        """Set what a flow sets by its first training batch, in place; here nothing."""

    def check_labels(self, labels: Labels, num: int) -> Int[Tensor, " n"]:
        """`labels` as a tensor; a single class is that of all `num` samples.

        **Raises** `ValueError` if they are no classes of this flow for `num` samples, `TypeError` if they are no whole
        numbers.
        """
        return check_labels(labels, check_count("num", num, 0), self.config.num_classes)

    def check_images(self, images: Float[Tensor, "n c h w"]) -> None:
        """**Raises** `TypeError` where `images` are no floating-point numbers, `ValueError` where they are not of the
        shape that this flow takes.
        """
        size = self.config.image_size
        check_floating("images", images, ("N", self.config.in_channels, size, size))

    def check_batch(self, images: Float[Tensor, "n c h w"], labels: Labels | None) -> Int[Tensor, " n"] | None:
        """Checks images and labels, as `encode` takes them; returns the labels as a tensor on the flow's device.

        **Raises** `TypeError` or `ValueError` if images do not fit the flow, labels are none of its classes for them
        (of a flow without classes, not one for each image), or tensors are on another device.
        """
        self.check_images(images)
        check_on("images", images, self.var.device)
        if labels is None:
            return None
        if isinstance(labels, Tensor):
            check_on("labels", labels, self.var.device)
        tensor = as_labels(labels, len(images)).to(self.var.device)
        check_rows("labels", tensor, len(images), "images")
        return self.check_labels(tensor, len(images)) if self.config.num_classes else tensor

    def walk(
        self,
        x: Float[Tensor, "n t d"],
        labels: Int[Tensor, " n"] | None = None,
        parameters: Callable[[int, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Iterator[Step]:
        """Encode tokens `x` in raster order block by block: what each one does, in encoding order.

        `parameters(i, x)` gives the log-scale and shift of block i at tokens in its causal order; by default it is
        `blocks[i](x, labels)`.
        """
        for i, block in enumerate(self.blocks):
            x = block.permutation(x)
            log_scale, shift = block(x, labels) if parameters is None else parameters(i, x)
            z = (x - shift) * torch.exp(-log_scale)
            yield Step(i, x, log_scale, shift, z)
            x = block.permutation(z)

    def normalize(
        self, images: Float[Tensor, "n c h w"], labels: Labels | None = None
    ) -> tuple[Float[Tensor, "n t d"], Float[Tensor, " n"]]:
        """Tokens after all blocks, before the prior's scale, and log|det| in nats, summed over dimensions.

        They are at least float32, in whatever dtype the network runs; see `state_dtype`. `labels` (N,) are the images'
        classes: a tensor on the flow's device, a list or an array; or one class for all.

        **Raises** `ValueError` where images or labels are not of this flow's shape, or a label is no class, and
        `TypeError` where they are of another kind. A flow without classes ignores labels.
        """
        labels = self.check_batch(images, labels)
        x, log_det = self.to_tokens(images.to(torch.promote_types(images.dtype, state_dtype(self))))
        for step in self.walk(x, labels):
            x = self.blocks[step.block].permutation(step.z)
            log_det = log_det - step.log_scale.sum(dim=(1, 2))
        return x, log_det

    def encode(
        self, images: Float[Tensor, "n c h w"], labels: Labels | None = None
    ) -> tuple[Float[Tensor, "n t d"], Float[Tensor, " n"]]:
        """Latents z = f(images), standard normal under the model, and log|det df/dx| in nats; prior included.

        `labels` as `normalize` takes them.
        """
        z, log_det = self.normalize(images, labels)
        var = self.var.to(z.dtype)
        return z / var.sqrt(), log_det - 0.5 * var.log().sum()

    def log_prob(self, images: Float[Tensor, "n c h w"], labels: Labels | None = None) -> Float[Tensor, " n"]:
        """Log-density in nats: log N(z; 0, I) + log|det df/dx|."""
        z, log_det = self.encode(images, labels)
        return log_det - 0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=(1, 2))

    def bits_per_dim(self, images: Float[Tensor, "n c h w"], labels: Labels | None = None) -> Float[Tensor, " n"]:
        """-log2 p(images) / D + log2(128): in units of 8-bit pixels, whose [0, 256) the images hold as [-1, 1)."""
        return -self.log_prob(images, labels) / (images[0].numel() * math.log(2)) + 7


def check_flow(flow: Any) -> None:
    """**Raises** `TypeError` where `flow` is no flow over images."""
    check_kind("flow", flow, ImageFlow, "a flow, such as jacobiflow.load(...) returns")


def state_dtype(flow: ImageFlow) -> torch.dtype:
    """The dtype of tokens and residuals: float64 where the flow's weights are, else float32."""
    return torch.float64 if flow.var.dtype == torch.float64 else torch.float32
