"""The exact inverse of a block with a causal transformer by native code, in float32 on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.native.build import TarFlowArguments, pointers, usable

_ROWS = 32  # of the network per thread and call: more rows do not fit in the processor's cache
_ROWS_PER_TEAM = 4  # from which separate teams of threads, which never wait for each other, are faster
_MAX_WEIGHTS_PER_TEAM = 2**22  # of a block; above, one team: each thread reads its part of every layer
_WORK = 2e9  # multiplications per call, about a tenth of a second, so that Ctrl-C works
_LAYER = (  # `Layer` of tarflow.cpp
    "norm", "norm_bias", "qkv", "qkv_bias", "proj", "proj_bias", "mlp_norm", "mlp_norm_bias", "up", "up_bias", "down",
    "down_bias", "query_norm", "query_norm_bias", "key_norm", "key_norm_bias", "condition", "scale", "shift", "gate",
    "gated_scale", "gated_shift", "gated_up", "gated_down", "gated_gate",
)  # fmt: skip
_WEIGHTS = ("qkv", "proj", "up", "down", "gated_up", "gated_down")


@dataclass(frozen=True)
class Extrapolation:
    """Guidance by a second row of the network, see `Guidance`.

    Attributes:
        scale, shift: w_t of the log-scale and of the shift of entry t.
        context: What is added to the embeddings of the second row.
        temperature: Divides its attention logits.
        by_density: The rule is "density", with w_t of the log-scale.
    """

    scale: Float[Tensor, " t"]
    shift: Float[Tensor, " t"]
    context: Float[Tensor, "1 1 c"] | None
    temperature: float
    by_density: bool


@dataclass(frozen=True)
class Prefix:
    """The prefix of the network's rows: first of those with a context, then of the unconditional ones.

    Attributes:
        layers: Keys and values of each layer.
        hidden: The output of the last layer for the last position, from which entry 0 is read.
    """

    layers: Sequence[Float[Tensor, "b 2 h p d"]]
    hidden: Float[Tensor, "b c"]


@dataclass(frozen=True)
class Recurrence:
    """The network of a block, as native code takes it: log-scale and shift of entry t from tokens before t.

    Attributes:
        layers: The parameters of each layer by their names in tarflow.cpp; a layer may lack those that may be null.
        position: What is added to the projection of each token.
        has_scale: False if log-scales are 0 ("volume-preserving").
        rotation: The cosine and the sine for each pair of a query's and a key's channels, prefix included.
        final_norm: The weights of an RMS norm of the last layer's output.
        soft_clip: Bounds the outputs softly, whose scales are then a softplus; 0 for neither.
    """

    proj_in: Float[Tensor, "c d"]
    position: Float[Tensor, "t c"]
    layers: Sequence[Mapping[str, Tensor]]
    heads: int
    proj_out: Float[Tensor, "o c"]
    out_bias: Float[Tensor, " o"]
    has_scale: bool
    rotation: Float[Tensor, "t d"] | None = None
    final_norm: Float[Tensor, " c"] | None = None
    soft_clip: float = 0.0

    @torch.no_grad()
    def invert(
        self, z: Float[Tensor, "b t d"], context: Float[Tensor, "#b #t c"] | None = None,
        guidance: Extrapolation | None = None, read_prefix: Callable[[slice], Prefix] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, " b"]] | None:  # fmt: skip
        """Returns x = g(x) and the sums of its log-scales; `None` if native code cannot do it.

        `context` is added to the embeddings of tokens, in causal order. `read_prefix` returns the prefix of some rows
        of z. Weights may change between calls, and so are packed in each.
        """
        tensors = [tensor for layer in self.layers for tensor in layer.values()]
        native = usable(z, self.proj_in, self.position, self.proj_out, self.out_bias, *tensors)
        # Native code trusts the sizes; if they are wrong, the loop in PyTorch reports it.
        if native is None or z.shape[1:] != (len(self.position), self.proj_in.shape[1]):
            return None
        packed = _Packed(native, self)
        networks, threads = (1 if guidance is None else 2), torch.get_num_threads()
        size = max(_ROWS * threads // networks, 1)
        z = z.contiguous()
        x, log_det = torch.empty_like(z), z.new_zeros(len(z), dtype=torch.float64)
        for first in range(0, len(z), size):
            rows = slice(first, first + size)
            some = context if context is None or len(context) == 1 else context[rows]
            prefix = None if read_prefix is None else read_prefix(rows)
            if not packed.invert(z[rows], x[rows], log_det[rows], some, guidance, prefix):
                return None
        return x, log_det.to(z.dtype)


class _Packed:
    """The parameters of a recurrence in the layout of native code."""

    def __init__(self, native: ctypes.CDLL, recurrence: Recurrence) -> None:
        def pack(weight: Tensor) -> Tensor:
            weight, (outputs, inputs) = weight.detach().contiguous(), weight.shape
            out = weight.new_empty(_rounded_up(outputs, lanes) * inputs)
            arguments = (_address(weight), outputs, inputs, _address(out))
            if native.jacobiflow_pack(*arguments, threads):  # so many threads are not available
                native.jacobiflow_pack(*arguments, 1)
            return out

        def pad(rows: Tensor) -> Tensor:
            return F.pad(rows.detach(), (0, _rounded_up(rows.shape[-1], lanes) - rows.shape[-1])).contiguous()

        lanes, threads = native.jacobiflow_lanes(), torch.get_num_threads()
        self.native, self.lanes, self.heads, self.depth = native, lanes, recurrence.heads, len(recurrence.layers)
        self.has_scale = recurrence.has_scale
        self.layers = [
            None if name not in layer else (pack if name in _WEIGHTS else pad)(layer[name])
            for layer in recurrence.layers
            for name in _LAYER
        ]
        self.hidden, self.channels = recurrence.layers[0]["up"].shape
        self.count = sum(layer[name].numel() for layer in recurrence.layers for name in _WEIGHTS if name in layer)
        self.proj_in, self.proj_out = pack(recurrence.proj_in), pack(recurrence.proj_out)
        self.out_bias, self.position = pad(recurrence.out_bias), recurrence.position.detach().contiguous()
        self.rotation = None if recurrence.rotation is None else recurrence.rotation.contiguous()
        self.final_norm = None if recurrence.final_norm is None else pad(recurrence.final_norm)
        self.soft_clip = recurrence.soft_clip

    def invert(
        self, z: Tensor, x: Tensor, log_det: Tensor, context: Tensor | None, guidance: Extrapolation | None,
        prefix: Prefix | None,
    ) -> bool:  # fmt: skip
        """Writes the rows of `x` and `log_det`; returns False if out of memory or threads."""
        (samples, tokens, values), networks = z.shape, 1 if guidance is None else 2
        rows = samples * networks
        scales: Sequence[Tensor | None] = (None, None, None)  # of queries, and the guidance weights
        if guidance is not None:
            if context is not None and guidance.context is not None:
                other = guidance.context.expand(samples, *context.shape[1:])
                context = torch.cat((context.expand(samples, -1, -1), other))
            query = z.new_ones(2, samples)
            query[1] /= guidance.temperature
            scales = (query, guidance.scale.contiguous(), guidance.shift.contiguous())
        context_row = context_token = 0
        if context is not None:
            context = context.detach().contiguous()
            context_row = 0 if len(context) == 1 else context.shape[1] * self.channels
            context_token = 0 if context.shape[1] == 1 else self.channels
        head = self.channels // self.heads
        prefix_length = 0 if prefix is None else prefix.layers[0].shape[3]
        length = prefix_length + tokens
        each = head * _rounded_up(length, self.lanes) + _rounded_up(head, self.lanes) * length
        keys_values = z.new_empty(self.depth * rows * self.heads * each)
        layers, (threads, teams) = pointers(self.layers), self._threads_and_teams(samples, rows)
        prefix_keys_values = None if prefix is None else torch.stack(list(prefix.layers))
        prefix_hidden = None if prefix is None else prefix.hidden.contiguous()
        arguments = TarFlowArguments(
            _address(z), _address(self.position), _address(context), _address(scales[0]), _address(self.proj_in),
            _address(self.proj_out), _address(self.out_bias), _address(scales[1]), _address(scales[2]),
            _address(prefix_keys_values), _address(prefix_hidden), _address(self.rotation), _address(self.final_norm),
            ctypes.addressof(layers), _address(x), _address(keys_values), _address(log_det), samples, networks, tokens,
            values, self.channels, self.hidden, self.heads, self.depth, int(self.has_scale), context_row, context_token,
            prefix_length, int(guidance is not None and guidance.by_density), threads, teams,
        )  # fmt: skip
        arguments.soft_clip = self.soft_clip
        step = max(int(_WORK / (self.count * rows)), 1)
        for start in range(0, tokens, step):
            arguments.start, arguments.stop = start, min(start + step, tokens)
            if self.native.jacobiflow_tarflow(ctypes.byref(arguments)):
                return False
        return True

    def _threads_and_teams(self, samples: int, rows: int) -> tuple[int, int]:
        """The numbers of threads and of teams; a team's threads share the columns of each layer."""
        threads = torch.get_num_threads()
        max_teams = 1 if self.count > _MAX_WEIGHTS_PER_TEAM else min(rows // _ROWS_PER_TEAM, samples, threads)
        teams = max(team for team in range(1, max(max_teams, 1) + 1) if threads % team == 0)
        return teams * min(threads // teams, _rounded_up(self.channels, self.lanes) // self.lanes), teams


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
