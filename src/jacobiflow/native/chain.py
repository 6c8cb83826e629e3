"""Evaluates chains of masked autoregressive transforms in native code, with their gradients."""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jacobiflow.errors import UnsupportedError
from jacobiflow.native.boundary import ChainArgs, GradientArgs, Transform
from jacobiflow.native.library import Library, compiled_library
from jacobiflow.native.tensors import address_of, addresses_of, allocate, check_tensor, is_plain
from jacobiflow.native.transforms import ChainTransform
from jacobiflow.utils.autograd import check_first_derivative, is_batched

_MAX_ACTIVATION_BYTES = 24 << 20  # memory for the backward pass; above, activations are computed again
# Numbers in a weight of a coupling's network; above, PyTorch computes the gradients.
_MAX_TRAINED_WEIGHT = 2**17
_TILE_VECTORS = 4  # vectors of a tile, to which rows are padded, see `Tiles` in masked.h


class Result(NamedTuple):
    """Rows of a chain. `failed` marks those that are not finite or overflowed on the way; `None` if there are none."""

    values: Float[Tensor, "b d"]
    log_det: Float[Tensor, "*bd"] | None
    failed: Bool[Tensor, " b"] | None


InPyTorch = Callable[
    [Float[Tensor, "b d"], Float[Tensor, "#b c"] | None, Sequence[Tensor]], tuple[Tensor, Tensor | None]
]
"""Computes values and log-determinants of a chain, with a graph, from rows, context and tensors."""


