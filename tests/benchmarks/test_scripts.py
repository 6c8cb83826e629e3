"""Every benchmark runs: its `main()` on a small setting, and what a page would show of it.

A test is named after its script. No test depends on how long something took.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks import ROOT
from benchmarks.lib import results
from benchmarks.lib.models import random_flow
from jacobiflow import native
from jacobiflow.data import load_images
from tests.helpers.problems import make_star
from tools.docs import render

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

SCRIPTS = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()
)
CONFIG = jf.TarFlowConfig(1, 16, 2, width=64, num_blocks=2, layers_per_block=1, num_classes=3)
UNLIMITED = ("free_energy", "basin_difference", "psnr")  # infinite for a bin without samples, and for equal images

Run = Callable[..., dict[str, list[Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a script with other constants, and returns the rows of its result files by name."""

    def run(script: str, *line: str, **constants: Any) -> dict[str, list[Any]]:
        module = pytest.importorskip(f"benchmarks.{script}")
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
        for each in (results, module):
            monkeypatch.setattr(each, "RESULTS", tmp_path, raising=False)
        monkeypatch.setattr(sys, "argv", [script, *line])
        monkeypatch.chdir(tmp_path)  # sbi logs its training where it runs
        module.main()
        files = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
        for content in files.values():
            assert content["command"] == f"python -m benchmarks.{script}"
            assert all(row["code"] == results.code_digest(f"benchmarks.{script}") for row in content["runs"])
            assert all(map(math.isfinite, numbers(content)))
        return {name: content["runs"] for name, content in files.items()}

    return run


def numbers(value: Any) -> Iterator[float]:
    """The numbers in a JSON value, without those that may be infinite."""
    if isinstance(value, Mapping):
        value = [entry for name, entry in value.items() if not name.startswith(UNLIMITED)]
    if isinstance(value, list):
        for entry in value:
            yield from numbers(entry)
    elif isinstance(value, int | float):
        yield value


def shrink(keys: Iterable[dict[str, Any]], **sizes: Any) -> list[dict[str, Any]]:
    """Keys with other sizes, each once."""
    return [*{json.dumps(key | sizes): key | sizes for key in keys}.values()]


def needs_native() -> None:
    if native.load_library() is None:
        pytest.skip(native.describe())


def test_every_script_has_a_test() -> None:
    assert [name for name in SCRIPTS if f"test_{name}" not in globals()] == []


def test_masked_flows(run: Run) -> None:
    module = pytest.importorskip("benchmarks.masked_flows")
    call_keys = shrink(module.call_keys(), features=3, hidden=8, rows=5)
    training_keys = shrink(module.training_keys(), features=3, rows=6)
    rows = run(
        "masked_flows", call_keys=lambda: call_keys, training_keys=lambda: training_keys, SECONDS=0, MIN_ROUNDS=1,
        MAX_ROUNDS=1,
    )  # fmt: skip
    assert {(row["library"], row["flow"]) for row in rows["masked-flows"]} == module.FLOWS.keys()
    for row in rows["masked-flows"]:
        assert row["error"]["accelerated"] <= 10 * row["error"]["library"] + 1e-6
    assert [row["flow"] for row in rows["training"]] == ["MAF", "NSF"]


def test_estimators(run: Run) -> None:
    module = pytest.importorskip("benchmarks.estimators")
    estimator_keys = shrink(module.estimator_keys(), rows=3)
    width_keys = shrink(module.width_keys(), hidden=8, rows=3)
    rows = run(
        "estimators", estimator_keys=lambda: estimator_keys, width_keys=lambda: width_keys, SECONDS=0, MIN_ROUNDS=1,
        MAX_ROUNDS=1,
    )  # fmt: skip
    for row in [*rows["estimators"], *rows["coupling-widths"]]:
        assert row.get("difference", 0) < 1e-3
        assert row["backends"] == ["native"] or row["flow"] in (*module.OTHERS, "zuko_naf", "zuko_unaf")


