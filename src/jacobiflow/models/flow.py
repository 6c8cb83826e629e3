"""The base class of flows: a stack of affine blocks over tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobiflow.blocks.base import AffineBlock, FlowBlock, TokensLogDet
from jacobiflow.blocks.context import Context
from jacobiflow.blocks.guidance import GIVE_GUIDANCE, Guidance, SamplingSettings, guided
from jacobiflow.blocks.permutation import Permutation
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.errors import InputValueError
from jacobiflow.models.checkpoints.pretrained import Pretrained
from jacobiflow.models.checkpoints.tensors import resolve_dtype
from jacobiflow.models.config import FlowConfig
from jacobiflow.models.contexts import Classes, ContextKind, ContextLike, NoContextKind
from jacobiflow.models.latents import log_normal
from jacobiflow.models.offload import BlockLoader
from jacobiflow.utils.checks import FLOATS, check_device, check_floating, check_kind
from jacobiflow.utils.progress import Progress

if TYPE_CHECKING:
    from typing_extensions import Self

Images = Float[Tensor, "n c h w"]
"""Images of a batch, nominally in [-1, 1]."""

Data = Float[Tensor, "n ..."]
"""Images (N, C, H, W), or tokens (N, T, C), as the flow takes them."""


class Flow(Pretrained):
    """A stack of affine blocks over tokens (N, T, C), each of which reads them in an order of its own.

    By default its data are the tokens. A flow over images also defines `to_tokens`, `from_tokens`, `tokens_log_det` if
    these change volumes, and `config_from_options`; its config has `in_channels` and `image_size`. The class decorator
    `jacobiflow.models.register_flow` registers a flow.

    Attributes:
        model_type: The name of the flow in model folders and on the command line.
        config_types: The classes of config that the flow takes.
        block_type: The class of the blocks, called with the config and a `Permutation`.
        var: The prior's variance (T, C).
        guidance: The guidance of this view, see `guided`.
        block_loader: Copies the blocks to the device of this view, see `offloaded`; `None` if they are there.
    """

    model_type: ClassVar[str] = ""
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
        self.register_buffer("var", torch.ones(config.num_tokens, config.token_dim, device=None))

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Checks that `config` is one of `config_types`."""
        check_kind("config", config, cls.config_types, f"a {' or a '.join(kind.__name__ for kind in cls.config_types)}")

    def make_block(self, index: int) -> FlowBlock:
        """Makes a block; by default blocks read the tokens alternately as they are and reversed."""
        return self.block_type(self.config, Permutation("flip" if index % 2 else "identity"))

    @classmethod
    def config_from_options(
        cls, *, in_channels: int, image_size: int, num_classes: int, width: int, blocks: int, layers: int
    ) -> FlowConfig:
        """Makes a config from the options of `jacobiflow train`.

        A flow may take more keyword arguments with a default: `patch_size`, `head_dim`, `volume_preserving`, and
        `noise_std` if it can be trained on images with Gaussian noise.
        """
        raise NotImplementedError

    def recommended_for(self, has_context: bool) -> SamplingSettings:
        """Returns the recommended settings; without guidance if that needs a context which samples have not."""
        is_guided = has_context or not self.context_kind.is_optional
        return self.recommended if is_guided else replace(self.recommended, guidance=None)

    def guided(self, guidance: Guidance | None) -> Self:
        """Returns a view of this flow that is sampled under `guidance`; it shares parameters and buffers.

        `encode`, `log_prob` and denoising are those of the plain flow. `None`, or a weight of 0, gives the plain flow.
        """
        check_kind("guidance", guidance, Guidance | None, GIVE_GUIDANCE)
        view = copy.copy(self)
        view.guidance = guidance if guidance is not None and guidance.weight else None
        if view.guidance is not None:
            self.context_kind.check_guidance(view.guidance)
            for block in self.blocks:
                guided(block, view.guidance)  # Raises if the block cannot be guided.
        return view

    def offloaded(self, device: str | torch.device, dtype: torch.dtype | str | None = None) -> Self:
        """Returns a view of this flow that computes on `device` with the weights of one block at a time.

        For a flow that is larger than a GPU. The weights stay on the CPU, and each block is copied to the device before
        it is used. For a GPU they move to pinned memory, from which it copies the next block meanwhile. Results are
        those of a flow that is on the device as a whole, bit for bit. Parameters get no gradients.

        Args:
            device: The device that computes.
            dtype: The dtype of the copies; by default that of the weights.

        Example:
            >>> flow = jf.load("digits-p1").offloaded("cpu")
            >>> jf.sample(flow, 2, labels=[3, 7]).images.shape
            torch.Size([2, 1, 8, 8])
        """
        check_flow(self)
        if self.var.device.type != "cpu":
            raise InputValueError(f"flow: its weights are on {self.var.device}; offload a flow that is on the CPU")
        view: Self = BlockLoader(self, check_device(device), resolve_dtype(dtype) or self.var.dtype).view()
        return view

    def block(self, index: int) -> FlowBlock:
        """Returns a block for computing, on the flow's device; see `offloaded`."""
        return self.blocks[index] if self.block_loader is None else self.block_loader.load(index)

    def inverse_block(self, index: int) -> AffineBlock:
        """Returns the block that sampling inverts: `block(index)` under the guidance of this view."""
        return guided(self.block(index), self.guidance)

    @property
    def context_kind(self) -> ContextKind:
        """The kind of context of the samples; by default the classes of the config, if there are any."""
        classes = self.config.num_classes
        return Classes(classes, self.classes) if classes else NoContextKind()

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

    def check_data(self, x: Data, name: str = "x") -> None:
        """Checks that `x` are floating-point numbers in the shape of this flow's data; messages call it `name`."""
        shape = self.image_shape or (self.config.num_tokens, self.config.token_dim)
        check_floating(name, x, ("N", *shape))

    def resolve_batch(self, x: Data, context: ContextLike | None) -> Context:
        """Checks that data and context fit the flow; returns the context on its device."""
        check_flow(self)
        self.check_data(x)
        return self.context_kind.resolve(context, len(x)).to(self.var.device)

    def prior_tokens(self, latents: Tokens) -> Tokens:
        """Returns sqrt(var) times standard normal `latents`, in `state_dtype`: the start of sampling."""
        return latents.to(self.var.device, self.state_dtype) * self.var.to(self.state_dtype).sqrt()

    def map_blocks_reversed(
        self, x: Tokens, solve: Callable[[int, Tensor], Tensor], progress: Progress | None = None, what: str = ""
    ) -> Tokens:
        """Returns the tokens f_0^-1(... f_{L-1}^-1(x)), and reports each block as a step of `what`.

        `solve(i, z)` inverts block `i` at `z`, both in the block's causal order. It may return more rows than `z` has.
        """
        num = self.config.num_blocks
        for i in reversed(range(num)):
            permutation = self.blocks[i].permutation
            x = permutation.inverse(solve(i, permutation(x)))
            if progress is not None:
                progress(num - i, num, what)
        return x

    def encode(self, x: Data, context: ContextLike | None = None, *, is_scaled: bool = True) -> TokensLogDet:
        """Returns latents z = f(x), standard normal under the model, and log|det df/dx| in nats.

        They are at least float32, in whatever dtype the network runs.

        Args:
            context: Labels (N,), one label for all, numbers (N, K) or (N, T, K), or texts, as the flow takes it.
            is_scaled: Divides by the standard deviation sqrt(var) of the prior.
        """
        resolved = self.resolve_batch(x, context)
        return self.encode_tokens(
            self.to_tokens(x.to(torch.promote_types(x.dtype, self.state_dtype))), resolved, is_scaled
        )

    def encode_tokens(self, tokens: Tokens, context: Context, is_scaled: bool = True) -> TokensLogDet:
        """Returns `encode` of the data that have these tokens."""
        log_det = self.tokens_log_det(tokens)
        for i, block in enumerate(self.blocks):
            encode = block.encode if self.block_loader is None else partial(self.block_loader.encode, i)
            z, block_log_det = encode(block.permutation(tokens), context)
            tokens, log_det = block.permutation.inverse(z), log_det + block_log_det
        if not is_scaled:
            return tokens, log_det
        var = self.var.to(tokens.dtype)
        return tokens / var.sqrt(), log_det - 0.5 * var.log().sum()

    def log_prob(self, x: Data, context: ContextLike | None = None) -> Float[Tensor, " n"]:
        """Returns the log-density in nats: log N(z; 0, I) + log|det df/dx|."""
        z, log_det = self.encode(x, context)
        return log_normal(z) + log_det


def check_flow(flow: Any) -> None:
    """Checks that `flow` is a flow."""
    expected = "a flow, such as jacobiflow.load(...) returns"
    if isinstance(flow, nn.Module):
        expected += "; for a module of other code, call jf.accelerate(module), then its own sampling method"
    check_kind("flow", flow, Flow, expected)
    if not flow.config.num_tokens:
        raise InputValueError("flow: of any peptide; give the view of one, flow.for_peptide(...)")
    if flow.var.dtype not in FLOATS:
        raise InputValueError(f"flow: its weights are of {flow.var.dtype}; give flow.float()")
