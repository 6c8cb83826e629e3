"""What crosses the boundary to C++, and what is refused there."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from jacobiflow.errors import UnsupportedError
from jacobiflow.native import compiler
from jacobiflow.native.library import Library
from jacobiflow.native.tensors import address_of, check_tensor
from jacobiflow.native.transformer import CausalTransformer, GuidanceWeights, RowInputs
from tests.helpers.native_problems import CASES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("declared", "moved"),
    [
        ("int32_t source;          // index of the value", "int64_t source;          // index of the value"),
        ("double alpha;            // of elu\n  double beta; ", "double beta;             // of elu\n  double alpha;"),
        ("const T* up_bias;  ", "const T* up_bias[2];"),
        ("relu, leaky_relu, elu", "leaky_relu, relu, elu"),
    ],
    ids=["a field", "two fields of one size", "a field of a template", "members"],
)
def test_a_build_fails_if_something_moves_in_cpp(
    declared: str, moved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(compiler.SOURCES, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    header = (tmp_path / "boundary.h").read_text()
    assert header.count(declared) == 1
    (tmp_path / "boundary.h").write_text(header.replace(declared, moved))
    with pytest.raises(subprocess.CalledProcessError) as failure:
        compiler.compile_library(tmp_path / "library.so")
    assert re.search("static.assert(ion)? failed", failure.value.stderr)


@pytest.mark.skipif(platform.system() != "Linux", reason="the library has OpenMP on Linux only")
def test_the_threads_are_those_of_pytorch() -> None:
    functions: list[int | None] = []
    other: Any = SimpleNamespace(_native=SimpleNamespace(jacobiflow_use_openmp=functions.extend))
    Library._use_threads_of_pytorch(other)
    assert len(functions) == 3 and all(functions)


def freed(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3, 2), torch.ones(6), torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3, device="meta"),
        torch.ones(2, 3).to_sparse(), torch.ones(2, 3).as_subclass(type("Subclass", (Tensor,), {})),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_refused(tensor: Tensor) -> None:
    with pytest.raises(UnsupportedError):
        check_tensor(tensor, (2, 3), torch.float32)


@pytest.mark.parametrize(
    "tensor", [freed(torch.ones(3)), torch.frombuffer(bytearray(17), dtype=torch.float32, offset=1)]
)
def test_values_that_are_freed_or_not_aligned_have_no_address(tensor: Tensor) -> None:
    with pytest.raises(UnsupportedError):
        address_of(tensor)


def test_a_context_for_one_of_two_rows_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="a context for one of two rows"):
        RowInputs.stack([RowInputs(torch.ones(1, 1, 7)), RowInputs()], 2)


def test_inputs_of_another_number_of_rows_are_refused() -> None:
    case = CASES["7 wide"]
    flow = case.flow()
    z, block = case.z(flow), flow.blocks[1]
    network = CausalTransformer(
        block.proj_in.weight, block.positions(), [layer.named() for layer in block.layer_weights()], 1,
        block.proj_out.weight, block.proj_out.bias, has_scale=True,
    )  # fmt: skip
    weights = GuidanceWeights(*torch.ones(2, z.shape[1]), "linear")
    network.invert(z, lambda rows: RowInputs(query_scale=torch.ones(2 * len(z[rows]))), weights)
    for inputs in (RowInputs(query_scale=torch.ones(1)), RowInputs(torch.ones(3, 1, 7))):
        with pytest.raises(UnsupportedError, match="where native code reads"):
            network.invert(z, lambda rows, inputs=inputs: inputs, weights)
