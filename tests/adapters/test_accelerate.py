"""`jf.accelerate` against the libraries' own inverses: the same bits, never more passes, nothing else changed."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import nflows.transforms
import pytest
import torch
import zuko
from hypothesis import given, settings
from hypothesis import strategies as st
from library_flows import CASES, MAIN, WITHOUT_CONTEXT, ZUKO, Case, Chain, angles, counted, normal, same_bits
from torch import Tensor, nn

import jacobiflow as jf

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 3
DTYPES = (torch.float32, torch.float64)


def both(case: Case, flow: nn.Module, y: Tensor, context: Tensor | None = None, tolerance: float = 0.0) -> Any:
    """The library's answer, the accelerated one, its handle, and the counted passes of both."""
    with counted(flow) as own:
        expected = case.invert(flow, y, context)
    with jf.accelerate(flow, tolerance) as done, counted(flow) as calls:
        found = case.invert(flow, y, context)
    assert done.passes == calls
    assert calls.keys() == own.keys()
    assert all(calls[name] <= own[name] for name in own)
    return expected, found, done, own


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max()) if a.numel() else 0.0


# ---------------------------------------------------------------------------------------------------- identical bits


@pytest.mark.parametrize("context", [0, CONTEXT])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_tolerance_0_gives_the_bits_of_the_library(name: str, dtype: torch.dtype, context: int) -> None:
    if context and name in WITHOUT_CONTEXT:
        pytest.skip("the library has no such flow")
    case = CASES[name]
    flow = case.make(context, dtype=dtype)
    shapes = [(), (1,), (7,), (3, 5)] if case.library == "zuko" else [(1,), (7,)]
    shapes = shapes[::3] if "UNAF" in name else shapes  # which is slow
    for shape in shapes:
        y = case.inputs(*shape, case.features, seed=len(shape), dtype=dtype)
        c = normal(*shape, context, seed=1, dtype=dtype) if context else None
        with torch.no_grad():
            expected, found, done, own = both(case, flow, y, c)
        assert same_bits(expected, found)
        assert len(expected) == len(found)
        assert all(x.isfinite().all() for x in expected)
        assert float(expected[0].abs().max()) < 1e3
        library_passes = {"zuko MAF coupling": 2, "zuko MAF five passes": 5, "zuko MAF adjacency": 8}
        assert set(own.values()) == {library_passes.get(name, case.features)}
        if case.features == 24 and name not in library_passes and dtype == torch.float32:
            assert all(2 < count < case.features for count in done.passes.values())


@pytest.mark.parametrize("name", CASES)
def test_with_gradients_the_values_are_the_bits_of_the_library(name: str) -> None:
    case = CASES[name]
    flow = case.make()
    expected, found, *_ = both(case, flow, case.inputs(5, case.features))
    assert same_bits(expected, found)
    assert [x.requires_grad for x in expected] == [x.requires_grad for x in found]


