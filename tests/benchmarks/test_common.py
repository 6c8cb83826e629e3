"""Result files are completed step by step; tiny shapes are timed in all ways."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

import jacobiflow as jf
from benchmarks import paper_sizes, regimes
from benchmarks.common import complete, random_flow

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = jf.TarFlowConfig(1, 16, 2, channels=64, num_blocks=1, layers_per_block=1)


def test_results_in_the_file_are_not_measured_again(tmp_path: Path) -> None:
    out = tmp_path / "new/result.json"
    complete(out, [{"name": "a"}], lambda key: {"value": 1})
    result = complete(out, [{"name": "a"}, {"name": "b"}], lambda key: {"value": 2})
    assert result["runs"] == [{"name": "a", "value": 1}, {"name": "b", "value": 2}]
    assert json.loads(out.read_text()) == result
    out.write_text(json.dumps(result | {"machine": "another"}))
    assert complete(out, [{"name": "a"}], lambda key: {"value": 3})["runs"] == [{"name": "a", "value": 3}]


def test_all_ways_of_a_block_are_timed() -> None:
    seconds = paper_sizes.measure(CONFIG, 2)["seconds"]
    names = {f"{dtype} x {size}" for dtype, size in product(("float32", "bfloat16"), (1, 16, 32, 64))}
    assert set(seconds) == names | {"growing cache", "fused loop"}
    run = regimes.measure(random_flow(CONFIG), 2)
    assert set(run["seconds"]) == {"fused loop", "eager loop", "pass", "pass in bfloat16"}
    # Two norms, four linear layers, the first and the last one, and positions.
    weights = 4 * 64 + (3 + 1 + 4 + 4) * 64**2 + (3 + 1 + 4 + 1) * 64 + (4 + 1) * 64 + (64 + 1) * 8 + 64 * 64
    assert run["weights_mb"] == pytest.approx(4e-6 * weights)
    assert run["max_difference"] < 1e-4  # of two different loops
