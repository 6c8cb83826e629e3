"""Labels: the classes of samples."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.checks import check_kind, short
from jacobiflow.errors import InputTypeError, InputValueError

Labels = int | Sequence[int] | np.ndarray | Tensor
"""Classes of samples: one for all of them, or a sequence, array or tensor (N,) with one for each."""

Context = Labels | Tensor
"""Labels, or numbers (N, K) for each sample or (N, T, K) for each token."""

_GIVE = "a class, or a tensor or list (N,) of classes, whole numbers"


def as_labels(labels: Any, num: int) -> Int[Tensor, " n"]:
    """Converts labels to a tensor of int64 or int32; a single class is that of all `num` samples."""
    tensor = labels
    try:
        if isinstance(labels, Integral) and not isinstance(labels, bool):
            tensor = torch.full((num,), operator.index(labels))
        elif isinstance(labels, np.ndarray):
            tensor = torch.as_tensor(labels.copy())  # any strides, and read-only ones
        elif isinstance(labels, Sequence) and not isinstance(labels, str | bytes):
            tensor = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # no numbers, no vector, or too large
        raise InputTypeError(f"labels={short(labels)}: give {_GIVE}") from error
    if isinstance(tensor, Tensor) and tensor.dtype in (torch.uint8, torch.int8, torch.int16):
        tensor = tensor.long()
    _check_vector("labels", tensor, _GIVE)
    return tensor


def embed_classes(table: Float[Tensor, "k ..."] | None, labels: Int[Tensor, " b"] | None) -> Tensor | None:
    """Looks up the row of a table for each label; the mean over classes for labels below 0 and for `None`.

    A label that is not a class raises ValueError. On a GPU only `ImageFlow.check_labels` finds out.
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
        raise InputValueError(f"context: {describe_unknown(labels, len(table))}") from None
    return torch.where((labels < 0).view(-1, *[1] * (table.ndim - 1)), mean, rows)


def _check_vector(name: str, labels: Any, give: str) -> None:
    check_kind(name, labels, Tensor, give)
    if labels.dtype not in (torch.int64, torch.int32):
        raise InputTypeError(f"{name}={short(labels)}: give {give}")
    if labels.ndim != 1:
        raise InputValueError(f"{name}={short(labels)}: give {give}")


def describe_unknown(labels: Int[Tensor, " n"], num_classes: int) -> str:
    """Says which of the labels is not a class."""
    return f"label {int(labels.max())}: this flow has classes 0 to {num_classes - 1} (below 0: no class)"
