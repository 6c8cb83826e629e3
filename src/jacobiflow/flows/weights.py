"""A flow from its weights: every tensor is checked against the config before any is used."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

if TYPE_CHECKING:
    from jacobiflow.flows.image_flow import FlowConfig, ImageFlow

    AnyFlow = TypeVar("AnyFlow", bound=ImageFlow)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REGISTRATIONS = 8  # of a tensor: a module may take its parameters from another


class CheckpointError(ValueError):
    """A model folder or file that cannot be used; the message names it, what is wrong, and what to do."""


def build(flow_class: type[AnyFlow], config: FlowConfig, state: dict[str, Tensor], source: str) -> AnyFlow:
    """A flow in eval mode with exactly the tensors of `state`, which is emptied; half precision becomes float32.

    **Raises** `CheckpointError` that names `source`, and all that does not fit.
    """
    _check_config(flow_class, config, state, source)
    try:
        with torch.device("meta"), _at_most(_REGISTRATIONS * len(state)):
            flow = flow_class(config)
    except _TooManyError:
        raise CheckpointError(
            f"{source}: {config} has more weights than the {len(state)} tensors that are there"
        ) from None
    except (RuntimeError, TypeError, ValueError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{source}: no flow has the sizes of {config} ({first_line(error)})") from error
    expected = {name: tuple(tensor.shape) for name, tensor in flow.state_dict().items()}
    problems = [f"{name} {shape}: missing" for name, shape in expected.items() if name not in state]
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        if name not in expected:
            problems.append(f"{name} {shape}: unknown")
        elif shape != expected[name]:
            problems.append(f"{name} {shape}: expected {expected[name]}")
        elif tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            problems.append(f"{name} {tensor.dtype}, {tensor.layout}: expected dense floating-point values")
    if problems:
        raise CheckpointError(f"{source}: does not fit the config: {'; '.join(problems)}")
    check_values(state, source)
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in state.values()), torch.float32)
    # Copied, so that no tensor stays mapped to the file or lies at an odd address; popped, to free what is copied.
    copies = {name: state.pop(name).to(dtype, copy=True, memory_format=torch.contiguous_format) for name in expected}
    flow.load_state_dict(copies, assign=True)
    return flow.eval()


def check_values(state: Mapping[str, Tensor], source: str) -> None:
    """**Raises** `CheckpointError` where a tensor is not finite, or the prior's variance not positive."""
    problems = [f"{name} has non-finite values" for name, tensor in state.items() if not tensor.isfinite().all()]
    if not (state["var"] > 0).all():
        problems.append("var has values that are not positive")
    if problems:
        raise CheckpointError(f"{source}: {'; '.join(problems)}")


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many n there are in names that start with "{prefix}{n}."; **raises** `ValueError` where one is left out."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = {int(found[1]) for name in state if (found := pattern.match(name))}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"{len(numbers)} of {prefix}*, but one is numbered {max(numbers)}")
    return len(numbers)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_config(flow_class: type[ImageFlow], config: FlowConfig, state: Mapping[str, Tensor], source: str) -> None:
    """**Raises** `CheckpointError` where the shapes of `state` say another config, before anything is built by it."""
    try:
        found = flow_class.config_from_shapes(state, config)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    differing = [
        f"{field.name}={getattr(found, field.name)} rather than {getattr(config, field.name)}"
        for field in fields(config)
        if getattr(found, field.name) != getattr(config, field.name)
    ]
    if differing:
        raise CheckpointError(f"{source}: does not fit the config: the shapes say {', '.join(differing)}")


class _TooManyError(Exception):
    """More parameters than there can be."""


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Stop this thread from making modules with more than `count` parameters: a config may ask for a million blocks."""
    thread, made = threading.get_ident(), 0

    def on_parameter(*_: object) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > count:
            raise _TooManyError

    hook = register_module_parameter_registration_hook(on_parameter)
    try:
        yield
    finally:
        hook.remove()
