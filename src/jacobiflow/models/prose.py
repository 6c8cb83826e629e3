"""Prose (arXiv 2508.18175): a TarFlow of peptides, whose layers are conditioned on atoms and residues."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from jacobiflow.blocks.permutation import Permutation
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.models.checkpoints.folder import build
from jacobiflow.models.checkpoints.original import count_groups, read_original, shape_of
from jacobiflow.models.config import check_heads, check_sizes
from jacobiflow.models.flow import Flow, register_flow
from jacobiflow.models.transformer.attention import Adaptive, Attention, AttentionBlock, LayerWeights
from jacobiflow.models.transformer.block import TransformerBlock
from jacobiflow.utils.checks import check_flag, check_kind, format_value

if TYPE_CHECKING:
    from typing_extensions import Self

ENCODINGS = ("atom_type", "aa_type", "aa_pos", "seq_len")
_ATOMS, _RESIDUES = 128, 64  # rows of the embeddings
_PERIOD, _POSITION_PERIOD = 1e3, 1e4  # of sinusoids: residue positions and lengths; positions of tokens
_ORDERS = (  # of the released weights
    "n2c_backbone-first_standard", "n2c_residue-by-residue_standard_flip", "n2c_backbone-first_standard_flip",
    "n2c_residue-by-residue_standard", "n2c_backbone-first_variant", "n2c_residue-by-residue_variant_flip",
    "n2c_backbone-first_variant_flip", "n2c_residue-by-residue_variant",
)  # fmt: skip


@dataclass(frozen=True)
class ProseConfig:
    """Shape of a `Prose`. The defaults are those of the released weights, of 285 million parameters.

    Args:
        channels: Width of the transformers.
        num_blocks: Affine blocks, each with a transformer.
        layers_per_block: Layers of a transformer.
        token_channels: C, the coordinates of an atom.
        head_dim: Channels of an attention head; divides `channels`.
        expansion: Hidden units of a layer's perceptrons, in multiples of `channels`.
        adaptive: Whether layers have adaptive normalisation and a second perceptron; without, the condition is added to
            the input of each, as in the transferable TarFlow of the same authors.
        lookahead: Whether a token's condition is that of its atom and of the next.
        orders: The names of the permutations in which the blocks read the atoms.
        num_tokens: T, the atoms of the peptide of a view, see `Prose.for_peptide`; 0 for none.
    """

    channels: int = 384
    num_blocks: int = 8
    layers_per_block: int = 8
    token_channels: int = 3
    head_dim: int = 64
    expansion: int = 4
    adaptive: bool = True
    lookahead: bool = True
    orders: tuple[str, ...] = _ORDERS
    num_tokens: int = 0
    num_classes: ClassVar[int] = 0
    noise_std: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_sizes(self)
        check_heads(self.channels, self.head_dim)
        check_flag("adaptive", self.adaptive)
        check_flag("lookahead", self.lookahead)
        give = "a tuple of names of permutations"
        check_kind("orders", self.orders, tuple, give)
        if not self.orders or not all(isinstance(name, str) for name in self.orders):
            raise InputValueError(f"orders={format_value(self.orders)}: give {give}")


class _AdaptiveNorm(nn.Module):
    """Parameters of sigmoid(W_g n + b_g) * norm(h) + W_b n, with n the normalised condition."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_cond = nn.LayerNorm(channels)
        self.to_gamma = nn.Sequential(nn.Linear(channels, channels), nn.Sigmoid())
        self.to_beta = nn.Linear(channels, channels, bias=False)

    def forward(self, condition: Float[Tensor, "t c"]) -> tuple[Float[Tensor, "t c"], Float[Tensor, "t c"]]:
        normalised = self.norm_cond(condition)
        return self.to_gamma(normalised), self.to_beta(normalised)


