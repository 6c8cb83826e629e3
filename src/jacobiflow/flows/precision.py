"""What a network computes in."""

from __future__ import annotations

import torch

from jacobiflow.flows.image_flow import ImageFlow


def precision(flow: ImageFlow) -> str:
    """What the flow's network computes in: "float32", "bfloat16", .. or "tf32", where PyTorch has a GPU use that."""
    dtype = flow.var.dtype
    tf32 = dtype == torch.float32 and flow.var.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")
