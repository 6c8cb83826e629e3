"""Labels: the classes of samples."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.checks import check_kind, short
from jacobiflow.errors import InputTypeError, InputValueError


def check_labels(labels: Any, num: int, num_classes: int) -> None:
    """**Raises** `ValueError` where `labels` are no classes for `num` samples, `TypeError` where they are no tensor of
    whole numbers.
    """
    if not num_classes:
        raise InputValueError("labels given, but this flow is unconditional: leave them out")
    _check_kind("labels", labels)
    if len(labels) != num:
        raise InputValueError(f"labels={short(labels)}: give {num} whole numbers, one for each sample")
    if (labels >= num_classes).any():
        raise InputValueError(_no_class(labels, num_classes))


def embed_classes(table: Float[Tensor, "k ..."] | None, labels: Int[Tensor, " b"] | None) -> Tensor | None:
    """The row of `table` for each label; the mean over classes for one without a class (`None`, or below 0).

    `None` where the flow has no classes, and so no table. **Raises** `TypeError` where labels, which solvers call the
    context, are no whole numbers, `ValueError` where one is no class (on a GPU that is for `check_labels` to find).
    """
    if table is None:
        return None
    mean = table.mean(dim=0, keepdim=True)
    if labels is None:
        return mean
    _check_kind("context", labels)
    try:
        rows = table[labels.clamp(min=0)]
    except IndexError:
        raise InputValueError(f"context: {_no_class(labels, len(table))}") from None
    return torch.where((labels < 0).view(-1, *[1] * (table.ndim - 1)), mean, rows)


def _check_kind(name: str, labels: Any) -> None:
    want = "a torch.Tensor (N,) of whole numbers"
    check_kind(name, labels, Tensor, want)
    if labels.dtype not in (torch.int64, torch.int32):
        raise InputTypeError(f"{name}={short(labels)}: give {want}")
    if labels.ndim != 1:
        raise InputValueError(f"{name}={short(labels)}: give {want}")


def _no_class(labels: Tensor, num_classes: int) -> str:
    return f"label {int(labels.max())}: this flow has classes 0 to {num_classes - 1} (below 0: no class)"
