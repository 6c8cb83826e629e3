"""What `jf.accelerate` leaves as it was: modules, files, random numbers, other ways to call a flow; and refusals."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import pytest
import torch
import zuko
from library_flows import BITS, CASES, MAIN, Additive, Case, counted, harder, normal, same_bits
from nflows.transforms.autoregressive import AutoregressiveTransform
from torch import Tensor, nn
from torch.autograd import forward_ad

import jacobiflow as jf

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 3
FEATURES = 24


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[Case, nn.Module, Tensor, Tensor]:
    case = CASES[name]
    y, c = case.inputs(5, FEATURES, dtype=dtype), normal(5, CONTEXT, seed=1, dtype=dtype)
    return case, case.make(CONTEXT, dtype=dtype), y, c


def classes(flow: nn.Module) -> list[type]:
    return [type(module) for module in flow.modules()]


def is_fast(case: Case, flow: nn.Module, y: Tensor, c: Tensor | None) -> bool:
    """Whether the inverse takes fewer passes than the library's."""
    with torch.no_grad(), counted(flow) as calls:
        case.invert(flow, y, c)
    assert calls
    return all(count < FEATURES for count in calls.values())


# --------------------------------------------------------------------------------------------- left to the library


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
@pytest.mark.parametrize("module_trains", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("kind", ["batch norm", "dropout"])
def test_networks_that_move_or_draw_in_training_mode(
    kind: str, residual: bool, module_trains: bool, tolerance: float, grad: bool
) -> None:
    settings = {"batch norm": {"use_batch_norm": True}, "dropout": {"dropout_probability": 0.4}}[kind]
    flow = nflows.transforms.MaskedAffineAutoregressiveTransform(8, 16, use_residual_blocks=residual, **settings)
    flow.train()
    if not module_trains:  # the network's own mode is what counts
        flow.training = False
    copied, y = copy.deepcopy(flow), normal(6, 8)
    jf.accelerate(flow, tolerance)
    answers = []
    for used in (copied, flow):
        torch.manual_seed(2)
        with torch.set_grad_enabled(grad):
            answers.append((*used.inverse(y), torch.get_rng_state(), *used.state_dict().values()))
    assert same_bits(*answers)


@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
def test_dropout_in_a_network_of_zuko(tolerance: float) -> None:
    activation = lambda: nn.Sequential(nn.ELU(), nn.Dropout(0.3))  # noqa: E731
    flow = zuko.flows.MAF(8, transforms=2, hidden_features=(16,), activation=activation).train()
    copied, y = copy.deepcopy(flow), normal(6, 8)
    jf.accelerate(flow, tolerance)
    answers = []
    for used in (copied, flow):
        torch.manual_seed(2)
        with torch.no_grad():
            answers.append((used().transform.inv(y), torch.get_rng_state()))
    assert same_bits(*answers)


@pytest.mark.parametrize("kind", ["batch norm", "dropout", "dropout of 0"])
def test_evaluation_mode_and_no_dropout_are_fast(kind: str) -> None:
    settings = {"use_batch_norm": True} if kind == "batch norm" else {"dropout_probability": 0.5 * (kind == "dropout")}
    flow = nflows.transforms.MaskedAffineAutoregressiveTransform(FEATURES, 32, **settings)
    case, y = CASES["nflows affine"], normal(5, FEATURES)
    flow.train(kind == "dropout of 0")
    with torch.no_grad():
        expected = flow.inverse(y)
        jf.accelerate(flow)
        assert is_fast(case, flow, y, None)
        assert same_bits(expected, flow.inverse(y))


@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jacrev", "jacfwd", "jvp", "vjp", "hessian"])
@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine"])
def test_function_transforms_give_what_the_library_gives(name: str, transform: str, tolerance: float) -> None:
    case = CASES[name]
    flow = case.make(features=8, dtype=torch.float64)
    y = normal(3, 8, dtype=torch.float64)
    inverse = lambda y: case.invert(flow, y[None])[0][0]  # noqa: E731
    loss = lambda y: inverse(y).pow(2).sum()  # noqa: E731
    run: Callable[[], Any] = {
        "vmap": lambda: torch.func.vmap(inverse)(y),
        "grad": lambda: torch.func.grad(loss)(y[0]),
        "jacrev": lambda: torch.func.jacrev(inverse)(y[0]),
        "jacfwd": lambda: torch.func.jacfwd(inverse)(y[0]),
        "jvp": lambda: torch.func.jvp(inverse, (y[0],), (y[1],)),
        "vjp": lambda: torch.func.vjp(inverse, y[0])[1](y[1]),
        "hessian": lambda: torch.func.hessian(loss)(y[0]),
    }[transform]
    expected = run()
    with jf.accelerate(flow, tolerance):
        assert same_bits(expected, run())


@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine"])
def test_dual_numbers(name: str) -> None:
    case = CASES[name]
    flow = case.make(features=8, dtype=torch.float64)
    y, tangent = normal(2, 3, 8, dtype=torch.float64)

    def tangents() -> tuple[Tensor, ...]:
        with forward_ad.dual_level():
            return tuple(forward_ad.unpack_dual(case.invert(flow, forward_ad.make_dual(y, tangent))[0]))

    expected = tangents()
    with jf.accelerate(flow, 1e-2):
        assert same_bits(expected, tangents())


def test_functional_calls_use_the_weights_they_are_given() -> None:
    case, flow, y, c = made("nflows affine", torch.float64)
    other = {name: 0.5 * value for name, value in flow.state_dict().items() if "mask" not in name}
    call = lambda weights: torch.func.functional_call(  # noqa: E731
        Inverse(flow), {f"flow.{name}": w for name, w in weights.items()}, (y, c)
    )
    with torch.no_grad():
        expected, plain = call(other), case.invert(flow, y, c)
        with jf.accelerate(flow):
            assert same_bits(expected, call(other))
            assert same_bits(plain, case.invert(flow, y, c))


class Inverse(nn.Module):
    """The slow side of a transform as a module."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, y: Tensor, c: Tensor | None = None) -> Any:
        return self.flow.inverse(y, c)


# ------------------------------------------------------------------------------------------------- modes of PyTorch


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MAIN)
def test_autocast(name: str, grad: bool) -> None:
    case, flow, y, c = made(name)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        try:
            expected = case.invert(flow, y, c)
        except (RuntimeError, AssertionError) as error:  # of splines that mix types
            with jf.accelerate(flow), pytest.raises(type(error)):
                case.invert(flow, y, c)
            return
        with jf.accelerate(flow) as done:
            assert same_bits(expected, case.invert(flow, y, c))
    assert all(count <= FEATURES for count in done.passes.values())


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
@pytest.mark.parametrize("name", MAIN)
def test_inference_mode(name: str, tolerance: float) -> None:
    case, flow, y, c = made(name)
    with torch.inference_mode():
        expected = case.invert(flow, y, c)
        with jf.accelerate(flow, tolerance):
            found = case.invert(flow, y, c)
    assert all(x.is_inference() for x in found)
    assert same_bits(expected, found) or tolerance > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    case, flow, y, c = made("zuko MAF")
    flow.to(dtype)
    with torch.no_grad():
        expected = case.invert(flow, y.to(dtype), c.to(dtype))
        with jf.accelerate(flow, tolerance) as done:
            found = case.invert(flow, y.to(dtype), c.to(dtype))
    assert found[0].dtype == dtype
    assert same_bits(expected, found) or tolerance > 0
    assert all(count <= FEATURES for count in done.passes.values())
    assert BITS[found[0].itemsize] == torch.int16


@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine"])
def test_compiled_callers(name: str) -> None:
    case = CASES[name]
    flow = case.make(features=6)
    y = normal(2, 6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = case.invert(flow, y)
        jf.accelerate(flow)
        torch._dynamo.reset()
        try:
            compiled = torch.compile(lambda y: case.invert(flow, y)[0] + 1, backend="eager")
        except RuntimeError as error:
            pytest.skip(f"no torch.compile here: {error}")
        assert same_bits(expected[0] + 1, compiled(y))


# -------------------------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize("name", MAIN)
def test_nothing_of_a_module_changes(name: str) -> None:
    case, flow, y, c = made(name)

    def look() -> list[Any]:
        modules = [(key, dict(module.__dict__)) for key, module in flow.named_modules()]
        weights = [(key, id(value), value.clone()) for key, value in flow.state_dict(keep_vars=True).items()]
        return [str(modules), [(key, i) for key, i, _ in weights], [w for *_, w in weights], repr(flow),
                [key for key, _ in flow.named_parameters()], [key for key, _ in flow.named_buffers()]]  # fmt: skip

    before, kinds = look(), classes(flow)
    done = jf.accelerate(flow)
    case.invert(flow, y, c)
    after = look()
    assert same_bits(before.pop(2), after.pop(2))
    assert before == after
    assert all(isinstance(module, kind) for module, kind in zip(flow.modules(), kinds, strict=True))
    assert classes(flow) != kinds
    done.restore()
    assert classes(flow) == kinds
    after = look()
    after.pop(2)
    assert before == after


def test_leaving_the_block_restores_whatever_happened() -> None:
    case, flow, y, c = made("zuko MAF")
    kinds = classes(flow)
    with jf.accelerate(flow) as done:
        assert is_fast(case, flow, y, c)
    assert classes(flow) == kinds
    assert not is_fast(case, flow, y, c)
    with pytest.raises(KeyError), jf.accelerate(flow):
        raise KeyError
    assert classes(flow) == kinds
    done.restore()
    done.restore()
    assert classes(flow) == kinds


@pytest.mark.parametrize("name", ["zuko MAF", "nflows affine"])
def test_accelerated_again_the_latest_tolerance_counts(name: str) -> None:
    case, flow, y, c = made(name)
    kinds = classes(flow)
    with torch.no_grad():
        exact = case.invert(flow, y, c)
        first = jf.accelerate(flow, 0.5)
        rough = case.invert(flow, y, c)
        seen = first.passes
        second = jf.accelerate(flow)
        assert same_bits(exact, case.invert(flow, y, c))
        assert not same_bits(exact, rough)
        assert first.passes == seen
        assert second.passes != seen
        assert first.transforms == second.transforms
        assert all(len(type(module).__mro__) < 12 for module in flow.modules())  # one subclass, not one of another
        third = jf.accelerate(flow, 0.5)
        assert same_bits(rough, case.invert(flow, y, c))
    first.restore()
    assert classes(flow) == kinds
    second.restore()
    third.restore()
    assert classes(flow) == kinds


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_a_distribution_outlives_the_acceleration_it_was_made_in(tolerance: float) -> None:
    case, flow, y, c = made("zuko MAF")
    with torch.no_grad():
        expected = case.invert(flow, y, c)[0]
        with jf.accelerate(flow, tolerance):
            distribution = flow(c)
        for _ in range(2):
            found = distribution.transform.inv(y)
            assert same_bits(expected, found) if tolerance == 0 else float((expected - found).abs().max()) < 0.1
            jf.accelerate(flow)


def test_a_distribution_made_before_goes_on_as_it_was() -> None:
    case, flow, y, c = made("zuko MAF")
    with torch.no_grad():
        distribution, expected = flow(c), case.invert(flow, y, c)[0]
        with jf.accelerate(flow, 0.5):
            assert same_bits(expected, distribution.transform.inv(y))


def test_zuko_distributions_hold_transforms_of_its_own_kind() -> None:
    _, flow, _, c = made("zuko MAF")
    before = flow(c).transform.transforms[0]
    with jf.accelerate(flow):
        assert isinstance(flow(c).transform.transforms[0], type(before))
        assert flow(c).transform.transforms[0].passes == before.passes


def test_a_parametrisation_added_meanwhile_stays() -> None:
    case, flow, y, c = made("nflows affine")
    plain = copy.deepcopy(flow)
    done = jf.accelerate(flow)
    for used in (plain, flow):
        nn.utils.parametrizations.weight_norm(used.autoregressive_net.final_layer)
        with torch.no_grad():
            used.autoregressive_net.final_layer.parametrizations.weight.original0.mul_(1.3)
    with torch.no_grad():
        expected = case.invert(plain, y, c)
        assert same_bits(expected, case.invert(flow, y, c))
        again = jf.accelerate(flow)
        assert same_bits(expected, case.invert(flow, y, c))
        done.restore()
        again.restore()
        assert same_bits(expected, case.invert(flow, y, c))


@pytest.mark.parametrize("name", MAIN)
def test_weights_that_change_between_calls_count(name: str) -> None:
    case, flow, y, c = made(name)
    jf.accelerate(flow)
    for change in ("weights", "loaded", "mask", "new parameter", "double", "single"):
        with torch.no_grad():
            if change == "weights":
                [p.mul_(0.9) for p in flow.parameters()]
            elif change == "loaded":
                other = case.make(CONTEXT, seed=5).state_dict()
                assert flow.load_state_dict(other).missing_keys == []
            elif change == "mask":
                next(b for key, b in flow.named_buffers() if key.endswith("mask"))[:, 1] = 0
            elif change == "new parameter":
                linear = next(m for m in flow.modules() if hasattr(m, "mask") and hasattr(m, "weight"))
                linear.weight = nn.Parameter(0.7 * linear.weight)
            else:
                dtype = torch.float64 if change == "double" else torch.float32
                flow.to(dtype)
                y, c = y.to(dtype), c.to(dtype)
            found = case.invert(flow, y, c)
            plain = pickle.loads(pickle.dumps(flow))
            assert same_bits(case.invert(plain, y, c), found)
            assert is_fast(case, flow, y, c)


def test_the_fast_side_sees_new_weights_after_an_inverse_that_failed_or_not() -> None:
    case, flow, y, c = made("nflows affine")
    jf.accelerate(flow)
    with torch.no_grad():
        for bad in (False, True):
            if bad:
                with pytest.raises(RuntimeError):
                    case.invert(flow, y, c[:2])
            else:
                case.invert(flow, y, c)
            [p.mul_(0.9) for p in flow.parameters()]
            assert same_bits(pickle.loads(pickle.dumps(flow)).forward(y, c), flow.forward(y, c))


def test_mask_and_weights_stay_apart_for_flows_that_share_a_network() -> None:
    _, flow, y, c = made("nflows affine")
    twin = nflows.transforms.CompositeTransform([flow, flow])
    with torch.no_grad():
        expected = twin.inverse(y, c)
        done = jf.accelerate(twin)
        assert same_bits(expected, twin.inverse(y, c))
    assert len(done.transforms) == 1


# ---------------------------------------------------------------------------------------------------- copies, files


@pytest.mark.parametrize("name", MAIN)
def test_deep_copies_are_accelerated_and_independent(name: str) -> None:
    case, flow, y, c = made(name)
    kinds = classes(flow)
    done = jf.accelerate(flow)
    with torch.no_grad():
        expected = case.invert(flow, y, c)
        seen = done.passes
        copied = copy.deepcopy(flow)
        [p.mul_(0.5) for p in flow.parameters()]
        assert same_bits(expected, case.invert(copied, y, c))
    assert done.passes == seen
    assert not {id(p) for p in flow.parameters()} & {id(p) for p in copied.parameters()}
    done.restore()
    assert classes(flow) == kinds
    assert is_fast(case, copied, y, c)
    with jf.accelerate(copied, 1e-3) as again:
        assert is_fast(case, copied, y, c)
        assert again.passes
    assert classes(copied) == kinds
    copied = copy.deepcopy(copied)
    assert classes(copied) == kinds


def test_a_deep_copy_keeps_what_is_shared_within_it() -> None:
    _, flow, *_ = made("nflows affine")
    jf.accelerate(flow)
    first, second = copy.deepcopy([flow, flow])
    assert first is second
    flow.me = [flow]
    copied = copy.deepcopy(flow)
    assert copied.me[0] is copied


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["zuko NSF", "nflows affine", "normflows spline"])
def test_pickles_hold_the_library_s_own_class(name: str, protocol: int) -> None:
    case, flow, y, c = made(name)
    kinds = classes(flow)
    with torch.no_grad():
        expected = case.invert(flow, y, c)
        jf.accelerate(flow)
        pickled = pickle.dumps(flow, protocol)
        assert b"jacobiflow" not in pickled
        loaded = pickle.loads(pickled)
        assert classes(loaded) == kinds
        assert same_bits(expected, case.invert(loaded, y, c))
        assert is_fast(case, flow, y, c)
        with jf.accelerate(loaded):
            assert is_fast(case, loaded, y, c)
            assert same_bits(expected, case.invert(loaded, y, c))


def test_saved_flows_load_where_this_package_is_not(tmp_path: Path) -> None:
    names = ["zuko MAF", "nflows affine", "normflows spline"]
    expected = []
    for i, name in enumerate(names):
        case, flow, y, c = made(name)
        jf.accelerate(flow)
        with torch.no_grad():
            expected.append(case.invert(flow, y, c)[0])
        torch.save({"flow": flow, "y": y, "c": c}, tmp_path / f"{i}.pt")
    script = """
        import sys, warnings
        sys.modules["jacobiflow"] = None
        warnings.simplefilter("ignore")
        import torch
        torch.set_num_threads(1)
        answers = []
        for i in range(3):
            saved = torch.load(f"{i}.pt", weights_only=False)
            flow, y, c = saved["flow"], saved["y"], saved["c"]
            with torch.no_grad():
                answers.append(flow(c).transform.inv(y) if i == 0 else [flow.inverse, flow][i - 1](y, c)[0])
        torch.save(answers, "answers.pt")
    """
    run_python(script, tmp_path)
    assert same_bits(expected, torch.load(tmp_path / "answers.pt"))


def run_python(script: str, folder: Path) -> None:
    lines = [line[8:] for line in script.splitlines()]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_shallow_copies_work() -> None:
    for name in ("zuko MAF", "nflows affine"):
        case, flow, y, c = made(name)
        with torch.no_grad():
            expected = case.invert(flow, y, c)
            with jf.accelerate(flow):
                copied = copy.copy(flow)
                assert same_bits(expected, case.invert(copied, y, c))
            assert same_bits(expected, case.invert(copied, y, c))
        assert next(copied.parameters()) is next(flow.parameters())


def test_state_dicts_are_interchangeable() -> None:
    case, flow, y, c = made("zuko MAF")
    jf.accelerate(flow)
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    plain = case.make(CONTEXT, seed=9)
    plain.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert same_bits(case.invert(flow, y, c), case.invert(plain, y, c))


@pytest.mark.parametrize("library", ["zuko", "nflows", "normflows"])
def test_one_library_is_enough_and_importing_takes_none(library: str, tmp_path: Path) -> None:
    build = {
        "zuko": "flow = zuko.flows.MAF(8); inverse = lambda: flow().transform.inv(y)",
        "nflows": "import nflows.transforms; flow = nflows.transforms.MaskedAffineAutoregressiveTransform(8, 16); "
        "inverse = lambda: flow.inverse(y)[0]",
        "normflows": "flow = normflows.flows.MaskedAffineAutoregressive(8, 16); inverse = lambda: flow.inverse(y)[0]",
    }[library]
    script = f"""
        import sys
        libraries = ["zuko", "nflows", "normflows", "sbi"]
        import jacobiflow as jf
        assert not [name for name in sys.modules if name.split(".")[0] in libraries], "imported with jacobiflow"
        for other in libraries:
            if other != {library!r}:
                sys.modules[other] = None
        import torch, {library}
        torch.set_num_threads(1)
        y = torch.randn(3, 8)
        {build}
        with torch.no_grad():
            expected = inverse()
            with jf.accelerate(flow) as done:
                assert torch.equal(expected, inverse())
        assert done.passes
        try:
            jf.accelerate(torch.nn.Linear(2, 2))
        except ValueError:
            sys.exit(0)
        sys.exit("a linear layer was accelerated")
    """
    run_python(script, tmp_path)


# --------------------------------------------------------------------------------------------------------- refusals


class OverriddenInverse(nflows.transforms.MaskedAffineAutoregressiveTransform):
    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Any:
        return super().inverse(2 * inputs, context)


class OverriddenForward(zuko.flows.MaskedAutoregressiveTransform):
    def forward(self, c: Tensor | None = None) -> Any:
        return super().forward(c).inv


class Hooked(zuko.flows.MaskedAutoregressiveTransform):
    """Changes what zuko's transform is at a context and point, not how it is inverted."""

    def meta(self, c: Tensor | None, x: Tensor) -> Any:
        return super().meta(c, 0.5 * x)


def replaced(entry: str, flow: nn.Module) -> nn.Module:
    own = getattr(flow, entry)
    setattr(flow, entry, lambda *args: own(*args))
    return flow


def coupling() -> nn.Module:
    mask = torch.arange(8) % 2
    return nflows.transforms.AffineCouplingTransform(mask, lambda i, o: nn.Linear(i, o))


NOTHING: dict[str, Callable[[], Any]] = {
    "zuko NICE": lambda: zuko.flows.NICE(8),
    "zuko RealNVP": lambda: zuko.flows.RealNVP(8),
    "zuko of one feature": lambda: zuko.flows.MAF(1),
    "nflows coupling": coupling,
    "normflows coupling": lambda: normflows.flows.AffineCouplingBlock(normflows.nets.MLP([4, 16, 8])),
    "linear": lambda: nn.Linear(3, 3),
    "int": lambda: 3,
    "None": lambda: None,
    "text": lambda: "flow",
    "class": lambda: zuko.flows.MAF,
    "empty list": lambda: [],
    "object": lambda: SimpleNamespace(a=1, b=[nn.Linear(2, 2)]),
}


@pytest.mark.parametrize("what", NOTHING)
def test_what_has_nothing_to_accelerate(what: str) -> None:
    flow = NOTHING[what]()
    kinds = classes(flow) if isinstance(flow, nn.Module) else None
    with pytest.raises(ValueError, match="nothing was changed"):
        jf.accelerate(flow)
    assert kinds is None or classes(flow) == kinds


UNTOUCHED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "inverse": (lambda: OverriddenInverse(8, 16), "OverriddenInverse overrides nflows's inverse"),
    "forward": (lambda: OverriddenForward(8), "OverriddenForward overrides zuko's forward"),
    "replaced inverse": (lambda: replaced("inverse", Additive(8)), "its inverse was replaced"),
    "replaced forward": (lambda: replaced("forward", zuko.flows.MaskedAutoregressiveTransform(8)), "its forward was"),
}


