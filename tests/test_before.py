"""Files that an earlier version wrote are read, and mean what they meant then: models, reports, strategies, samples.

tests/fixtures/before/README.md says how they were made; expected.json is what that version made of them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import jacobiflow as jf
from jacobiflow.flows.fingerprint import fingerprint

BEFORE = Path(__file__).parent / "fixtures" / "before"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())
GUIDANCE = jf.Guidance(0.5, annealed=True, on="both", attn_temperature=1.2)
LABELS = torch.arange(12) % 3

pytestmark = pytest.mark.usefixtures("one_thread")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["tarflow", "maf"])
def test_a_model_folder(name):
    flow = jf.load(BEFORE / name, dtype=torch.float64)
    image = torch.tensor(EXPECTED["image"], dtype=torch.float64).view(1, 1, 3, 3)
    assert fingerprint(flow) == EXPECTED["fingerprint"][name]
    assert flow.log_prob(image, torch.tensor([1])).item() == pytest.approx(EXPECTED["log_prob"][name], rel=1e-9)


@pytest.mark.parametrize("name", ["tarflow/report.json", "guided.json"])
def test_a_report(name):
    report, expected = jf.Report.load(BEFORE / name), EXPECTED["reports"][name]
    report.check(jf.load(BEFORE / "tarflow"))
    assert report.crm == pytest.approx(expected["crm"], rel=1e-12)
    assert list(report.tough_blocks) == expected["tough_blocks"]
    assert [report.best_guess(block) for block in range(3)] == expected["best_guess"]
    assert list(report.mean_sweeps("noise", 1e-2)) == expected["mean_sweeps"]
    assert report.settings.guidance == (GUIDANCE if name == "guided.json" else None)


def test_a_tuning():
    tuning = jf.Report.load(BEFORE / "tarflow" / "report.json").tuning
    assert tuning is not None
    for block, expected in zip(tuning.blocks, EXPECTED["tuning"], strict=True):
        assert block.guess.kernel.sum().item() == pytest.approx(expected["guess"], rel=1e-6)
        assert type(block.correction).__name__ == expected["correction"]
        assert block.amplification == expected["amplification"]
        assert sum(sum(run.sweeps) for run in block.runs) == expected["sweeps"]
        assert (len(block.runs), len(block.counted)) == (expected["runs"], expected["counted"])


@pytest.mark.parametrize("name", EXPECTED["strategies"])
def test_a_strategy(name):
    strategy, expected = jf.Strategy.load(BEFORE / "strategies" / f"{name}.json"), EXPECTED["strategies"][name]
    assert (strategy.fingerprint, strategy.tolerance) == (expected["fingerprint"], expected["tolerance"])
    assert (strategy.prediction is not None) == (name == "planned")
    for solver, known in zip(strategy.solvers, expected["solvers"], strict=True):
        pieces = type(solver.guess).__name__, type(solver.correction).__name__, repr(solver.partition)
        assert pieces == (known["guess"], known["correction"], known["partition"])
        sweeps = solver.stopping.max_sweeps
        assert solver.stopping.atol == known["atol"]
        assert (list(sweeps) if isinstance(sweeps, tuple) else sweeps) == known["max_sweeps"]
        assert solver.coarse == known["coarse"]
    flow = jf.load(BEFORE / "tarflow")
    drawn = jf.sample(
        flow, num=2, labels=torch.tensor([0, 2]), seed=3, strategy=replace(strategy, prediction=None), certify=False,
        progress=False,
    )  # fmt: skip
    # Those that stop on a tolerance may stop elsewhere now, within it; bfloat16 rounds differently by machine.
    within = {"planned": 0.1, "chord": 1e-2, "jacobi": 1e-3, "window": 1e-3}.get(name, 1e-5)
    assert drawn.images.flatten().tolist() == pytest.approx(expected["images"], abs=within)


@pytest.mark.parametrize("name", ["jacobi", "auto"])
def test_a_sample_folder(name):
    folder, expected = jf.SampleFolder.open(BEFORE / "samples" / name), EXPECTED["samples"][name]
    folder.check()
    images = b"".join(shard.numpy().tobytes() for shard in folder.batches())
    assert hashlib.sha256(images).hexdigest() == expected["sha256"]
    assert folder.certificate().tolist() == pytest.approx(expected["certificate"], rel=1e-6)
    assert [record.figures["network_calls"] for record in folder.records()] == expected["network_calls"]
    assert torch.cat([folder.labels(shard) for shard in range(2)]).tolist() == LABELS.tolist()
    assert folder.manifest.fingerprint == EXPECTED["fingerprint"]["tarflow"]
    assert len(folder.strategy().solvers) == 3


@pytest.mark.parametrize(
    ("name", "settings"),
    [("jacobi", {"tolerance": 1e-2}), ("auto", {"tolerance": 5e-2, "guidance": GUIDANCE, "denoise": 1.0})],
)
def test_a_finished_run_has_nothing_left_to_draw(name, settings, tmp_path):
    out = tmp_path / name
    shutil.copytree(BEFORE / "samples" / name, out)
    before, drawn = bytes_of(out / "shards"), []
    folder = jf.sample_to_folder(
        jf.load(BEFORE / "tarflow"), 12, out, LABELS, 5, strategy=name, batch_size=3, shard_size=6, model="tarflow",
        progress=False, on_shard=lambda start, *shard: drawn.append(start), **settings,
    )  # fmt: skip
    assert drawn == []
    assert folder.drawn == 0
    assert bytes_of(out / "shards") == before
    folder.check()


def test_auto_plans_from_an_earlier_report():
    flow = jf.load(BEFORE / "tarflow")
    exact, found = (
        jf.sample(flow, num=2, labels=LABELS[:2], strategy=strategy, tolerance=1e-2, progress=False)
        for strategy in ("sequential", "auto")
    )
    assert found.images.flatten().tolist() == pytest.approx(exact.images.flatten().tolist(), abs=3e-2)
