"""Flows as ONNX graphs: a block's fixed-point map, the denoising step, and a folder of both."""

from jacobiflow.export.block import block_graph
from jacobiflow.export.denoising import denoising_graph
from jacobiflow.export.folder import export

__all__ = ["block_graph", "denoising_graph", "export"]
