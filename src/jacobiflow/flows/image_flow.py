"""The base class of flows over images, a stack of affine blocks over tokens; and the flows by their names."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobiflow.checks import check_device, check_floating, check_kind, check_path, short
from jacobiflow.errors import CheckpointError, InputTypeError, InputValueError
from jacobiflow.flows.base import AffineBlock, FlowBlock, Permutation, ScaleShift, Tokens
from jacobiflow.flows.config import FlowConfig, Labels, as_labels, describe_unknown
from jacobiflow.flows.folder import CONFIG, ModelFolder, build, check_dtype, hub_client, reports_in, write_model
from jacobiflow.flows.guidance import GIVE_GUIDANCE, Guidance, SamplingSettings, guided

if TYPE_CHECKING:
    from typing_extensions import Self

Images = Float[Tensor, "n c h w"]
"""Images of a batch, nominally in [-1, 1]."""


class Step(NamedTuple):
    """The step z = (x - shift) exp(-log_scale) of a block in an encoding pass, in the block's causal order."""

    block: int
    x: Tokens
    log_scale: Tokens
    shift: Tokens
    z: Tokens


class ImageFlow(nn.Module, ABC):
    """A stack of affine blocks over the tokens of an image, alternately in raster and in reverse order.

    A flow derives from it, is registered by `jacobiflow.flows.register`, and defines the class attributes, `to_tokens`,
    `to_images` and `config_from_options`.

    Attributes:
        model_type: Its name in model folders and on the command line.
        block_type: The class of its blocks, called with the config and a `Permutation`.
        var: The prior's variance (T, C).
        guidance: That of this view, see `guided`.
        recommended: The settings that suit it best.
        report_files: The reports and tunings in the model folder that it was read from.
    """

    model_type: ClassVar[str] = ""
    config_type: ClassVar[type[FlowConfig]]
    block_type: ClassVar[type[FlowBlock]]
    config: FlowConfig
    blocks: Sequence[FlowBlock]
    var: Tensor
    guidance: Guidance | None = None
    recommended: SamplingSettings = SamplingSettings()
    report_files: tuple[Path, ...] = ()

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        check_kind("config", config, self.config_type, f"a {self.config_type.__name__}")
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
        """Makes a config from the options of `jacobiflow train`.

        A flow may have more of them as keyword arguments with a default: `patch_size`, `head_dim`, `volume_preserving`,
        and `noise_std` if it can be trained on images with Gaussian noise.
        """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub: Any) -> Self:
        """Loads a bundled model, a folder, or a hub id "owner/name", in eval mode, its parameters with gradients.

        For a hub id `hub` may be `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.
        """
        check_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        folder = ModelFolder.open(pretrained_model_name_or_path, **hub)
        if folder.model_type != cls.model_type:
            raise CheckpointError(f"{folder.path}: a {folder.model_type!r}, not a {cls.__name__}; use jacobiflow.load")
        flow = build(cls, folder.config(cls.config_type), folder.state(), str(folder.path))
        flow.recommended, flow.report_files = folder.recommended, reports_in(folder.path)
        return flow

    def save_pretrained(self, save_directory: str | Path, *, dtype: torch.dtype | str | None = None) -> None:
        """Writes a model folder; a model that was there stays until all files are complete.

        The flow's `recommended` settings go into config.json. Its reports are copied if they are of these weights.
        `dtype` is by default the flow's own.

        Raises:
            CheckpointError: If a weight is not finite, or the folder has files under a model's names that are not ours.
        """
        check_path("save_directory", save_directory)
        write_model(self, Path(save_directory), check_dtype(dtype))

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None,
        dtype: torch.dtype | str | None = None, **upload: Any,
    ) -> str:  # fmt: skip
        """Uploads a model folder, as `save_pretrained` writes it, to the Hugging Face Hub.

        Args:
            repo_id: The repository, "owner/name", which is created if need be.
            token: By default that of `hf auth login`.
            upload: For `huggingface_hub.HfApi.upload_folder`, such as `revision`, `create_pr`, `commit_message`.

        Returns the address of the commit.
        """
        hub = hub_client().HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            write_model(self, Path(folder), check_dtype(dtype), repo_id)
            return str(hub.upload_folder(repo_id=repo_id, folder_path=folder, **upload))

    def guided(self, guidance: Guidance | None) -> Self:
        """Returns a view of this flow that is sampled under `guidance`; it shares parameters and buffers.

        `encode`, `log_prob` and denoising are those of the plain flow. `None`, or a weight of 0, gives the plain flow.
        """
        check_kind("guidance", guidance, Guidance | None, GIVE_GUIDANCE)
        view = copy.copy(self)
        view.guidance = guidance if guidance is not None and guidance.weight else None
        view.inverse_blocks  # noqa: B018  raises if a block cannot be guided
        return view

    @property
    def inverse_blocks(self) -> list[AffineBlock]:
        """The blocks that sampling inverts: `blocks`, each under the guidance of this view."""
        return [guided(block, self.guidance) for block in self.blocks]

    @property
    def learns_prior(self) -> bool:
        """True if training also moves the prior's variance `var`, towards the mean of z^2."""
        return False

    @abstractmethod
    def to_tokens(self, images: Images) -> tuple[Tokens, Float[Tensor, " n"]]:
        """Returns images as tokens in raster order, and log|det| of that map in nats."""

    @abstractmethod
    def to_images(self, x: Tokens) -> Images:
        """Returns the images of tokens; inverse of `to_tokens`."""

    def initialize(self, images: Images, labels: Int[Tensor, " n"] | None = None) -> None:
        """Initialises the flow by its first training batch, in place; by default it does nothing."""

    def check_labels(self, labels: Labels, num: int) -> Int[Tensor, " n"]:
        """Returns `labels`, checked to be classes of this flow for `num` samples, as a tensor."""
        num_classes = self.config.num_classes
        if not num_classes:
            raise InputValueError("labels given, but this flow is unconditional: leave them out")
        tensor = as_labels(labels, num)
        if len(tensor) != num:
            raise InputValueError(f"labels={short(labels)}: give {num} whole numbers, one for each sample")
        if (tensor >= num_classes).any():
            raise InputValueError(describe_unknown(tensor, num_classes))
        return tensor

    def check_images(self, images: Images) -> None:
        """Checks that `images` are floating-point numbers in the shape of this flow."""
        size = self.config.image_size
        check_floating("images", images, ("N", self.config.in_channels, size, size))

    def check_batch(self, images: Images, labels: Labels | None) -> Int[Tensor, " n"] | None:
        """Checks that images and labels fit the flow; returns the labels as a tensor on its device."""
        self.check_images(images)
        if labels is None or not self.config.num_classes:
            return None
        return self.check_labels(labels, len(images)).to(self.var.device)

    def walk(
        self, x: Tokens, labels: Tensor | None = None, parameters: Callable[[int, Tensor], ScaleShift] | None = None
    ) -> Iterator[Step]:
        """Encodes tokens `x` in raster order block by block, and yields the step of each.

        `parameters(i, x)` gives the log-scale and shift of block i; by default it is `blocks[i](x, labels)`.
        """
        for i, block in enumerate(self.blocks):
            x = block.permutation(x)
            log_scale, shift = block(x, labels) if parameters is None else parameters(i, x)
            z = (x - shift) * torch.exp(-log_scale)
            yield Step(i, x, log_scale, shift, z)
            x = block.permutation(z)

    def prior_tokens(self, latents: Tokens) -> Tokens:
        """Returns sqrt(var) times standard normal `latents`, in the dtype of `state_dtype`: the start of `invert`."""
        dtype = state_dtype(self)
        return latents.to(self.var.device, dtype) * self.var.to(dtype).sqrt()

    def invert(self, x: Tokens, solve: Callable[[int, Tensor], Tensor]) -> Tokens:
        """Returns the tokens f_0^-1(... f_{L-1}^-1(x)) in raster order: `walk`, backwards.

        `solve(i, z)` inverts block `i` at `z`, both in the block's causal order. It may return more rows than `z` has.
        """
        for i in reversed(range(self.config.num_blocks)):
            permutation = self.blocks[i].permutation
            x = permutation(solve(i, permutation(x)))
        return x

    def normalize(self, images: Images, labels: Labels | None = None) -> tuple[Tokens, Float[Tensor, " n"]]:
        """Returns tokens after all blocks, before the prior's scale, and log|det| in nats, summed over dimensions.

        They are at least float32, in whatever dtype the network runs. `labels` are classes (N,), or one for all; a flow
        without classes ignores them.
        """
        labels = self.check_batch(images, labels)
        x, log_det = self.to_tokens(images.to(torch.promote_types(images.dtype, state_dtype(self))))
        for step in self.walk(x, labels):
            x = self.blocks[step.block].permutation(step.z)
            log_det = log_det - step.log_scale.sum(dim=(1, 2))
        return x, log_det

    def encode(self, images: Images, labels: Labels | None = None) -> tuple[Tokens, Float[Tensor, " n"]]:
        """Returns latents z = f(images), standard normal under the model, and log|det df/dx| in nats with the prior."""
        z, log_det = self.normalize(images, labels)
        var = self.var.to(z.dtype)
        return z / var.sqrt(), log_det - 0.5 * var.log().sum()

    def log_prob(self, images: Images, labels: Labels | None = None) -> Float[Tensor, " n"]:
        """Returns the log-density in nats: log N(z; 0, I) + log|det df/dx|."""
        z, log_det = self.encode(images, labels)
        return log_det - 0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=(1, 2))

    def bits_per_dim(self, images: Images, labels: Labels | None = None) -> Float[Tensor, " n"]:
        """Returns -log2 p(images) / D + log2(128): bits of 8-bit pixels, whose [0, 256) is [-1, 1) here."""
        return -self.log_prob(images, labels) / (images[0].numel() * math.log(2)) + 7


