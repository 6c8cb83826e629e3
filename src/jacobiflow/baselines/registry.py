"""The samplers to compare with, by name: the loop of a flow's original code, and those of other papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.baselines.full_passes import full_passes_sample
from jacobiflow.baselines.growing_cache import growing_cache_sample
from jacobiflow.baselines.peer import PeerSamples
from jacobiflow.baselines.selective_jacobi import GRID as SELECTIVE_GRID
from jacobiflow.baselines.selective_jacobi import selective_jacobi
from jacobiflow.baselines.starflow import GRID as STARFLOW_GRID
from jacobiflow.baselines.starflow import starflow
from jacobiflow.checks import check_kind, short
from jacobiflow.errors import InputTypeError
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.flows.maf import MAF
from jacobiflow.flows.tarflow import TarFlow
from jacobiflow.guidance import Guidance
from jacobiflow.sampling import sample

GROWING_CACHE, FULL_PASSES, SEQUENTIAL = "growing cache", "full passes", "sequential"

PEERS: Mapping[str, Callable[..., PeerSamples]] = {
    "Selective Jacobi Decoding": selective_jacobi,
    "STARFlow": starflow,
}
"""Samplers of other papers, called with the flow, latents, labels and guidance, and a setting of `GRIDS`."""

GRIDS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "Selective Jacobi Decoding": SELECTIVE_GRID,
    "STARFlow": STARFLOW_GRID,
}
"""Settings to try each of `PEERS` at, the published one first. GS-Jacobi's are `gs_jacobi_grid`."""

Loop = Callable[..., Tensor]
"""Called with the flow, standard normal latents, labels and guidance, the last two may be `None`; gives images."""

_LOOPS: dict[type[ImageFlow], tuple[str, Loop]] = {
    TarFlow: (GROWING_CACHE, growing_cache_sample),
    MAF: (FULL_PASSES, full_passes_sample),
}


def register_original_loop(flow_type: type[ImageFlow], name: str, loop: Loop) -> None:
    """Compare flows of that class, and of classes derived from it, with `loop` as the one of their original code.

    `loop(flow, latents, labels, guidance)` takes latents (N, T, C) before the prior's scale and gives images
    (N, C, H, W); `labels` and `guidance` may be `None`. `name` is shown in tables.

    **Raises** `TypeError` for other kinds of arguments.
    """
    if not isinstance(flow_type, type) or not issubclass(flow_type, ImageFlow):
        raise InputTypeError(f"flow_type={short(flow_type)}: give a class that derives from ImageFlow")
    check_kind("name", name, str, "a name for tables")
    check_kind("loop", loop, Callable, "a function of a flow, latents, labels and guidance")
    _LOOPS[flow_type] = (name, loop)


def original_loop(flow: ImageFlow) -> tuple[str, Loop]:
    """The loop by which the flow's original code samples, and its name.

    "growing cache" for a TarFlow, "full passes" for a MAF, and what `register_original_loop` added. A flow that has
    none is compared with this library's sequential loop, "sequential".
    """
    check_flow(flow)
    for flow_type in type(flow).__mro__:
        if flow_type in _LOOPS:
            return _LOOPS[flow_type]
    return SEQUENTIAL, _sequential_sample


def _sequential_sample(
    flow: ImageFlow, z: Float[Tensor, "n t c"], labels: Int[Tensor, " n"] | None, guidance: Guidance | None
) -> Float[Tensor, "n c h w"]:
    return sample(
        flow, latents=z, labels=labels, strategy=SEQUENTIAL, guidance=guidance, certify=False, progress=False
    ).images