@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["MAF", "NSF", "MAF adjacency"])
@pytest.mark.parametrize(
    ("batch", "context"), [((), (7,)), ((7,), ()), ((3, 1), (5,)), ((5,), (3, 1)), ((1,), (4,)), ((3, 5), (5,))]
)
def test_zuko_contexts_broadcast(
    name: str, batch: tuple[int, ...], context: tuple[int, ...], grad: bool, tolerance: float
) -> None:
    case = ZUKO[name]
    flow = case.make(CONTEXT, dtype=torch.float64)
    y, c = normal(*batch, 24, dtype=torch.float64), normal(*context, CONTEXT, seed=1, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        expected, found, *_ = both(case, flow, y, c, tolerance)
    assert found[0].shape == (*torch.broadcast_shapes(batch, context), 24)
    assert same_bits(expected, found) if tolerance == 0 else worst(expected[0], found[0]) < 1e-6


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
def test_inputs_of_any_strides(grad: bool, tolerance: float) -> None:
    case = ZUKO["MAF"]
    flow = case.make(CONTEXT, dtype=torch.float64)
    c = normal(5, 3, CONTEXT, dtype=torch.float64).transpose(0, 1)
    views = [
        normal(24, 3, 5, dtype=torch.float64).permute(1, 2, 0),
        normal(5, 3, 24, dtype=torch.float64).transpose(0, 1),
        normal(3, 5, 48, dtype=torch.float64)[..., ::2],
        normal(24, dtype=torch.float64).expand(3, 5, 24),
    ]
    with torch.set_grad_enabled(grad):
        for y in views:
            for context in (None, c):
                used = case.make(dtype=torch.float64) if context is None else flow
                before = y.clone()
                expected, found, *_ = both(case, used, y, context, tolerance)
                assert same_bits(expected, found) if tolerance == 0 else worst(expected[0], found[0]) < 1e-6
                assert torch.equal(y, before)


@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
def test_inputs_of_another_precision_than_the_weights(tolerance: float) -> None:
    case = ZUKO["MAF"]
    flow, y, c = case.make(CONTEXT, dtype=torch.float64), normal(4, 24), normal(4, CONTEXT, dtype=torch.float64)
    with torch.no_grad():
        expected, found, *_ = both(case, flow, y, c, tolerance)
    assert found[0].dtype == torch.float64
    assert same_bits(expected, found) if tolerance == 0 else worst(expected[0], found[0]) < 1e-6


@pytest.mark.parametrize("name", ["MAF", "NSF", "NCSF", "BPF", "NAF"])
@pytest.mark.parametrize("call", ["sample", "rsample", "sample_and_log_prob", "rsample_and_log_prob", "log_prob"])
def test_zuko_distributions_give_the_same_bits(name: str, call: str) -> None:
    case = ZUKO[name]
    flow, c = case.make(CONTEXT), normal(4, CONTEXT)

    def drawn() -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        if call == "log_prob":
            return (flow(c).log_prob(angles(6, 4, case.features)),)
        if not hasattr(flow(c), call):
            pytest.skip("this version of zuko has it not")
        out = getattr(flow(c), call)((3,))
        return (*(out if isinstance(out, tuple) else (out,)), torch.get_rng_state())

    expected = drawn()
    with jf.accelerate(flow):
        assert same_bits(expected, drawn())


@pytest.mark.parametrize("name", ["affine", "rational tails", "user's own"])
def test_nflows_distributions_give_the_same_bits(name: str) -> None:
    parts = [CASES[f"nflows {name}"].make(CONTEXT, seed=seed) for seed in range(2)]
    base = nflows.distributions.StandardNormal([24])
    flow = nflows.flows.Flow(nflows.transforms.CompositeTransform(parts), base).eval()
    c = normal(2, CONTEXT)

    def drawn() -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        sampled = flow.sample(3, context=c)
        return sampled, *flow.sample_and_log_prob(3, context=c), flow.log_prob(sampled[:, 0], context=c)

    expected = drawn()
    with jf.accelerate(flow) as done:
        found = drawn()
    assert same_bits(expected, found)
    assert all(2 < count < 24 for count in done.passes.values())


@pytest.mark.parametrize("name", ["affine", "spline", "circular"])
def test_normflows_models_give_the_same_bits(name: str) -> None:
    import normflows

    case = CASES[f"normflows {name}"]
    base = normflows.distributions.DiagGaussian(24, trainable=False)
    model = normflows.NormalizingFlow(base, [case.make(seed=seed) for seed in range(2)]).eval()

    def drawn() -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        y = case.inputs(5, 24)
        return *model.sample(4), model.log_prob(y), model.forward(y), model.inverse(y), model.forward_kld(y)

    expected = drawn()
    with jf.accelerate(model) as done:
        assert same_bits(expected, drawn())
    assert done.passes


def test_an_inverse_flow_of_zuko_has_its_slow_side_in_the_density() -> None:
    maf = ZUKO["MAF"].make(CONTEXT)
    iaf = zuko.lazy.Flow([t.inv for t in maf.transform.transforms], maf.base).eval()
    x, c = normal(5, 24), normal(5, CONTEXT)
    expected = iaf(c).log_prob(x)
    with jf.accelerate(iaf) as done, counted(iaf) as calls:
        found = iaf(c).log_prob(x)
    assert same_bits(expected, found)
    assert len(done.passes) == 2
    assert all(2 < count < 24 for count in done.passes.values())
    assert sum(calls.values()) <= sum(done.passes.values()) + 2  # and the log-determinant of each


configurations = st.tuples(
    st.integers(2, 12),
    st.integers(0, 3),
    st.lists(st.integers(3, 20), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 10**6),
    st.sampled_from([0.5, 1.0, 2.0, 3.0]),
    st.sampled_from([None, 1, 2, 3, 40]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(configurations)
def test_any_small_maf_keeps_its_bits(configuration: tuple[Any, ...]) -> None:
    features, context, hidden, randperm, seed, gain, passes = configuration
    build = lambda d, c: zuko.flows.MAF(  # noqa: E731
        d, c, transforms=2, hidden_features=[max(h, features) for h in hidden], randperm=randperm, passes=passes
    )
    if passes == 1:
        return  # without dependencies zuko has no such network
    case = Case("zuko", build, gain)
    flow = case.make(context, features, seed=seed)
    y, c = normal(4, features, seed=seed), normal(4, context, seed=seed + 1) if context else None
    with torch.no_grad():
        expected, found, _, own = both(case, flow, y, c)
    assert same_bits(expected, found)
    assert set(own.values()) == {min(passes or features, features)} or passes not in (None, 2)


# ------------------------------------------------------------------------------------------------- counts of passes


@pytest.mark.parametrize("tolerance", [0.0, 1e-12, 1e-3, 10.0])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("features", [1, 2, 3, 24])
@pytest.mark.parametrize("name", MAIN)
def test_never_more_passes_than_the_library(name: str, features: int, grad: bool, tolerance: float) -> None:
    case = CASES[name]
    if case.library == "zuko" and features == 1:
        pytest.skip("zuko makes no masked autoregressive transform of one feature")
    flow, y = case.make(features=features), case.inputs(5, features)
    with torch.set_grad_enabled(grad):
        expected, found, done, own = both(case, flow, y, None, tolerance)  # compares the counts
    assert set(own.values()) == {features}
    assert all(1 <= count <= features for count in done.passes.values())
    if tolerance <= 1e-12 and features <= 3:
        assert worst(expected[0], found[0]) < 1e-4
    if tolerance == 10:
        assert all(count <= 3 for count in done.passes.values())


def test_a_looser_tolerance_takes_no_more_passes() -> None:
    case = CASES["zuko MAF"]
    flow, y = case.make(), normal(9, 24)
    counts = []
    with torch.no_grad():
        for tolerance in (0.0, 1e-6, 1e-4, 1e-2, 1.0):
            *_, done, _ = both(case, flow, y, None, tolerance)
            counts.append(done.passes["transform.transforms.1"])  # the first to be inverted: the same input each time
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]


@pytest.mark.parametrize("grad", [False, True])
def test_coupling_takes_its_two_passes(grad: bool) -> None:
    case = ZUKO["MAF coupling"]
    with torch.set_grad_enabled(grad):
        *_, done, own = both(case, case.make(), normal(3, 24))
    assert set(done.passes.values()) == set(own.values()) == {2}


def test_passes_of_a_transform_that_had_no_inverse_are_not_there() -> None:
    case = CASES["zuko MAF"]
    flow = case.make()
    with jf.accelerate(flow) as done:
        assert done.passes == {}
        flow().log_prob(normal(3, 24))
        assert done.passes == {}
        flow.transform.transforms[1]().inv(normal(3, 24))
        assert list(done.passes) == ["transform.transforms.1"]


# ------------------------------------------------------------------------------------------------------- tolerances


def jacobian(case: Case, flow: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    """dg/dx of one row at its solution, from the map that the library iterates: x = g(x, y)."""
    if case.library == "zuko":
        t = flow.transform.transforms[0]
        return torch.func.jacrev(lambda x: t.meta(None, x).inv(y))(x)
    step = lambda x: flow._elementwise_inverse(y[None], flow.autoregressive_net(x[None], None))[0][0]  # noqa: E731
    return torch.func.jacrev(step)(x)


SMOOTH = {
    "zuko": Case("zuko", lambda d, c: zuko.flows.MAF(d, c, transforms=1, hidden_features=(32, 32), activation=nn.Tanh),
                 2.0),
    "nflows": CASES["nflows user's own"],
}  # fmt: skip


@pytest.mark.parametrize("tolerance", [1e-8, 1e-6, 1e-5])
@pytest.mark.parametrize("name", SMOOTH)
def test_the_error_is_the_residual_amplified(name: str, tolerance: float) -> None:
    # x = g(p) with |x - p| <= tolerance. With J = dg/dx: x - p = (J - I)(p - x*), and the error is J (p - x*).
    case = SMOOTH[name]
    flow, y = case.make(dtype=torch.float64), normal(5, 24, dtype=torch.float64)
    with torch.no_grad():
        expected, found, *_ = both(case, flow, y, None, tolerance)
    errors = (expected[0] - found[0]).abs().amax(dim=1)
    for row in range(5):
        j = jacobian(case, flow, y[row], expected[0][row]).detach()
        assert worst(j.triu(), torch.zeros_like(j)) == 0
        amplification = float((j @ torch.linalg.inv(torch.eye(24).double() - j)).abs().sum(dim=1).max())
        assert errors[row] <= 1.2 * amplification * tolerance  # 1.2: J is not constant between p and x*
    assert float(errors.max()) > 1e-3 * tolerance  # it did end early


@pytest.mark.parametrize("tolerance", [1e-9, 1e-6])
@pytest.mark.parametrize("name", CASES)
def test_errors_are_of_the_order_of_the_tolerance(name: str, tolerance: float) -> None:
    # 3e3: amplification by the steepest of these flows; the bisections of zuko answer in steps of 1e-6 themselves.
    case = CASES[name]
    context = 0 if name in WITHOUT_CONTEXT else CONTEXT
    flow = case.make(context, dtype=torch.float64)
    y = case.inputs(9, case.features, dtype=torch.float64)
    c = normal(9, context, seed=1, dtype=torch.float64) if context else None
    steps = 2e-6 if any(kind in name for kind in ("SOSPF", "BPF", "NAF")) else 0.0
    bound = 3e3 * max(tolerance, steps)
    with torch.no_grad():
        expected, found, *_ = both(case, flow, y, c, tolerance)
        with jf.accelerate(flow, tolerance):
            alone = [case.invert(flow, y[i : i + 1], None if c is None else c[i : i + 1]) for i in range(9)]
    gaps = expected[0] - found[0]
    if case.inputs is angles:
        gaps = torch.remainder(gaps + math.pi, 2 * math.pi) - math.pi  # -pi and pi are one angle
    assert float(gaps.abs().max()) <= bound
    for place, whole in enumerate(found):
        gaps = torch.cat([row[place] for row in alone]) - whole
        if case.inputs is angles and place == 0:
            gaps = torch.remainder(gaps + math.pi, 2 * math.pi) - math.pi
        assert float(gaps.abs().max()) <= 24 * bound  # a log-determinant is a sum of 24


def chain(coefficients: list[float], tolerance: float, features: int = 32) -> tuple[Chain, Tensor, Any]:
    """A chain accelerated, what it answers for rows (1, 0, 0, ...), and its handle."""
    flow = Chain()
    y = torch.zeros(len(coefficients), features, dtype=torch.float64)
    y[:, 0] = 1
    done = jf.accelerate(flow, tolerance)
    x, _ = flow.inverse(y, torch.tensor(coefficients, dtype=torch.float64)[:, None])
    return flow, x, done


def ended(coefficient: float, tolerance: float, features: int = 32) -> int:
    """The pass that ends a row of a chain: the first that changes it by no more than the tolerance."""
    return next((k for k in range(1, features + 1) if k > 1 and coefficient ** (k - 1) <= tolerance), features)


def power_series(coefficient: float, passes: int, features: int = 32) -> Tensor:
    return torch.tensor([coefficient**i if i < passes else 0.0 for i in range(features)], dtype=torch.float64)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
@pytest.mark.parametrize("hard", [0, 3, 7])
def test_a_hard_row_goes_on_alone(hard: int, tolerance: float) -> None:
    coefficients = [0.1] * 8
    coefficients[hard] = 0.7
    flow, x, done = chain(coefficients, tolerance)
    easy, last = ended(0.1, tolerance), ended(0.7, tolerance)
    assert 2 < easy < last < 32
    assert done.passes == {"": last}
    assert flow.autoregressive_net.contexts == [coefficients] * easy + [[0.7]] * (last - easy)
    for row, coefficient in enumerate(coefficients):
        torch.testing.assert_close(x[row], power_series(coefficient, ended(coefficient, tolerance)), rtol=0, atol=1e-15)


def test_contexts_follow_their_rows() -> None:
    coefficients = [0.9, 0.01, 0.5, 0.3, 0.01, 0.7, 0.1, 0.01, 0.6]
    flow, x, done = chain(coefficients, 1e-3)
    seen = flow.autoregressive_net.contexts
    assert len(seen) == done.passes[""] == 32  # 0.9^31 > 1e-3
    assert all(now == [c for c in before if c in now] for before, now in itertools.pairwise(seen))  # in their order
    assert sorted({len(rows) for rows in seen}, reverse=True)[0] == 9
    assert len(seen[-1]) == 1
    for row, coefficient in enumerate(coefficients):
        passes = ended(coefficient, 1e-3)
        error = (x[row] - power_series(coefficient, 32)).abs().max()
        assert float(error) <= coefficient**passes  # at least as good as alone: what pass `passes + 1` would change
        assert max(k + 1 for k, rows in enumerate(seen) if coefficient in rows) >= passes


def test_a_row_does_not_end_before_it_is_within_the_tolerance() -> None:
    # Entry 1 needs pass 2, whatever entry 0 does: a row may not end with the change of one entry only.
    flow, x, _ = chain([1.0] * 4, 1e-3)
    assert torch.equal(x, torch.ones_like(x))
    assert len(flow.autoregressive_net.contexts) == 32


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 11])
@pytest.mark.parametrize("name", ["zuko MAF", "zuko NSF", "nflows affine", "nflows rational tails", "normflows affine"])
def test_rows_that_are_not_numbers_stay_alone(name: str, place: int, bad: float, tolerance: float) -> None:
    case = CASES[name]
    flow = case.make(CONTEXT, dtype=torch.float64)
    y, c = normal(6, 24, dtype=torch.float64), normal(6, CONTEXT, seed=1, dtype=torch.float64)
    y[2, place] = bad
    with torch.no_grad():
        try:
            expected = case.invert(flow, y, c)
        except Exception as error:
            with jf.accelerate(flow, tolerance), pytest.raises(type(error)):
                case.invert(flow, y, c)
            return
        expected, found, done, _ = both(case, flow, y, c, tolerance)
    if tolerance == 0:
        assert same_bits(expected, found)
        if name != "zuko NSF":  # where the sign of a NaN changes with each pass
            assert all(count < 24 for count in done.passes.values())
        return
    others = [0, 1, 3, 4, 5]
    for own, other in zip(expected, found, strict=True):
        assert worst(own[others], other[others]) < 1e-3
        assert torch.equal(own[2].isfinite(), other[2].isfinite())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine", "normflows affine"])
def test_empty_batches(name: str, tolerance: float, grad: bool) -> None:
    case = CASES[name]
    flow = case.make(CONTEXT)
    y, c = torch.zeros(0, 24, requires_grad=grad), torch.zeros(0, CONTEXT)
    with torch.set_grad_enabled(grad):
        expected, found, *_ = both(case, flow, y, c, tolerance)
    assert [x.shape for x in expected] == [x.shape for x in found]
    if grad:
        assert sum(x.sum() for x in found).requires_grad
        gradients = torch.autograd.grad(sum(x.sum() for x in found), [y, *flow.parameters()], allow_unused=True)
        assert gradients[0].shape == y.shape
        assert all(g is None or not g.any() for g in gradients)


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_empty_batches_of_several_dimensions(tolerance: float) -> None:
    case = ZUKO["MAF"]
    flow = case.make(CONTEXT)
    with torch.no_grad():
        for batch, context in (((0, 5), (5,)), ((3, 0), ()), ((5, 1), (0,))):
            expected, found, *_ = both(case, flow, torch.zeros(*batch, 24), torch.zeros(*context, CONTEXT), tolerance)
            assert expected[0].shape == found[0].shape


# ------------------------------------------------------------------------------------------------------------ threads


def test_many_threads_on_one_flow_get_what_each_gets_alone() -> None:
    case = CASES["zuko MAF"]
    flow = case.make(CONTEXT)
    work = [(normal(3 + i % 4, 24, seed=i), normal(3 + i % 4, CONTEXT, seed=100 + i)) for i in range(32)]

    def answer(item: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            return case.invert(flow, *item)[0]

    expected = [answer(item) for item in work]
    with jf.accelerate(flow), ThreadPoolExecutor(8) as pool:
        assert same_bits(expected, list(pool.map(answer, work)))


def test_flows_of_different_tolerances_in_two_threads() -> None:
    flows = {tolerance: CASES["nflows affine"].make(CONTEXT, seed=1) for tolerance in (0.0, 1e-3, 0.3)}
    y, c = normal(5, 24), normal(5, CONTEXT)
    for tolerance, flow in flows.items():
        jf.accelerate(flow, tolerance)

    def answer(tolerance: float) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return flows[tolerance].inverse(y, c)

    alone = {tolerance: answer(tolerance) for tolerance in flows}
    assert not same_bits(alone[0.0], alone[0.3])
    order = list(flows) * 20
    with ThreadPoolExecutor(3) as pool:
        for tolerance, found in zip(order, pool.map(answer, order), strict=True):
            assert same_bits(alone[tolerance], found)