def test_packages(run: Run) -> None:
    """All programs but those that are no tools of the project."""
    module = pytest.importorskip("benchmarks.packages")
    calls = {
        "sample": module.SbiCall("NPE", partial(module.one_observation, count=5), {}),
        "rejection": module.SbiCall("NLE", partial(module.one_observation, count=2), {"sample_with": "rejection"}),
    }
    clients = {name: module.CLIENTS[name] for name in ("train, 10 epochs", "npe.flow(x).sample((10_000,))")}
    fits = [{"program": "zuko", "flow": "MAF", "loop": loop} for loop in (module.LOADER, module.BY_INDEX)]
    fits += [{"program": "sbi NPE", "flow": "maf"}]
    rows = run(
        "packages", SBI_CALLS=calls, ESTIMATORS=("maf",), CLIENTS=clients,
        fit_keys=lambda: fits, FIT_ROUNDS=dict.fromkeys(module.FIT_ROUNDS, 1), SIMULATIONS=100, FEW_SIMULATIONS=100,
        FIT_SIMULATIONS=100, EPOCHS=1, FEW_EPOCHS=1, FIT_EPOCHS=1, ROUNDS={"NPE": 1, "NLE": 1}, BATCH=50, SAMPLES=5,
    )  # fmt: skip
    assert len(rows["sbi"]) == len(rows["clients"]) == 2
    assert all(row["error"] < 1e-3 for row in rows["clients"])
    for row in rows["fits"]:
        assert row["result"]["accelerated"]["loss"] == pytest.approx(row["result"]["library"]["loss"], rel=1e-3)


def test_performance(run: Run) -> None:
    module = pytest.importorskip("benchmarks.performance")
    rounds = {1: 1, 2: 1}
    rows = run(
        "performance", "model-speed", "afhq-size", "denoising", "performance", "digits-p1-strategies",
        DETAILED="digits-p1", BATCHES=(1, 2), DENOISED={"digits-p1": (1, 2)},
        MODEL_BATCHES={"digits-p1": (2,), "digits-maf": (1,)},
        PRESET=replace(module.PRESET, config=CONFIG),
        ROUNDS=rounds, LARGE=2, GRIDS={name: grid[:1] for name, grid in module.GRIDS.items()},
    )  # fmt: skip
    assert rows["model-speed"][0]["max_error"]["exact loop"] < 1e-4
    assert "GS-Jacobi" in rows["model-speed"][0]["seconds"]
    assert rows["afhq-size"][0]["max_difference"] < 1e-4
    for row in rows["denoising"]:
        assert 1e-5 < row["change"]["max"] < 0.1
    for row in rows["performance"]:
        errors = {each["strategy"].split(" | ")[0]: each["error"]["max"] for each in row["rows"]}
        assert errors["auto, certified"] < 1e-2
        assert errors.keys() >= {"GS-Jacobi", "STARFlow", "Selective Jacobi Decoding"}
    for row in rows["digits-p1-strategies"]:
        errors = {each["strategy"]: each["error"]["max"] for each in row["rows"]}
        assert max(errors[name] for name in ("auto", "growing cache", "sequential, in PyTorch")) < 1e-2
        assert ("Jacobi-30" in errors) == (row["batch"] == 1)


def test_regimes(run: Run) -> None:
    needs_native()
    flows = {"64x1": partial(random_flow, replace(CONFIG, num_classes=0)), "digits-p1": partial(jf.load, "digits-p1")}
    rows = run("regimes", FLOWS=flows, BATCH_SIZES=(2,), TRAINED=("digits-p1",))
    assert [(row["name"], row["trained"]) for row in rows["regimes"]] == [("64x1", False), ("digits-p1", True)]
    for row in rows["regimes"]:
        assert set(row["seconds"]) == {"fused loop", "eager loop", "pass", "pass in bfloat16"}
        assert row["max_difference"] < 1e-3
    # Two norms, four linear layers, the first and the last one, and positions.
    weights = 4 * 64 + (3 + 1 + 4 + 4) * 64**2 + (3 + 1 + 4 + 1) * 64 + (4 + 1) * 64 + (64 + 1) * 8 + 64 * 64
    assert rows["regimes"][0]["weights_mb"] == pytest.approx(4e-6 * weights)


def test_devices(run: Run) -> None:
    needs_native()

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    star = make_star().config
    rows = run(
        "devices", MODELS=("digits-p1", "digits-p1, bfloat16"),
        BATCHES=(1,), ROUNDS={1: 1}, FLOAT64_MODEL="digits-p1", FLOAT64_BATCH=1, RELEASED=star, LARGE=star,
        in_new_process=call, ROUNDED_MODELS=("digits-p1",), ROUNDED=2, ROUNDED_BATCH=2,
    )  # fmt: skip
    errors = [row["error"] for row in rows["precision"] if "model" in row]
    assert len(errors) == 2 and max(errors) < 1e-4
    offloaded, whole = (row for row in rows["large-models"] if "sample" in row)
    assert offloaded["samples"] == whole["samples"]
    assert offloaded["weights"] == whole["weights"] > whole["largest_block"]
    assert rows["rounding"][0]["error"]["max"] < 1e-4


