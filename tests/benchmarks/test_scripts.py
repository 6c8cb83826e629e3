"""Every benchmark runs: its `main()` on a small setting, and what a page would show of it.

A test is named after its script. No test depends on how long something took.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from benchmarks.common import random_flow
from benchmarks.sources import ROOT, code_digest
from jacobiflow import native
from jacobiflow.data import load_images
from tests.helpers.fake_device import FakeDevice
from tests.helpers.problems import make_star

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

SCRIPTS = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()
)
CONFIG = jf.TarFlowConfig(1, 16, 2, channels=64, num_blocks=2, layers_per_block=1, num_classes=3)
PRESETS = {"tiny": jf.Preset("", "", CONFIG, jf.SamplingSettings(jf.Guidance(1.5), 1.0), "[1-4-2-3]")}
UNLIMITED = ("free_energy", "basin_difference")  # infinite for a bin without samples

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a script with other constants, and returns its result files by name."""

    def run(script: str, *line: str, **constants: Any) -> dict[str, Any]:
        module = pytest.importorskip(f"benchmarks.{script}")
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
        if hasattr(module, "RESULTS"):
            monkeypatch.setattr(module, "RESULTS", tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *line])
        module.main()
        results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
        for result in results.values():
            assert result["command"] == f"python -m benchmarks.{script}"
            assert result["machine"]
            for row in result.get("runs", [result]):
                assert "commit" in row
                assert row["code"] == code_digest(f"benchmarks.{script}")
            assert all(map(math.isfinite, numbers(result)))
        return results

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


def test_masked_flows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("benchmarks.masked_flows")
    keys = shrink(module.keys(), features=3, hidden=8, rows=5)
    result = run("masked_flows", keys=lambda: keys, LEAST=1, MOST=1)["masked-flows"]
    assert {(row["library"], row["flow"]) for row in result["runs"]} == module.FLOWS.keys()
    for row in result["runs"]:
        assert row["error"]["accelerated"] <= 10 * row["error"]["library"] + 1e-6


def test_sbi_flows(run: Run, tmp_path: Path) -> None:
    module = pytest.importorskip("benchmarks.sbi_flows")
    calls = {
        "sample": module.Call("NPE", partial(module.one_observation, count=5), {}),
        "rejection": module.Call("NLE", partial(module.one_observation, count=2), {"sample_with": "rejection"}),
    }
    (result,) = run(
        "sbi_flows", CALLS=calls, ESTIMATORS={"NPE": ("maf", "zuko_nsf"), "NLE": ("maf",)}, ROOT=tmp_path,
        SIMULATIONS=100, EPOCHS=1, ROUNDS=1,
    ).values()  # fmt: skip
    assert len(result["runs"]) == 3
    for row in result["runs"]:
        assert all(0 < share < 1 for share in row["share"].values())


def test_clients(run: Run) -> None:
    module = pytest.importorskip("benchmarks.clients")
    pytest.importorskip("sbi")
    slow = ("pocomc", "ltu-ili", "lampe")
    clients = [each._replace(rounds=1) for each in module.CLIENTS if each.package not in slow and each.rounds > 2]
    result = run("clients", CLIENTS=clients, SIMULATIONS=200, EPOCHS=1, ROWS=20, OBSERVATIONS=2)["clients"]
    assert {"zuko", "nflows", "normflows", "pyro-ppl", "sbi"} <= {row["package"] for row in result["runs"]}
    for row in result["runs"]:
        assert row["error"] < 1e-3


def test_training(run: Run) -> None:
    module = pytest.importorskip("benchmarks.training")
    keys = shrink(module.keys(), features=5, hidden="8 x 2", rows=6)
    small = {"SIMULATIONS": 50, "STEPS": 5, "SECONDS": 0, "LEAST": 1, "MOST": 1, "CALLS": 1, "PROFILED": (1, 1)}
    runs = run("training", keys=lambda: keys, **small)["training"]["runs"]
    for row in runs:
        if row["task"] == module.LOSSES:
            assert row["losses"]["accelerated"] == pytest.approx(row["losses"]["library"], rel=1e-4)
        else:
            assert row["error"]["accelerated"] <= 10 * row["error"]["library"] + 1e-5