class _Gate(nn.Module):
    """Parameters of sigmoid(W c + b), c the condition."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        linear = nn.Linear(channels, channels)
        nn.init.zeros_(linear.weight)
        nn.init.constant_(linear.bias, -2.0)
        self.to_adaln_zero_gamma = nn.Sequential(linear, nn.Sigmoid())

    def forward(self, condition: Float[Tensor, "t c"]) -> Float[Tensor, "t c"]:
        return self.to_adaln_zero_gamma(condition)


class _NormalisedAttention(Attention):
    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__(channels, head_dim)
        self.q_layer_norm, self.k_layer_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)


class _NormalisedAttentionBlock(AttentionBlock):
    """A layer of a TarFlow with normalised queries and keys."""

    attention: _NormalisedAttention

    def __init__(self, config: ProseConfig) -> None:
        super().__init__(config.channels, config.head_dim, config.expansion)
        self.attention = _NormalisedAttention(config.channels, config.head_dim)

    def conditioned(self, condition: Float[Tensor, "t c"]) -> LayerWeights:
        return self.weights()._replace(
            query_norm=(self.attention.q_layer_norm.weight, self.attention.q_layer_norm.bias),
            key_norm=(self.attention.k_layer_norm.weight, self.attention.k_layer_norm.bias),
            condition=condition,
        )


class _AdaptiveAttention(nn.Module):
    def __init__(self, config: ProseConfig) -> None:
        super().__init__()
        self.adaln, self.mha = _AdaptiveNorm(config.channels), _NormalisedAttentionBlock(config)
        self.scale_output = _Gate(config.channels)


class _Transition(nn.Module):
    def __init__(self, config: ProseConfig) -> None:
        super().__init__()
        hidden = config.channels * config.expansion
        self.swish_linear = nn.ModuleList([nn.Linear(config.channels, 2 * hidden, bias=False)])
        self.linear_out = nn.Linear(hidden, config.channels, bias=False)


class _AdaptiveTransition(nn.Module):
    def __init__(self, config: ProseConfig) -> None:
        super().__init__()
        self.adaln, self.transition = _AdaptiveNorm(config.channels), _Transition(config)
        self.scale_output = _Gate(config.channels)


class _AdaptiveLayer(nn.Module):
    """Parameters of a layer, under the original's names: h <- h + gate * A(norm(h)), h <- h + gate' * SwiGLU(norm'(h)).

    A is a whole layer of a TarFlow; the norms and the gates depend on the condition c of each token.
    """

    def __init__(self, config: ProseConfig) -> None:
        super().__init__()
        self.mha, self.transition = _AdaptiveAttention(config), _AdaptiveTransition(config)

    def conditioned(self, condition: Float[Tensor, "t c"]) -> LayerWeights:
        transition = self.transition.transition
        scale, shift = self.mha.adaln(condition)
        gated_scale, gated_shift = self.transition.adaln(condition)
        adaptive = Adaptive(
            scale=scale,
            shift=shift,
            gate=self.mha.scale_output(condition),
            gated_scale=gated_scale,
            gated_shift=gated_shift,
            gated_gate=self.transition.scale_output(condition),
            gated_up=cast(nn.Linear, transition.swish_linear[0]).weight,
            gated_down=transition.linear_out.weight,
        )
        return self.mha.mha.conditioned(condition)._replace(condition=None, adaptive=adaptive)


class ProseBlock(TransformerBlock):
    """One block of a `Prose`. In the view of a peptide it has the embeddings of its atoms, in the order of the data.

    Conditions do not depend on the sample, so each call computes them once for each position.
    """

    attn_blocks: Sequence[_AdaptiveLayer | _NormalisedAttentionBlock]
    embed_atoms: Callable[[], Float[Tensor, "t c"]]

    def __init__(self, config: ProseConfig, permutation: Permutation) -> None:
        super().__init__(config.num_tokens, True, permutation)
        channels = config.channels
        self.proj_in = nn.Linear(config.token_channels, channels)
        self.lookahead = config.lookahead
        self.proj_cond = (
            nn.Sequential(nn.Linear(2 * channels, channels), nn.GELU(), nn.Linear(channels, channels))
            if config.lookahead
            else nn.Linear(channels, channels)
        )
        self.pos_embed_scale = nn.Parameter(torch.full((1,), 1e-2))
        layer = _AdaptiveLayer if config.adaptive else _NormalisedAttentionBlock
        self.attn_blocks = nn.ModuleList(layer(config) for _ in range(config.layers_per_block))  # type: ignore[assignment]
        self.proj_out = nn.Linear(channels, 2 * config.token_channels)
        nn.init.zeros_(self.proj_out.weight)

    def layer_weights(self) -> tuple[LayerWeights, ...]:
        atoms = self.permutation(self.embed_atoms(), dim=0)
        if self.lookahead:
            atoms = torch.cat((atoms, F.pad(atoms[1:], (0, 0, 0, 1))), dim=-1)
        condition = self.proj_cond(atoms)
        return tuple(layer.conditioned(condition) for layer in self.attn_blocks)

    def positions(self) -> Float[Tensor, "t c"]:
        table = sinusoid(torch.arange(self.num_tokens), len(self.proj_in.weight), _POSITION_PERIOD)
        return table.to(self.pos_embed_scale) * self.pos_embed_scale + self.proj_in.bias

    def embed_context(self, values: Tensor | None) -> None:
        return None


class _Embedder(nn.Module):
    """Embeds the atoms of a peptide, under the original's names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.atom_embed, self.residue_embed = nn.Embedding(_ATOMS, channels), nn.Embedding(_RESIDUES, channels)
        self.mlp = nn.Sequential(nn.Linear(4 * channels, channels), nn.GELU(), nn.Linear(channels, channels))

    def forward(self, encodings: Mapping[str, Int[Tensor, " t"]]) -> Float[Tensor, "t c"]:
        atoms, residues = self.atom_embed(encodings["atom_type"]), self.residue_embed(encodings["aa_type"])
        positions, lengths = (
            sinusoid(encodings[name], atoms.shape[-1], _PERIOD).to(atoms) for name in ("aa_pos", "seq_len")
        )
        return self.mlp(torch.cat((atoms, residues, positions, lengths), dim=-1))


def _numbers(name: str, values: Any, device: torch.device | None = None) -> Tensor:
    """The values, which a message calls `name`, as a vector."""
    try:
        return torch.as_tensor(values, device=device).flatten()
    except (RuntimeError, TypeError, ValueError) as error:  # PyTorch raises any of these
        raise InputTypeError(f"{name}={format_value(values)}: give whole numbers") from error


def sinusoid(numbers: Int[Tensor, " t"], channels: int, period: float) -> Float[Tensor, "t c"]:
    """Returns sin and cos of n period^(-2k / channels), k = 0, 1, .., in turn."""
    rates = torch.exp(torch.arange(0, channels, 2, device=numbers.device) * -(math.log(period) / channels))
    angles = numbers.float().unsqueeze(-1) * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


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

    def __init__(self, config: ProseConfig) -> None:
        super().__init__(config)
        self.cond_embed = _Embedder(config.channels)

    @classmethod
    def from_original(cls, path: str | Path, orders: Sequence[str] = _ORDERS) -> Self:
        """Loads a `.pth` state dict of Prose, or of the transferable TarFlow of the same code, in eval mode.

        `orders` are the names of the permutations, by default those of the released Prose.
        """
        state = read_original(path)
        shape = partial(shape_of, state, str(path), "Prose")
        channels, token_channels = shape("blocks.0.proj_in.weight", 2)
        adaptive = "blocks.0.attn_blocks.0.mha.adaln.to_beta.weight" in state
        inner = "blocks.0.attn_blocks.0." + ("mha.mha." if adaptive else "")
        hidden, _ = shape(f"{inner}mlp.main.0.weight", 2)
        config = ProseConfig(
            channels=channels,
            num_blocks=count_groups(state, r"blocks\.(\d+)\."),
            layers_per_block=count_groups(state, r"blocks\.0\.attn_blocks\.(\d+)\."),
            token_channels=token_channels,
            expansion=hidden // channels,
            adaptive=adaptive,
            lookahead="blocks.0.proj_cond.2.weight" in state,
            orders=tuple(orders) if isinstance(orders, list) else orders,  # type: ignore[arg-type]  # which is checked
        )
        state["var"] = torch.ones(0, token_channels)
        return build(cls, config, state, str(path))

    def for_peptide(
        self, encodings: Mapping[str, Sequence[int] | Tensor | int], permutations: Mapping[str, Sequence[int] | Tensor]
    ) -> Self:
        """Returns a view of this flow for the atoms of a peptide; it shares the parameters.

        Args:
            encodings: Whole numbers "atom_type", "aa_type", "aa_pos" (T,) or (1, T), and "seq_len", as Prose's own code
                gives them.
            permutations: By name, the indices (T,) or (1, T) of the atoms in the order that a block reads them in.
        """
        weight = self.cond_embed.atom_embed.weight  # not `var`, which does not move with the parameters of a view
        missing = [name for name in ENCODINGS if name not in encodings]
        missing += [name for name in self.config.orders if name not in permutations]
        if missing:
            raise InputValueError(f"encodings and permutations lack {', '.join(missing)}")
        tensors = {name: _numbers(name, encodings[name], weight.device) for name in ENCODINGS}
        num_atoms = len(tensors["atom_type"])
        for name, tensor in tensors.items():
            limit = {"atom_type": _ATOMS, "aa_type": _RESIDUES}.get(name, 2**31)
            if tensor.is_floating_point() or len(tensor) not in (1, num_atoms) or not len(tensor):
                raise InputValueError(f"{name}={tensor.tolist()}: give a whole number for each of {num_atoms} atoms")
            if not 1 <= int(tensor.min()) <= int(tensor.max()) < limit:
                raise InputValueError(
                    f"{name}={tensor.tolist()}: give numbers from 1, which is no padding, to {limit - 1}"
                )
        tensors = {name: tensor.expand(num_atoms) for name, tensor in tensors.items()}
        view = copy.copy(self)
        view.config = replace(self.config, num_tokens=num_atoms)
        view._modules, view._buffers = dict(self._modules), dict(self._buffers)
        view._non_persistent_buffers_set = set()
        for name, tensor in tensors.items():
            view.register_buffer(name, tensor, persistent=False)
        blocks = []
        for i, block in enumerate(self.blocks):
            name = self.config.orders[i % len(self.config.orders)]
            order = _numbers(name, permutations[name]).tolist()
            if len(order) != num_atoms:
                raise InputValueError(f"permutations: {len(order)} indices, but {num_atoms} atoms")
            block = copy.copy(block)
            block.permutation, block.num_tokens = Permutation(tuple(order)), num_atoms
            block.embed_atoms = partial(self.cond_embed, view._buffers)  # whose tensors move with the view
            blocks.append(block)
        view.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        view.var = weight.new_ones(num_atoms, self.config.token_channels)
        return view
