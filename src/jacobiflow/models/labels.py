"""Labels and other contexts as users give them: their types and checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.blocks.context import NO_CONTEXT, Context, check_numbers
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.models.latents import MAX_SAMPLES
from jacobiflow.utils.checks import check_count, check_finite, check_kind, check_rows, format_value

Labels = int | str | Sequence[int] | Sequence[str] | np.ndarray | Tensor
"""Classes by number or by name: one for all samples, or a sequence, array or tensor (N,) with one for each."""

ContextLike = Context | Labels
"""Labels, numbers (N, K) for each sample or (N, T, K) for each token, prompts, or a `Context` of them."""


def convert_labels(labels: Any, num: int, classes: Sequence[str] = ()) -> Int[Tensor, " n"]:
    """Converts labels to a tensor of int64 or int32; a single class is that of all `num` samples.

    Args:
        classes: The names that labels may have.
    """
    give = "a class, or a tensor or list (N,) of classes, by number or by name"
    if isinstance(labels, str):
        labels = class_number(labels, classes)
    elif isinstance(labels, list | tuple) and labels and all(isinstance(label, str) for label in labels):
        labels = [class_number(label, classes) for label in labels]
    tensor = labels
    if isinstance(labels, Tensor | np.ndarray):
        check_kind("labels", labels, Tensor | np.ndarray, give)
        check_count("number of labels", math.prod(labels.shape), 0, MAX_SAMPLES)
    if not isinstance(labels, Tensor):
        try:
            tensor = torch.as_tensor(np.array(labels))  # Arrays may be read-only or have negative strides.
        except (TypeError, ValueError) as error:
            raise InputTypeError(f"give {give}", argument="labels", value=format_value(labels)) from error
        tensor = tensor if tensor.ndim else tensor.repeat(num)
    if tensor.dtype in (torch.uint8, torch.int8, torch.int16):
        tensor = tensor.long()
    _check_vector("labels", tensor, give)
    return tensor


def class_number(name: str, classes: Sequence[str]) -> int:
    """Returns the number of the class of a name."""
    if name in classes:
        return classes.index(name)
    close = get_close_matches(name, classes, n=1, cutoff=0.5)
    known = f"the classes are {', '.join(classes)}" if classes else "this model has no names of classes, give numbers"
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise InputValueError(f"no such class{hint}; {known}", argument="labels", value=name)


def check_labels(labels: Labels, num: int, num_classes: int, classes: Sequence[str] = ()) -> Int[Tensor, " n"]:
    """Returns labels as a tensor, checked to be one class for each of `num` samples, or below 0."""
    if not num_classes:
        raise InputValueError("labels given, but this flow has no classes: leave them out")
    tensor = convert_labels(labels, num, classes)
    if len(tensor) != num:
        message = f"give {num} classes, one for each sample"
        raise InputValueError(message, argument="labels", value=format_value(labels))
    if (tensor >= num_classes).any():
        raise InputValueError(_describe_unknown(tensor, num_classes))
    return tensor


def check_class_context(values: Any, num: int, num_classes: int, classes: Sequence[str] = ()) -> Context:
    """Returns the context of labels, checked as by `check_labels`, or of no labels."""
    if isinstance(values, Tensor) and values.is_floating_point() and not num_classes:
        raise InputValueError(f"context={format_value(values)}: this flow's context is labels, or none; leave it out")
    return NO_CONTEXT if values is None else Context(check_labels(values, num, num_classes, classes))


def check_number_context(values: Any, num: int, num_tokens: int, channels: int) -> Context:
    """Returns the context of numbers (N, K) or (N, T, K), checked to be finite and of `num` samples."""
    check_numbers(values, num_tokens, channels)
    check_rows("context", values, num, "samples")
    check_finite("context", values)
    return Context(values)


def embed_classes(table: Float[Tensor, "k ..."] | None, labels: Int[Tensor, " b"] | None) -> Tensor | None:
    """Looks up the row of a table for each label; the mean over classes for labels below 0 and for `None`.

    On a CPU it raises ValueError for a label that is not a class. On a GPU only `Flow.check_labels` notices.
    """
    if table is None:
        return None
    mean = table.mean(dim=0, keepdim=True)
    if labels is None:
        return mean
    _check_vector("context", labels, "a torch.Tensor (N,) of whole numbers")
    try:
        rows = table[labels.clamp(min=0)]
    except IndexError:
        raise InputValueError(f"context: {_describe_unknown(labels, len(table))}") from None
    return torch.where((labels < 0).view(-1, *[1] * (table.ndim - 1)), mean, rows)


def _check_vector(name: str, labels: Any, give: str) -> None:
    check_kind(name, labels, Tensor, give)
    if labels.dtype not in (torch.int64, torch.int32):
        raise InputTypeError(f"{name}={format_value(labels)}: give {give}")
    if labels.ndim != 1:
        raise InputValueError(f"{name}={format_value(labels)}: give {give}")


def _describe_unknown(labels: Int[Tensor, " n"], num_classes: int) -> str:
    """Describes which of the labels is not a class."""
    return f"label {int(labels.max())}: this flow has classes 0 to {num_classes - 1} (below 0: no class)"
