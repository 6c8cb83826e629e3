"""benchmarks/paper_shapes.py on shapes for a CPU: what it writes and how it adds up, never how long it took."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import latents, make_flow
from running import load_script
from torch import Tensor

import jacobiflow as jf
from jacobiflow.baselines import GROWING_CACHE, SEQUENTIAL
from jacobiflow.experiments.speed import ENCODING_PASS
from jacobiflow.guidance import guided
from jacobiflow.measuring import Timing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Before `results`, whose machine is to be that of every test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


script = load_script("paper_shapes")


def tiny_shape(num_classes: int = 3, attn_temperature: float = 1.0) -> Any:
    """T = 16, C = 4; two stacked blocks with different segments, and three others."""
    config = jf.TarFlowConfig(1, 8, 2, channels=32, num_blocks=5, layers_per_block=2, num_classes=num_classes,
                              head_dim=16)  # fmt: skip
    preset = jf.Preset("tiny", "", config, 1.5, 1.0, "[0/3-4/2-2/3-2]", attn_temperature=attn_temperature)
    return script.Shape(preset, paper_rate=2.0)


TINY = {"classes": tiny_shape(), "no classes": tiny_shape(0, 0.5)}
TRAINED = {"digits-p1": ("jacobi", "window:16")}


def run(out: Path, *arguments: str) -> dict[str, Any]:
    script.main(["--out", str(out), "--device", "cpu", "--repeats", "1", *arguments], TINY, TRAINED)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("results") / "made" / "results.json"
    return out, run(out, "--shapes", *TINY, "--batch-sizes", "1", "2")


# ------------------------------------------------------------------------------------------------------- what it writes


def test_every_shape_and_batch_size_is_written(results: tuple[Path, dict[str, Any]]) -> None:
    _, found = results
    assert [(r["shape"], r["batch_size"]) for r in found["runs"]] == [(name, b) for name in TINY for b in (1, 2)]
    assert any("not the number of sweeps" in note for note in found["notes"])
    for r in found["runs"]:
        assert set(r["machine"]["tf32"]) == {"matmul", "convolution"}
        assert r["settings"]["config"]["num_blocks"] == 5
        assert (r["paper_rate"], r["target_rate"]) == (2.0, 4.0)
        methods = [row["method"] for row in r["rows"]]
        assert methods == [
            GROWING_CACHE, SEQUENTIAL, "GS-Jacobi [0/3-4/2-2/3-2]", "window", "window, bfloat16 first", ENCODING_PASS,
        ]  # fmt: skip
        assert r["differences"][GROWING_CACHE] < 1e-5
        assert script.GRAPHS not in r["parts"]


def test_seconds_are_the_sum_of_their_parts(results: tuple[Path, dict[str, Any]]) -> None:
    _, found = results
    for r in found["runs"]:
        baseline = 5 * r["parts"][GROWING_CACHE]["seconds"]["median"]
        for row in r["rows"]:
            medians = {name: r["parts"][name]["seconds"]["median"] for name in row["parts"]}
            assert row["seconds"] == pytest.approx(sum(row["parts"][name] * medians[name] for name in medians))
            assert row["rate"] == pytest.approx(baseline / row["seconds"])
            assert "reason" not in row


def test_parts_are_those_of_the_strategy(results: tuple[Path, dict[str, Any]]) -> None:
    _, found = results
    for r in found["runs"]:
        parts = {row["method"]: row["parts"] for row in r["rows"]}
        paper = {"Segments(count=4) x 2": 1, "Segments(count=2) x 3": 1, "Whole() x 2": 3}
        assert parts["GS-Jacobi [0/3-4/2-2/3-2]"] == paper
        window = {"Window(size=4) x 2": 1, "Window(size=8) x 3": 1, "Whole() x 2": 3}
        assert parts["window"] == window | {"certificate": 5}
        coarse = {f"{name}, bfloat16": count for name, count in window.items()}
        assert parts["window, bfloat16 first"] == coarse | {"Whole() x 1": 5, "certificate": 5}
        for name, part in r["parts"].items():
            counted = name == SEQUENTIAL or " x " in name
            assert ("network_calls" in part) == counted
        assert r["parts"]["Whole() x 2"]["network_calls"] == 2
        assert r["parts"]["Whole() x 2"]["evaluations_per_token"] == (16 + 15) / 16  # the first token is done
        assert r["parts"][SEQUENTIAL]["evaluations_per_token"] == 1
        assert set(r["chords"]) == {"chord in Window(size=4)", "chord in Window(size=8)"}
        assert all(chord["kernel_bytes"] == 24 * 4 * 4 * 4 for chord in r["chords"].values())


def test_a_network_in_bfloat16_has_no_mixed_row(tmp_path: Path) -> None:
    found = run(tmp_path / "b.json", "--shapes", "classes", "--batch-sizes", "2", "--dtype", "bfloat16")
    methods = [row["method"] for row in found["runs"][0]["rows"]]
    assert "window" in methods
    assert "window, bfloat16 first" not in methods


def test_a_trained_model_is_compared_in_full(tmp_path: Path) -> None:
    found = run(tmp_path / "trained.json", "--shapes", "digits-p1", "--batch-sizes", "1")
    (r,) = found["runs"]
    assert [row["strategy"] for row in r["rows"]] == [GROWING_CACHE, SEQUENTIAL, "jacobi", "window:16"]
    assert r["settings"] == {"strategies": ["jacobi", "window:16"]}
    assert r["encoding_pass"]["median"] > 0


# ------------------------------------------------------------------------------------------------------------- resuming


def test_what_the_file_holds_is_not_measured_again(
    results: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = results
    out = tmp_path / "results.json"
    out.write_text(json.dumps(found | {"runs": found["runs"][:1] + found["runs"][2:]}))
    measured = []

    def measure(shape: Any, batch: int, *_: Any) -> dict[str, Any]:
        measured.append((shape, batch))
        return {"rows": []}

    monkeypatch.setattr(script, "measure", measure)
    run(out, "--shapes", *TINY, "--batch-sizes", "1", "2")
    assert measured == [(TINY["classes"], 2)]
    last = json.loads(out.read_text())["runs"][-1]
    assert (last["shape"], last["batch_size"]) == ("classes", 2)


@pytest.mark.parametrize("changed", ["machine", "dtype", "settings"])
def test_what_another_machine_or_setting_gave_is_measured_again(
    results: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    _, found = results
    out = tmp_path / "results.json"
    out.write_text(json.dumps(found | {"runs": [r | {changed: "another"} for r in found["runs"]]}))
    monkeypatch.setattr(script, "measure", lambda *_: {"rows": []})
    again = run(out, "--shapes", "classes", "--batch-sizes", "1")
    assert len(again["runs"]) == len(found["runs"]) + 1


def test_an_interrupted_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(shape: Any, batch: int, *_: Any) -> dict[str, Any]:
        if batch == 2:
            raise KeyboardInterrupt
        return {"rows": []}

    monkeypatch.setattr(script, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "results.json", "--shapes", "classes", "--batch-sizes", "1", "2")
    assert [r["batch_size"] for r in json.loads((tmp_path / "results.json").read_text())["runs"]] == [1]


# ------------------------------------------------------------------------------------------------- what cannot be timed


def test_memory_that_runs_out_leaves_a_row_without_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def certify(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB. GPU 0 has none.")

    monkeypatch.setattr(jf, "certify", certify)
    (r,) = run(tmp_path / "results.json", "--shapes", "classes", "--batch-sizes", "2")["runs"]
    assert r["parts"]["certificate"] == {
        "seconds": None, "reason": "CUDA out of memory. Tried to allocate 8 GiB",
    }  # fmt: skip
    rows = {row["method"]: row for row in r["rows"]}
    reason = "certificate: CUDA out of memory. Tried to allocate 8 GiB"
    assert (rows["window"]["seconds"], rows["window"]["rate"], rows["window"]["reason"]) == (None, None, reason)
    assert rows[SEQUENTIAL]["rate"] > 0
    assert reason in capsys.readouterr().out


def test_without_a_baseline_there_are_seconds_and_no_rates() -> None:
    shape = TINY["classes"]
    timed = {name: {"seconds": {"median": 1.0}} for counts in script.sums(shape).values() for name in counts}
    rows = script.combine(shape, timed | {GROWING_CACHE: {"seconds": None, "reason": "no memory"}})
    assert rows[0]["reason"] == f"{GROWING_CACHE}: no memory"
    assert all(row["rate"] is None for row in rows)
    assert rows[1]["seconds"] == 5


def test_a_loop_that_is_not_the_sequential_one_has_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = script.growing_cache_sample
    monkeypatch.setattr(script, "growing_cache_sample", lambda *arguments: right(*arguments) + 0.1)
    (r,) = run(tmp_path / "results.json", "--shapes", "classes", "--batch-sizes", "1")["runs"]
    assert r["parts"][GROWING_CACHE]["seconds"] is None
    assert "differs" in r["parts"][GROWING_CACHE]["reason"]


def test_a_part_warms_up_once_and_keeps_the_answer_of_its_full_run() -> None:
    calls: list[str] = []

    def called(name: str) -> str:
        calls.append(name)
        return name

    part = script.Part(lambda: called("full"), lambda: called("warm"))
    for _ in range(3):
        part()
    assert calls == ["warm", "full", "full"]
    assert part.result == "full"
    assert part.to_json(Timing(1.0, 1.0, 1.0)) == {"seconds": {"median": 1.0, "min": 1.0, "max": 1.0}}


# ------------------------------------------------------------------------------------------------------------ its steps


GUIDES = {
    "unguided": None,
    "annealed": jf.Guidance(0.6, attn_temperature=1.5),
    "constant": jf.Guidance(0.4, annealed=False, on="scale"),
}
LABELS = torch.tensor([0, 2, -1])


@pytest.mark.parametrize("bucket", [1, 3, 5, 8, 64])
@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("image_size", [8, 12])
def test_steps_at_rounded_contexts_are_the_sequential_loop(image_size: int, guide: str, bucket: int) -> None:
    flow = make_flow(image_size=image_size, num_classes=3)
    block = guided(flow.blocks[1], GUIDES[guide])
    runner = script.GraphedSequential(block, latents(flow, 3), LABELS, bucket)
    assert len(runner.steps) == -(-(flow.config.num_tokens - 1) // bucket)
    for seed in (0, 1):
        z = latents(flow, 3, seed)
        exact = jf.solve(block, z, jf.Solver(jf.Sequential()), LABELS).x
        torch.testing.assert_close(runner(z), exact, rtol=0, atol=1e-12)
        assert torch.equal(z, latents(flow, 3, seed))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a CUDA device")
@pytest.mark.parametrize("guide", GUIDES)
def test_replayed_steps_are_the_sequential_loop(guide: str) -> None:
    config = replace(make_flow(num_classes=3).config, num_blocks=1)
    flow = jf.TarFlow(config).double().eval().requires_grad_(False).cuda()
    flow.blocks[0].proj_out.weight.normal_(std=0.05)
    block, labels = guided(flow.blocks[0], GUIDES[guide]), LABELS.cuda()
    runner = script.GraphedSequential(block, latents(flow, 3).cuda(), labels, 5)
    for seed in (0, 1):
        z = latents(flow, 3, seed).cuda()
        exact = jf.solve(block, z, jf.Solver(jf.Sequential()), labels).x
        torch.testing.assert_close(runner(z), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("guide", GUIDES)
def test_a_front_per_sample_changes_no_answer(guide: str) -> None:
    flow = make_flow(num_classes=3)
    block, z = guided(flow.blocks[1], GUIDES[guide]), latents(flow, 3)
    solver = jf.Solver(jf.Window(5), stopping=jf.MaxSweeps(2))
    apart, shared = (jf.solve(b, z, solver, LABELS) for b in (script.FrontPerSample(block), block))
    torch.testing.assert_close(apart.x, shared.x, rtol=0, atol=1e-10)
    assert apart.token_evaluations == shared.token_evaluations


# ----------------------------------------------------------------------------------------------------------- its shapes


def test_shapes_are_the_papers() -> None:
    sizes = {
        name: (s.preset.config.num_tokens, s.preset.config.token_channels, s.preset.config.channels)
        for name, s in script.SHAPES.items()
    }
    assert sizes == {
        "img128cond": (1024, 48, 1024),
        "afhq": (1024, 192, 768),
        "img64uncond": (1024, 12, 768),
        "img64cond": (256, 48, 1024),
    }
    for shape in script.SHAPES.values():
        assert (shape.preset.config.num_blocks, shape.preset.config.layers_per_block) == (8, 8)
        assert sum(shape.solvers.values()) == 8
    assert [round(2 * shape.paper_rate, 1) for shape in script.SHAPES.values()] == [9.1, 10.6, 5.9, 5.0]


@pytest.mark.parametrize("name", script.SHAPES)
def test_windows_evaluate_tokens_as_often_as_the_papers_segments(name: str) -> None:
    shape = script.SHAPES[name]
    length = shape.preset.config.num_tokens
    for solver in shape.solvers:
        window = script.matched(solver, length)
        assert 0 <= script.evaluations(window, length) - script.evaluations(solver, length) <= length
        if isinstance(solver.partition, jf.Segments):
            assert window.partition == jf.Window(length // solver.partition.count)
        else:
            assert window == solver


@pytest.mark.parametrize(("count", "sweeps"), [(64, 1), (64, 3), (1, 5), (8, 8), (7, 4)])
def test_there_is_a_window_for_segments_of_any_size(count: int, sweeps: int) -> None:
    solver = jf.Solver(jf.Segments(count), stopping=jf.MaxSweeps(sweeps))
    window = script.matched(solver, 64)
    assert 0 <= script.evaluations(window, 64) - script.evaluations(solver, 64) <= 64
