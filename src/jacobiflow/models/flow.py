"""The base class of flows, a stack of affine blocks over tokens; and the flows by their names."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobiflow.blocks.base import AffineBlock, FlowBlock, ScaleShift, TokensLogDet
from jacobiflow.blocks.context import NO_CONTEXT, Context, check_numbers
from jacobiflow.blocks.guidance import GIVE_GUIDANCE, Guidance, SamplingSettings, guided
from jacobiflow.blocks.permutation import Permutation
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.errors import CheckpointError, InputError, InputTypeError, InputValueError
from jacobiflow.models.checkpoints.folder import (
    CONFIG,
    ModelFolder,
    build,
    check_dtype,
    hub_client,
    reports_in,
    write_model,
)
from jacobiflow.models.config import ContextLike, FlowConfig, Labels, as_labels, describe_unknown
from jacobiflow.models.latents import FIRST_CALIBRATION_LATENT, draw_latents
from jacobiflow.utils.checks import (
    FLOATS,
    check_device,
    check_finite,
    check_floating,
    check_kind,
    check_number,
    check_path,
    check_rows,
    format_value,
)

if TYPE_CHECKING:
    from typing_extensions import Self

Images = Float[Tensor, "n c h w"]
"""Images of a batch, nominally in [-1, 1]."""

Data = Float[Tensor, "n ..."]
"""Images (N, C, H, W), or tokens (N, T, C), as the flow takes them."""


class Step(NamedTuple):
    """The step z = (x - shift) exp(-log_scale) of a block in an encoding pass, in the block's causal order."""

    block: int
    x: Tokens
    log_scale: Tokens
    shift: Tokens
    z: Tokens


