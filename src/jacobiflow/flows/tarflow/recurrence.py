"""The recurrence of a TarFlow block in native code, for float32 on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jacobiflow.flows.base import Extrapolation
from jacobiflow.flows.permutation import Permutation
from jacobiflow.flows.tarflow.attention import AttentionBlock
from jacobiflow.native import TarFlowArguments, pointers, usable

_ROWS = 32  # of the network for each thread, solved together: more of them leave the processor's cache
_ROWS_A_TEAM = 4  # at which threads that share no rows, and so never wait, are faster
_SHARED = 2**22  # weights of a block above which threads always share rows: each reads its part of every layer
_WORK = 2e9  # multiplications of a call, about a tenth of a second, after which Ctrl-C is heard


class TransformerBlock(Protocol):
    """What a `TarFlowBlock` is computed from."""

    num_tokens: int
    nvp: bool
    permutation: Permutation
    proj_in: nn.Linear
    pos_embed: nn.Parameter
    attn_blocks: Sequence[AttentionBlock]
    proj_out: nn.Linear

    def embed_classes(self, labels: Int[Tensor, " b"] | None) -> Float[Tensor, "#b 1 c"] | None: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def exact_inverse(
    block: TransformerBlock, z: Float[Tensor, "b t c"], context: Int[Tensor, " b"] | None,
    extrapolation: Extrapolation | None,
) -> Float[Tensor, "b t c"] | None:  # fmt: skip
    """See `jacobiflow.flows.base.ExactInverse`. Weights may change between calls, and so are packed at each."""
    native = usable(z, *block.parameters())
    # Native code trusts the sizes: tokens of other ones are left to PyTorch, which checks them.
    if native is None or z.shape[1:] != (block.num_tokens, block.proj_in.in_features):
        return None
    weights = _Weights(native, block)
    networks, threads = (1 if extrapolation is None else 2), torch.get_num_threads()
    size = max(_ROWS * threads // networks, 1)
    z = z.contiguous()
    x = torch.empty_like(z)
    for first in range(0, len(z), size):
        rows = slice(first, first + size)
        labels = None if context is None else context[rows]
        if not _solve(native, block, weights, z[rows], x[rows], labels, extrapolation):
            return None
    return x


class _Weights:
    """The weights of a block, in the order and the layout of the native code."""

    def __init__(self, native: ctypes.CDLL, block: TransformerBlock) -> None:
        def packed(weight: Tensor) -> Tensor:
            weight, (outputs, inputs) = weight.detach().contiguous(), weight.shape
            out = weight.new_empty(_rounded_up(outputs, lanes) * inputs)
            arguments = (_address(weight), outputs, inputs, _address(out))
            if native.jacobiflow_pack(*arguments, threads):  # they cannot be had
                native.jacobiflow_pack(*arguments, 1)
            return out

        def padded(bias: Tensor) -> Tensor:
            return torch.nn.functional.pad(bias.detach(), (0, _rounded_up(len(bias), lanes) - len(bias)))

        lanes, threads = native.jacobiflow_lanes(), torch.get_num_threads()
        self.layers: list[Tensor] = []
        for layer in block.attn_blocks:
            norm, qkv, proj, mlp_norm, up, down, self.heads = layer.weights()
            for normalisation, linears in ((norm, (qkv, proj)), (mlp_norm, (up, down))):
                self.layers += [parameter.detach().contiguous() for parameter in normalisation]
                for weight, bias in linears:
                    self.layers += [packed(weight), padded(bias)]
        self.hidden, self.channels = up[0].shape
        self.depth, self.lanes = len(block.attn_blocks), lanes
        self.count = sum(map(torch.numel, self.layers))
        self.proj_in, self.proj_out = packed(block.proj_in.weight), packed(block.proj_out.weight)
        self.out_bias = padded(block.proj_out.bias)
        self.position = (block.permutation(block.pos_embed, dim=0) + block.proj_in.bias).detach().contiguous()


def _solve(
    native: ctypes.CDLL, block: TransformerBlock, weights: _Weights, z: Tensor, x: Tensor, labels: Tensor | None,
    extrapolation: Extrapolation | None,
) -> bool:  # fmt: skip
    """Write the rows of `x`; whether there were memory and threads for it."""
    (samples, tokens, values), networks = z.shape, 1 if extrapolation is None else 2
    classes = block.embed_classes(labels)
    scales: Sequence[Tensor | None] = (None, None, None)  # of queries, and the weights of the extrapolation
    if extrapolation is not None:
        unconditional = block.embed_classes(None)
        if classes is not None and unconditional is not None:
            classes = torch.cat((classes.expand(samples, -1, -1), unconditional.expand(samples, -1, -1)))
        query = z.new_ones(2, samples)
        query[1] /= extrapolation.attn_temperature
        scales = (query, extrapolation.log_scale.contiguous(), extrapolation.shift.contiguous())
    if classes is not None:
        classes = classes.detach().expand(samples * networks, -1, -1).contiguous()
    head, rows = weights.channels // weights.heads, samples * networks
    each = head * _rounded_up(tokens, weights.lanes) + _rounded_up(head, weights.lanes) * tokens
    keys_values = z.new_empty(weights.depth * rows * weights.heads * each)
    layers, (threads, teams) = pointers(weights.layers), _threads_and_teams(samples, rows, weights)
    arguments = TarFlowArguments(
        _address(z), _address(weights.position), _address(classes), _address(scales[0]), _address(weights.proj_in),
        _address(weights.proj_out), _address(weights.out_bias), _address(scales[1]), _address(scales[2]),
        ctypes.addressof(layers), _address(x), _address(keys_values), samples, networks, tokens, values,
        weights.channels, weights.hidden, weights.heads, weights.depth, int(block.nvp), threads, teams,
    )  # fmt: skip
    step = max(int(_WORK / (weights.count * rows)), 1)
    for start in range(0, tokens, step):
        arguments.start, arguments.stop = start, min(start + step, tokens)
        if native.jacobiflow_tarflow(ctypes.byref(arguments)):
            return False
    return True


def _threads_and_teams(samples: int, rows: int, weights: _Weights) -> tuple[int, int]:
    """How many threads compute, and how many teams they form.

    Each team takes its samples through all tokens. The threads of one share layers, by columns: no more of them than
    the narrowest layer has vectors, since all others would only be waited for.
    """
    threads = torch.get_num_threads()
    most = 1 if weights.count > _SHARED else min(rows // _ROWS_A_TEAM, samples, threads)
    teams = max(team for team in range(1, max(most, 1) + 1) if threads % team == 0)
    return teams * min(threads // teams, _rounded_up(weights.channels, weights.lanes) // weights.lanes), teams


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