def test_fits(run: Run) -> None:
    """All programs but pocomc, which is no tool of the project."""
    module = pytest.importorskip("benchmarks.fits")
    keys = [key for key in islice(module.keys(), 9) if key["flow"] in ("MAF", "maf")]
    runs = run(
        "fits", keys=lambda: keys, simulations=cache(module.simulations.__wrapped__), WEIGHTS={},
        SIMULATIONS=100, EPOCHS=1, BATCH=50, SAMPLES=5, HMC_SAMPLES=2, WARM_UP=1, REJECTION_SAMPLES=2, ITERATIONS=2,
        ROUNDS=dict.fromkeys(module.ROUNDS, 1),
    )["fits"]["runs"]  # fmt: skip
    assert [row["program"] for row in runs] == ["zuko", "zuko", "sbi NPE", "sbi NLE"]
    for row in runs:
        assert row["result"]["accelerated"]["loss"] == pytest.approx(row["result"]["library"]["loss"], rel=1e-3)
        assert row["steps"]["accelerated"]["training"] == row["steps"]["library"]["training"]


def test_model_speed(run: Run) -> None:
    constants = {"BATCHES": {"digits-p1": (2,), "digits-maf": (1,)}, "DETAILED": "digits-p1"}
    result = run("model_speed", ROUNDS={1: 1, 2: 1}, **constants)["model-speed"]
    assert result["runs"][0]["max_error"]["exact loop"] < 1e-4
    assert "GS-Jacobi" in result["runs"][0]["seconds"]


def test_performance(run: Run) -> None:
    module = pytest.importorskip("benchmarks.performance")
    rounds = {1: 1, 2: 1}
    result = run(
        "performance", MODEL="digits-p1", BATCHES=(1, 2), SMALLER={2: "1"}, ROUNDS=rounds, GRID_RUNS=rounds,
        TOLERANCES=(1e-3,), GRIDS={name: grid[:1] for name, grid in module.GRIDS.items()},
        gs_jacobi_grid=partial(module.gs_jacobi_grid, short=True),
    )["performance"]  # fmt: skip
    for final in result["final"].values():
        rows = {row["strategy"]: row for row in final["rows"]}
        assert rows["auto, certified"]["error"]["max"] < 1e-2
        assert {name.split(" | ")[0] for name in rows} >= {"GS-Jacobi", "STARFlow", "Selective Jacobi Decoding"}
    assert len(result["grid"]["2"]) < len(result["grid"]["1"])


def test_strategies(run: Run) -> None:
    (result,) = run("strategies", "digits-p1", REPEATS={1: 1, 2: 1}, LARGE=2).values()
    for batch in (1, 2):
        rows = {row["strategy"]: row for row in result["rows"] if row["batch"] == batch}
        assert rows["Original"]["rate"] == 1
        assert all(rows[name]["max_error"] < 1e-2 for name in ("auto", "Original", "sequential, in PyTorch"))
        assert ("Jacobi-30" in rows) == (batch == 1)


def test_regimes(run: Run) -> None:
    needs_native()
    flows = {"64x1": partial(random_flow, replace(CONFIG, num_classes=0)), "digits-p1": partial(jf.load, "digits-p1")}
    runs = run("regimes", FLOWS=flows, BATCH_SIZES=(2,))["regimes"]["runs"]
    assert [(row["name"], row["trained"]) for row in runs] == [("64x1", False), ("digits-p1", True)]
    for row in runs:
        assert set(row["seconds"]) == {"fused loop", "eager loop", "pass", "pass in bfloat16"}
        assert row["max_difference"] < 1e-3
    # Two norms, four linear layers, the first and the last one, and positions.
    weights = 4 * 64 + (3 + 1 + 4 + 4) * 64**2 + (3 + 1 + 4 + 1) * 64 + (4 + 1) * 64 + (64 + 1) * 8 + 64 * 64
    assert runs[0]["weights_mb"] == pytest.approx(4e-6 * weights)