class Flow(nn.Module):
    """A stack of affine blocks over tokens (N, T, C), each of which reads them in an order of its own.

    By default its data are the tokens. A flow over images also defines `to_tokens`, `from_tokens`, `tokens_log_det` if
    these change volumes, and `config_from_options`; its config has `in_channels` and `image_size`. A flow is registered
    by `jacobiflow.models.register_flow`.

    Attributes:
        model_type: Its name in model folders and on the command line.
        reads_text: Its context is prompts or the states of texts.
        block_type: The class of its blocks, called with the config and a `Permutation`.
        var: The prior's variance (T, C).
        guidance: That of this view, see `guided`.
        recommended: The settings that suit it best.
        report_files: The reports and tunings in the model folder that it was read from.
    """

    model_type: ClassVar[str] = ""
    reads_text: ClassVar[bool] = False
    config_types: ClassVar[tuple[type[FlowConfig], ...]]
    block_type: ClassVar[type[FlowBlock]]
    config: FlowConfig
    blocks: Sequence[FlowBlock]
    var: Tensor
    guidance: Guidance | None = None
    recommended: SamplingSettings = SamplingSettings()
    report_files: tuple[Path, ...] = ()

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.check_config(config)
        self.config = config
        self.blocks = nn.ModuleList(map(self.make_block, range(config.num_blocks)))  # type: ignore[assignment]
        self.register_buffer("var", torch.ones(config.num_tokens, config.token_channels))

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Checks that `config` is of a kind that the flow takes."""
        check_kind("config", config, cls.config_types, f"a {' or a '.join(kind.__name__ for kind in cls.config_types)}")

    def make_block(self, index: int) -> FlowBlock:
        """Makes a block; by default they read the tokens alternately as they are and reversed."""
        return self.block_type(self.config, Permutation("flip" if index % 2 else "identity"))

    @classmethod
    def config_from_options(
        cls, *, in_channels: int, image_size: int, num_classes: int, channels: int, blocks: int, layers: int
    ) -> FlowConfig:
        """Makes a config from the options of `jacobiflow train`.

        A flow may have more of them as keyword arguments with a default: `patch_size`, `head_dim`, `volume_preserving`,
        and `noise_std` if it can be trained on images with Gaussian noise.
        """
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub: Any) -> Self:
        """Loads a bundled model, a folder, or a hub id "owner/name", in eval mode, its parameters with gradients.

        For a hub id `hub` may be `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.
        """
        check_path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        folder = ModelFolder.open(pretrained_model_name_or_path, **hub)
        if folder.model_type != cls.model_type:
            raise CheckpointError(f"{folder.path}: a {folder.model_type!r}, not a {cls.__name__}; use jacobiflow.load")
        flow = build(cls, folder.config(cls.config_types), folder.state(), str(folder.path))
        flow.recommended, flow.report_files = folder.recommended, reports_in(folder.path)
        try:
            flow.guided(flow.recommended.guidance)
            check_rate(flow, flow.recommended.denoise)
        except InputError as error:
            raise CheckpointError(f"{folder.path / CONFIG}: recommended: {error}") from error
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
        if guidance is not None and guidance.weight and self._context_channels:
            raise InputValueError(f"guidance={guidance}: for classes only, and this flow's context is numbers")
        view = copy.copy(self)
        view.guidance = guidance if guidance is not None and guidance.weight else None
        view.inverse_blocks  # noqa: B018  raises if a block cannot be guided
        return view

    @property
    def inverse_blocks(self) -> list[AffineBlock]:
        """The blocks that sampling inverts: `blocks`, each under the guidance of this view."""
        return [guided(block, self.guidance) for block in self.blocks]

    @property
    def has_conditions(self) -> bool:
        """True if its context can be left out: labels or texts, which guidance moves samples towards."""
        return bool(self.config.num_classes) or self.reads_text

    @property
    def learns_prior(self) -> bool:
        """True if training also moves the prior's variance `var`, towards the mean of z^2."""
        return False

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) if the data are images, else `None`."""
        size = getattr(self.config, "image_size", None)
        return None if size is None else (self.config.in_channels, size, size)  # type: ignore[attr-defined]

    def require_images(self) -> tuple[int, int, int]:
        """Returns (C, H, W). Raises ValueError for a flow over tokens."""
        if self.image_shape is None:
            raise InputValueError(f"this flow is over {self.config.num_tokens} tokens, and images are asked for")
        return self.image_shape

    @property
    def _context_channels(self) -> int:
        return int(getattr(self.config, "context_channels", 0))

    def to_tokens(self, x: Data) -> Tokens:
        """Returns data as tokens; images in raster order."""
        return x

    def from_tokens(self, tokens: Tokens) -> Data:
        """Returns the data of tokens; inverse of `to_tokens`."""
        return tokens

    def tokens_log_det(self, tokens: Tokens) -> Float[Tensor, " n"]:
        """Returns log|det| of `to_tokens` in nats, at the data of these tokens."""
        return tokens.new_zeros(len(tokens))

    def initialize(self, x: Data, labels: Int[Tensor, " n"] | None = None) -> None:
        """Initialises the flow by its first training batch, in place; by default it does nothing."""

    def check_labels(self, labels: Labels, num: int) -> Int[Tensor, " n"]:
        """Returns `labels`, checked to be classes of this flow for `num` samples, as a tensor."""
        num_classes = self.config.num_classes
        if not num_classes:
            raise InputValueError("labels given, but this flow has no classes: leave them out")
        tensor = as_labels(labels, num)
        if len(tensor) != num:
            raise InputValueError(f"labels={format_value(labels)}: give {num} whole numbers, one for each sample")
        if (tensor >= num_classes).any():
            raise InputValueError(describe_unknown(tensor, num_classes))
        return tensor

    def check_context(self, context: ContextLike | None, num: int) -> Context:
        """Returns the context of `num` samples: labels, numbers (N, K) or (N, T, K), or nothing; all checked."""
        if isinstance(context, Context):
            context = context.values
        if channels := self._context_channels:
            check_numbers(context, self.config.num_tokens, channels)
            check_rows("context", context, num, "samples")
            assert isinstance(context, Tensor)
            check_finite("context", context)
            return Context(context)
        is_numbers = isinstance(context, Tensor) and context.is_floating_point()
        if is_numbers and not self.config.num_classes:
            raise InputValueError(
                f"context={format_value(context)}: this flow's context is labels, or none; leave it out"
            )
        return NO_CONTEXT if context is None else Context(self.check_labels(context, num))  # type: ignore[arg-type]

    def check_one_context(self, labels: Labels | None, context: ContextLike | None, num: int) -> Context:
        """Returns the context of `num` samples, given as either argument; checked."""
        if labels is not None and context is not None:
            raise InputValueError("labels and context: give one of them")
        return self.check_context(labels if context is None else context, num)

    def example_context(self, num: int) -> Context:
        """Returns a context to time the flow with: all classes in turn, or standard normal numbers."""
        if self._context_channels:
            return Context(draw_latents(num, 1, self._context_channels, start=FIRST_CALIBRATION_LATENT).squeeze(1))
        classes = self.config.num_classes
        return Context(torch.arange(num) % classes) if classes else NO_CONTEXT

    def check_data(self, x: Data, name: str = "x") -> None:
        """Checks that `x`, in a message `name`, are floating-point numbers in the shape of this flow's data."""
        config = self.config
        shape = self.image_shape or (config.num_tokens, config.token_channels)
        check_floating(name, x, ("N", *shape))

    def check_batch(self, x: Data, context: ContextLike | None) -> Context:
        """Checks that data and context fit the flow; returns the context on its device."""
        check_flow(self)
        self.check_data(x)
        return self.check_context(context, len(x)).to(self.var.device)

    def encode_steps(
        self, x: Tokens, context: Context = NO_CONTEXT, parameters: Callable[[int, Tensor], ScaleShift] | None = None
    ) -> Iterator[Step]:
        """Encodes tokens `x` block by block, and yields the step of each.

        `parameters(i, x)` gives the log-scale and shift of block i; by default it is `blocks[i](x, context)`.
        """
        for i, block in enumerate(self.blocks):
            x = block.permutation(x)
            log_scale, shift = block(x, context) if parameters is None else parameters(i, x)
            z = (x - shift) * torch.exp(-log_scale)
            yield Step(i, x, log_scale, shift, z)
            x = block.permutation.inverse(z)

    def prior_tokens(self, latents: Tokens) -> Tokens:
        """Returns sqrt(var) times standard normal `latents`, in the dtype of `state_dtype`: the start of sampling."""
        dtype = state_dtype(self)
        return latents.to(self.var.device, dtype) * self.var.to(dtype).sqrt()

    def map_blocks_reversed(self, x: Tokens, solve: Callable[[int, Tensor], Tensor]) -> Tokens:
        """Returns the tokens f_0^-1(... f_{L-1}^-1(x)).

        `solve(i, z)` inverts block `i` at `z`, both in the block's causal order. It may return more rows than `z` has.
        """
        for i in reversed(range(self.config.num_blocks)):
            permutation = self.blocks[i].permutation
            x = permutation.inverse(solve(i, permutation(x)))
        return x

    def normalize(self, x: Data, context: ContextLike | None = None) -> TokensLogDet:
        """Returns tokens after all blocks, before the prior's scale, and log|det| in nats, summed over dimensions.

        They are at least float32, in whatever dtype the network runs. `context` is labels (N,), one label for all, or
        numbers (N, K) or (N, T, K), as the flow takes it.
        """
        checked = self.check_batch(x, context)
        return self._normalize(self.to_tokens(x.to(torch.promote_types(x.dtype, state_dtype(self)))), checked)

    def _normalize(self, tokens: Tokens, context: Context) -> TokensLogDet:
        log_det = self.tokens_log_det(tokens)
        for block in self.blocks:
            z, log_scale = block.encode(block.permutation(tokens), context)
            tokens, log_det = block.permutation.inverse(z), log_det - log_scale
        return tokens, log_det

    def encode(self, x: Data, context: ContextLike | None = None) -> TokensLogDet:
        """Returns latents z = f(x), standard normal under the model, and log|det df/dx| in nats with the prior."""
        return self._to_standard(*self.normalize(x, context))

    def _to_standard(self, z: Tensor, log_det: Tensor) -> TokensLogDet:
        var = self.var.to(z.dtype)
        return z / var.sqrt(), log_det - 0.5 * var.log().sum()

    def log_prob(self, x: Data, context: ContextLike | None = None) -> Float[Tensor, " n"]:
        """Returns the log-density in nats: log N(z; 0, I) + log|det df/dx|."""
        z, log_det = self.encode(x, context)
        return log_normal(z) + log_det

    def tokens_log_prob(self, tokens: Tokens, context: Context) -> Float[Tensor, " n"]:
        """Returns the log-density in nats of the data that have these tokens."""
        z, log_det = self._to_standard(*self._normalize(tokens, context))
        return log_normal(z) + log_det

    def bits_per_dim(self, images: Images, labels: Labels | None = None) -> Float[Tensor, " n"]:
        """Returns -log2 p(images) / D + log2(128): bits of 8-bit pixels, whose [0, 256) is [-1, 1) here."""
        self.check_data(images, "images")
        return -self.log_prob(images, labels) / (images[0].numel() * math.log(2)) + 7


def log_normal(z: Tokens) -> Float[Tensor, " n"]:
    """Returns log N(z; 0, I) in nats."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=(1, 2))


def check_flow(flow: Any) -> None:
    """Checks that `flow` is a flow."""
    check_kind("flow", flow, Flow, "a flow, such as jacobiflow.load(...) returns")
    if not flow.config.num_tokens:
        raise InputValueError("flow: of any peptide; give the view of one, flow.for_peptide(...)")
    if flow.var.dtype not in FLOATS:
        raise InputValueError(f"flow: its weights are of {flow.var.dtype}; give flow.float()")


def check_rate(flow: Flow, rate: float, name: str = "denoise") -> float:
    """Returns the rate as a Python number; raises ValueError, naming it `name`, if the flow has no noise to remove."""
    rate = check_number(name, rate, expected="0 (off) or a positive rate")
    if rate and not flow.config.noise_std:
        raise InputValueError(f"{name}={rate}: this flow's noise_std is 0, there is no noise to remove; give 0")
    return rate


def state_dtype(flow: Flow) -> torch.dtype:
    """Returns the dtype of tokens and residuals: float64 if the flow's weights are, else float32."""
    return torch.float64 if flow.var.dtype == torch.float64 else torch.float32


def precision(flow: Flow) -> str:
    """Returns the name of the flow's dtype: "float32", "bfloat16", .. or "tf32", if PyTorch lets a GPU use that."""
    dtype = flow.var.dtype
    tf32 = dtype == torch.float32 and flow.var.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")


FlowType = TypeVar("FlowType", bound=type[Flow])

FLOWS: dict[str, type[Flow]] = {}
"""The registered flows by their names."""


def register_flow(flow: FlowType) -> FlowType:
    """Registers a subclass of `Flow` under its `model_type`; a class decorator.

    Example:
        >>> @register_flow
        ... class Wide(jf.MAF):
        ...     model_type = "wide-maf"
    """
    if not isinstance(flow, type) or not issubclass(flow, Flow):
        raise InputTypeError(f"flow={format_value(flow)}: give a class that derives from Flow")
    name, owner = flow.model_type, FLOWS.get(flow.model_type, flow)
    # The same class once more is a module that was loaded again, or a notebook's cell.
    if (owner.__module__, owner.__qualname__) != (flow.__module__, flow.__qualname__):
        raise InputValueError(f"model_type {name!r}: taken by {owner.__module__}.{owner.__qualname__}; give another")
    FLOWS[name] = flow
    return flow


def load(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None) -> Flow:
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
    device, dtype = check_device(device, must_exist=True), check_dtype(dtype)
    folder = ModelFolder.open(name)
    if folder.model_type not in FLOWS:
        raise CheckpointError(
            f"{folder.path / CONFIG}: model_type {folder.model_type!r}; there are {', '.join(sorted(FLOWS))}: import "
            "the module that registers another"
        )
    flow = FLOWS[folder.model_type].from_pretrained(folder.path)
    return flow.requires_grad_(False).to(device=device, dtype=dtype)