@pytest.mark.parametrize("what", UNTOUCHED)
def test_what_is_left_alone_is_said_and_why(what: str) -> None:
    build, why = UNTOUCHED[what]
    flow = build()
    kinds = classes(flow)
    with pytest.raises(ValueError, match=f"{why}.*nothing was changed"):
        jf.accelerate(nn.ModuleList([flow]))
    assert classes(flow) == kinds
    both = nn.ModuleDict({"first": flow, "second": CASES["normflows affine"].make()})
    with jf.accelerate(both) as done:
        assert list(done.untouched) == ["first"]
        assert why in done.untouched["first"]
        assert done.transforms == {"second": "normflows MaskedAffineAutoregressive"}
        assert type(flow) is kinds[0]
        for text in ("first", why, "second", "normflows MaskedAffineAutoregressive"):
            assert text in str(done)
    assert classes(flow) == kinds


def test_a_subclass_that_keeps_the_inverse_is_accelerated() -> None:
    torch.manual_seed(0)
    flow = harder(Hooked(FEATURES), 2.0).eval()
    y = normal(4, FEATURES)
    with torch.no_grad():
        expected = flow().inv(y)
        with jf.accelerate(flow) as done:
            assert same_bits(expected, flow().inv(y))
        assert 2 < done.passes[""] < FEATURES
    assert type(flow) is Hooked
    own = Additive(FEATURES)
    assert type(own) is Additive
    with jf.accelerate(own) as done:
        assert isinstance(own, Additive)
        assert isinstance(own, AutoregressiveTransform)
        assert type(own).__name__ == "Additive"
        assert "Additive" in str(done)


