"""The report: what it says of its figures, its JSON, and files that are none."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from calibration_problems import GUESSES, linear_flow, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from invented import make_report, small
from running import figures, put

import jacobiflow as jf
from jacobiflow import codec
from jacobiflow.calibration import Components, Metrics, Report, Trace, TuneSettings

pytestmark = pytest.mark.usefixtures("one_thread")

FLOW = linear_flow([0.15, 0.15, 2.0, 0.15, 0.15], num_classes=2)  # in float64
SHORT = jf.MeanAffine(torch.zeros(3, 1), torch.zeros(3, 1))
COUNTS: dict[str, tuple[int | None, ...]] = {"latent": (2, 4, 3), "zeros": (2, None, 3), "mean_affine": (0, 1, 7)}


@pytest.fixture(scope="module")
def report() -> Report:
    """One that has everything, infinities too."""
    few = TuneSettings((1e-2,), partitions=(jf.Whole(),), fine=(3,), coarse=(), coarse_to_tolerance=())
    found = jf.calibrate(FLOW, randn(6, 1, 3, 3), torch.tensor([0, 1, 1, -1, 0, 0]), "fro", traced=3, per_class=True)
    row = {name: Trace((math.inf, 0.0), (math.inf, 0.0), {1e-3: counts}) for name, counts in COUNTS.items()}
    last = dict.fromkeys(GUESSES, Trace((1.0,), (1.0,), {1e-3: (1, 1, 1)}))
    return replace(
        found, settings=replace(found.settings, guidance=jf.Guidance(0.5)), traces={"noise": (*(row,) * 4, last)},
        segment_traces={2: {2: (last["latent"],) * 2}},
        metrics=found.metrics | {1: Metrics(found.igm, (Components(math.inf, 1.0, 0.0),) * 5)},
        gamma=((math.inf, 1.0),) * 2 + ((1.0, 2.0),) * 3,
        tuning=jf.tune(FLOW, samples=3, settings=few, guidance=jf.Guidance(0.5), progress=False),
    )  # fmt: skip


def test_figures_are_those_in_the_norm_of_the_settings(report: Report) -> None:
    chosen, z = report.metrics["fro"], randn(2, 9, 1)
    assert (report.igm, report.crm, report.crm_percent) == (chosen.igm, chosen.crm, chosen.crm_percent)
    assert (report.components, report.tough_blocks, report.num_blocks) == (chosen.components, (2,), 5)
    for block, guess in enumerate(report.mean_affine):
        assert report.igm[block][report.best_guess(block)] == min(report.igm[block].values())
        assert report.guess(block) == report.guesses(block)[report.best_guess(block)]
        expected = z, jf.Zeros()(z), guess.log_scale.exp() * z + guess.shift
        assert all(torch.equal(g(z), x) for g, x in zip(report.guesses(block).values(), expected, strict=True))


def test_sweeps_are_over_the_samples(report: Report) -> None:
    """A sample that does not get there counts as many sweeps as tokens."""
    assert report.mean_sweeps("noise", 1e-3, "zeros") == pytest.approx((*[(2 + 9 + 3) / 3] * 4, 1))
    assert report.slowest_sweeps("noise", 1e-3, "zeros") == (9, 9, 9, 9, 1)
    best: Any = [*(COUNTS[report.best_guess(block)] for block in range(4)), (1, 1, 1)]
    means = [float(np.mean(counts)) for counts in best]
    assert report.mean_sweeps("noise", 1e-3) == pytest.approx(means)
    assert report.slowest_sweeps("noise", 1e-3) == tuple(map(max, best))
    rank = scipy.stats.spearmanr
    assert report.rank_correlation("crm") == pytest.approx(rank(report.crm, means).statistic)
    gamma = [np.mean(norms) for norms in report.gamma]
    assert report.rank_correlation("gamma") == pytest.approx(rank(gamma, means).statistic)
    with pytest.raises(ValueError, match=r"tolerance 0\.5: measured are 0\.001"):
        report.mean_sweeps("noise", 0.5)
    with pytest.raises(ValueError, match="sweeps from 'images': measured are those from noise"):
        report.slowest_sweeps("images", 1e-3)


def test_class_spread_is_the_mean_and_deviation_over_classes(report: Report) -> None:
    per_class = list(report.class_metrics.values())
    values = np.array([metrics.crm for metrics in per_class])
    ranks, percent = scipy.stats.rankdata(values, "min", axis=1), 100 * values / values.sum(axis=1, keepdims=True)
    for i, spread in enumerate(report.class_spread()):
        assert spread.rank == pytest.approx((ranks[:, i].mean(), ranks[:, i].std()))
        assert spread.percent == pytest.approx((percent[:, i].mean(), percent[:, i].std()))
        igm = np.array([[metrics.igm[i][name] for metrics in per_class] for name in GUESSES])
        for k, name in enumerate(GUESSES):
            assert spread.igm[name] == pytest.approx((igm[k].mean(), igm[k].std()))
            assert spread.wins[name] == (igm.argmin(axis=0) == k).sum()
    undefined = replace(report, class_metrics={0: Metrics(report.igm, None)}).class_spread()
    assert all((spread.rank, spread.percent) == (None, None) for spread in undefined)
    with pytest.raises(ValueError, match="per_class=True"):
        replace(report, class_metrics={}).class_spread()


def test_a_report_comes_back_from_its_file_and_fits_its_flow_only(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.save(path)
    assert (
        Report.load(path) == Report.load(str(path)) == report != replace(report, mean_affine=report.mean_affine[::-1])
    )
    figures(path)  # JSON, without NaN or infinity
    assert path.read_text().count("\n") == 1
    older = {name: entry for name, entry in report.to_json().items() if name != "tuning"}
    assert Report.from_json(older) == Report.from_json(older | {"tuning": None}) == replace(report, tuning=None)
    report.check(copy.deepcopy(FLOW).bfloat16())
    changed = copy.deepcopy(FLOW)
    changed.var[3] = 2
    with pytest.raises(ValueError, match=r"the report is of another flow.*calibrate this one"):
        report.check(changed)
    with pytest.raises(ValueError, match=r"report of blocks, tokens, channels \(3, 16, 4\), but the flow has \(2, 16"):
        make_report([1, 1, 1]).check(small())
    for text in (b"", b'{"schema', b"[]", b"{}", b'{"schema_version": 2}', b"\xff\xfe\x00", b"[" * 100_000):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"report .*report\.json: .*; make it anew with jacobiflow calibrate"):
            Report.load(path)
    with pytest.raises(ValueError, match=r"report .*: cannot be read"):
        Report.load(tmp_path)


@pytest.mark.parametrize(
    ("path", "entry", "message"),
    [
        (("settings", "norm"), 3, r"settings\.norm: 3: one of 2, 'fro', 1 wanted"),
        (("metrics",), {"3": {"igm": [], "components": None}}, "metrics: '3': one of 2, fro, 1 wanted"),
        (("metrics",), {}, "without metrics in norm 'fro'"),
        (("metrics", "2", "components"), [[1.0, 2.0, 3.0]] * 5, r"metrics\.2\.components\[0\]"),
        (("gamma",), [[1.0]], r"parts of \[1\] blocks"),
        (("settings", "guidance"), {"weight": -1.0}, r"settings\.guidance: guidance weight=-1"),
        (("traces", "noise", 0), {}, "without one of the guesses"),
        (("traces", "noise", 0, "zeros", "sweeps", "0.001"), [1.5], r"noise\[0\]\.zeros\.sweeps\.0\.001\[0\]: 1\.5"),
        (("mean_affine", 0, "shift", "float32"), "AAAA", r"mean_affine\[0\]\.shift: not an array"),
        (("num_tokens",), 8, r"mean parameters are not \(8, 1\)"),
        (("tuning",), {}, "not a tuning"),
        (("num_tokens",), 0, "num_tokens=0: give a positive"),
        (("settings", "segments"), 3, "segment_metrics are not of 3 segments"),
        (("schema_version",), 1, "report of schema_version 1: an entry is missing or of the wrong kind"),
        (("settings", "traced"), 2, "traces are not of 2 samples"),
        (("class_metrics", "0", "igm"), [], r"class_metrics\.0: metrics: components of 5 blocks or segments, IGM of 0"),
        (("metrics", "2", "igm", 0, "zeros"), -1.0, r"metrics\.2: metrics: a norm that is not 0 or positive"),
        (("traces", "noise", 0, "zeros", "sweeps"), {"0.5": [1, 1, 1]}, "of 3 samples to the same tolerances"),
        (("traces", "noise", 0, "zeros", "sweeps"), {}, r"noise\[0\]\.zeros: trace: give"),
        (("traces", "noise", 0, "zeros", "sweeps", "0.001"), [1, 2, 10], "more sweeps than there are tokens, 9"),
        (("traces", "noise", 0, "zeros", "largest"), [1.0, -1.0], r"noise\[0\]\.zeros: trace: a distance"),
        (("segment_traces",), {"7": {}}, "segment_traces are not a trace for each segment of a block"),
        (("segment_traces", "2"), {"3": []}, "segment_traces are not a trace for each segment of a block"),
        (("gamma", 0), [-1.0], "gamma is not a norm"),
        (("tuning", "num_tokens"), 8, "tuning of 5 blocks of 8 tokens, but the flow has 5 of 9"),
        (("tuning", "fingerprint"), "0", "tuning of another flow"),
        (("tuning", "blocks", 1, "guess"), codec.encode(SHORT), r"tuning, block 1: MeanAffine .*\(3, 1\)"),
        (("tuning", "blocks", 1, "runs", 0, "tolerance"), -1.0, r"runs\[0\]: tolerance=-1"),
    ],
    ids=range(28),
)
def test_an_entry_that_does_not_fit_is_named(report: Report, path: tuple[Any, ...], entry: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Report.from_json(put(report.to_json(), path, entry))


def everywhere(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all entries inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from everywhere(inner, (*path, key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.just(10**400) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_json_is_a_value_error_or_a_report(report: Report, data: st.DataObject) -> None:
    """One entry of any kind of a report, or of its tuning, is replaced."""
    value = json.loads(json.dumps(report.to_json()))
    kinds = {tuple("*" if isinstance(key, int) else key for key in path): path for path in everywhere(value)}
    try:
        found = Report.from_json(put(value, data.draw(st.sampled_from(list(kinds.values()))), data.draw(JSON)))
    except ValueError:
        return
    assert Report.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found
