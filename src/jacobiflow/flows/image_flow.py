"""What flows over images share: a stack of affine blocks over tokens, its likelihood, and its folder on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobiflow.flows.base import AffineBlock
from jacobiflow.flows.permutation import Permutation

if TYPE_CHECKING:
    from typing_extensions import Self


class FlowConfig(Protocol):
    """What every config tells of its flow: a frozen dataclass with, in part, these fields and properties."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def in_channels(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def noise_std(self) -> float: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def token_channels(self) -> int: ...


class FlowBlock(AffineBlock, nn.Module):
    """An affine block of an image flow, called as `block(x, labels)` for the log-scale and shift of all its entries.

    Tokens are in the block's own causal order, which `permutation` makes of the raster order and back.
    """

    permutation: Permutation


class ImageFlow(nn.Module, PyTorchModelHubMixin, library_name="jacobiflow", tags=["normalizing-flow"]):
    """A stack of affine blocks over the tokens of an image, alternately in raster and in reverse order.

    A flow over images derives from it: it has a `model_type`, the name in its model folders, a `block_type`, which is
    called with the config and an order, and says with `to_tokens` and `to_images` what a token is. `var` is the prior's
    variance (T, C). `report_file` is the report.json of the model folder that it was read from, where it has one:
    "auto" plans by it.
    """

    model_type: ClassVar[str]
    block_type: ClassVar[type[FlowBlock]]
    config: FlowConfig
    blocks: Sequence[FlowBlock]
    var: Tensor
    report_file: Path | None = None

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        orders = (Permutation("identity"), Permutation("flip"))
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            self.block_type(config, orders[i % 2]) for i in range(config.num_blocks)
        )
        self.register_buffer("var", torch.ones(config.num_tokens, config.token_channels))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub: Any) -> Self:
        """The flow that `save_pretrained` or `push_to_hub` wrote, in eval mode, its parameters with gradients.

        **Arguments:**

        - `pretrained_model_name_or_path`: a bundled model's name, a folder, or a hub id "owner/name".
        - `hub`: for a hub id, `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        **Raises** `CheckpointError`, a `ValueError`, where that is no model, one of another kind, or a broken one.
        """
        from jacobiflow.flows import folder as checkpoints

        return checkpoints.read(cls, pretrained_model_name_or_path, **hub)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        config: FlowConfig | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Write a model folder as `checkpoints.save` does, with a model card where it has no README.md.

        `push_to_hub` calls this with `config`, which can only be the flow's own.

        **Raises** `CheckpointError`, a `ValueError`, where a weight is not finite or the folder cannot be written.
        """
        from jacobiflow.flows import folder as checkpoints

        if config not in (None, self.config):
            raise ValueError(f"config={config}: leave it out, the flow's own is saved")
        checkpoints.save(self, save_directory, dtype)
        readme = Path(save_directory) / "README.md"
        if not readme.exists():
            with checkpoints.writing(readme) as partial:
                self.generate_model_card(**(model_card_kwargs or {})).save(partial)

    @property
    def learns_prior(self) -> bool:
        """Whether training also moves the prior's variance `var`, towards the mean of z^2."""
        return False

    def to_tokens(self, images: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n t d"], Float[Tensor, " n"]]:
        """Images as tokens in raster order, and log|det| of that map in nats."""
        raise TypeError(f"{type(self).__name__} must define to_tokens")

    def to_images(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n c h w"]:
        """Inverse of `to_tokens`."""
        raise TypeError(f"{type(self).__name__} must define to_images")

    def initialize(self, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"] | None = None) -> None:
        """Set what a flow sets by its first training batch, in place; here nothing."""

    def check_labels(self, labels: Int[Tensor, " n"], num: int) -> None:
        """**Raises** `ValueError` where `labels` are no classes of this flow for `num` samples."""
        if not self.config.num_classes:
            raise ValueError("labels given, but this flow is unconditional: leave them out")
        if labels.dtype not in (torch.int64, torch.int32) or labels.shape != (num,):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} and dtype {labels.dtype}: give {num} whole numbers"
            )
        if (labels >= self.config.num_classes).any():
            last = self.config.num_classes - 1
            raise ValueError(f"label {int(labels.max())}: this flow has classes 0 to {last} (below 0: no class)")

    def normalize(
        self, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"] | None = None
    ) -> tuple[Float[Tensor, "n t d"], Float[Tensor, " n"]]:
        """Tokens after all blocks, before the prior's scale, and log|det| in nats, summed over dimensions."""
        x, log_det = self.to_tokens(images)
        for block in self.blocks:
            x = block.permutation(x)
            log_scale, shift = block(x, labels)
            x = block.permutation((x - shift) * torch.exp(-log_scale))
            log_det = log_det - log_scale.sum(dim=(1, 2))
        return x, log_det

    def encode(
        self, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"] | None = None
    ) -> tuple[Float[Tensor, "n t d"], Float[Tensor, " n"]]:
        """Latents z = f(images), standard normal under the model, and log|det df/dx| in nats; prior included."""
        z, log_det = self.normalize(images, labels)
        var = self.var.to(z.dtype)
        return z / var.sqrt(), log_det - 0.5 * var.log().sum()

    def log_prob(
        self, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, " n"]:
        """Log-density in nats: log N(z; 0, I) + log|det df/dx|."""
        z, log_det = self.encode(images, labels)
        return log_det - 0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=(1, 2))

    def bits_per_dim(
        self, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, " n"]:
        """-log2 p(images) / D + log2(128): in units of 8-bit pixels, whose [0, 256) the images hold as [-1, 1)."""
        return -self.log_prob(images, labels) / (images[0].numel() * math.log(2)) + 7


def state_dtype(flow: ImageFlow) -> torch.dtype:
    """The dtype of tokens and residuals: float64 where the flow's weights are, else float32."""
    return torch.float64 if flow.var.dtype == torch.float64 else torch.float32


def check_sizes(config: FlowConfig, names: Sequence[str]) -> None:
    """**Raises** `ValueError` where a field of those `names` is not a positive whole number, or num_classes below 0."""
    for name in names:
        if not isinstance(getattr(config, name), int) or getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)!r}: give a positive whole number")
    if config.num_classes < 0:
        raise ValueError(f"num_classes={config.num_classes}: give 0 for an unconditional flow, or the class count")


def embed_classes(table: Float[Tensor, "k ..."] | None, labels: Int[Tensor, " b"] | None) -> Tensor | None:
    """The row of `table` for each label; the mean over classes for one without a class (`None`, or below 0).

    `None` where the flow has no classes, and so no table.
    """
    if table is None:
        return None
    mean = table.mean(dim=0, keepdim=True)
    if labels is None:
        return mean
    return torch.where((labels < 0).view(-1, *[1] * (table.ndim - 1)), mean, table[labels.clamp(min=0)])
