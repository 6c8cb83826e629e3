"""A baseline to time against, and no solver of this library: the loop that a MAF's own codes sample by.

Every block fills in its tokens one after another, and the whole masked network is evaluated for each: T full passes
over the batch, of whose entries one is used. It is the "For" loop of section 4.4 of the GS-Jacobi paper. `jacobiflow`
needs none of this: it is written here, over the weights of a `jacobiflow.MAF`, so that speed-ups are measured against
what others pay. It masks the weights once per block, where other codes do so in every pass.

Reference: Papamakarios et al., Masked Autoregressive Flow for Density Estimation, arXiv 1705.07057.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jacobiflow.baselines.peer import check_arguments
from jacobiflow.checks import check_kind
from jacobiflow.errors import InputValueError
from jacobiflow.flows.labels import Labels
from jacobiflow.flows.maf import MAF, MAFBlock, full_pass
from jacobiflow.guidance import Guidance, in_force
from jacobiflow.inversion import invert, prior_tokens


def _invert_block(
    block: MAFBlock, z: Float[Tensor, "n t 1"], labels: Int[Tensor, " n"] | None, guidance: Guidance | None
) -> Float[Tensor, "n t 1"]:
    """Solve one block at `z`, in the block's causal order."""
    x, last = torch.zeros_like(z), z.shape[1] - 1
    layers = block.masked_layers(labels)
    free_layers = None if guidance is None else block.masked_layers()
    for t in range(z.shape[1]):
        log_scale, shift = (out[:, t] for out in full_pass(x, layers))
        if guidance is not None and free_layers is not None:
            weight = guidance.weight * t / max(last, 1) if guidance.annealed else guidance.weight
            log_scale_free, shift_free = (out[:, t] for out in full_pass(x, free_layers))
            if guidance.on != "shift":
                log_scale = log_scale + weight * (log_scale - log_scale_free)
            if guidance.on != "scale":
                shift = shift + weight * (shift - shift_free)
        x[:, t] = z[:, t] * log_scale.exp() + shift
    return x


@torch.no_grad()
def full_passes_sample(
    flow: MAF,
    z: Float[Tensor, "n t 1"],
    labels: Labels | None = None,
    guidance: Guidance | None = None,
) -> Float[Tensor, "n c h w"]:
    """Images from latents by one full pass per token; nothing is measured or certified.

    **Arguments:**

    - `flow`: the MAF whose weights are used, in their dtype and on their device.
    - `z`: standard normal latents (N, T, 1), before the prior's scale. Not changed.
    - `labels`: a class per row (N,), as a tensor on that device, a list or an array; one class for all; or `None` for
        rows without a class.
    - `guidance`: a `Guidance` with `attn_temperature` 1, or `None`; that or a weight of 0 makes no second pass.

    **Returns:** images (N, C, H, W), not clipped.

    **Raises:** `ValueError` for an attention temperature, or where `z` or `labels` do not fit the flow, `TypeError` for
    other kinds of arguments.
    """
    check_kind("flow", flow, MAF, "a MAF")
    classes = check_arguments(flow, z, labels, guidance)
    guidance = in_force(guidance)
    if guidance is not None and guidance.attn_temperature != 1:
        raise InputValueError(f"attn_temperature {guidance.attn_temperature}: a MAF has no attention; leave it at 1")

    def solve(i: int, x: Tensor) -> Tensor:
        return _invert_block(flow.blocks[i], x, classes, guidance)

    return flow.to_images(invert(flow, prior_tokens(flow, z), solve))
