"""The examples in docstrings run, and print the output that they show."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import jacobiflow as jf

ROOT = Path(jf.__file__).parent
MODULES = [
    ".".join(("jacobiflow", *path.relative_to(ROOT).with_suffix("").parts))
    for path in sorted(ROOT.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, scope="module")
def _in_a_folder_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("examples"))
        yield


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_show(name: str) -> None:
    torch.manual_seed(0)
    names = {"jf": jf, "torch": torch}
    if ".adapters." in name:
        names["zuko"] = pytest.importorskip("zuko")
    results = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert results.attempted > 0 and results.failed == 0