@pytest.mark.parametrize("tolerance", [-1, -1e-9, float("nan"), float("inf"), True, False, "0", None, 1j, [0.0]])
def test_tolerances_that_are_none(tolerance: Any) -> None:
    _, flow, *_ = made("zuko MAF")
    kinds = classes(flow)
    with pytest.raises(ValueError, match="tolerance"):
        jf.accelerate(flow, tolerance)
    assert classes(flow) == kinds


@pytest.mark.parametrize(
    ("name", "have"),
    [("zuko MAF", "1.1.0"), ("zuko MAF", "2.0"), ("zuko MAF", "0.9"), ("nflows affine", "0.13"),
     ("nflows affine", "0.15.0"), ("normflows affine", "1.6.9"), ("normflows affine", "2.0.0rc1")],
)  # fmt: skip
def test_versions_that_were_never_tried(name: str, have: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, flow, *_ = made(name)
    kinds = classes(flow)
    monkeypatch.setattr(sys.modules["jacobiflow.adapters.accelerate"], "version", lambda _: have)
    with pytest.raises(ValueError, match=rf"{name.split()[0]} {have}: supported are .*nothing was changed"):
        jf.accelerate(flow)
    assert classes(flow) == kinds


@pytest.mark.parametrize(
    ("name", "have"),
    [("zuko MAF", "1.2.0"), ("zuko MAF", "1.99.3"), ("nflows affine", "0.14"), ("normflows affine", "1.7.0.post1")],
)
def test_versions_in_between(name: str, have: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, flow, *_ = made(name)
    monkeypatch.setattr(sys.modules["jacobiflow.adapters.accelerate"], "version", lambda _: have)
    with jf.accelerate(flow) as done:
        assert done.transforms


def test_another_library_s_version_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"zuko": "9.0", "nflows": "0.14", "normflows": "9.0"}
    monkeypatch.setattr(sys.modules["jacobiflow.adapters.accelerate"], "version", have.__getitem__)
    _, flow, *_ = made("nflows affine")
    with jf.accelerate(flow):
        pass
    mixed = nn.ModuleList([flow, made("zuko MAF")[1]])
    kinds = classes(mixed)
    with pytest.raises(ValueError, match=r"zuko 9\.0"):
        jf.accelerate(mixed)
    assert classes(mixed) == kinds


# --------------------------------------------------------------------------------------------------------- the handle


def test_the_handle_says_what_was_done() -> None:
    _, flow, *_ = made("zuko MAF")
    done = jf.accelerate(flow)
    name = "transform.transforms.0"
    assert list(done.transforms) == [name, "transform.transforms.1"]
    assert flow.get_submodule(name)
    assert done.tolerance == 0
    assert done.untouched == {}
    assert "2 masked autoregressive transforms" in str(done)
    assert f"{name}: zuko MaskedAutoregressiveTransform" in str(done)
    assert "identical bits" in str(done)
    assert "0.001" in str(jf.accelerate(flow, 1e-3))
    assert isinstance(done, jf.Acceleration)


def test_flows_within_objects_are_found() -> None:
    flows = [CASES[name].make() for name in MAIN[:4]]
    holder = SimpleNamespace(
        first=flows[0], several=[flows[1], SimpleNamespace(inner=flows[2])], pair=(flows[3], 3), word="x"
    )
    kinds = [classes(flow) for flow in flows]
    with jf.accelerate(holder) as done:
        assert {name.split(".")[0] for name in done.transforms} == {"first", "several", "pair"}
        assert len(done.transforms) == 6
        assert {what.split()[0] for what in done.transforms.values()} == {"zuko", "nflows"}
        with torch.no_grad():
            flows[2].inverse(normal(3, FEATURES))
        assert len(done.passes) == 1
        assert "several.1.inner" in done.passes
    assert [classes(flow) for flow in flows] == kinds


def test_three_libraries_in_one_flow() -> None:
    parts = nn.ModuleDict({name.split()[0]: CASES[name].make() for name in MAIN})
    y = normal(3, FEATURES)
    run = lambda: [CASES[n].invert(parts[n.split()[0]], y) for n in ("zuko NSF", "nflows rational tails")]  # noqa: E731
    with torch.no_grad():
        expected = run()
        with jf.accelerate(parts) as done:
            assert same_bits(expected, run())
    assert {what.split()[0] for what in done.transforms.values()} == {"zuko", "nflows", "normflows"}
