"""The base class of flows: a stack of affine blocks over tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jacobiflow.blocks.base import AffineBlock, FlowBlock, ScaleShift, TokensLogDet
from jacobiflow.blocks.context import NO_CONTEXT, Context
from jacobiflow.blocks.guidance import GIVE_GUIDANCE, Guidance, SamplingSettings, guided
from jacobiflow.blocks.permutation import Permutation
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.errors import InputValueError
from jacobiflow.models.checkpoints.pretrained import Pretrained
from jacobiflow.models.checkpoints.tensors import check_dtype
from jacobiflow.models.config import FlowConfig
from jacobiflow.models.labels import ContextLike, Labels, check_class_context, check_labels, check_number_context
from jacobiflow.models.latents import FIRST_CALIBRATION_LATENT, draw_latents, log_normal
from jacobiflow.models.offload import BlockLoader
from jacobiflow.utils.checks import FLOATS, check_device, check_floating, check_kind, check_number

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


class Flow(Pretrained):
    """A stack of affine blocks over tokens (N, T, C), each of which reads them in an order of its own.

    By default its data are the tokens. A flow over images also defines `to_tokens`, `from_tokens`, `tokens_log_det` if
    these change volumes, and `config_from_options`; its config has `in_channels` and `image_size`. The class decorator
    `jacobiflow.models.register_flow` registers a flow.

    Attributes:
        model_type: The name of the flow in model folders and on the command line.
        reads_text: The context is prompts or the states of texts.
        config_types: The classes of config that the flow takes.
        block_type: The class of the blocks, called with the config and a `Permutation`.
        var: The prior's variance (T, C).
        guidance: The guidance of this view, see `guided`.
        block_loader: Copies the blocks to the device of this view, see `offloaded`; `None` if they are there.
    """

    model_type: ClassVar[str] = ""
    reads_text: ClassVar[bool] = False
    config_types: ClassVar[tuple[type[FlowConfig], ...]]
    block_type: ClassVar[type[FlowBlock]]
    config: FlowConfig
    blocks: Sequence[FlowBlock]
    var: Tensor
    guidance: Guidance | None = None
    block_loader: BlockLoader | None = None

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.check_config(config)
        self.config = config
        self.blocks = nn.ModuleList(map(self.make_block, range(config.num_blocks)))  # type: ignore[assignment]
        self.register_buffer("var", torch.ones(config.num_tokens, config.token_channels))

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Checks that `config` is one of `config_types`."""
        check_kind("config", config, cls.config_types, f"a {' or a '.join(kind.__name__ for kind in cls.config_types)}")

    def make_block(self, index: int) -> FlowBlock:
        """Makes a block; by default blocks read the tokens alternately as they are and reversed."""
        return self.block_type(self.config, Permutation("flip" if index % 2 else "identity"))

    @classmethod
    def config_from_options(
        cls, *, in_channels: int, image_size: int, num_classes: int, channels: int, blocks: int, layers: int
    ) -> FlowConfig:
        """Makes a config from the options of `jacobiflow train`.

        A flow may take more keyword arguments with a default: `patch_size`, `head_dim`, `volume_preserving`, and
        `noise_std` if it can be trained on images with Gaussian noise.
        """
        raise NotImplementedError

    def check_recommended(self) -> None:
        self.guided(self.recommended.guidance)
        check_rate(self, self.recommended.denoise)

    def recommended_for(self, has_context: bool) -> SamplingSettings:
        """Returns the recommended settings; without guidance if that needs a context which samples have not."""
        is_guided = has_context or not self.has_conditions
        return self.recommended if is_guided else replace(self.recommended, guidance=None)

    def guided(self, guidance: Guidance | None) -> Self:
        """Returns a view of this flow that is sampled under `guidance`; it shares parameters and buffers.

        `encode`, `log_prob` and denoising are those of the plain flow. `None`, or a weight of 0, gives the plain flow.
        """
        check_kind("guidance", guidance, Guidance | None, GIVE_GUIDANCE)
        if guidance is not None and guidance.weight and self._context_channels:
            message = "for classes only, and this flow's context is numbers"
            raise InputValueError(message, argument="guidance", value=guidance)
        view = copy.copy(self)
        view.guidance = guidance if guidance is not None and guidance.weight else None
        for block in self.blocks:
            guided(block, view.guidance)  # Raises if the block cannot be guided.
        return view

    def offloaded(self, device: str | torch.device, dtype: torch.dtype | str | None = None) -> Self:
        """Returns a view of this flow that computes on `device` with the weights of one block at a time.

        For a flow that is larger than a GPU. The weights stay in their place, and each block is copied to the device
        before it is used. A GPU copies the next block meanwhile, from pinned memory. Results are those of a flow that
        is on the device as a whole, bit for bit. Parameters get no gradients.

        Args:
            device: The device that computes.
            dtype: The dtype of the copies; by default that of the weights.

        Example:
            >>> flow = jf.load("digits-p1").offloaded("cpu")
            >>> jf.sample(flow, 2, labels=[3, 7]).images.shape
            torch.Size([2, 1, 8, 8])
        """
        check_flow(self)
        place, number = check_device(device), check_dtype(dtype)
        view, loader = copy.copy(self), BlockLoader(self, place, number or self.var.dtype)
        others = {name: loader.copy_other(each) for name, each in self._modules.items() if name != "blocks"}
        view._modules, view._buffers = others | {"blocks": self.blocks}, loader.copy_other(self._buffers)
        view.block_loader = loader
        return view

    def block(self, index: int) -> FlowBlock:
        """Returns a block for computing, on the flow's device; see `offloaded`."""
        return self.blocks[index] if self.block_loader is None else self.block_loader.load(index)

    def inverse_block(self, index: int) -> AffineBlock:
        """Returns the block that sampling inverts: `block(index)` under the guidance of this view."""
        return guided(self.block(index), self.guidance)

    @property
    def inverse_blocks(self) -> list[AffineBlock]:
        """All blocks that sampling inverts; see `inverse_block`."""
        return [self.inverse_block(index) for index in range(self.config.num_blocks)]

    @property
    def has_conditions(self) -> bool:
        """True if guidance moves samples towards the context: labels or texts, which can be left out."""
        return bool(self.config.num_classes) or self.reads_text

    @property
    def learns_prior(self) -> bool:
        """True if training also moves the prior's variance `var`, towards the mean of z^2."""
        return False

    @property
    def stored(self) -> Flow:
        """The flow that a model folder stores: itself, or for the view of a peptide the flow of any peptide."""
        return self

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of tokens and residuals: float64 if the flow's weights are, else float32."""
        return torch.float64 if self.var.dtype == torch.float64 else torch.float32

    @property
    def precision(self) -> str:
        """The name of the flow's dtype, such as "float32"; "tf32" if PyTorch lets a GPU use that."""
        is_float32 = self.var.is_cuda and self.var.dtype == torch.float32
        is_tf32 = is_float32 and torch.get_float32_matmul_precision() != "highest"
        return "tf32" if is_tf32 else str(self.var.dtype).removeprefix("torch.")

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
        return check_labels(labels, num, self.config.num_classes, self.classes)

    def check_context(self, context: ContextLike | None, num: int) -> Context:
        """Returns the context of `num` samples: labels, numbers (N, K) or (N, T, K), or nothing; all checked."""
        values: Any = context.values if isinstance(context, Context) else context
        if channels := self._context_channels:
            return check_number_context(values, num, self.config.num_tokens, channels)
        return check_class_context(values, num, self.config.num_classes, self.classes)

    def check_one_context(self, labels: Labels | None, context: ContextLike | None, num: int) -> Context:
        """Returns the context of `num` samples, given as either argument; checked."""
        if labels is not None and context is not None:
            raise InputValueError("labels and context: give one of them")
        return self.check_context(labels if context is None else context, num)

    def example_context(self, num: int) -> Context:
        """Returns a context for timing the flow: all classes in turn, or standard normal numbers."""
        if self._context_channels:
            return Context(draw_latents(num, 1, self._context_channels, start=FIRST_CALIBRATION_LATENT).squeeze(1))
        classes = self.config.num_classes
        return Context(torch.arange(num) % classes) if classes else NO_CONTEXT

    def check_data(self, x: Data, name: str = "x") -> None:
        """Checks that `x` are floating-point numbers in the shape of this flow's data; messages call it `name`."""
        shape = self.image_shape or (self.config.num_tokens, self.config.token_channels)
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
            log_scale, shift = self.block(i)(x, context) if parameters is None else parameters(i, x)
            z = (x - shift) * torch.exp(-log_scale)
            yield Step(i, x, log_scale, shift, z)
            x = block.permutation.inverse(z)

    def prior_tokens(self, latents: Tokens) -> Tokens:
        """Returns sqrt(var) times standard normal `latents`, in `state_dtype`: the start of sampling."""
        return latents.to(self.var.device, self.state_dtype) * self.var.to(self.state_dtype).sqrt()

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
        return self._normalize(self.to_tokens(x.to(torch.promote_types(x.dtype, self.state_dtype))), checked)

    def _normalize(self, tokens: Tokens, context: Context) -> TokensLogDet:
        log_det = self.tokens_log_det(tokens)
        for i, block in enumerate(self.blocks):
            z, log_scale = self._encode_block(i, block.permutation(tokens), context)
            tokens, log_det = block.permutation.inverse(z), log_det - log_scale
        return tokens, log_det

    def _encode_block(self, index: int, x: Tokens, context: Context) -> TokensLogDet:
        if self.block_loader is None or not torch.is_grad_enabled():
            return self.block(index).encode(x, context)

        def encode(x: Tensor, values: Tensor | None) -> TokensLogDet:
            return self.block(index).encode(x, replace(context, values=values))

        # The backward pass loads the block again, since the graph would hold the weights of all blocks.
        options: Any = {"use_reentrant": False, "preserve_rng_state": False}
        result: TokensLogDet = checkpoint(encode, x, context.values, **options)
        return result

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


def check_flow(flow: Any) -> None:
    """Checks that `flow` is a flow."""
    check_kind("flow", flow, Flow, "a flow, such as jacobiflow.load(...) returns")
    if not flow.config.num_tokens:
        raise InputValueError("flow: of any peptide; give the view of one, flow.for_peptide(...)")
    if flow.var.dtype not in FLOATS:
        raise InputValueError(f"flow: its weights are of {flow.var.dtype}; give flow.float()")


def check_rate(flow: Flow, rate: float, name: str = "denoise") -> float:
    """Returns the rate of denoising as a Python number; raises ValueError if the flow has no noise to remove."""
    rate = check_number(name, rate, expected="0 (off) or a positive rate")
    if rate and not flow.config.noise_std:
        message = "the images of this flow's training had no noise, which it could remove; give 0"
        raise InputValueError(message, argument=name, value=rate)
    return rate
