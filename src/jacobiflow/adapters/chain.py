"""Chains of transforms: those that native code knows go through it together, all others through the library's code."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import Parameter

from jacobiflow.adapters.masked import UnsupportedError
from jacobiflow.adapters.network import is_traced
from jacobiflow.adapters.part import Description, Part, Watch, part_of
from jacobiflow.native.masked import run_chain
from jacobiflow.native.structures import Transform

Link = tuple[Any, bool]
"""A transform, and whether the chain has its inverse."""

Values = tuple[Float[Tensor, "b d"], Float[Tensor, " b"] | None]
"""Rows after a chain, and the logarithm of the determinant of its Jacobian if that was asked for."""

_DTYPES = (torch.float32, torch.float64)
_PLAIN = (Tensor, Parameter)


class Library(ABC):
    """A library's transforms, as chains take them."""

    @abstractmethod
    def links(self, module: Any) -> Iterator[Link]:
        """The transforms that `module` is composed of, in the order of its own forward direction."""

    @abstractmethod
    def describe(self, module: Any, is_conditional: bool) -> Description:
        """The transform for native code.

        Raises:
            UnsupportedError: If native code does not take it.
        """

    @abstractmethod
    def call(
        self,
        module: Any,
        x: Float[Tensor, "b d"],
        context: Float[Tensor, "b c"] | None,
        is_inverse: bool,
        is_accelerated: bool,
    ) -> Values:
        """The values and log-determinant by a transform's own methods, or by those of the library's class."""


@dataclass(frozen=True)
class Segment:
    """Links next to each other that native code takes together, or one that it does not take.

    Attributes:
        links: The transforms.
        parts: What native code knows of them, which has to live as long as `transforms`.
        transforms: For native code; `None` if it does not take the link.
        addresses: Of the transforms' tensors; those of the constants are there.
        tensors: The others, with their positions in `addresses` and their shapes.
        features: D as the transforms know it.
        contexts: Widths of the context that their networks take.
    """

    links: tuple[Link, ...]
    parts: tuple[Part, ...] = ()
    transforms: ctypes.Array[Transform] | None = None
    addresses: tuple[int, ...] = ()
    tensors: tuple[tuple[int, dict[str, Any], str, torch.Size], ...] = ()
    features: frozenset[int] = frozenset()
    contexts: frozenset[int] = frozenset()

    @staticmethod
    def of(links: Sequence[Link], parts: Sequence[Part]) -> Segment:
        """A segment for native code."""
        transforms = (Transform * len(parts))(*(part.transform for part in parts))
        addresses: list[int] = []
        tensors = []
        for transform, part in zip(transforms, parts, strict=True):
            transform.first_tensor = len(addresses)
            tensors += [(len(addresses) + i, *slot, slot[0][slot[1]].shape) for i, slot in enumerate(part.tensors)]
            addresses += [0] * len(part.tensors) + [tensor.data_ptr() for _, _, tensor, _ in part.watch.constants]
        features = frozenset(part.features for part in parts if part.features is not None)
        contexts = frozenset(part.context for part in parts if part.context is not None)
        return Segment(tuple(links), tuple(parts), transforms, tuple(addresses), tuple(tensors), features, contexts)

    def read(self, dtype: torch.dtype, for_graph: bool) -> list[int] | None:
        """The addresses of all tensors; `None` if native code cannot use one of them.

        Args:
            dtype: What they have to be of.
            for_graph: If a graph is wanted, tensors that require a gradient are not for native code.
        """
        addresses = [*self.addresses]
        for position, holder, name, shape in self.tensors:
            tensor: Any = holder.get(name)
            kind = type(tensor)
            if (
                (kind is not Parameter and kind is not Tensor) or tensor.dtype is not dtype or not tensor.is_cpu
                or tensor.shape != shape or not tensor.is_contiguous() or (for_graph and tensor.requires_grad)
            ):  # fmt: skip
                return None
            addresses[position] = tensor.data_ptr()
        return addresses


