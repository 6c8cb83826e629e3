"""The exact inverse of a block with a causal transformer by native code, in float32 or float64 on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.native.boundary import (
    MATRICES,
    MAX_INT32,
    LayerArgs,
    Library,
    RecurrenceArgs,
    UnsupportedError,
    Weight,
    address_of,
    layer_shapes,
    require,
)
from jacobiflow.native.library import usable_library
from jacobiflow.native.weights import HALVES, MIN_IN_PLACE, faster_halves, in_halves, in_int16

_ROWS = 32  # of the network per thread and call: more rows do not fit in the processor's cache
_ROWS_PER_TEAM = 4  # from which separate teams of threads, which never wait for each other, are faster
_MAX_WEIGHTS_PER_TEAM = 2**22  # of a block; above, one team: each thread reads its part of every layer
_WORK = 2e9  # multiplications per call, about a tenth of a second, so that Ctrl-C works


@dataclass(frozen=True)
class GuidanceTerms:
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
        layers: The parameters of each layer by their names in boundary.h; all layers have the same, of the same shapes.
        position: What is added to the projection of each token; in the dtype of the weights, or in that of the sums.
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
        guidance: GuidanceTerms | None = None, read_prefix: Callable[[slice], Prefix] | None = None,
        is_rounded: bool = False,
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, " b"]] | None:  # fmt: skip
        """Returns x = g(x) and the sums of its log-scales; `None` if native code cannot do it.

        Weights that are 16-bit floating-point numbers are read as such, which halves the bytes and changes no bit of
        the result. `is_rounded` rounds other weights to 16-bit integers with a scale for each output; the result is
        `None` if there is nothing to round.

        `context` is added to the embeddings of tokens, in causal order. `read_prefix` returns the prefix of some rows
        of z. Weights may change between calls, and so are packed in each.
        """
        native = usable_library(z)
        if native is None:
            return None
        try:
            z = require(z, (*z.shape[:1], len(self.position), self.proj_in.shape[1]), z.dtype)
            if context is not None and len(context) not in (1, len(z)):
                raise UnsupportedError("a context for another number of samples")
            networks, threads = (1 if guidance is None else 2), torch.get_num_threads()
            size = max(_ROWS * threads // networks, 1)
            packed = _PackedRecurrence(native, self, z.dtype, min(size, len(z)), networks, is_rounded)
            x, log_det = torch.empty_like(z), z.new_zeros(len(z), dtype=torch.float64)
            for first in range(0, len(z), size):
                rows = slice(first, first + size)
                some = context if context is None or len(context) == 1 else context[rows]
                prefix = None if read_prefix is None else read_prefix(rows)
                if not packed.invert(z[rows], x[rows], log_det[rows], some, guidance, prefix):
                    return None
        except UnsupportedError:  # the loop in PyTorch computes it, or reports what is wrong
            return None
        return x, log_det.to(z.dtype)


class _PackedRecurrence:
    """The parameters of a recurrence as native code reads them, for so many rows of the network per team."""

    def __init__(
        self, native: Library, recurrence: Recurrence, dtype: torch.dtype, samples: int, networks: int, is_rounded: bool
    ) -> None:
        self.native, self.dtype, self.memory = (
            native,
            dtype,
            list[Tensor | None](),
        )  # `memory` is what structures point to
        self.heads, self.depth = recurrence.heads, len(recurrence.layers)
        self.tokens, self.values = len(recurrence.position), recurrence.proj_in.shape[1]
        self.channels, self.hidden = len(recurrence.proj_in), len(recurrence.layers[0]["up"])
        self.has_scale, self.soft_clip = recurrence.has_scale, recurrence.soft_clip
        self.head = self.channels // self.heads
        if self.head * self.heads != self.channels or (recurrence.rotation is not None and self.head % 2):
            raise UnsupportedError("heads that do not divide the channels, or whose channels make no pairs")
        if self.tokens * self.channels > MAX_INT32:
            raise UnsupportedError("a context whose rows are too far apart")
        shapes = layer_shapes(recurrence.layers, self.tokens, self.channels, self.hidden)
        names = [name for name in shapes if name in MATRICES]
        matrices = [layer[name].detach() for layer in recurrence.layers for name in names]
        self.count, self.parameter_dtype = sum(matrix.numel() for matrix in matrices), matrices[0].dtype
        stored, scales = self._stored_matrices(matrices, samples * networks, is_rounded)
        has_whole_vectors = all(native.padded(size, dtype) == size for size in (self.channels, self.hidden))
        in_panels = self.count < MIN_IN_PLACE or not has_whole_vectors
        self.layers = (LayerArgs * self.depth)()
        weights = iter(zip(stored, scales, strict=True))
        for entry, layer in zip(self.layers, recurrence.layers, strict=True):
            for name in names:
                matrix, scale = next(weights)
                setattr(entry, name, self._weight(matrix, shapes[name], scale, in_panels))
            for name in shapes.keys() - MATRICES:
                setattr(entry, name, address_of(self._vector(layer[name], shapes[name])))
        outputs = self.values * (2 if self.has_scale else 1)
        self.proj_in = self._projection(recurrence.proj_in, (self.channels, self.values))
        self.proj_out = self._projection(recurrence.proj_out, (outputs, self.channels))
        self.out_bias = self._vector(recurrence.out_bias, (outputs,))
        self.position = require(self._converted(recurrence.position), (self.tokens, self.channels), dtype)
        rotation, norm = recurrence.rotation, recurrence.final_norm
        self.rotation = None if rotation is None else self._converted(rotation)
        self.final_norm = None if norm is None else self._vector(norm, (self.channels,))

    def _stored_matrices(
        self, matrices: list[Tensor], rows: int, is_rounded: bool
    ) -> tuple[list[Tensor], list[Tensor] | list[None]]:
        """The matrices in the dtype in which they are read, and their scales if they are rounded."""
        for matrix in matrices:
            if matrix.dtype != self.parameter_dtype or torch.promote_types(matrix.dtype, torch.float32) != self.dtype:
                raise UnsupportedError("weights of a dtype other than that of the tokens")
        if not is_rounded:
            halves = None
            if self.parameter_dtype == torch.float32 and self.native.has_fast_halves:
                _, teams = self._threads(rows, rows)
                halves = in_halves(matrices, faster_halves(self.count, rows // teams))
            return halves or matrices, [None] * len(matrices)
        if self.parameter_dtype != torch.float32 or in_halves(matrices, HALVES) is not None:
            raise UnsupportedError("weights that have 16 bits already, or 64")
        if not all(bool(matrix.isfinite().all()) for matrix in matrices):
            raise UnsupportedError("weights that are not finite")
        integers, scales = zip(*map(in_int16, matrices), strict=True)
        return list(integers), list(scales)

    def _weight(self, matrix: Tensor, shape: tuple[int, ...], scales: Tensor | None, in_panels: bool) -> Weight:
        weight, tensors = self.native.weight(matrix, shape, self.dtype, scales, in_panels)
        self.memory += tensors
        return weight

    def _projection(self, matrix: Tensor, shape: tuple[int, ...]) -> Weight:
        return self._weight(require(self._widened(matrix), shape, self.dtype), shape, None, in_panels=True)

    def _vector(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        vector = self.native.pad(self._widened(values), shape, self.dtype)
        self.memory.append(vector)
        return vector

    def _widened(self, parameter: Tensor) -> Tensor:
        """A parameter that is not a layer's matrix, in the dtype of the sums."""
        if parameter.dtype != self.parameter_dtype:
            raise UnsupportedError(f"parameters of {self.parameter_dtype} and of {parameter.dtype}")
        return parameter.to(self.dtype)

    def _converted(self, values: Tensor) -> Tensor:
        """What PyTorch has computed from parameters, in their dtype or in that of the sums."""
        return values if values.dtype == self.dtype else self._widened(values)

    def invert(
        self, z: Tensor, x: Tensor, log_det: Tensor, context: Tensor | None, guidance: GuidanceTerms | None,
        prefix: Prefix | None,
    ) -> bool:  # fmt: skip
        """Writes the rows of `x` and `log_det`; returns False if out of memory or threads."""
        samples, networks, native = len(z), 1 if guidance is None else 2, self.native
        rows, channels = samples * networks, self.channels
        query_scale = weight_scale = weight_shift = rotation = keys_values = hidden = None
        dtype = self.dtype
        if guidance is not None:
            if (context is None) != (guidance.context is None):
                raise UnsupportedError("a context for one of two rows")
            if context is not None and guidance.context is not None:
                other = guidance.context.expand(samples, *context.shape[1:])
                context = torch.cat((context.expand(samples, -1, -1), other))
            query_scale = z.new_ones(networks, samples)
            query_scale[1] /= guidance.temperature
            weight_scale, weight_shift = (
                require(guidance.scale, (self.tokens,), dtype),
                require(guidance.shift, (self.tokens,), dtype),
            )
        if context is not None:
            is_shared, is_repeated = len(context) == 1, context.shape[1] == 1
            sizes = (1 if is_shared else rows, 1 if is_repeated else self.tokens, channels)
            context = require(self._converted(context), sizes, dtype)
        prefix_length = 0 if prefix is None else prefix.layers[0].shape[3]
        length = prefix_length + self.tokens
        if prefix is not None:
            shape = (self.depth, rows, 2, self.heads, prefix_length, self.head)
            keys_values = require(self._converted(torch.stack(list(prefix.layers))), shape, dtype)
            hidden = require(self._converted(prefix.hidden), (rows, channels), dtype)
        if self.rotation is not None:
            rotation = require(self.rotation, (length, self.head), dtype)
        each = self.head * native.padded(length, dtype) + native.padded(self.head, dtype) * length
        memory, (threads, teams) = z.new_empty(self.depth * rows * self.heads * each), self._threads(samples, rows)
        arguments = RecurrenceArgs(
            z=address_of(z), position=address_of(self.position), context=address_of(context),
            query_scale=address_of(query_scale), proj_in=self.proj_in, proj_out=self.proj_out,
            out_bias=address_of(self.out_bias), weight_scale=address_of(weight_scale),
            weight_shift=address_of(weight_shift), prefix_keys_values=address_of(keys_values),
            prefix_hidden=address_of(hidden), rotation=address_of(rotation), final_norm=address_of(self.final_norm),
            layers=ctypes.addressof(self.layers), x=address_of(x), keys_values=address_of(memory),
            log_det=address_of(log_det), samples=samples, networks=networks, tokens=self.tokens, values=self.values,
            channels=channels, hidden=self.hidden, heads=self.heads, depth=self.depth, scales=self.has_scale,
            context_row=0 if context is None or is_shared else context.shape[1] * channels,
            context_token=0 if context is None or is_repeated else channels, prefix=prefix_length,
            by_density=guidance is not None and guidance.by_density, threads=threads, teams=teams,
            soft_clip=self.soft_clip,
        )  # fmt: skip
        step = max(int(_WORK / (self.count * rows)), 1)
        for start in range(0, self.tokens, step):
            arguments.start, arguments.stop = start, min(start + step, self.tokens)
            if not native.solve_recurrence(arguments, dtype):
                return False
        return True

    def _threads(self, samples: int, rows: int) -> tuple[int, int]:
        """The numbers of threads and of teams; a team's threads share the columns of each layer."""
        threads = torch.get_num_threads()
        max_teams = 1 if self.count > _MAX_WEIGHTS_PER_TEAM else min(rows // _ROWS_PER_TEAM, samples, threads)
        teams = max(team for team in range(1, max(max_teams, 1) + 1) if threads % team == 0)
        columns = self.native.padded(self.channels, torch.float32) // self.native.lanes
        return teams * min(threads // teams, columns), teams