def test_gpu(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU takes the place of the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="PyTorch finds none here"):
        run("gpu")
    (row,) = run("gpu", DEVICE="cpu", MODELS=("digits-p1",), BATCHES=(1,), ROUNDS=1)["gpu"]
    assert row["error"]["auto"] < 1e-2
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    assert "| digits-p1 | 1 |" in render.render("<!-- render gpu --><!-- end -->")
    render.result.cache_clear()


def tiny_emoji() -> tuple[Tensor, list[str], list[str]]:
    images = torch.randint(256, (8, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return images, [letter * (i + 1) for i, letter in enumerate("abcdefgh")], 4 * ["low", "high"]


def test_claiming(run: Run) -> None:
    rows = run("claiming", BEFORE="HEAD", NUM_UNITS=5, NUM_PROCESSES=2)["claiming"]
    assert [row["package"] for row in rows] == ["HEAD", "working tree"]


def test_star(run: Run, tmp_path: Path) -> None:
    flow = jf.STARFlow(replace(make_star().config, captions=tuple(tiny_emoji()[1])))
    flow.load_state_dict(make_star().state_dict())
    flow.save_pretrained(tmp_path / "star")
    results = run(
        "star", MODEL=tmp_path / "star", captioned_emoji=tiny_emoji, BATCHES=(1,), ROUNDS=1,
        PROMPTS=("a", "bb"), SAMPLES_PER_PROMPT=2, MIN_RIGHT=0,
        CATEGORIES={name: name for name in ("low", "high")}, FIGURES=tmp_path,
    )  # fmt: skip
    errors = results["starflow"][0]["errors"]
    assert errors["auto"] < 1e-2
    for row in results["captions"]:
        assert {name: group["captions"] for name, group in row["groups"].items()} == {"low": 4, "high": 4, "all": 8}
    assert (tmp_path / "emoji-star.png").exists()


def test_boltzmann(run: Run) -> None:
    module = pytest.importorskip("benchmarks.boltzmann")

    def frames() -> tuple[Tensor, Tensor]:
        positions = torch.randn(200, 22, 3, generator=torch.Generator().manual_seed(0))
        return positions, torch.full((200,), 1 / 200, dtype=torch.float64)

    rows = run(
        "boltzmann", frames=frames, CERTIFIED=("auto", "window:8, 1e-3"),
        UNCERTIFIED=("jacobi-2",), PROPOSALS=(20, 40), LATENTS=20, PARTS=2, ROUNDS=1, SIZES={"tiny": (4, 3, 64, 2, 1)},
        BATCHES={"tiny": 2, module.TRAINED: 2}, GRADIENTS_MODEL="digits-p1",
    )  # fmt: skip
    assert len(rows["boltzmann"]) == 2 + 1
    for row in rows["boltzmann"][:2]:
        assert max(error["largest"] for error in row["errors"]["growing cache"].values()) < 1e-3
    runs = rows["alanine"]
    assert [row["what"] for row in runs] == ["simulations", "20 proposals", "40 proposals", "tolerances"]
    assert sum(map(math.exp, (-value for value in runs[0]["free_energy"]))) == pytest.approx(1)
    assert len(runs[2]["maps"]) == 2
    for row in runs[3]["rows"]:
        assert row["largest_error"] < 1e-2 or not row["certified"]


def test_search_guidance(run: Run) -> None:
    module = pytest.importorskip("benchmarks.search_guidance")
    (rows,) = run(
        "search_guidance", "digits-p1", MODELS={"digits-p1": (module.pixel_distance, 4)},
        RATES=(0.0, 1.0), WEIGHTS=(0.0, 1.0), TEMPERATURES=(1.2,),
    ).values()  # fmt: skip
    points = {(row["weight"], row["attn_temperature"], row["denoise"]) for row in rows}
    assert points >= {(0.0, 1.0, 0.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 1.0, 1.0)}


def test_maf(run: Run) -> None:
    flow = jf.MAF(jf.MAFConfig(1, 8, hidden_features=8, num_blocks=2)).requires_grad_(False)

    def digits(name: str, *values: Any) -> Any:
        return load_images("digits", *values)

    rows = run("maf", trained=lambda: flow, load_images=digits, IMAGES=6, BATCH=3, LOOP_BATCHES=1)["maf"]
    assert len(rows) == 9
    for row in rows:
        assert row["max_error"] < 1e-2, row["method"]
        assert row["batches"] == (1 if row["method"] == "For loop" else 2)


def test_quality(run: Run, tmp_path: Path) -> None:
    line = ("fashion-p2", "--out", str(tmp_path / "rows.json"), "--strategy", "STARFlow", "--num", "2")
    ((_, *rows),) = run("quality", *line, "--batch-size", "2", "--repeats", "1").values()
    assert [row["name"] for row in rows] == ["Original", "sequential", "STARFlow"]
