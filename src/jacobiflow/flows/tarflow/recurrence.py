"""The exact inverse of a TarFlow block by native code, in float32 on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from jacobiflow.flows.base import Tokens
from jacobiflow.flows.config import embed_classes
from jacobiflow.flows.guidance import Guidance
from jacobiflow.native import TarFlowArguments, pointers, usable

_ROWS = 32  # of the network per thread and call: more rows do not fit in the processor's cache
_ROWS_PER_TEAM = 4  # from which separate teams of threads, which never wait for each other, are faster
_MAX_WEIGHTS_PER_TEAM = 2**22  # of a block; above, one team: each thread reads its part of every layer
_WORK = 2e9  # multiplications per call, about a tenth of a second, so that Ctrl-C works


def exact_inverse(
    block: Any, z: Tokens, context: Int[Tensor, " b"] | None = None, guidance: Guidance | None = None
) -> Tokens | None:
    """See `AffineBlock.exact_inverse`. Weights may change between calls, and so are packed in each."""
    native = usable(z, *block.parameters())
    # Native code trusts the sizes; if they are wrong, the loop in PyTorch reports it.
    if native is None or z.shape[1:] != (block.num_tokens, block.proj_in.in_features):
        return None
    weights = _Weights(native, block)
    networks, threads = (1 if guidance is None else 2), torch.get_num_threads()
    size = max(_ROWS * threads // networks, 1)
    z = z.contiguous()
    x = torch.empty_like(z)
    for first in range(0, len(z), size):
        rows = slice(first, first + size)
        labels = None if context is None else context[rows]
        if not _solve(native, block, weights, z[rows], x[rows], labels, guidance):
            return None
    return x


class _Weights:
    """The weights of a block, in the order and the layout of the native code."""

    def __init__(self, native: ctypes.CDLL, block: Any) -> None:
        def packed(weight: Tensor) -> Tensor:
            weight, (outputs, inputs) = weight.detach().contiguous(), weight.shape
            out = weight.new_empty(_rounded_up(outputs, lanes) * inputs)
            arguments = (_address(weight), outputs, inputs, _address(out))
            if native.jacobiflow_pack(*arguments, threads):  # so many threads are not available
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
    native: ctypes.CDLL, block: Any, weights: _Weights, z: Tensor, x: Tensor, labels: Tensor | None,
    guidance: Guidance | None,
) -> bool:  # fmt: skip
    """Writes the rows of `x`; returns False if out of memory or threads."""
    (samples, tokens, values), networks = z.shape, 1 if guidance is None else 2
    classes = embed_classes(block.class_embed, labels)
    scales: Sequence[Tensor | None] = (None, None, None)  # of queries, and the guidance weights
    if guidance is not None:
        unconditional = embed_classes(block.class_embed, None)
        if classes is not None and unconditional is not None:
            classes = torch.cat((classes.expand(samples, -1, -1), unconditional.expand(samples, -1, -1)))
        query = z.new_ones(2, samples)
        query[1] /= guidance.attn_temperature
        scales = (query, *guidance.weights(z))
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
    """The numbers of threads and of teams; a team's threads share the columns of each layer."""
    threads = torch.get_num_threads()
    max_teams = 1 if weights.count > _MAX_WEIGHTS_PER_TEAM else min(rows // _ROWS_PER_TEAM, samples, threads)
    teams = max(team for team in range(1, max(max_teams, 1) + 1) if threads % team == 0)
    return teams * min(threads // teams, _rounded_up(weights.channels, weights.lanes) // weights.lanes), teams


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
