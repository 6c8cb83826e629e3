"""The exact inverse of a block with a causal transformer by native code, in float32 or float64 on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import LayerArgs, TransformerArgs, Weight
from jacobiflow.native.library import Library, usable_library
from jacobiflow.native.tensors import (
    MATRICES,
    MAX_INT32,
    address_of,
    addresses_of,
    allocate,
    check_tensor,
    layer_shapes,
)
from jacobiflow.native.weights import WeightMemory, kept_memory, store_weights

_MAX_ROWS_PER_THREAD = 32  # rows of the network per call; more do not fit in the processor's cache
_MIN_ROWS_PER_TEAM = 4  # rows of the network from which teams of threads work, which never wait for each other
_MAX_WEIGHTS_PER_TEAM = 2**22  # weights of a block above which there is one team: each thread reads a part of a layer
_MAX_MULTIPLICATIONS = 2e9  # per call of C++, about a tenth of a second, so that Ctrl-C works


class GuidanceWeights(NamedTuple):
    """Guidance by a second, unconditional row of the network for each sample, see `Guidance`.

    Attributes:
        scale, shift: Weights of the log-scale and of the shift of each token.
        rule: "linear", or "density", which takes the weights of the log-scale.
    """

    scale: Float[Tensor, " t"]
    shift: Float[Tensor, " t"]
    rule: str


class RowInputs(NamedTuple):
    """The inputs of rows of the network beside tokens and weights.

    Attributes:
        context: Added to the embeddings of tokens, in causal order.
        query_scale: One over the attention temperature of each row; `None` if all are 1.
        prefix: Keys and values of the prefix in each layer.
        hidden: The output of the last layer at the end of the prefix, from which token 0 is computed.
    """

    context: Float[Tensor, "#r #t w"] | None = None
    query_scale: Float[Tensor, " r"] | None = None
    prefix: Sequence[Float[Tensor, "r 2 h p d"]] = ()
    hidden: Float[Tensor, "r w"] | None = None

    @classmethod
    def stack(cls, parts: Sequence[RowInputs], num: int) -> RowInputs:
        """Returns the inputs of `num` conditional rows, and then those of as many unconditional ones."""
        if len(parts) == 1:
            return parts[0]
        contexts = [part.context.expand(num, -1, -1) for part in parts if part.context is not None]
        hidden = [part.hidden for part in parts if part.hidden is not None]
        if contexts and len(contexts) < len(parts):
            raise UnsupportedError("a context for one of two rows")
        scales = [torch.ones(num, device="cpu") if part.query_scale is None else part.query_scale for part in parts]
        prefix = [torch.cat(pair) for pair in zip(*(part.prefix for part in parts), strict=True)]
        return cls(
            torch.cat(contexts) if contexts else None, torch.cat(scales), prefix, torch.cat(hidden) if hidden else None
        )


@dataclass(frozen=True)
class CausalTransformer:
    """The network of a block. It computes the log-scale and shift of token t from tokens before t.

    Attributes:
        position: Added to the projection of each token. It has the dtype of the weights or of the sums.
        layers: The parameters of each layer, by the fields of `LayerArgs`. All layers have the same shapes.
        has_scale: False if log-scales are 0 ("volume-preserving").
        rotation: The cosine and the sine for each pair of a query's and a key's values, prefix included.
        final_norm: The weights of an RMS norm of the last layer's output.
        soft_clip: Bounds the outputs softly, and makes the scales a softplus. 0 does neither.
    """

    proj_in: Float[Tensor, "w c"]
    position: Float[Tensor, "t w"]
    layers: Sequence[Mapping[str, Tensor]]
    heads: int
    proj_out: Float[Tensor, "o w"]
    out_bias: Float[Tensor, " o"]
    has_scale: bool
    rotation: Float[Tensor, "t d"] | None = None
    final_norm: Float[Tensor, " w"] | None = None
    soft_clip: float = 0.0

    @property
    def num_weights(self) -> int:
        """The number of weights in the matrices of all layers."""
        return sum(layer[name].numel() for layer in self.layers for name in layer.keys() & MATRICES)

    def check(self, dtype: torch.dtype) -> None:
        """Raises UnsupportedError if native code does not take these sizes and dtypes, for tokens of `dtype`."""
        width, head_size = len(self.proj_in), len(self.proj_in) // self.heads
        if head_size * self.heads != width or (self.rotation is not None and head_size % 2):
            raise UnsupportedError("heads that do not divide the width, or whose values make no pairs")
        if len(self.position) * width > MAX_INT32:
            raise UnsupportedError("a context whose rows are too far apart")
        parameters = [self.proj_in, self.proj_out, self.out_bias]
        parameters += [tensor for layer in self.layers for tensor in layer.values()]
        dtypes = {tensor.dtype for tensor in parameters if tensor is not None}
        if len(dtypes) > 1 or torch.promote_types(self.proj_in.dtype, torch.float32) != dtype:
            raise UnsupportedError(f"weights of {' and '.join(sorted(map(str, dtypes)))} for tokens of {dtype}")

    @torch.no_grad()
    def invert(
        self, z: Float[Tensor, "b t c"], row_inputs: Callable[[slice], RowInputs],
        guidance: GuidanceWeights | None = None, batch_size: int | None = None,
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, " b"]]:  # fmt: skip
        """Returns x = g(x) and the sums of its log-scales.

        Weights that 16-bit floating-point numbers represent are stored as such, which halves the bytes and changes no
        bit of the result. Weights may change between calls, so each call stores them anew.

        Args:
            row_inputs: Returns the inputs of the network's rows for some samples: one for each, or with guidance two.
            batch_size: Samples that are solved at a time, on which the last bits depend; all by default.

        Raises:
            UnsupportedError: If native code does not take these tensors.
            MemoryError: If C++ has too little memory; PyTorch raises RuntimeError.
        """
        native = usable_library(z)
        z = check_tensor(z, (*z.shape[:1], len(self.position), self.proj_in.shape[1]), z.dtype)
        rows_per_sample, batch_size = 1 if guidance is None else 2, batch_size or max(len(z), 1)
        size = max(_MAX_ROWS_PER_THREAD * torch.get_num_threads() // rows_per_sample, 1)
        x, log_det = allocate(z.dtype, *z.shape), allocate(torch.float64, len(z)).zero_()
        with kept_memory() as memory:
            rows = min(size, batch_size, len(z)) * rows_per_sample
            packed = _PackedTransformer(native, self, z.dtype, rows, rows_per_sample, memory)
            for start in range(0, len(z), batch_size):
                stop = min(start + batch_size, len(z))
                for first in range(start, stop, size):
                    some = slice(first, min(first + size, stop))
                    for args in packed.calls(z[some], x[some], log_det[some], row_inputs(some), guidance):
                        native.solve_transformer(args, z.dtype)
        return x, log_det.to(z.dtype)


class _PackedTransformer:
    """The parameters of a network as native code reads them, for calls of at most `rows` rows."""

    def __init__(
        self, native: Library, network: CausalTransformer, dtype: torch.dtype, rows: int, rows_per_sample: int,
        memory: WeightMemory,
    ) -> None:  # fmt: skip
        network.check(dtype)
        self.native, self.network, self.dtype, self.rows_per_sample = native, network, dtype, rows_per_sample
        self.tensors: list[Tensor] = []  # what structures point to
        self.num_weights = network.num_weights
        self.tokens, (self.width, self.token_dim) = len(network.position), network.proj_in.shape
        self.hidden, self.head_size = len(network.layers[0]["up"]), self.width // network.heads
        self.layers, proj_in, proj_out = self._pack_layers(rows, memory)
        position = self._convert(network.position, (self.tokens, self.width))
        self.tensors.append(position)
        norm = network.final_norm
        self.args = TransformerArgs(
            layers=ctypes.addressof(self.layers), position=address_of(position), proj_in=proj_in, proj_out=proj_out,
            out_bias=self._pad([network.out_bias], (len(network.proj_out),))[0],
            final_norm=None if norm is None else self._pad([norm], (self.width,))[0], rows_per_sample=rows_per_sample,
            tokens=self.tokens, token_dim=self.token_dim, width=self.width, hidden=self.hidden, heads=network.heads,
            depth=len(network.layers), has_scale=network.has_scale, soft_clip=network.soft_clip,
        )  # fmt: skip

    def _pack_layers(self, rows: int, memory: WeightMemory) -> tuple[ctypes.Array[LayerArgs], Weight, Weight]:
        """Returns the structures of the layers, and the weights of the projections before and after them."""
        network, layers = self.network, self.network.layers
        shapes = layer_shapes(layers, self.tokens, self.width, self.hidden)
        names, outputs = shapes.keys() & MATRICES, self.token_dim * (2 if network.has_scale else 1)
        matrices = [(layer[name], shapes[name]) for layer in layers for name in names]
        matrices += [(network.proj_in, (self.width, self.token_dim)), (network.proj_out, (outputs, self.width))]
        contiguous, sizes = [matrix.contiguous() for matrix, _ in matrices], [shape for _, shape in matrices]
        self.tensors += contiguous
        rows_per_team = rows // self._threads(rows, rows)[1]
        *weights, proj_in, proj_out = store_weights(
            self.native, contiguous, sizes, self.num_weights, rows_per_team, memory
        )
        structures, each = (LayerArgs * len(layers))(), iter(weights)
        for structure in structures:
            for name in names:
                setattr(structure, name, next(each))
        for name in shapes.keys() - MATRICES:
            addresses = self._pad([layer[name] for layer in layers], shapes[name])
            for structure, address in zip(structures, addresses, strict=True):
                setattr(structure, name, address)
        return structures, proj_in, proj_out

    def _pad(self, vectors: Sequence[Tensor], shape: tuple[int, ...]) -> Sequence[int]:
        """Returns the addresses of parameters of one shape in the dtype of the sums, padded to whole vectors."""
        *tokens, size = shape
        padded_size = self.native.padded(size, self.dtype)
        if padded_size > size:
            vectors = [F.pad(vector, (0, padded_size - size)) for vector in vectors]
        if vectors[0].dtype != self.dtype:
            vectors = [vector.to(self.dtype) for vector in vectors]
        vectors = [vector.contiguous() for vector in vectors]
        self.tensors += vectors
        return addresses_of(vectors, [(*tokens, padded_size)] * len(vectors), self.dtype)

    def _convert(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns values that PyTorch has computed from parameters in the dtype of the sums."""
        return check_tensor(values.to(self.dtype), shape, self.dtype)

    def calls(
        self, z: Tensor, x: Tensor, log_det: Tensor, inputs: RowInputs, guidance: GuidanceWeights | None
    ) -> Iterator[TransformerArgs]:
        """Yields the arguments of the calls that write the rows of `x` and `log_det`, some tokens each."""
        args, samples, rows, context = self.args, len(z), len(z) * self.rows_per_sample, inputs.context
        prefix_length = inputs.prefix[0].shape[3] if inputs.prefix else 0
        length = prefix_length + self.tokens
        tensors = {"z": z, "x": x, "log_det": log_det, "keys_values": self._empty_cache(rows, length)}
        if guidance is not None:
            tensors["guidance_scale"] = check_tensor(guidance.scale, (self.tokens,), self.dtype)
            tensors["guidance_shift"] = check_tensor(guidance.shift, (self.tokens,), self.dtype)
            args.is_by_density = guidance.rule == "density"
        if inputs.query_scale is not None:
            tensors["query_scale"] = self._convert(inputs.query_scale, (rows,))
        if context is not None:
            sizes = (1 if len(context) == 1 else rows, 1 if context.shape[1] == 1 else self.tokens, self.width)
            tensors["context"] = self._convert(context, sizes)
            args.context_row_stride = 0 if sizes[0] == 1 else sizes[1] * self.width
            args.context_token_stride = 0 if sizes[1] == 1 else self.width
        if inputs.hidden is not None:
            shape = (len(self.network.layers), rows, 2, self.network.heads, prefix_length, self.head_size)
            tensors["prefix_keys_values"] = self._convert(torch.stack(list(inputs.prefix)), shape)
            tensors["prefix_hidden"] = self._convert(inputs.hidden, (rows, self.width))
        if self.network.rotation is not None:
            tensors["rotation"] = self._convert(self.network.rotation, (length, self.head_size))
        for name, tensor in tensors.items():
            setattr(args, name, address_of(tensor))
        args.samples, args.prefix_length = samples, prefix_length
        args.num_threads, args.num_teams = self._threads(samples, rows)
        step = max(int(_MAX_MULTIPLICATIONS / (self.num_weights * rows)), 1)
        for start in range(0, self.tokens, step):
            args.start, args.stop = start, min(start + step, self.tokens)
            yield args

    def _empty_cache(self, rows: int, length: int) -> Tensor:
        """Returns memory for the keys and values of all layers, which are padded to whole vectors."""
        padded_length, padded_head = (self.native.padded(size, self.dtype) for size in (length, self.head_size))
        num_heads = len(self.network.layers) * rows * self.network.heads
        return allocate(self.dtype, num_heads * (self.head_size * padded_length + padded_head * length))

    def _threads(self, samples: int, rows: int) -> tuple[int, int]:
        """Returns the numbers of threads and of teams. A team's threads share the columns of each layer."""
        threads = torch.get_num_threads()
        is_large = self.num_weights > _MAX_WEIGHTS_PER_TEAM
        max_teams = 1 if is_large else max(min(rows // _MIN_ROWS_PER_TEAM, samples, threads), 1)
        teams = max(team for team in range(1, max_teams + 1) if threads % team == 0)
        columns = self.native.padded(self.width, torch.float32) // self.native.lanes
        return teams * min(threads // teams, columns), teams