def check_flow(flow: Any) -> None:
    """Checks that `flow` is a flow over images."""
    check_kind("flow", flow, ImageFlow, "a flow, such as jacobiflow.load(...) returns")


def state_dtype(flow: ImageFlow) -> torch.dtype:
    """Returns the dtype of tokens and residuals: float64 if the flow's weights are, else float32."""
    return torch.float64 if flow.var.dtype == torch.float64 else torch.float32


def precision(flow: ImageFlow) -> str:
    """Returns the name of the flow's dtype: "float32", "bfloat16", .. or "tf32", if PyTorch lets a GPU use that."""
    dtype = flow.var.dtype
    tf32 = dtype == torch.float32 and flow.var.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")


Flow = TypeVar("Flow", bound=type[ImageFlow])

FLOWS: dict[str, type[ImageFlow]] = {}
"""The registered flows by their names."""


def register(flow: Flow) -> Flow:
    """Registers a subclass of `ImageFlow` under its `model_type`; a class decorator.

    Example:
        >>> @register
        ... class Wide(jf.MAF):
        ...     model_type = "wide-maf"
    """
    if not isinstance(flow, type) or not issubclass(flow, ImageFlow):
        raise InputTypeError(f"flow={short(flow)}: give a class that derives from ImageFlow")
    name, owner = flow.model_type, FLOWS.get(flow.model_type, flow)
    # The same class once more is a module that was loaded again, or a notebook's cell.
    if (owner.__module__, owner.__qualname__) != (flow.__module__, flow.__qualname__):
        raise InputValueError(f"model_type {name!r}: taken by {owner.__module__}.{owner.__qualname__}; give another")
    FLOWS[name] = flow
    return flow


def load(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None) -> ImageFlow:
    """Loads a flow for sampling: in eval mode, its parameters without gradients.

    Args:
        name: A bundled model's name, else a local folder, else a hub id "owner/name". For a folder that has the name of
            a bundled model write "./name", or give a `Path`.
        dtype: By default as stored, with float16 and bfloat16 widened to float32.

    Raises:
        CheckpointError: If there is no such model, or its files do not fit each other.

    Example:
        >>> flow = jf.load("digits-p1")
        >>> type(flow).__name__, flow.config.num_tokens
        ('TarFlow', 64)
    """
    check_path("name", name)
    device, dtype = check_device(device, here=True), check_dtype(dtype)
    folder = ModelFolder.open(name)
    if folder.model_type not in FLOWS:
        raise CheckpointError(
            f"{folder.path / CONFIG}: model_type {folder.model_type!r}; there are {', '.join(sorted(FLOWS))}: import "
            "the module that registers another"
        )
    flow = FLOWS[folder.model_type].from_pretrained(folder.path)
    return flow.requires_grad_(False).to(device=device, dtype=dtype)