class TransformChain:
    """A composition of transforms, and its inverse.

    Args:
        transforms: The transforms in forward order.

    Attributes:
        transforms: The transforms.
        features: D.
        context: The width of the context, 0 without one.
        shapes: The shapes of the tensors of all transforms.
        table: The transforms for native code.
    """

    def __init__(self, transforms: Sequence[ChainTransform]) -> None:
        self.transforms = transforms  # their memory has to live as long as the table
        features = {each.features for each in transforms if each.features is not None}
        contexts = {each.context for each in transforms if each.context is not None}
        if len(features) != 1 or len(contexts) > 1:
            raise UnsupportedError("transforms of several widths")
        (self.features,), (self.context,) = features, contexts or (0,)
        self.table = (Transform * len(transforms))(*(each.structure for each in transforms))
        self.shapes: list[tuple[int, ...]] = []
        for entry, each in zip(self.table, transforms, strict=True):
            entry.first_tensor = len(self.shapes)
            self.shapes += each.shapes
        weights = [shape for each in transforms if each.is_coupling for shape in each.shapes]
        self._largest_weight = max(map(math.prod, weights), default=0)
        self._sizes: tuple[int, int] | None = None
        self._addresses: dict[torch.dtype, array[int]] = {}  # of the latest call

    def sizes(self, native: Library) -> tuple[int, int]:
        """Returns the size of its packed weights, and of its activations for each row, in numbers."""
        if self._sizes is None:
            table, count = ctypes.addressof(self.table), len(self.table)
            arguments = ChainArgs(table, count=count, features=self.features, context_features=self.context)
            self._sizes = native.chain_sizes(arguments)
        return self._sizes

    def memory_size(self, native: Library, x: Tensor) -> int:
        """Returns the size of memory for packed weights, and for the activations of all rows unless they are many."""
        packed, activations = self.sizes(native)
        tile = _TILE_VECTORS * native.lanes * 4 // x.itemsize
        size = activations * -(-x.shape[0] // tile) * tile
        return packed + (size if size * x.itemsize <= _MAX_ACTIVATION_BYTES else 0)

    def arguments(
        self, x: Tensor, context: Tensor | None, memory: Tensor | None, is_inverse: bool, is_by_feature: bool
    ) -> tuple[ChainArgs, Any]:
        """Returns the arguments of a call without results, and the tensors that they point to."""
        rows, features = x.shape
        (x, in_stride), (context, context_stride) = _with_row_stride(x), _with_row_stride(context)
        arguments = ChainArgs(
            ctypes.addressof(self.table), None, address_of(x), address_of(context), None, None, None, None, None,
            rows, in_stride, context_stride, len(self.table), features, self.context, is_inverse, is_by_feature,
            torch.get_num_threads(),
        )  # fmt: skip
        if memory is not None and self._sizes is not None:
            packed, _ = self._sizes
            arguments.packed = memory.data_ptr()
            if memory.shape[0] > packed:
                arguments.activations = memory.data_ptr() + packed * memory.itemsize
        return arguments, (x, context)

    def evaluate(
        self,
        tensors: Sequence[Tensor],
        x: Float[Tensor, "b d"],
        context: Float[Tensor, "#b c"] | None,
        is_inverse: bool,
        log_det: str | None,
        in_pytorch: InPyTorch | None = None,
    ) -> Result:
        """Computes the chain or its inverse. The results have gradients if an input requires one.

        Args:
            tensors: The tensors of all transforms, in the dtype of `x`.
            x: Rows, float32 or float64, on a CPU.
            context: A row for each row of `x`, or one for all.
            is_inverse: Inverts the chain.
            log_det: "rows" for the sum over features, "features" for each feature of a single transform, or `None`.
            in_pytorch: Computes the same for second derivatives, which raise an error without it.

        Raises:
            UnsupportedError: If native code does not take the inputs, or if a row fails whose gradients are needed.
            MemoryError: If C++ has too little memory; PyTorch raises RuntimeError.
        """
        native, dtype, (rows, features) = compiled_library(), x.dtype, x.shape
        if native is None:
            raise UnsupportedError("no native library")
        width, is_by_feature = 0 if context is None else context.shape[1], log_det == "features"
        if features != self.features or width != self.context:
            raise UnsupportedError("rows or a context of another width")
        if not (is_plain(x, torch.float32) or is_plain(x, torch.float64)):
            raise UnsupportedError(f"rows of {dtype}, or not on a CPU")
        if context is not None and not (is_plain(context, dtype) and context.shape[0] in (1, rows)):
            raise UnsupportedError("a context that does not fit the rows")
        inputs = (x, context, *tensors)
        needed = [t is not None and t.requires_grad for t in inputs] if torch.is_grad_enabled() else []
        if any(needed):
            if self._largest_weight > _MAX_TRAINED_WEIGHT:
                raise UnsupportedError("gradients of wide couplings, which PyTorch computes")
            # Autograd saves no tensors of inference mode.
            x = x.clone() if x.is_inference() else x
            context = context.clone() if context is not None and context.is_inference() else context
        self._addresses[dtype] = addresses = addresses_of(tensors, self.shapes, dtype, self._addresses.get(dtype))
        memory = allocate(dtype, self.memory_size(native, x)) if any(needed) else None
        out, failed = allocate(dtype, rows, features), ctypes.create_string_buffer(rows)
        log_dets = None
        if log_det is not None:
            log_dets = allocate(dtype, rows, features) if is_by_feature else allocate(dtype, rows)
        arguments, _inputs = self.arguments(x, context, memory, is_inverse, is_by_feature)
        arguments.tensors, arguments.out = addresses.buffer_info()[0], out.data_ptr()
        arguments.log_det, arguments.failed = address_of(log_dets), ctypes.addressof(failed)
        num_failed = native.evaluate_chain(arguments, dtype)
        result = Result(out, log_dets, torch.frombuffer(failed, dtype=torch.bool) if num_failed else None)
        if memory is None:
            return result
        if num_failed:
            raise UnsupportedError("gradients of rows that are not finite")
        call = _Call(self, native, is_inverse, is_by_feature, needed, in_pytorch, tensors, _versions(tensors))
        values, log_dets = _Gradients.apply(call, memory, result, (x, context), *compress(inputs, needed))
        return Result(values, log_dets, None)


@dataclass(slots=True)
class _Call:
    """The parts of a call that its backward pass needs beside saved tensors.

    Attributes:
        needed: True for each of x, the context and the tensors that requires a gradient.
        versions: The versions of the tensors in the forward pass, with which a second derivative compares them.
    """

    chain: TransformChain
    native: Library
    is_inverse: bool
    is_by_feature: bool
    needed: Sequence[bool]
    in_pytorch: InPyTorch | None
    tensors: Sequence[Tensor]
    versions: Sequence[tuple[int, int]]

    def differentiate(
        self, memory: Tensor, x: Tensor, context: Tensor | None, cotangents: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        """Returns the gradients of x, the context and the tensors, `None` for those that are not wanted."""
        shape, dtype = (x.shape[0], self.chain.features), x.dtype
        # A hook on saved tensors, see torch.autograd.graph.saved_tensors_hooks, may have returned anything.
        memory = check_tensor(memory, (self.chain.memory_size(self.native, x),), dtype)
        x = check_tensor(x, shape, dtype)
        if context is not None:
            context = check_tensor(context, (1 if len(context) == 1 else len(x), self.chain.context), dtype)
        grad_out, grad_log_det = (None if c is None else check_tensor(c, shape[: c.ndim], dtype) for c in cotangents)
        wants_x, wants_context, *wants_tensors = wanted
        grad_x = allocate(dtype, *shape) if wants_x else None
        grad_context = None if context is None or not wants_context else allocate(dtype, len(x), context.shape[1])
        grads = [allocate(dtype, *s) if w else None for s, w in zip(self.chain.shapes, wants_tensors, strict=True)]
        table = (ctypes.c_void_p * len(grads))(*map(address_of, grads))
        arguments, _inputs = self.chain.arguments(x, context, memory, self.is_inverse, self.is_by_feature)
        gradient_arguments = GradientArgs(
            ctypes.addressof(arguments), address_of(grad_out), address_of(grad_log_det), ctypes.addressof(table),
            address_of(grad_x), address_of(grad_context),
        )  # fmt: skip
        self.native.differentiate_chain(gradient_arguments, dtype)
        if grad_context is not None and context is not None and len(context) < len(x):
            grad_context = grad_context.sum(dim=0, keepdim=True)
        return [grad_x, grad_context, *grads]

    def differentiate_in_pytorch(
        self, x: Tensor, context: Tensor | None, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Does the same as `differentiate` with a graph, or for a batch of cotangents."""
        if self.in_pytorch is None:
            check_first_derivative("an inverse", "write the loss with the forward direction instead")
            raise RuntimeError("is_grads_batched=True: an inverse takes one cotangent at a time; loop over them")
        if _versions(self.tensors) != self.versions:
            raise RuntimeError("second derivatives: weights have changed since the forward pass; call the flow again")
        with torch.enable_grad():
            # Aliases leave out the part of a derivative by which x itself depends on a tensor.
            aliases: Any = [None if t is None else t.view_as(t) for t in (x, context, *self.tensors)]
            outputs = self.in_pytorch(aliases[0], aliases[1], aliases[2:])
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o is not None and c is not None]
        inputs = list(compress(aliases, wanted))
        gradients = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], inputs, [c for _, c in pairs], create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )  # fmt: skip
        return [next(gradients) if is_wanted else None for is_wanted in wanted]


def _versions(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Returns where each tensor is, and how often it was changed in place; inference mode does not count."""
    return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def _with_row_stride(x: Tensor | None) -> tuple[Any, int]:
    """Returns the tensor, or a copy if its columns do not follow each other, and its stride; 0 for a single row."""
    if x is None:
        return x, 0
    x = x if x.stride()[1] == 1 else x.contiguous()
    return x, x.stride()[0] if len(x) > 1 else 0


class _Gradients(torch.autograd.Function):
    """Connects results of native code to the inputs that require a gradient."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, memory: Tensor, result: Result, rows: tuple[Tensor, Tensor | None], *_inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(memory, *rows)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return result.values, result.log_det

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        memory, x, context = ctx.saved_tensors
        call = ctx.call
        before = 1 + sum(call.needed[:2])  # nodes of `memory`, x and the context come first
        wants_tensors = any(_is_wanted(node) for node, _ in ctx.next_functions[before:])
        wanted = [needs and (i < 2 or wants_tensors) for i, needs in enumerate(call.needed)]
        if torch.is_grad_enabled() or any(c is not None and is_batched(c) for c in cotangents):
            gradients = call.differentiate_in_pytorch(x, context, cotangents, wanted)
        else:
            gradients = call.differentiate(memory, x, context, cotangents, wanted)
        return (None, None, None, None, *compress(gradients, call.needed))


def _is_wanted(node: Any) -> bool:
    """Returns True if a gradient is used. torch.autograd.grad(log_prob, x) uses no gradient of the weights."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except (AttributeError, RuntimeError):  # an older PyTorch; a leaf whose gradient is used
        return True
