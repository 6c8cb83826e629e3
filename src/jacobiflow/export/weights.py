"""The weights that all graphs of an export share: one file of float16 or float32, read by name and offset."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import torch
from torch import Tensor

from jacobiflow.files import sha256

_TYPES = {torch.float16: onnx.TensorProto.FLOAT16, torch.float32: onnx.TensorProto.FLOAT}


def file_name(stem: str, content: bytes | bytearray, suffix: str) -> str:
    """The name of a file of an export. Other content has another name, so that no file is overwritten by another."""
    return f"{stem}-{sha256(content)[:16]}{suffix}"


class SharedWeights:
    """Tensors, one after another in `data`; a graph refers to them as external data of the file `location`.

    Each is stored in float16 where that loses nothing, as in weights that were saved so, and else in float32.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.data = bytearray()
        self._stored: dict[str, onnx.TensorProto] = {}
        for name, tensor in tensors.items():
            tensor = tensor.detach().cpu().float()
            half = tensor.half()
            self._stored[name] = self._store(name, half if torch.equal(half.float(), tensor) else tensor)
        self.location = file_name("weights", self.data, ".bin")
        for entry in self._stored.values():
            entry.external_data.add(key="location", value=self.location)

    def _store(self, name: str, tensor: Tensor) -> onnx.TensorProto:
        raw = tensor.contiguous().numpy().tobytes()
        entry = onnx.TensorProto(
            name=f"{name}/stored", dims=list(tensor.shape), data_type=_TYPES[tensor.dtype],
            data_location=onnx.TensorProto.EXTERNAL,
        )  # fmt: skip
        for key, value in (("offset", len(self.data)), ("length", len(raw))):
            entry.external_data.add(key=key, value=str(value))
        self.data += raw
        return entry

    def read(self, name: str) -> tuple[onnx.TensorProto, onnx.NodeProto]:
        """What a graph needs for the float32 value `name`: the stored tensor, and the node that casts it."""
        stored = self._stored[name]
        return stored, onnx.helper.make_node("Cast", [stored.name], [name], to=onnx.TensorProto.FLOAT)
