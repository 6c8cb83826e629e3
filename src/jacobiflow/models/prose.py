"""Prose (arXiv 2508.18175): a TarFlow of peptides, whose layers are conditioned on atoms and residues."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.blocks.permutation import Permutation
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.models.checkpoints.original import OriginalShapes, read_original
from jacobiflow.models.checkpoints.tensors import build
from jacobiflow.models.config import check_heads, check_sizes
from jacobiflow.models.flow import Flow
from jacobiflow.models.prose_layers import (
    NUM_ATOM_TYPES,
    NUM_RESIDUE_TYPES,
    AdaptiveLayer,
    AtomEmbedder,
    NormalizedLayer,
    sinusoid,
)
from jacobiflow.models.registry import register_flow
from jacobiflow.models.transformer.attention import SharedParameters
from jacobiflow.models.transformer.block import TransformerBlock
from jacobiflow.utils.checks import check_fields, check_kind, format_value
from jacobiflow.utils.deprecation import renamed_arguments

if TYPE_CHECKING:
    from typing_extensions import Self

ENCODINGS = ("atom_type", "aa_type", "aa_pos", "seq_len")
_TOKEN_PERIOD = 1e4  # Base of the wavelengths that encode token positions.
_RELEASED_ORDERS = (
    "n2c_backbone-first_standard", "n2c_residue-by-residue_standard_flip", "n2c_backbone-first_standard_flip",
    "n2c_residue-by-residue_standard", "n2c_backbone-first_variant", "n2c_residue-by-residue_variant_flip",
    "n2c_backbone-first_variant_flip", "n2c_residue-by-residue_variant",
)  # fmt: skip


@renamed_arguments(channels="width", token_channels="token_dim")
@dataclass(frozen=True)
class ProseConfig:
    """Shape of a `Prose`. The defaults are those of the released weights, of 285 million parameters.

    Args:
        width: Width of the transformers.
        num_blocks: Affine blocks, each with a transformer.
        layers_per_block: Layers of a transformer.
        token_dim: C, the coordinates of an atom.
        head_dim: Channels of an attention head; divides `width`.
        expansion: Hidden units of a layer's perceptrons, in multiples of `width`.
        adaptive: Whether layers have adaptive normalisation and a second perceptron. Without them the condition is
            added to the input of each layer, as in the transferable TarFlow of the same authors.
        lookahead: Whether a token's condition is that of its atom and of the next.
        orders: The names of the permutations in which the blocks read the atoms, in turn.
        num_tokens: T, the number of atoms in a view of one peptide, see `Prose.for_peptide`; else 0.
    """

    width: int = 384
    num_blocks: int = 8
    layers_per_block: int = 8
    token_dim: int = 3
    head_dim: int = 64
    expansion: int = 4
    adaptive: bool = True
    lookahead: bool = True
    orders: tuple[str, ...] = _RELEASED_ORDERS
    num_tokens: int = 0
    num_classes: ClassVar[int] = 0
    noise_std: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_sizes(self)
        check_heads(self.width, self.head_dim)
        give = "a tuple of names of permutations"
        check_kind("orders", self.orders, tuple, give)
        if not self.orders or not all(isinstance(name, str) for name in self.orders):
            raise InputValueError(f"orders={format_value(self.orders)}: give {give}")
        check_fields(self)


class ProseBlock(TransformerBlock):
    """One block of a `Prose`.

    Conditions do not depend on the sample, so each call computes them once for each position.

    Attributes:
        embed_atoms: In the view of a peptide, returns the embeddings of its atoms in the order of the data.
    """

    attn_blocks: Sequence[AdaptiveLayer | NormalizedLayer]
    embed_atoms: Callable[[], Float[Tensor, "t w"]]

    def __init__(self, config: ProseConfig, permutation: Permutation) -> None:
        super().__init__(config.num_tokens, True, permutation)
        width = config.width
        self.proj_in = nn.Linear(config.token_dim, width)
        self.lookahead = config.lookahead
        self.proj_cond = (
            nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width))
            if config.lookahead
            else nn.Linear(width, width)
        )
        self.pos_embed_scale = nn.Parameter(torch.full((1,), 1e-2, device=None))
        layer = AdaptiveLayer if config.adaptive else NormalizedLayer
        self.attn_blocks = nn.ModuleList(  # type: ignore[assignment]
            layer(width, config.head_dim, config.expansion) for _ in range(config.layers_per_block)
        )
        self.proj_out = nn.Linear(width, 2 * config.token_dim)
        nn.init.zeros_(self.proj_out.weight)

    def for_peptide(
        self, order: list[int], num_atoms: int, embed_atoms: Callable[[], Float[Tensor, "t w"]]
    ) -> ProseBlock:
        """Returns a view of this block for the atoms of a peptide; it shares the parameters."""
        if len(order) != num_atoms:
            raise InputValueError(f"permutations: {len(order)} indices, but {num_atoms} atoms")
        view = copy.copy(self)
        view.permutation, view.num_tokens, view.embed_atoms = Permutation(tuple(order)), num_atoms, embed_atoms
        return view

    def shared_parameters(self) -> SharedParameters:
        # A copy of the block in float64 reads the embeddings of the flow, too.
        atoms = self.permutation(self.embed_atoms(), dim=0).to(self.pos_embed_scale.dtype)
        if self.lookahead:
            atoms = torch.cat((atoms, F.pad(atoms[1:], (0, 0, 0, 1))), dim=-1)
        return SharedParameters(condition=self.proj_cond(atoms))

    def positions(self) -> Float[Tensor, "t w"]:
        table = sinusoid(torch.arange(self.num_tokens, device="cpu"), len(self.proj_in.weight), _TOKEN_PERIOD)
        return table.to(self.pos_embed_scale) * self.pos_embed_scale + self.proj_in.bias

    def embed_context(self, values: Tensor | None) -> None:
        return None


def _convert_numbers(name: str, values: Any, device: torch.device | str = "cpu") -> Tensor:
    """Returns values as a vector; a message calls them `name`."""
    try:
        return torch.as_tensor(values, device=device).flatten()
    except (RuntimeError, TypeError, ValueError) as error:  # PyTorch raises any of these.
        raise InputTypeError(f"{name}={format_value(values)}: give whole numbers") from error


def _resolve_encodings(encodings: dict[str, Tensor]) -> dict[str, Int[Tensor, " t"]]:
    """Returns the encodings, checked, with a number for each atom."""
    num_atoms = len(encodings["atom_type"])
    limits = {"atom_type": NUM_ATOM_TYPES, "aa_type": NUM_RESIDUE_TYPES}
    for name, tensor in encodings.items():
        limit = limits.get(name, 2**31)
        if tensor.is_floating_point() or len(tensor) not in (1, num_atoms) or not len(tensor):
            raise InputValueError(f"{name}={tensor.tolist()}: give a whole number for each of {num_atoms} atoms")
        if not 1 <= int(tensor.min()) <= int(tensor.max()) < limit:
            raise InputValueError(f"{name}={tensor.tolist()}: give numbers from 1, which is no padding, to {limit - 1}")
    return {name: tensor.expand(num_atoms).clone() for name, tensor in encodings.items()}


@register_flow
class Prose(Flow):
    """A flow of the positions of a peptide's atoms (N, T, 3), of any peptide; `for_peptide` gives the view of one.

    Reference: Tan et al., Amortized Sampling with Transferable Normalizing Flows, arXiv 2508.18175.

    Example:
        >>> flow = jf.Prose(jf.ProseConfig(64, num_blocks=2, layers_per_block=1, orders=("plain", "reversed")))
        >>> encodings = {"atom_type": [1, 2, 2], "aa_type": [1, 1, 1], "aa_pos": [1, 1, 1], "seq_len": 1}
        >>> peptide = flow.for_peptide(encodings, {"plain": [0, 1, 2], "reversed": [2, 1, 0]})
        >>> jf.sample(peptide, 5).tokens.shape
        torch.Size([5, 3, 3])
    """

    model_type = "prose"
    config_types = (ProseConfig,)
    block_type = ProseBlock
    config: ProseConfig
    blocks: Sequence[ProseBlock]
    _of_any_peptide: tuple[Prose, ...] = ()

    def __init__(self, config: ProseConfig) -> None:
        super().__init__(config)
        self.cond_embed = AtomEmbedder(config.width)

    @classmethod
    def from_original(cls, path: str | Path, orders: Sequence[str] = _RELEASED_ORDERS) -> Self:
        """Loads a `.pth` state dict of Prose, or of the transferable TarFlow of the same code, in eval mode.

        `orders` are the names of the permutations, by default those of the released Prose.
        """
        state = read_original(path)
        shapes = OriginalShapes(state, str(path), "Prose")
        width, token_dim = shapes.shape("blocks.0.proj_in.weight", 2)
        adaptive = "blocks.0.attn_blocks.0.mha.adaln.to_beta.weight" in state
        layer = "blocks.0.attn_blocks.0." + ("mha.mha." if adaptive else "")
        hidden, _ = shapes.shape(f"{layer}mlp.main.0.weight", 2)
        config = ProseConfig(
            width=width,
            num_blocks=shapes.count(r"blocks\.(\d+)\."),
            layers_per_block=shapes.count(r"blocks\.0\.attn_blocks\.(\d+)\."),
            token_dim=token_dim,
            expansion=hidden // width,
            adaptive=adaptive,
            lookahead="blocks.0.proj_cond.2.weight" in state,
            orders=tuple(orders) if isinstance(orders, list) else orders,  # type: ignore[arg-type]
        )
        state["var"] = torch.ones(0, token_dim, device="cpu")
        return build(cls, config, state, str(path))

    @property
    def stored(self) -> Prose:
        return self._of_any_peptide[0] if self._of_any_peptide else self

    def for_peptide(
        self, encodings: Mapping[str, Sequence[int] | Tensor | int], permutations: Mapping[str, Sequence[int] | Tensor]
    ) -> Self:
        """Returns a view of this flow for the atoms of a peptide; it shares the parameters.

        Args:
            encodings: Whole numbers "atom_type", "aa_type", "aa_pos" (T,) or (1, T), and "seq_len", as the code of
                Prose makes them.
            permutations: By name, the indices (T,) or (1, T) of the atoms in the order in which a block reads them.
        """
        weight = self.cond_embed.atom_embed.weight  # Unlike `var`, it moves with the parameters of a view.
        check_kind("encodings", encodings, Mapping, "a dict of whole numbers by name")
        check_kind("permutations", permutations, Mapping, "a dict of indices by name")
        missing = [name for name in ENCODINGS if name not in encodings]
        missing += [name for name in self.config.orders if name not in permutations]
        if missing:
            raise InputValueError(f"encodings and permutations lack {', '.join(missing)}")
        tensors = {name: _convert_numbers(name, encodings[name], weight.device) for name in ENCODINGS}
        tensors = _resolve_encodings(tensors)
        num_atoms = len(tensors["atom_type"])
        view = copy.copy(self)
        view._of_any_peptide = (self.stored,)  # A tuple hides it from `nn.Module`, whose submodule it is not.
        view.config = replace(self.config, num_tokens=num_atoms)
        view._modules, view._buffers = dict(self._modules), dict(self._buffers)
        view._non_persistent_buffers_set = set()
        for name, tensor in tensors.items():
            view.register_buffer(name, tensor, persistent=False)
        orders = (self.config.orders[i % len(self.config.orders)] for i in range(self.config.num_blocks))
        embed_atoms = partial(self.cond_embed, view._buffers)  # The tensors of these buffers move with the view.
        blocks = (
            block.for_peptide(_convert_numbers(name, permutations[name]).tolist(), num_atoms, embed_atoms)
            for block, name in zip(self.blocks, orders, strict=True)
        )
        view.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        view.var = weight.new_ones(num_atoms, self.config.token_dim)
        return view
