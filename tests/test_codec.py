"""JSON of dataclasses, tensors and registered pieces, by the strategies that hold all of them."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from invented import GUIDANCE, Stretched, make_report
from running import put

import jacobiflow as jf
from jacobiflow import codec
from jacobiflow.solvers import Given, Stopping
from jacobiflow.strategy import Prediction

some = settings(max_examples=50, deadline=None, derandomize=True)

counts, positive = st.integers(1, 10**6), st.floats(0, 1e30)
float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def tensors(*shape: int) -> st.SearchStrategy[torch.Tensor]:
    values = st.lists(float32, min_size=math.prod(shape), max_size=math.prod(shape))
    return values.map(lambda numbers: torch.tensor(numbers, dtype=torch.float32).reshape(shape))


guesses = st.one_of(
    st.just(jf.Latent()), st.just(jf.Zeros()), st.builds(jf.MeanAffine, tensors(2, 3), tensors(2, 3)),
    st.builds(jf.CausalLinear, tensors(2, 3, 3), tensors(2, 3)),
)  # fmt: skip
solvers = st.builds(
    jf.Solver,
    st.sampled_from([jf.Sequential(), jf.Whole()]) | st.builds(jf.Segments, counts) | st.builds(jf.Window, counts),
    guesses,
    st.builds(Stopping, st.none() | positive, counts, st.none() | positive) | st.builds(jf.Tolerance, positive),
    st.just(jf.Plain()) | st.builds(jf.Chord, tensors(2, 3, 3)),
    st.integers(0, 9),
)
each = st.lists(counts, min_size=1, max_size=5).map(
    lambda counts: jf.Solver(jf.Segments(len(counts)), stopping=jf.MaxSweeps(counts))
)
texts = st.text(st.characters(codec="utf-8"), max_size=9)
predictions = st.builds(
    Prediction, texts, counts, st.sampled_from([None, GUIDANCE]), positive, positive, positive, positive
)


@given(
    solvers=st.lists(solvers | each, min_size=1, max_size=4), rest=st.tuples(*map(st.none().__or__, (
        texts, positive, predictions,
    ))),
)  # fmt: skip
@some
def test_json_and_back(solvers: list[jf.Solver], rest: Any) -> None:
    strategy = jf.Strategy(tuple(solvers), *rest)
    back = jf.Strategy.from_json(json.loads(json.dumps(strategy.to_json(), allow_nan=False)))
    assert back == strategy
    assert hash(back) == hash(strategy)
    assert (back.fingerprint, back.tolerance, back.prediction) == rest
    assert back.to_json() == strategy.to_json()


def array_json(values: Any) -> dict[str, Any]:
    """What stands for an array in JSON, built without the library."""
    array = np.asarray(values, "<f4")
    return {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode()}


def test_the_form_and_the_bits_of_a_tensor() -> None:
    """Little-endian float32 in base64, row after row: negative zero, subnormal, largest, no short decimal form."""
    values = torch.tensor([[0.0, -0.0, 1e-45, -1.1754944e-38], [3.4028235e38, 0.1, -1 / 3, 1e-10]])
    for given_ in (values, values.double(), values.T.contiguous().T):
        assert codec.encode(given_) == array_json(values.numpy())
    back = codec.decode(torch.Tensor, array_json(values.numpy()))
    assert back.numpy().tobytes() == values.numpy().tobytes()
    back.add_(1)  # a tensor of its own, that can be written to


def test_the_form_of_a_solver() -> None:
    """An early stop stands there only where there is one."""
    plain = {"kind": "plain"}
    assert codec.encode(jf.Solver(jf.Segments(2), jf.Zeros(), jf.MaxSweeps((7, 4)), coarse=3)) == {
        "partition": {"kind": "segments", "count": 2}, "guess": {"kind": "zeros"}, "correction": plain,
        "stopping": {"atol": None, "max_sweeps": [7, 4]}, "coarse": 3,
    }  # fmt: skip
    assert codec.encode(jf.Solver(stopping=jf.EarlyStop(0.5))) == {
        "partition": {"kind": "whole"}, "guess": {"kind": "latent"}, "correction": plain,
        "stopping": {"atol": None, "max_sweeps": None, "ebound": 0.5}, "coarse": 0,
    }  # fmt: skip


def test_a_registered_class_has_a_json_form_by_its_name() -> None:
    stretched = Stretched(5, 1)
    assert codec.encode(stretched) == {"kind": "Stretched", "first": 5, "then": 1}
    assert codec.decode(jf.Partition, codec.encode(stretched)) == stretched
    for value in ({"first": 5}, {"kind": "Stretched", "first": 5}):  # what is missing takes its default
        assert codec.decode(Stretched, value) == Stretched(5, 2)
    with pytest.raises(ValueError, match="here: kind 'whole': Stretched wanted"):
        codec.decode(Stretched, {"kind": "whole", "first": 5}, "here")
    with pytest.raises(ValueError, match=r"(?s)Given.*has no JSON form: register its class under a name"):
        codec.encode(Given(torch.zeros(1, 2, 3)))
    with pytest.raises(ValueError, match="'Stretched': the name of Stretched; give Other another"):
        jf.register("Stretched")(type("Other", (jf.Partition,), {}))
    with pytest.raises(TypeError, match="int: derive it from one of Guess, Partition, Correction to register it"):
        jf.register("number")(int)


PLAN = jf.Strategy(
    (
        jf.Solver(jf.Segments(4), jf.Zeros(), Stopping(1e-3, 5)),
        jf.Solver(jf.Segments(3), jf.MeanAffine(torch.ones(2, 2), torch.zeros(2, 2)), jf.MaxSweeps((5, 3, 2))),
    ),
    "f" * 64, 1e-3, Prediction("cpu", 4, GUIDANCE, 1.0, 2.0, 1e-4, 0.0),
).to_json()  # fmt: skip
BLOCK: list[Any] = ["blocks", 0]
COUNTS: list[Any] = ["blocks", 1, "stopping", "max_sweeps"]
ARRAY: list[Any] = ["blocks", 1, "guess", "log_scale"]
BROKEN: list[tuple[list[Any], Any, str]] = [
    (BLOCK, "window", "block 0: 'window' is no object"),
    ([*BLOCK, "speed"], 3, "block 0: 'speed' unknown"),
    ([*BLOCK, "partition", "kind"], "halves", r"block 0\.partition: kind 'halves': one of sequential, whole"),
    ([*BLOCK, "partition", "kind"], ["segments"], r"block 0\.partition: kind"),
    ([*BLOCK, "partition", "count"], 0, r"block 0\.partition.*0"),
    ([*BLOCK, "partition", "count"], 2.5, r"block 0\.partition\.count: 2\.5 is no int"),
    ([*BLOCK, "partition"], {"kind": "segments"}, r"block 0\.partition: 'count' missing"),
    ([*BLOCK, "stopping", "kind"], "x", r"block 0\.stopping: 'kind' unknown"),
    ([*BLOCK, "stopping", "atol"], math.nan, r"block 0\.stopping.*nan"),
    ([*BLOCK, "coarse"], True, r"block 0\.coarse: True is no int"),
    (COUNTS, [5, 3], "block 1.*2 sweep counts"),
    (COUNTS, [5, [3], 2], r"block 1\.stopping\.max_sweeps\[1\]"),
    ([*ARRAY, "float32"], "AAAA", r"block 1\.guess\.log_scale"),  # three bytes
    ([*ARRAY, "float32"], array_json(np.ones((2, 2)))["float32"] + "\n", "block 1"),
    ([*ARRAY, "shape"], [-2, -2], r"block 1.*shape \[-2, -2\]"),
    ([*ARRAY, "shape"], [10**30, 2], "block 1"),
    ([*ARRAY, "extra"], 1, "block 1.*entries shape, float32, extra"),
    (ARRAY, array_json(np.ones((2, 3))), r"block 1.*\(2, 3\)"),
    (ARRAY, array_json([[1, math.nan], [1, 1]]), "block 1.*NaN"),
    (["prediction"], {}, "prediction: .* missing"),
    (["prediction", "guidance", "weight"], -1, r"prediction\.guidance.*-1"),
    (
        ["prediction", "guidance", "on"],
        "colour",
        r"prediction\.guidance\.on: 'colour': one of 'both', 'scale', 'shift' wanted",
    ),
    (["prediction", "seconds"], 10**400, r"prediction\.seconds: .* is no float"),
]


@pytest.mark.parametrize(("path", "new", "message"), BROKEN, ids=[f"{path}={new}"[:70] for path, new, _ in BROKEN])
def test_broken_json_is_one_error_that_names_the_place(path: list[Any], new: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        jf.Strategy.from_json(put(PLAN, path, new))


array_jsons = st.builds(
    lambda shape, fill: array_json(np.full(shape, fill, "<f4")), st.lists(st.integers(0, 3), max_size=3), float32
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | array_jsons,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("kind"), inner, max_size=3),
    max_leaves=5,
)


@given(place=st.sampled_from([[], *(path for path, _, _ in BROKEN)]), new=any_json)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_json_of_any_kind_is_read_as_it_stands_or_refused(place: list[Any], new: Any) -> None:
    value = put(PLAN, place, new) if place else new
    try:
        strategy = jf.Strategy.from_json(value)
    except ValueError:
        return
    assert strategy.to_json() == json.loads(json.dumps(value), parse_constant=lambda name: None)


@pytest.mark.parametrize("place", [["settings", "norm"], ["metrics"]])
def test_a_norm_that_there_is_not_is_refused(place: list[str]) -> None:
    """In a report, where the numbers of each norm stand under its name."""
    report = make_report([1, 1])
    value = json.loads(json.dumps(report.to_json()))
    assert jf.Report.from_json(value) == report
    for norm in ("7", "nuclear"):
        new = norm if place[0] == "settings" else {**value["metrics"], norm: value["metrics"]["2"]}
        with pytest.raises(ValueError, match=rf"{place[-1]}: '{norm}': one of '?2'?, '?fro'?, '?1'? wanted"):
            jf.Report.from_json(put(value, place, new))