class Chain:
    """The transforms of a module, as native code takes them.

    Args:
        module: A transform, or a composition of transforms.
        library: Of the module.
        is_conditional: Whether there is a context.

    Attributes:
        library: Of the module.
        segments: In the order of the forward direction.
        native_links: The modules of those that native code takes.
        watch: What they depend on.
    """

    def __init__(self, module: nn.Module, library: Library, is_conditional: bool) -> None:
        self.library = library
        self.segments: list[Segment] = []
        links = tuple(library.links(module))
        inner = {part for link, _ in links for part in link.modules()}
        self.watch = Watch.of(part for part in module.modules() if part not in inner)
        parts = [self._part(link, is_conditional) for link in links]
        self.native_links = [link for (link, _), part in zip(links, parts, strict=True) if part is not None]
        for is_native, group in groupby(zip(links, parts, strict=True), key=lambda pair: pair[1] is not None):
            pairs = list(group)
            if is_native:
                native = [part for _, part in pairs if part is not None]
                self.segments.append(Segment.of([link for link, _ in pairs], native))
                self.watch = sum((part.watch for part in native), self.watch)
            else:
                self.segments += [Segment((link,)) for link, _ in pairs]

    def _part(self, link: Link, is_conditional: bool) -> Part | None:
        try:
            part = part_of(self.library.describe(link[0], is_conditional))
        except UnsupportedError:
            return None
        part.transform.is_reversed = link[1]
        return part


def run(
    chain: Chain,
    x: Float[Tensor, "b d"],
    context: Float[Tensor, "#b c"] | None,
    is_inverse: bool,
    log_det: str | None,
    for_graph: bool,
) -> Values | None:
    """Values of a chain, and their log-determinants; `None` if native code takes no part of it now.

    Rows that are not finite, or that overflow on the way, go through the library's own code.

    Args:
        chain: Of the library's transforms.
        x: Rows of the dtype of the weights.
        context: A row for each row of `x`, or one for all.
        is_inverse: Whether to invert the chain.
        log_det: See `native.masked.run_chain`.
        for_graph: Whether tensors that require a gradient keep native code from being used.

    Raises:
        ChangedError: If a transform is no longer what it was.
    """
    chain.watch.check()
    width = 0 if context is None else context.shape[1]
    ready: list[tuple[Segment, list[int] | None]] = []
    for segment in chain.segments:
        addresses = None
        if segment.transforms is not None:
            addresses = segment.read(x.dtype, for_graph)
            if addresses is None or segment.contexts - {width}:  # the library says what is wrong with the context
                return None
        ready.append((segment, addresses))
    if all(addresses is None for _, addresses in ready):
        return None
    total: Tensor | None = None
    for segment, addresses in reversed(ready) if is_inverse else ready:
        if addresses is None or segment.features - {x.shape[1]}:
            # Accelerated, a transform that native code takes would come back here.
            x, change = _by_library(chain.library, segment, x, context, is_inverse, is_accelerated=addresses is None)
        else:
            x, change = _by_native_code(chain.library, segment, addresses, x, context, is_inverse, log_det)
        total = change if total is None or change is None else total + change
    return x, total


def _by_library(
    library: Library, segment: Segment, x: Tensor, context: Tensor | None, is_inverse: bool, is_accelerated: bool
) -> Values:
    context = None if context is None else context.expand(len(x), -1)
    total: Tensor | None = None
    for module, is_reversed in reversed(segment.links) if is_inverse else segment.links:
        x, change = library.call(module, x, context, is_inverse != is_reversed, is_accelerated)
        total = change if total is None or change is None else total + change
    return x, total


def _by_native_code(
    library: Library, segment: Segment, addresses: list[int], x: Tensor, context: Tensor | None, is_inverse: bool,
    log_det: str | None,
) -> Values:  # fmt: skip
    assert segment.transforms is not None
    result = run_chain(segment.transforms, addresses, x, context, is_inverse, log_det)
    if result is None:
        return _by_library(library, segment, x, context, is_inverse, is_accelerated=False)
    if result.failed is not None:
        rows = result.failed.nonzero().flatten()
        own = None if context is None else context.expand(len(x), -1)[rows]
        values, log_dets = _by_library(library, segment, x[rows], own, is_inverse, is_accelerated=False)
        result.values[rows] = values
        if result.log_det is not None and log_dets is not None:
            result.log_det[rows] = log_dets
    return result.values, result.log_det


def is_plain_module(module: nn.Module, *methods: str) -> bool:
    """True if a call of a module, or of these methods, runs those of its class and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or any(name in vars(module) for name in methods))


def is_plain(*tensors: Tensor | None) -> bool:
    """True if native code can read these: of one dtype, on a CPU, and values rather than what PyTorch traces."""
    dtype = next(tensor.dtype for tensor in tensors if tensor is not None)
    return dtype in _DTYPES and not is_traced() and not torch.is_autocast_enabled("cpu") and all(
        tensor is None or (type(tensor) in _PLAIN and tensor.dtype is dtype and tensor.is_cpu) for tensor in tensors
    )  # fmt: skip
