"""The modules of a Prose flow, under the original's names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobiflow.models.transformer.attention import (
    AdaptiveModulation,
    Attention,
    Layer,
    LayerWeights,
    SharedParameters,
    TransformerLayer,
)

NUM_ATOM_TYPES, NUM_RESIDUE_TYPES = 128, 64
_RESIDUE_PERIOD = 1e3  # Base of the wavelengths that encode residue positions and sequence lengths.


class _AdaptiveNorm(nn.Module):
    """Parameters of sigmoid(W_g n + b_g) * norm(h) + W_b n, with n the normalised condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_cond = nn.LayerNorm(width)
        self.to_gamma = nn.Sequential(nn.Linear(width, width), nn.Sigmoid())
        self.to_beta = nn.Linear(width, width, bias=False)

    def forward(self, condition: Float[Tensor, "t w"]) -> tuple[Float[Tensor, "t w"], Float[Tensor, "t w"]]:
        normalised = self.norm_cond(condition)
        return self.to_gamma(normalised), self.to_beta(normalised)


class _Gate(nn.Module):
    """Parameters of sigmoid(W c + b), c the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        linear = nn.Linear(width, width)
        nn.init.zeros_(linear.weight)
        nn.init.constant_(linear.bias, -2.0)
        self.to_adaln_zero_gamma = nn.Sequential(linear, nn.Sigmoid())

    def forward(self, condition: Float[Tensor, "t w"]) -> Float[Tensor, "t w"]:
        return self.to_adaln_zero_gamma(condition)


class _NormalizedAttention(Attention):
    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__(width, head_dim)
        self.q_layer_norm, self.k_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)


class NormalizedLayer(TransformerLayer):
    """A layer of a TarFlow with normalised queries and keys."""

    attention: _NormalizedAttention

    def __init__(self, width: int, head_dim: int, expansion: int) -> None:
        super().__init__(width, head_dim, expansion)
        self.attention = _NormalizedAttention(width, head_dim)

    def weights(self, shared: SharedParameters) -> LayerWeights:
        weights, query, key = super().weights(shared), self.attention.q_layer_norm, self.attention.k_layer_norm
        return weights._replace(query_norm=(query.weight, query.bias), key_norm=(key.weight, key.bias))


class _AdaptiveAttention(nn.Module):
    def __init__(self, width: int, head_dim: int, expansion: int) -> None:
        super().__init__()
        self.adaln, self.mha = _AdaptiveNorm(width), NormalizedLayer(width, head_dim, expansion)
        self.scale_output = _Gate(width)


class _Transition(nn.Module):
    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        self.swish_linear = nn.ModuleList([nn.Linear(width, 2 * hidden, bias=False)])
        self.linear_out = nn.Linear(hidden, width, bias=False)


class _AdaptiveTransition(nn.Module):
    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.adaln, self.transition = _AdaptiveNorm(width), _Transition(width, expansion)
        self.scale_output = _Gate(width)


class AdaptiveLayer(Layer):
    """Parameters of a layer, under the original's names: h <- h + gate * A(norm(h)), h <- h + gate' * SwiGLU(norm'(h)).

    A is a whole layer of a TarFlow; the norms and the gates depend on the condition c of each token.
    """

    def __init__(self, width: int, head_dim: int, expansion: int) -> None:
        super().__init__()
        self.mha = _AdaptiveAttention(width, head_dim, expansion)
        self.transition = _AdaptiveTransition(width, expansion)

    def weights(self, shared: SharedParameters) -> LayerWeights:
        transition, condition = self.transition.transition, shared.condition
        scale, shift = self.mha.adaln(condition)
        gated_scale, gated_shift = self.transition.adaln(condition)
        adaptive = AdaptiveModulation(
            scale=scale,
            shift=shift,
            gate=self.mha.scale_output(condition),
            gated_scale=gated_scale,
            gated_shift=gated_shift,
            gated_gate=self.transition.scale_output(condition),
            gated_up=cast(nn.Linear, transition.swish_linear[0]).weight,
            gated_down=transition.linear_out.weight,
        )
        return self.mha.mha.weights(SharedParameters())._replace(adaptive=adaptive)


class AtomEmbedder(nn.Module):
    """Embeds the atoms of a peptide, under the original's names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.atom_embed = nn.Embedding(NUM_ATOM_TYPES, width)
        self.residue_embed = nn.Embedding(NUM_RESIDUE_TYPES, width)
        self.mlp = nn.Sequential(nn.Linear(4 * width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, encodings: Mapping[str, Int[Tensor, " t"]]) -> Float[Tensor, "t w"]:
        atoms, residues = self.atom_embed(encodings["atom_type"]), self.residue_embed(encodings["aa_type"])
        positions, lengths = (
            sinusoid(encodings[name], atoms.shape[-1], _RESIDUE_PERIOD).to(atoms) for name in ("aa_pos", "seq_len")
        )
        return self.mlp(torch.cat((atoms, residues, positions, lengths), dim=-1))


def sinusoid(numbers: Int[Tensor, " t"], width: int, period: float) -> Float[Tensor, "t w"]:
    """Returns sin and cos of n period^(-2k / width) for k = 0, 1, .., in turn."""
    rates = torch.exp(torch.arange(0, width, 2, device=numbers.device) * -(math.log(period) / width))
    angles = numbers.float().unsqueeze(-1) * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
