"""The recurrence of a MAF block in native code, for float32 on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.flows.base import Extrapolation
from jacobiflow.native import MafArguments, pointers

ROWS = 1024  # for each thread: more rows a call gain nothing, and their offsets take memory


def solve_rows(
    native: ctypes.CDLL, z: Float[Tensor, "b t"], weights: Sequence[Float[Tensor, "o i"]],
    networks: Sequence[Sequence[Float[Tensor, "#b o"]]], extrapolation: Extrapolation | None,
    units_below: Sequence[int],
) -> Float[Tensor, "b t"] | None:  # fmt: skip
    """The rows x (B, T) token by token; `None` where memory or threads are wanting.

    **Arguments:** the masked `weights` of the layers, first to last; for each of one or two `networks` the layers'
    offsets; `units_below[d]`, how many units of a hidden layer have a degree below d, for d from 0 to T.
    """
    (samples, tokens), panel = z.shape, native.jacobiflow_panel()
    padding = -samples % panel
    padded = samples + padding

    def columns(rows: Tensor) -> Tensor:
        return F.pad(rows.expand(samples, -1).T, (0, padding)).contiguous()

    z, x, below = columns(z), z.new_empty(tokens, padded), (ctypes.c_int32 * len(units_below))(*units_below)
    offsets = [columns(offset) for layers in networks for offset in layers]
    scales = (None, None) if extrapolation is None else (extrapolation.log_scale, extrapolation.shift)
    held = [None if scale is None else scale.contiguous() for scale in scales]
    weights = [weight.contiguous() for weight in weights]
    weight_table, offset_table = pointers(weights), pointers(offsets)
    arguments = MafArguments(
        z.data_ptr(), *(None if scale is None else scale.data_ptr() for scale in held),
        ctypes.addressof(weight_table), ctypes.addressof(offset_table), ctypes.addressof(below), x.data_ptr(),
        padded, len(networks), tokens, weights[0].shape[0], len(weights) - 1,
        min(torch.get_num_threads(), padded // panel),
    )  # fmt: skip
    if native.jacobiflow_maf(ctypes.byref(arguments)):
        return None
    return x[:, :samples].T
