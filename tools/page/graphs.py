"""ONNX graphs node by node, with the operators of a transformer, over one shared file of weights."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from jacobiflow.utils.files import sha256

OPSET, IR_VERSION = 20, 9
LEVELS = 50  # of a weight, above 0 and below; the bundled model then compresses to less than 3 MB
_TYPES = {
    torch.int8: TensorProto.INT8, torch.float16: TensorProto.FLOAT16, torch.float32: TensorProto.FLOAT,
}  # fmt: skip
Shape = Sequence[int | str]


def file_name(stem: str, content: bytes | bytearray, suffix: str) -> str:
    """The name of a file of an export. Other content has another name, so that no file is overwritten by another."""
    return f"{stem}-{sha256(content)[:16]}{suffix}"


def round_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to multiples of a step. Returns the multiples in int8, and the steps, (rows, 1)."""
    steps = matrix.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
    return (matrix / steps).round().to(torch.int8), steps


class SharedWeights:
    """Tensors, one after another in `data`; a graph refers to them as external data of the file `location`.

    Matrices are stored as `round_rows` rounds them, others in float16 if that loses nothing, else in float32.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.data = bytearray()
        self._stored: dict[str, list[onnx.TensorProto]] = {}
        for name, tensor in tensors.items():
            tensor = tensor.detach().cpu().float()
            half = tensor.half()
            parts = round_rows(tensor) if tensor.ndim == 2 else [half if torch.equal(half.float(), tensor) else tensor]
            self._stored[name] = [self._store(f"{name}/{i}", part) for i, part in enumerate(parts)]
        self.location = file_name("weights", self.data, ".bin.gz")
        for entry in itertools.chain(*self._stored.values()):
            entry.external_data.add(key="location", value=self.location)

    def _store(self, name: str, tensor: Tensor) -> onnx.TensorProto:
        raw = tensor.contiguous().numpy().tobytes()
        entry = onnx.TensorProto(
            name=name, dims=list(tensor.shape), data_type=_TYPES[tensor.dtype], data_location=TensorProto.EXTERNAL
        )
        for key, value in (("offset", len(self.data)), ("length", len(raw))):
            entry.external_data.add(key=key, value=str(value))
        self.data += raw
        return entry

    def read(self, name: str) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
        """The stored tensors of the float32 value `name`, and the nodes that make it from them."""
        stored = self._stored[name]
        if len(stored) == 1:
            return stored, [helper.make_node("Cast", [stored[0].name], [name], to=TensorProto.FLOAT)]
        multiples, steps = (entry.name for entry in stored)
        cast = helper.make_node("Cast", [multiples], [f"{name}/float"], to=TensorProto.FLOAT)
        return stored, [cast, helper.make_node("Mul", [f"{name}/float", steps], [name])]


class Graph:
    """Nodes and constants, named as they come. Called with an operator, it adds a node."""

    def __init__(self, weights: SharedWeights) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._weights = weights
        self._read: set[str] = set()
        self._names = (f"t{i}" for i in itertools.count())

    def __call__(self, op: str, *inputs: str, outputs: int | str = 1, **attributes: Any) -> Any:
        """Adds a node; returns the name of its output, or a list of names if there are several `outputs`."""
        names = [outputs] if isinstance(outputs, str) else list(itertools.islice(self._names, outputs))
        self._nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names[0] if len(names) == 1 else names

    def ints(self, *values: int) -> str:
        """A constant vector of integers: a shape, or axes."""
        return self.constant(np.asarray(values, np.int64))

    def number(self, value: float) -> str:
        return self.constant(np.asarray(value, np.float32))

    def constant(self, value: Any) -> str:
        name = next(self._names)
        self._constants.append(onnx.numpy_helper.from_array(value, name))
        return name

    def weight(self, name: str) -> str:
        if name not in self._read:
            stored, nodes = self._weights.read(name)
            self._constants += stored
            self._nodes += nodes
            self._read.add(name)
        return name

    def linear(self, x: str, name: str) -> str:
        return self("Gemm", x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"), transB=1)

    def norm(self, x: str, name: str, outputs: int = 1) -> Any:
        """The layer norm `name`; with three `outputs` also the mean and the inverse of the standard deviation."""
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self("LayerNormalization", x, weight, bias, epsilon=1e-5, outputs=outputs)

    def split(self, x: str, parts: int, axis: int = 0) -> list[str]:
        return self("Split", x, outputs=parts, axis=axis, num_outputs=parts)

    def classes(self, name: str) -> str:
        """The class embeddings of block `name`, a row for each class and then their mean, for no class."""
        table = self("Squeeze", self.weight(f"{name}.class_embed"), self.ints(1))
        return self("Concat", table, self("ReduceMean", table, self.ints(0)), axis=0)

    def model(
        self, floats: Mapping[str, Shape], ints: Mapping[str, Shape], outputs: Mapping[str, Shape]
    ) -> onnx.ModelProto:
        """The model with these inputs of float32 and int64, and outputs of float32."""
        value = helper.make_tensor_value_info
        inputs = [value(name, TensorProto.FLOAT, shape) for name, shape in floats.items()]
        inputs += [value(name, TensorProto.INT64, shape) for name, shape in ints.items()]
        results = [value(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
        graph = helper.make_graph(self._nodes, "jacobiflow", inputs, results, self._constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
