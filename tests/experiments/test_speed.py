"""Benchmarks: turns are taken, medians and errors are what they say, and the command writes what the library measures.

No test here asserts how long anything takes.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from problems import make_flow, to_float32
from running import figures, run_line

import jacobiflow as jf
from jacobiflow.baselines.growing_cache import growing_cache_sample
from jacobiflow.experiments import speed as benchmarking
from jacobiflow.experiments.speed import Comparison, Row, compare
from jacobiflow.latents import draw_latents
from jacobiflow.measuring import Error, Timing, interleave, machine, paired_error

pytestmark = pytest.mark.usefixtures("one_thread")

GUIDED = "--guidance 0.7 --guidance-on shift --constant-guidance --attn-temperature 0.8"
GUIDANCE = jf.Guidance(0.7, annealed=False, on="shift", attn_temperature=0.8)


# -------------------------------------------------------------------------------------------------------------- runner


class Clock:
    """A clock that only moves when a run says so; reading it is noted."""

    def __init__(self) -> None:
        self.now = 100.0
        self.log: list[str] = []

    def read(self) -> float:
        self.log.append("read")
        return self.now

    def run(self, name: str, durations: list[float]) -> Callable[[], str]:
        """A callable that takes `durations` in turn and returns its name and how often it has run."""
        left: Iterator[tuple[int, float]] = iter(enumerate(durations))

        def run() -> str:
            count, duration = next(left)
            self.log.append(name)
            self.now += duration
            return f"{name} {count}"

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(benchmarking, "perf_counter", clock.read)
    monkeypatch.setattr(benchmarking, "_synchronize", lambda device: clock.log.append(f"wait for {device}"))
    return clock


def test_runs_take_turns_and_the_device_is_waited_for(clock: Clock) -> None:
    runs = {name: clock.run(name, [1.0] * 3) for name in ("a", "b", "c")}
    interleave(runs, 2, "cuda:1", lambda name: clock.log.append(f"after {name}"))
    wait = "wait for cuda:1"
    assert clock.log == [x for name in "abc" * 3 for x in (wait, "read", name, wait, "read", f"after {name}")]


def test_medians_and_extremes_are_of_the_rounds_that_count(clock: Clock) -> None:
    odd, even = [999.0, 5.0, 1.0, 2.0], [0.0, 8.0, 8.0, 64.0]
    timings, results = interleave({"odd": clock.run("odd", odd), "even": clock.run("even", even)}, 3)
    assert timings == {"odd": Timing(2.0, 1.0, 5.0), "even": Timing(8.0, 8.0, 64.0)}
    assert results == {"odd": "odd 0", "even": "even 0"}  # of the warm-up
    timings, _ = interleave({"two": clock.run("two", [999.0, 1.0, 4.0])}, 2)
    assert timings == {"two": Timing(2.5, 1.0, 4.0)}


@pytest.mark.parametrize("repeats", [0, -3])
def test_no_round_is_refused_before_anything_runs(repeats: int, clock: Clock) -> None:
    with pytest.raises(ValueError, match=rf"repeats={repeats}: give a positive number of rounds"):
        interleave({"a": clock.run("a", [])}, repeats)
    assert clock.log == []


@pytest.mark.parametrize(("device", "called"), [("cpu", []), ("cuda:1", ["cuda:1"]), ("mps", ["mps"])])
def test_devices_that_work_on_their_own_are_synchronised(
    device: str, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(str(device)))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: seen.append("mps"))
    benchmarking._synchronize(torch.device(device))
    assert seen == called


# --------------------------------------------------------------------------------------------------------------- error


def test_errors_are_max_mean_and_rms_over_entries() -> None:
    exact = torch.zeros(2, 1, 1, 2)
    error = paired_error(torch.tensor([3.0, -4.0, 0.0, 0.0]).view_as(exact), exact)
    assert error == Error(4.0, 7 / 4, pytest.approx(2.5))  # type: ignore[arg-type]
    assert paired_error(exact, exact) == Error(0.0, 0.0, 0.0)


def test_a_nan_in_one_answer_is_infinite_and_in_both_it_is_none() -> None:
    whole, lost = torch.ones(1, 1, 1, 3), torch.tensor([1.0, torch.nan, 1.5]).view(1, 1, 1, 3)
    for pair in ((whole, lost), (lost, whole)):
        assert paired_error(*pair) == Error(math.inf, math.inf, math.inf)
    assert paired_error(lost, lost) == Error(0.0, 0.0, 0.0)
    assert paired_error(torch.full_like(whole, torch.inf), lost) == Error(math.inf, math.inf, math.inf)


def test_errors_add_up_in_float64() -> None:
    exact = torch.zeros(1, 1, 2000, 2000)
    assert paired_error(exact + 0.1, exact).mean == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


# ------------------------------------------------------------------------------------------------------------- compare


@pytest.mark.parametrize("guidance", [None, GUIDANCE, jf.Guidance(1.0, on="scale")])
def test_compare_measures_what_the_library_draws(guidance: jf.Guidance | None) -> None:
    flow = make_flow(num_classes=3)
    z, labels = draw_latents(3, 16, flow.config.token_channels, seed=5), torch.tensor([2, -1, 0])
    done: list[str] = []
    draw = partial(jf.sample, flow, latents=z, labels=labels, guidance=guidance, progress=False)
    runs = {"few sweeps": partial(draw, strategy="jacobi-2"), "window": partial(draw, strategy="window:4")}
    found = compare(flow, z, labels, runs, guidance=guidance, repeats=1, after_each=done.append)

    names = ["growing cache", "sequential", "few sweeps", "window"]
    assert done == [*names, "encoding pass"] * 2
    assert found.batch_size == 3
    assert [row.strategy for row in found.rows] == names
    exact = draw(strategy="sequential", certify=False)
    growing, sequential, few, window = found.rows
    baseline = growing_cache_sample(flow, z.double(), labels, guidance)
    assert growing.error == paired_error(baseline, exact.images)
    assert growing.error.max < 1e-10
    assert (growing.network_calls, growing.token_evaluations, growing.evaluations_per_token) == (None,) * 3
    assert growing.certificate is None
    assert sequential.error == Error(0.0, 0.0, 0.0)
    assert (sequential.network_calls, sequential.certificate) == (exact.network_calls, None)
    assert sequential.evaluations_per_token == 1
    for row, strategy in ((few, "jacobi-2"), (window, "window:4")):
        want = draw(strategy=strategy)
        assert row.error == paired_error(want.images, exact.images)
        assert row.network_calls == want.network_calls
        assert row.token_evaluations == want.token_evaluations
        assert row.evaluations_per_token == want.token_evaluations / (3 * 16 * flow.config.num_blocks)
        assert want.certificate is not None
        assert row.certificate == float(want.certificate.max())
    assert few.error.max > 1e-2 > window.error.max
    for row in found.rows:
        for name in ("growing cache", "sequential"):
            ratio = found.row(name).seconds.median / row.seconds.median
            assert found.speed_up(row, name) == ratio
    with pytest.raises(KeyError):
        found.row("jacobi")


def test_the_baselines_are_not_certified_and_the_floor_encodes_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = make_flow()
    z = draw_latents(2, 16, flow.config.token_channels)
    certified: list[bool] = []
    encoded: list[Any] = []
    draw = benchmarking.sample

    def spy(*args: Any, **settings: Any) -> jf.Samples:
        certified.append(settings["certify"])
        return draw(*args, **settings)

    monkeypatch.setattr(benchmarking, "sample", spy)
    monkeypatch.setattr(flow, "encode", lambda images, labels: encoded.append((images, torch.is_grad_enabled())))
    compare(flow, z, None, {}, repeats=2)
    assert certified == [False] * 4  # the reference, the warm-up, two rounds
    exact = jf.sample(flow, latents=z, strategy="sequential", progress=False).images
    assert len(encoded) == 3
    assert all(torch.equal(images, exact) and not gradients for images, gradients in encoded)


@pytest.mark.parametrize("name", ["growing cache", "sequential", "encoding pass"])
def test_names_that_are_taken_are_refused(name: str) -> None:
    flow = make_flow()
    with pytest.raises(ValueError, match=rf"run '{name}'.*give it another name"):
        compare(flow, draw_latents(1, 16, flow.config.token_channels), None, {name: lambda: None}, repeats=1)  # type: ignore[dict-item, return-value]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_growing_cache_computes_in_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    """As the sequential loop does: latents stay in float32 at least."""
    flow = deepcopy(make_flow(num_classes=3)).to(dtype)
    z, labels = draw_latents(2, 16, flow.config.token_channels, seed=1), torch.tensor([0, 2])
    found = compare(flow, z, labels, {}, guidance=jf.Guidance(0.5), repeats=1)
    eps = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
    assert found.row("growing cache").error.max < eps


def test_machine_says_what_a_timing_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine()
    assert list(here) == ["processor", "cores", "threads", "device", "torch", "python", "jacobiflow"]
    assert here["processor"] and here["cores"] >= 1 and here["threads"] == 1
    assert (here["device"], here["torch"], here["jacobiflow"]) == ("cpu", torch.__version__, jf.__version__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the name of {device}")
    assert machine("cuda:1")["device"] == "the name of cuda:1"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("model name\t: Fast (R): CPU\nflags : fpu\nmodel name\t: other\n", "Fast (R): CPU"),
        ("model name\t: Fast\nflags\t\t: fpu amx_bf16\n", "Fast with AVX512-BF16 and AMX"),
        ("Hardware : phone\n", "arm64"), (None, "arm64"),
    ],
)  # fmt: skip
def test_the_processor_is_named(text: str | None, want: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(benchmarking, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(benchmarking.platform, "processor", lambda: "")
    monkeypatch.setattr(benchmarking.platform, "machine", lambda: "arm64")
    assert machine()["processor"] == want


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in: models, strategies, reports."""
    folder = tmp_path_factory.mktemp("work")
    flow = to_float32(make_flow(num_classes=3, noise_std=0.1))
    flow.save_pretrained(folder / "model")
    to_float32(make_flow(num_classes=3, nvp=False)).save_pretrained(folder / "other")
    jf.Strategy.uniform(jf.Solver(jf.Window(4), stopping=jf.Tolerance(1e-2)), 2).save(folder / "window.json")
    jf.Strategy.uniform(jf.Solver(jf.Window(4)), 5).save(folder / "five.json")
    jf.Strategy.uniform(jf.Solver(jf.Segments(17)), 2).save(folder / "segments.json")
    (folder / "broken.json").write_text('{"format_version": 1,')
    (folder / "broken.txt").write_text("not JSON")
    (folder / "file").write_text("a regular file")
    size, channels = flow.config.image_size, flow.config.in_channels
    images = torch.randn(9, channels, size, size, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    report = jf.calibrate(flow, images, torch.arange(9) % 3, segments=4, traced=3, progress=False)
    report.save(folder / "report.json")
    plan = jf.Strategy.parse("jacobi", report)
    replace(plan, fingerprint="0" * 64).save(folder / "theirs.json")
    return folder


@pytest.fixture(autouse=True)
def _work_there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "run" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("folder"))
        monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `jacobiflow bench` in this process; gives its exit code, stdout and stderr."""

    return lambda line: run_line(f"bench {line}", capsys)


def test_help_has_an_example_whose_options_exist(run: Any) -> None:
    result = run("--help")
    assert (result.code, result.err) == (0, "")
    text = " ".join(result.out.split())
    example = re.search(r"Example: (jacobiflow bench .*?) Options:", text)
    assert example is not None
    for option in re.findall(r"--[\w-]+", example[1]):
        assert f"{option} <" in text.split("Options:")[1], option


def test_the_example_of_the_help_runs(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(run("--help").out.split())
    example = re.search(r"Example: jacobiflow bench (.*?) Options:", text)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    line = f"{example[1]} --repeats 1 --batch-size 1"
    assert run(line).code == 0
    assert sorted(os.listdir("out/bench")) == ["bench.json", "bench.png"]


def test_bench_measures_a_bundled_model_end_to_end(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = run(
        "--model digits-p1 --strategy auto --strategy '[2-4-5-6]' --strategy sequential --batch-size 2 --batch-size 1 "
        f"--batch-size 2 --repeats 1 --seed 3 --out {out} --json {tmp_path}/copy.json"
    )
    assert (result.code, result.err) == (0, "")
    assert sorted(os.listdir(out)) == ["bench.json", "bench.png"]
    assert (out / "bench.json").read_bytes() == (tmp_path / "copy.json").read_bytes()
    with Image.open(out / "bench.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 900

    shown = figures(out / "bench.json")
    assert set(shown) == {
        "model", "num_tokens", "num_blocks", "dtype", "seed", "labels", "guidance", "tolerance", "report", "certify",
        "repeats", "machine", "comparisons", "predictions",
    }  # fmt: skip
    assert (shown["model"], shown["num_tokens"], shown["num_blocks"], shown["dtype"]) == ("digits-p1", 64, 4, "float32")
    assert (shown["seed"], shown["labels"], shown["certify"], shown["repeats"]) == (3, "balanced", True, 1)
    assert (shown["guidance"], shown["tolerance"], shown["report"]) == (None, None, None)
    assert shown["machine"] == machine()
    assert [entry["batch_size"] for entry in shown["comparisons"]] == [2, 1]
    flow = jf.load("digits-p1")
    for entry in shown["comparisons"]:
        size = entry["batch_size"]
        assert set(entry) == {"batch_size", "rows", "encoding_pass"}
        assert set(entry["encoding_pass"]) == {"median", "min", "max"}
        assert [row["strategy"] for row in entry["rows"]] == ["growing cache", "sequential", "auto", "[2-4-5-6]"]
        exact = jf.sample(flow, size, torch.arange(size), 3, strategy="sequential", progress=False)
        medians = {row["strategy"]: row["seconds"]["median"] for row in entry["rows"]}
        for row in entry["rows"]:
            assert set(row) == {
                "strategy", "seconds", "speed_up", "error", "network_calls", "token_evaluations",
                "evaluations_per_token", "certificate", "resolved_sequentially", "sweeps",
            }  # fmt: skip
            assert set(row["seconds"]) == {"median", "min", "max"}
            assert set(row["error"]) == {"max", "mean", "rms"}
            assert row["speed_up"] == {
                name: medians[name] / medians[row["strategy"]] for name in ("growing cache", "sequential")
            }
        growing, sequential, *others = entry["rows"]
        for name in ("network_calls", "token_evaluations", "evaluations_per_token", "certificate", "sweeps"):
            assert growing[name] is None
        assert 0 < growing["error"]["max"] < 1e-4
        assert sequential["error"] == {"max": 0, "mean": 0, "rms": 0}
        assert (sequential["evaluations_per_token"], sequential["certificate"]) == (1, None)
        for row in others:
            want = jf.sample(flow, size, torch.arange(size), 3, strategy=row["strategy"], progress=False)
            assert row["error"] == asdict(paired_error(want.images, exact.images))
            assert row["network_calls"] == want.network_calls
            assert row["token_evaluations"] == want.token_evaluations
            assert row["evaluations_per_token"] == want.token_evaluations / (size * 64 * 4)
            assert want.certificate is not None
            assert row["certificate"] == float(want.certificate.max())
            assert row["sweeps"] == [block.sweeps for block in want.stats]
            assert row["resolved_sequentially"] == want.resolved_sequentially
    assert_tables(result.out, shown)
    assert result.out.endswith(f"wrote {out}/bench.png and {out}/bench.json\n")


def assert_tables(text: str, shown: Any) -> None:
    """Every row is printed, whole, on one line, and no table is wider than the terminal."""

    def seconds(timing: Any) -> list[str]:
        return [f"{timing['median']:.3f}", f"{timing['min']:.3f}-{timing['max']:.3f}"]

    tables = re.split(r"^batch size (\d+)$", text, flags=re.MULTILINE)[1:]
    assert [int(size) for size in tables[::2]] == [entry["batch_size"] for entry in shown["comparisons"]]
    for table, entry in zip(tables[1::2], shown["comparisons"], strict=True):
        lines = table.partition("over cache, over seq.:")[0].splitlines()
        assert max(map(len, lines)) <= 80
        cells = [line.split() for line in lines]
        for row in entry["rows"]:
            ratios = [f"{row['speed_up'][name]:.2f}" for name in ("growing cache", "sequential")]
            counts = [] if row["network_calls"] is None else [f"{row['network_calls']:,}"]
            counts += [] if row["network_calls"] is None else [f"{row['evaluations_per_token']:.2f}"]
            error = f"{row['error']['max']:.1e}" if row["error"]["max"] else "0"
            residual = [] if row["certificate"] is None else [f"{row['certificate']:.1e}"]
            assert [*row["strategy"].split(), *seconds(row["seconds"]), *ratios, *counts, error, *residual] in cells
        assert ["encoding", "pass", *seconds(entry["encoding_pass"])] in cells


def rows_of(path: Path) -> dict[str, Any]:
    (entry,) = figures(path)["comparisons"]
    return {row["strategy"]: row for row in entry["rows"]}


def test_settings_reach_the_library(run: Any, tmp_path: Path) -> None:
    result = run(
        f"--model model --strategy jacobi --batch-size 3 --repeats 1 --labels 0,2 {GUIDED} --dtype float64 "
        f"--tolerance 1e-6 --out {tmp_path}"
    )
    assert (result.code, result.err) == (0, "")
    shown = figures(tmp_path / "bench.json")
    assert shown["guidance"] == asdict(GUIDANCE)
    assert (shown["tolerance"], shown["labels"], shown["dtype"]) == (1e-6, "0,2", "float64")
    rows, flow = rows_of(tmp_path / "bench.json"), jf.load("./model", dtype="float64")
    draw = partial(jf.sample, flow, 3, torch.tensor([0, 2, 0]), guidance=GUIDANCE, progress=False)
    want, exact = draw(strategy="jacobi", tolerance=1e-6), draw(strategy="sequential")
    assert rows["jacobi"]["error"] == asdict(paired_error(want.images, exact.images))
    assert 0 < rows["jacobi"]["certificate"] <= 1e-6
    assert rows["growing cache"]["error"]["max"] < 1e-10


def test_no_certify(run: Any, tmp_path: Path) -> None:
    result = run(f"--model model --strategy jacobi --batch-size 2 --repeats 1 --no-certify --out {tmp_path}")
    assert (result.code, result.err) == (0, "")
    assert figures(tmp_path / "bench.json")["certify"] is False
    row = rows_of(tmp_path / "bench.json")["jacobi"]
    want = jf.sample(jf.load("./model"), 2, torch.arange(2), strategy="jacobi", certify=False, progress=False)
    assert row["certificate"] is None
    assert row["network_calls"] == want.network_calls


def test_a_tolerance_is_for_the_strategies_that_have_one(run: Any, tmp_path: Path) -> None:
    result = run(
        "--model model --strategy jacobi-2 --strategy window:4 --strategy window.json --batch-size 2 --repeats 1 "
        f"--tolerance 1e-5 --out {tmp_path}"
    )
    assert (result.code, result.err) == (0, "")
    rows = rows_of(tmp_path / "bench.json")
    assert rows["window:4"]["certificate"] <= 1e-5
    assert rows["window.json"]["certificate"] <= 1e-5 < rows["jacobi-2"]["certificate"]
    assert run(f"--model model --strategy window.json --batch-size 2 --repeats 1 --out {tmp_path}").code == 0
    assert 1e-5 < rows_of(tmp_path / "bench.json")["window.json"]["certificate"] <= 1e-2


def test_a_report_gives_the_guesses_of_named_strategies(run: Any, tmp_path: Path) -> None:
    result = run(
        f"--model model --report report.json --strategy jacobi-3 --strategy window.json --batch-size 2 --repeats 1 "
        f"--out {tmp_path}"
    )
    assert (result.code, result.err) == (0, "")
    assert figures(tmp_path / "bench.json")["report"] == "report.json"
    rows, flow = rows_of(tmp_path / "bench.json"), jf.load("./model")
    draw = partial(jf.sample, flow, 2, torch.arange(2), progress=False)
    exact = draw(strategy="sequential").images
    plans = {"jacobi-3": jf.Strategy.parse("jacobi-3", jf.Report.load("report.json")), "window.json": "window.json"}
    for name, plan in plans.items():
        assert rows[name]["error"] == asdict(paired_error(draw(strategy=plan).images, exact))
    assert rows["jacobi-3"]["error"] != asdict(paired_error(draw(strategy="jacobi-3").images, exact))


def test_other_guidance_than_the_report_s_is_said(run: Any, tmp_path: Path) -> None:
    result = run(
        "--model model --report report.json --guidance 1 --strategy jacobi-2 --batch-size 1 --repeats 1 "
        f"--out {tmp_path}"
    )
    assert result.code == 0
    assert result.err == "warning: --report report.json: calibrated under other guidance; it may start far off\n"


def test_the_baselines_alone(run: Any, tmp_path: Path) -> None:
    result = run(f"--model model --strategy sequential --batch-size 2 --repeats 1 --out {tmp_path}")
    assert (result.code, result.err) == (0, "")
    assert list(rows_of(tmp_path / "bench.json")) == ["growing cache", "sequential"]
    assert sorted(os.listdir(tmp_path)) == ["bench.json", "bench.png"]


def test_lost_samples_stay_json_and_are_drawn(run: Any, tmp_path: Path) -> None:
    flow = jf.load("./model")
    flow.blocks[0].proj_out.bias[:4] = 200  # exp(200) overflows float32: so does the exact inverse
    flow.save_pretrained(tmp_path / "overflowing")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run(f"--model {tmp_path}/overflowing --strategy jacobi --batch-size 2 --repeats 1 --out {tmp_path}")
    assert result.code == 0
    assert all("the exact inverse itself overflows" in line for line in result.err.splitlines())
    rows = rows_of(tmp_path / "bench.json")
    assert rows["jacobi"]["error"]["max"] == 0  # both answers say that there is none
    assert rows["jacobi"]["certificate"] is None
    assert rows["growing cache"]["error"]["max"] is None  # it does not say so


def test_names_in_square_brackets_are_no_markup(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = jf.load("./model")
    plan = jf.Strategy.uniform(jf.Solver(jf.Whole()), 2)
    monkeypatch.chdir(tmp_path)
    flow.save_pretrained("[/red]")
    plan.save("[bold]$x.json")
    result = run("--model './[/red]' --strategy '[bold]$x.json' --batch-size 1 --repeats 1 --out '[bold]/[/red]'")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("./[/red] on ")
    assert "\n[bold]$x.json " in result.out
    assert "wrote [bold]/[/red]/bench.png and [bold]/[/red]/bench.json\n" in result.out


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("--repeats 0", "--repeats 0: give a positive number of rounds"),
        ("--batch-size 4 --batch-size 0", "--batch-size 0: give a positive number of images"),
        ("--batch-size -2", "--batch-size -2: give a positive number of images"),
        ("--batch-size many", "Invalid value for '--batch-size'.*; see .*bench --help"),
        ("--strategy nonsense", "strategy 'nonsense': unknown; give auto, sequential, .*"),
        ("--strategy auto --strategy '[7-4-5-6]'", r"strategy '\[7-4-5-6\]': Stack names block 7, the flow has 0 to 1"),
        ("--strategy gs-jacobi:17", "strategy 'gs-jacobi:17': .*more segments than there are tokens, 16"),
        ("--strategy missing.json", "strategy missing.json: cannot be read .*"),
        ("--strategy broken.json", "strategy broken.json: .*"),
        ("--strategy five.json", "strategy for 5 blocks, but the flow has 2"),
        ("--strategy segments.json", ".*17.*16.*"),
        ("--strategy theirs.json", "the strategy was made for .*"),
        ("--tolerance -1", ".*-1.*"),
        ("--tolerance nan", ".*nan.*"),
        ("--strategy jacobi-3 --tolerance 1e-4", "--tolerance 0.0001: every strategy stops .*; leave it out"),
        ("--report missing.json", ".*missing.json.*"),
        ("--report broken.txt", ".*broken.txt.*"),
        ("--model other --report report.json", ".*report.*"),
        ("--model nowhere/to/be/found", ".*nowhere/to/be/found.*"),
        ("--labels 3", r"label 3: this flow has classes 0 to 2 \(below 0: no class\)"),
        ("--labels cats", "--labels cats: give .*"),
        ("--guidance -1", "guidance weight -1.0: give .*"),
        ("--guidance-on nothing --guidance 1", "guidance on 'nothing': give .*"),
        ("--device nowhere", "--device nowhere: not available here; give cpu"),
        ("--dtype int8", ".*int8.*"),
        ("--seed -1", "Invalid value for '--seed'.*"),
        ("--out file", "--out file: cannot write there .*"),
        ("--json missing/copy.json", "--json missing/copy.json: give a file in a folder that exists"),
        ("--unheard-of", "No such option.*; see .*bench --help"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(line: str, error: str, run: Any, folder: Path) -> None:
    before = sorted(str(path) for path in folder.rglob("*"))
    model = "" if "--model" in line else "--model model "
    result = run(f"{model}{line}")
    assert result.code == 2
    assert re.fullmatch(rf"error: {error}\n", result.err), result.err
    assert "batch size" not in result.out
    assert sorted(str(path) for path in folder.rglob("*")) == before


@pytest.mark.parametrize("problem", [MemoryError(), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_ends_early_leaves_no_file(
    problem: BaseException, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise problem

    place = os if isinstance(problem, OSError) else "jacobiflow.cli.bench"
    monkeypatch.setattr(place, "replace", fail) if place is os else monkeypatch.setattr(f"{place}.compare", fail)
    result = run(f"--model model --strategy jacobi-1 --batch-size 1 --repeats 1 --out {tmp_path}")
    assert result.code == (130 if isinstance(problem, KeyboardInterrupt) else 2)
    assert result.err.count("\n") == 1
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------------- what the benchmarks use


def make_comparison(batch_size: int, seconds: dict[str, float], error: float = 1e-3) -> Comparison:
    rows = (
        Row(name, Timing(value, value / 2, value * 3), Error(0.0 if name == "sequential" else error, 0.0, 0.0), None)
        for name, value in seconds.items()
    )
    return Comparison(batch_size, tuple(rows), Timing(0.01, 0.01, 0.02))


def test_speed_ups_are_ratios_of_medians() -> None:
    found = make_comparison(4, {"growing cache": 8.0, "sequential": 4.0, "auto": 1.0})
    assert found.speed_up(found.row("auto"), "growing cache") == 8
    assert found.speed_up(found.row("auto"), "sequential") == 4
    assert found.speed_up(found.row("growing cache"), "sequential") == 0.5
    assert found.to_json()["rows"][2]["speed_up"] == {"growing cache": 8, "sequential": 4}