def test_paper_sizes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jf, "PRESETS", PRESETS)
    results = run("paper_sizes", TRAINED=("digits-p1",), BATCH_SIZES=(1,), SAMPLES=2)
    (row,) = results["paper-sizes"]["runs"]
    assert row["seconds"].keys() > {"growing cache", "fused loop", "bfloat16 x 64"}
    model = results["paper-sweeps"]["models"]["digits-p1"]
    assert model["tokens"] == 64
    assert all(1 <= count <= 64 for block in model["blocks"] for way in block for count in way["sweeps"])


def test_precision(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_native()
    runs = run(
        "precision", MODELS=("digits-p1", "digits-p1, bfloat16"), BLOCKS=("64x1",), BATCHES=(1,), ROUNDS={1: 1},
        DOUBLE="digits-p1", RELEASED=make_star().config, RELEASED_RUNS=(("bfloat16", False),),
    )["precision"]["runs"]  # fmt: skip
    errors = [row["errors"]["16 bits"] for row in runs if "model" in row]
    assert len(errors) == 2 and max(errors) < 1e-4
    assert all(row["residual"] < 1e-3 for row in runs if "block" in row)
    assert all(row["errors"]["float64"] < 1e-9 for row in runs if "double" in row)
    assert [row["seconds"] > 0 for row in runs if "released" in row] == [True]


def test_rounding(run: Run) -> None:
    models = {"digits-p1": partial(jf.load, "digits-p1")}
    (row,) = run("rounding", MODELS=models, BATCH=2, BATCHES=1, ROUNDS=1)["rounding"]["runs"]
    assert row["samples"] == 2
    assert row["error"]["max"] < 1e-4
    assert set(row["time"]) == {"1", "2"}


def tiny_star() -> jf.STARFlow:
    """A STARFlow that reads the number of letters of a text."""
    flow = deepcopy(make_star()).float()
    shape = (flow.config.text_tokens, flow.config.text_channels)
    flow.encode_text = lambda prompts: (
        torch.tensor([float(len(text)) for text in prompts]).view(-1, 1, 1).expand(-1, *shape)
    )
    return flow


def tiny_emoji() -> tuple[Tensor, list[str], list[str]]:
    images = torch.randint(256, (8, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return images, [letter * (i + 1) for i, letter in enumerate("abcdefgh")], 4 * ["low", "high"]


def test_star(run: Run, tmp_path: Path) -> None:
    results = run(
        "star", load=tiny_star, captioned_emoji=tiny_emoji, RELEASED=make_star(layers_per_block=(2,)).config,
        BATCHES=(1,), ROUNDS=1, CALIBRATED=4, CURVE_SAMPLES=2, PROMPTS=("a", "bb"), SAMPLES_PER_PROMPT=2,
        MOST=0, CATEGORIES={name: name for name in ("low", "high")}, FIGURES=tmp_path,
    )  # fmt: skip
    errors = results["starflow"]["runs"][0]["errors"]
    assert max(errors[name] for name in ("exact loop", "auto", "window:16, certified")) < 1e-2
    for row in results["captions"]["runs"]:
        assert {name: group["captions"] for name, group in row["groups"].items()} == {"low": 4, "high": 4, "all": 8}
    assert (tmp_path / "emoji-star.png").exists()


def test_boltzmann(run: Run) -> None:
    module = pytest.importorskip("benchmarks.boltzmann")
    runs = run(
        "boltzmann", SIZES={"tiny": (4, 3, 64, 2, 1)}, PROSE_CONFIG=jf.ProseConfig(64, 2, 1), ROUNDS=1,
        BATCHES=dict.fromkeys(("tiny", module.TRAINED, module.PROSE), (2,)), BUNDLED=("digits-p1", "digits-maf"),
    )["boltzmann"]["runs"]  # fmt: skip
    assert len(runs) == 3 + 3


def test_alanine(run: Run) -> None:
    def frames() -> tuple[Tensor, Tensor]:
        positions = torch.randn(200, 22, 3, generator=torch.Generator().manual_seed(0))
        return positions, torch.full((200,), 1 / 200, dtype=torch.float64)

    small = {"PROPOSALS": (20, 40), "LATENTS": 20, "PARTS": 2}
    runs = run("alanine", frames=frames, CERTIFIED=("auto", "window:8, 1e-3"), UNCERTIFIED=("jacobi-2",), **small)[
        "alanine"
    ]["runs"]
    assert [row["what"] for row in runs] == ["simulations", "20 proposals", "40 proposals", "tolerances"]
    assert sum(map(math.exp, (-value for value in runs[0]["free_energy"]))) == pytest.approx(1)
    assert len(runs[2]["maps"]) == 2
    for row in runs[3]["rows"]:
        assert row["largest_error"] < 1e-2 or not row["certified"]


def test_large_models(run: Run) -> None:
    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    small = {"CONFIG": make_star().config, "SHARD_SIZE": 20_000, "in_new_process": call}
    runs = run("large_models", **small)["large-models"]["runs"]
    offloaded, whole = (row for row in runs if "sample" in row)
    assert offloaded["samples"] == whole["samples"]
    assert offloaded["weights"] == whole["weights"] > whole["largest_block"]


def test_clusters(run: Run) -> None:
    module = pytest.importorskip("benchmarks.clusters")
    assert set(module.scripts()) == {"two machines", "srun", "requeue", "array"}
    sample = module.COMMANDS["sample"]
    small = replace(sample, line=sample.line.replace("--num 96", "--num 8"))
    (row,) = run("clusters", keys=lambda: [{"command": "sample"}], COMMANDS={"sample": small})["clusters"]["runs"]
    assert row["difference"] == 0


def test_kills(run: Run) -> None:
    line = "sample --model digits-p1 --num 8 --batch-size 2 --shard-size 2 --strategy jacobi"
    (row,) = run("kills", COMMANDS={"sample": line}, MOMENTS=1)["kills"]["runs"]
    assert (row["rounds"], row["equal"]) == (1, 1)


def test_search_guidance(run: Run) -> None:
    module = pytest.importorskip("benchmarks.search_guidance")
    (result,) = run(
        "search_guidance", "digits-p1", MEASURES={"digits-p1": lambda: module.pixel_distance()._replace(num=4)},
        RATES=(0.0, 1.0), WEIGHTS=(0.0, 1.0), TEMPERATURES=(1.2,),
    ).values()  # fmt: skip
    points = {(row["weight"], row["attn_temperature"], row["denoise"]) for row in result["rows"]}
    assert points >= {(0.0, 1.0, 0.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 1.0, 1.0)}
    assert result["best"]["pixel_distance"] == min(row["pixel_distance"] for row in result["rows"])


def test_calibration(run: Run) -> None:
    path = jf.find_report(jf.load("digits-p1"))
    (result,) = run("calibration", "digits-p1", str(path)).values()
    assert len(result["crm_percent"]) == len(result["guess"]) == 4
    assert sum(result["crm_percent"]) == pytest.approx(100)


def test_maf(run: Run) -> None:
    flow = jf.MAF(jf.MAFConfig(1, 8, hidden_features=8, num_blocks=2)).requires_grad_(False)

    def digits(name: str, *values: Any) -> Any:
        return load_images("digits", *values)

    result = run("maf", trained=lambda: flow, load_images=digits, IMAGES=6, BATCH=3, LOOP_BATCHES=1)["maf"]
    assert len(result["runs"]) == 9
    for row in result["runs"]:
        assert row["max_error"] < 1e-2, row["method"]
        assert row["batches"] == (1 if row["method"] == "For loop" else 2)


def test_quality(run: Run, tmp_path: Path) -> None:
    line = ("fashion-p2", "--out", str(tmp_path / "rows.json"), "--strategy", "STARFlow", "--num", "2")
    (result,) = run("quality", *line, "--batch-size", "2", "--repeats", "1").values()
    assert [row["name"] for row in result["rows"]] == ["Original", "sequential", "STARFlow"]


def test_gpu(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jf, "PRESETS", PRESETS)
    line = ("--device", "cuda:0", "--out", str(tmp_path / "gpu.json"))
    with FakeDevice():
        images, *times = run("gpu", *line, BUNDLED=("digits-p1",), SAMPLES=2, BATCHES=(1,), ROUNDS=1)["gpu"]["runs"]
    assert not any(row["wrong"] for row in images["rows"])
    assert [row["dtype"] for row in times] == ["float32", "bfloat16"]
    assert times[0]["difference_of_loops"] < 1e-4
