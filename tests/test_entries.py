"""Every public function and class refuses what it cannot take: a kind by TypeError, a value by ValueError, by name.

And it takes NumPy's numbers and labels of every kind for what they stand for.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from invented import invented_block, make_report, make_tuning
from problems import make_flow, make_maf

import jacobiflow as jf
from jacobiflow import baselines, calibration, flows, guidance, inversion, latents, measuring, solvers, strategy
from jacobiflow.baselines.full_passes import full_passes_sample
from jacobiflow.baselines.growing_cache import growing_cache_sample
from jacobiflow.calibration.tuning import CountedRun
from jacobiflow.data.augmentation import Augmentation
from jacobiflow.data.noise import Noise, keyed_generator
from jacobiflow.training import TrainConfig

FLOW, MAF, PLAN = make_flow(num_classes=3, noise_std=0.1), make_maf(), jf.Strategy.uniform(jf.Solver(), 2)
REPORT, TUNING = make_report([1, 1]), make_tuning(invented_block(0), invented_block(1))
IMAGES, LABELS, Z = torch.zeros(2, 1, 8, 8), torch.tensor([0, 2]), torch.zeros(2, 16, 4)
QUICK = calibration.TuneSettings(tolerances=(1e-2,), fine=(2,), coarse=(2,), fine_after_coarse=(2,))
SHIFT, KERNEL, THREE = torch.zeros(16, 4), torch.zeros(3, 4, 4), (1.0, 2.0, 9.0)

# A valid value of an argument, wrong kinds, and wrong values. `None` is also wrong where it is not the default.
Argument = tuple[Any, tuple[Any, ...], tuple[Any, ...]]
KINDS = ("2", 1.5, True, math.nan, torch.tensor(2), np.float64(2), np.True_, np.array(2))
NUMBERS = ("1", True, torch.tensor(1.0), [], np.True_, np.array(1.0), np.complex64(1))
COUNT: Argument = (2, KINDS, (0, -1, 10**30))
UNLIMITED: Argument = (2, KINDS, (0, -1))
FROM_0: Argument = (0, KINDS, (-1,))
NUMBER: Argument = (1.0, NUMBERS, (-1, math.nan, math.inf, -math.inf, 10**400))
POSITIVE: Argument = (1.0, NUMBERS, (0, *NUMBER[2]))
FLAG: Argument = (False, (0, 1, "no"), ())

# Tensors without the values that PyTorch's operations need.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch's own: nested tensors are a prototype
    NESTED = torch.nested.nested_tensor([torch.zeros(16, 4), torch.zeros(9, 4)])
    NESTED_LABELS = torch.nested.nested_tensor([LABELS, LABELS[:1]])
ABSENT = (Z.to_sparse(), Z.to("meta"), NESTED)
TOKENS: Argument = (Z, (7, [1], Z.numpy(), Z.long(), Z.bool(), Z.cfloat()), (Z[0], Z[:, :9], Z[..., :3], *ABSENT))
FINITE: Argument = (Z, TOKENS[1], (*TOKENS[2], Z * math.nan))
MEANS: Argument = (SHIFT, TOKENS[1], (Z, SHIFT / 0))
PIXELS: Argument = (IMAGES, ([1], IMAGES.numpy(), IMAGES.byte(), IMAGES.cfloat()), (IMAGES[0], IMAGES[:0], *ABSENT))
NO_CONTEXT = (7, [0, 1], LABELS.numpy(), LABELS.double(), LABELS.bool(), LABELS.byte())
NO_LABELS = (1.5, True, "2", ["0", "2"], [0, None], [[0], [0, 2]], {0: 2}, LABELS.double(), LABELS.bool().numpy())
ABSENT_LABELS = (LABELS.to_sparse(), LABELS.to("meta"), NESTED_LABELS)
NO_ROWS = (LABELS[:1], LABELS.repeat(2), LABELS.view(1, 2), LABELS[0], *ABSENT_LABELS)


def each(names: str, argument: Argument) -> dict[str, Argument]:
    return dict.fromkeys(names.split(), argument)


ARGUMENTS: dict[str, Argument] = {
    **each("num batch_size samples traced segments num_tokens token_channels num_blocks in_channels image_size", COUNT),
    **each("layers_per_block patch_size channels head_dim expansion hidden_features hidden_layers", COUNT),
    **each("slots max_iterations count size run_length max_sweeps repeats fine", UNLIMITED),
    **each("num_classes coarse stream index", FROM_0), **each("attn_temperature threshold", POSITIVE),
    **each("tolerance denoise rate rtol dominance ebound noise_std std call_cost atol weight", NUMBER),
    **each("return_trace per_class chord annealed nvp per_segment short fresh_keys", FLAG),
    **each("certify certificate", (True, (), ("x", 1))), "norm": (2, (), ("x", True)), "on": ("both", (), ("x", 7)),
    "seed": (0, KINDS, (-1, 2**63)), "start": (0, KINDS, (-1, 2**63)), **each("residual error", (0.1, NUMBERS, (-1,))),
    "progress": (False, (0, "no"), ()), **each("say loop", (print, (7, "f"), ())), "after_each": (None, (7, "f"), ()),
    "flow": (FLOW, ("digits-p1", FLOW.config, jf.TarFlow), ()), "block": (FLOW.blocks[0], (FLOW, 7, jf.Solver()), ()),
    "images": (*PIXELS[:2], (*PIXELS[2], IMAGES[..., :7])), "labels": (LABELS, NO_LABELS, (*NO_ROWS, [0, 3], [0], 3)),
    "context": (LABELS, NO_CONTEXT, (*NO_ROWS, LABELS + 1)), **each("z latents", FINITE), "x": TOKENS,
    "matrix": (SHIFT, TOKENS[1], (Z,)), "solver": (jf.Solver(), (PLAN, "jacobi"), ()),
    "strategy": (PLAN, (7, b"auto", jf.Solver(), (jf.Solver(),)), ("x" * 999,)),
    "guidance": (None, (1.5, True, "both"), ()), "report": (None, ("report.json", 7, PLAN), ()),
    "device": ("cpu", (7, torch.float32), ("x", "cuda:x")), "dtype": (None, (7, []), ("int64",)),
    "prediction": (None, ("x", PLAN), ()), "path": ("x", (7,), ()), "kind": ("gaussian", (), ("x", 7)),
    **each("log_scale shift", MEANS), "kernel": (KERNEL, TOKENS[1], (SHIFT, KERNEL[:0], KERNEL[:, 1:], KERNEL / 0)),
    "name": ("new", (7,), ()), "text": ("jacobi", (7,), ()), "fingerprint": (None, (7,), ()),
    "crm": (THREE, (7, "x", ["1"]), ()), **each("first second", (THREE, (7, "x", [True]), ((), (1.0,)))),
    "solvers": ((jf.Solver(),), (jf.Solver(), [jf.Solver()], ("x",)), ((),)), "runs": ({}, (7, [print], {"a": 7}), ()),
    "settings": (QUICK, (7, PLAN), ()), "exact": PIXELS, "actual": (*PIXELS[:2], (IMAGES[:0],)),
    "flow_type": (jf.TarFlow, (7, FLOW, int), ()), "logit_alpha": (1e-6, NUMBERS, (*POSITIVE[2], 0.5)),
}  # fmt: skip
NAMED = {"atol": "tolerance", "max_sweeps": "sweeps"}

CALLS: list[tuple[Callable[..., Any], str, dict[str, Argument]]] = [
    (jf.sample, "flow num labels seed strategy guidance denoise tolerance certify batch_size return_trace", {}),
    (jf.sample, "flow latents labels progress", {}), (jf.decode, "flow z labels strategy tolerance certify", {}),
    (jf.denoise, "flow images labels rate batch_size", {}),
    (jf.calibrate, "flow images labels norm guidance segments traced per_class chord batch_size seed progress",
     {"images": (IMAGES, (7, "x", {}), (IMAGES[:1], IMAGES[:0], *ABSENT))}),
    (jf.tune, "flow labels guidance samples batch_size seed progress settings",
     {"labels": (LABELS, NO_LABELS, (LABELS[0], LABELS[:0], LABELS + 1, 3, *ABSENT_LABELS))}),
    (jf.plan, "flow report batch_size tolerance device guidance settings",
     {"tolerance": POSITIVE, "report": (TUNING, (7,), (REPORT,)), "settings": (strategy.PlanSettings(), (PLAN,), ())}),
    (strategy.auto, "flow batch_size tolerance guidance report say", {}),
    (strategy.choose, "flow strategy batch_size tolerance guidance report say", {}),
    (jf.load, "name device dtype", {"name": ("digits-p1", (7,), ("x", "x" * 300, Path("x" * 300), "x\0"))}),
    *((call, "images labels", {}) for call in (FLOW.encode, FLOW.normalize, FLOW.log_prob, FLOW.bits_per_dim)),
    (make_flow().encode, "images labels", {"labels": (None, NO_LABELS, (LABELS[:1], LABELS[0], [0]))}),
    *((jf.solve, "block z solver context slots", {"solver": (jf.Solver(way), (PLAN, "jacobi"), ())})
      for way in (jf.Whole(), jf.Sequential())),
    (jf.solve, "block z solver context", {"block": (MAF.blocks[0], (MAF,), ()), "z": (Z[..., :1], *FINITE[1:])}),
    (jf.solve_certified, "block z solver context certificate slots tolerance", {}),
    (jf.certify, "block z x context slots", {"z": TOKENS}),
    *((call, f"block x z {name} context count", {"z": TOKENS, "count": COUNT, name: guess}) for call, name, guess in (
        (calibration.distances, "guess", (jf.Latent(), (7, "latent"), ())),
        (calibration.initial_residuals, "guesses", ({"z": jf.Latent()}, (7, [jf.Latent()], {"z": 7}), ())))),
    (calibration.gamma_norm, "block x z context rtol max_iterations seed", {"z": TOKENS}),
    (calibration.matrix_norm, "matrix norm", {}), (calibration.tough_blocks, "crm dominance", {}),
    (calibration.rank_correlation, "first second", {}), (jf.Segments, "count", {}), (jf.Window, "size", {}),
    *((jf.Solver, name, {name: (getattr(jf.Solver(), name), ("jacobi", 7, jf.Whole), ())})
      for name in ("partition", "guess", "stopping", "correction")),
    (jf.Solver, "coarse", {}), (jf.Tolerance, "atol", {}), (jf.EarlyStop, "ebound", {}),
    (solvers.Stopping, "atol max_sweeps ebound", {"max_sweeps": (2, KINDS, (0, (), (5, 0, 2)))}),
    (jf.MeanAffine, "log_scale shift", {}), (jf.CausalLinear, "kernel shift", {}), (jf.Chord, "kernel", {}),
    (jf.Guidance, "weight annealed on attn_temperature", {}), (jf.SamplingSettings, "guidance denoise", {}),
    (jf.find_report, "flow guidance", {}), (guidance.guided, "block guidance", {}),
    (jf.TarFlowConfig, "in_channels image_size patch_size channels num_blocks layers_per_block num_classes nvp "
     "head_dim expansion noise_std", {}),
    (jf.MAFConfig, "in_channels image_size hidden_features num_blocks hidden_layers num_classes logit_alpha", {}),
    (jf.TarFlow, "config", {"config": (FLOW.config, ({}, MAF.config), ())}),
    (jf.MAF, "config", {"config": (MAF.config, ({}, FLOW.config), ())}),
    (jf.Strategy, "solvers fingerprint tolerance prediction", {}), (jf.Strategy.uniform, "solver num_blocks", {}),
    (jf.Strategy.parse, "text report num_blocks num_tokens tolerance", {}), (PLAN.with_tolerance, "atol", {}),
    (jf.Strategy.from_report, "report tolerance per_segment call_cost", {"report": (REPORT, (7, PLAN), ())}),
    *((made.check, "flow", {}) for made in (PLAN, REPORT, TUNING)),
    *((call, "path", {}) for made in (PLAN, REPORT, TUNING) for call in (made.save, made.load)),
    (REPORT.mean_sweeps, "start tolerance guess", {"start": ("noise", (), ("x", 7)), "guess": (None, (), (7, "x"))}),
    (REPORT.guess, "block", {"block": (0, KINDS, (-1, 2))}), (CountedRun, "coarse fine residual error", {}),
    (latents.draw_latents, "num num_tokens token_channels seed start", {}),
    (latents.draw_labels, "num num_classes seed start", {"num_classes": COUNT}),
    (inversion.prior_tokens, "flow latents", {"latents": TOKENS}),
    (jf.accelerate, "flow tolerance", {"flow": (FLOW, (), ())}),
    (jf.register, "name", {"name": ("new", (7,), ("", "a b", "a+b", "a:1"))}),
    (flows.register, "flow", {"flow": (jf.TarFlow, (7, FLOW, int), ())}), (baselines.original_loop, "flow", {}),
    *((call, "flow z labels guidance", {}) for call in (*baselines.PEERS.values(), growing_cache_sample)),
    (full_passes_sample, "flow z labels guidance", {"flow": (MAF, (FLOW, 7), ()), "z": (Z[..., :1], *FINITE[1:])}),
    (baselines.PEERS["STARFlow"], "flow z run_length max_sweeps threshold fresh_keys", {}),
    (baselines.gs_jacobi_grid, "report short", {}), (baselines.register_original_loop, "flow_type name loop", {}),
    (measuring.interleave, "runs repeats device after_each", {}), (measuring.machine, "device", {}),
    (measuring.paired_error, "actual exact", {}), (Noise, "kind std", {}), (keyed_generator, "seed stream index", {}),
    (Augmentation, "shift hue", {"shift": FROM_0, "hue": NUMBER}),
    (TrainConfig, "steps batch_size learning_rate weight_decay warmup ema clip drop_label seed", {
        "steps": COUNT, "warmup": FROM_0, **each("learning_rate clip", POSITIVE), "weight_decay": NUMBER,
        "batch_size": UNLIMITED, **each("ema drop_label", (0.5, NUMBERS, (*NUMBER[2], 1.0)))}),
    (calibration.TuneSettings, "typical coarse_from coarse_share", {
        "typical": POSITIVE, **each("coarse_from coarse_share", NUMBER)}),
    (strategy.PlanSettings, "margin least_passes trials stricter count_margin busy", {
        **each("margin least_passes stricter count_margin busy", NUMBER), "trials": FROM_0}),
]  # fmt: skip
CASES = [
    pytest.param(call, names.split(), own, name, id=f"{i} {call.__qualname__} {name}")
    for i, (call, names, own) in enumerate(CALLS)
    for name in names.split()
]


@pytest.mark.parametrize(("call", "names", "own", "name"), CASES)
def test_what_it_cannot_take_is_refused_by_name(
    call: Callable[..., Any], names: list[str], own: dict[str, Argument], name: str
) -> None:
    arguments = {each: (ARGUMENTS | own)[each] for each in names}
    parameter = inspect.signature(call).parameters[name]
    valid, kinds, values = arguments[name]
    if kinds and valid is not None and parameter.default is not None:
        kinds += (None,)
    for error, wrong in [(TypeError, kind) for kind in kinds] + [(ValueError, value) for value in values]:
        with pytest.raises(error) as caught:
            call(**{each: valid for each, (valid, *_) in arguments.items()} | {name: wrong})
        assert NAMED.get(name, name).removesuffix("s") in (message := str(caught.value))
        assert len(message) <= 300


def as_numpy(value: Any) -> Any:
    """A number, or a tuple of numbers, as NumPy scalars that overflow and round early; anything else as it is."""
    if type(value) is tuple:
        return tuple(map(as_numpy, value))
    return {int: np.uint8, float: np.float32}.get(type(value), lambda same: same)(value)


def parts(value: Any) -> Iterator[Any]:
    """The parts of a result, in fields, tuples, lists and mappings."""
    yield value
    if is_dataclass(value):
        value = [getattr(value, entry.name) for entry in fields(value)]
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from parts(part)


def outcome(call: Callable[..., Any], arguments: dict[str, Any]) -> tuple[list[Any], str]:
    """The parts of the result of a call, and the message if it refuses."""
    try:
        return list(parts(call(**arguments))), ""
    except jf.InputError as error:
        return [], str(error)


def entries(takes: Callable[[str, Any], bool]) -> list[Any]:
    """The entries of which an argument, by its name and valid value, is such a one."""
    return [
        pytest.param(call, {name: valid[name] for name in names.split()}, id=f"{i} {call.__qualname__}")
        for i, (call, names, own) in enumerate(CALLS)
        if (valid := {name: (ARGUMENTS | own)[name][0] for name in names.split()})
        and any(takes(name, value) for name, value in valid.items())
    ]


@pytest.mark.parametrize(("call", "valid"), entries(lambda name, value: as_numpy(value) is not value))
def test_numbers_of_numpy_are_numbers_and_are_recorded_as_those_of_python(
    call: Callable[..., Any], valid: dict[str, Any]
) -> None:
    result, refusal = outcome(call, {name: as_numpy(value) for name, value in valid.items()})
    assert not any(isinstance(part, np.generic) for part in result)
    if refusal:  # of something else: that no such tolerance was measured, that there is nothing to accelerate
        assert refusal == outcome(call, valid)[1]


@pytest.mark.parametrize("labels", [[0, 2], np.array([0, 2], np.uint8)[::-1], np.int32(2)], ids=repr)
@pytest.mark.parametrize(("call", "valid"), entries(lambda name, value: name == "labels"))
def test_labels_may_be_a_list_an_array_or_one_class_for_all(
    call: Callable[..., Any], valid: dict[str, Any], labels: Any
) -> None:
    tensor = torch.from_numpy(np.broadcast_to(np.asarray(labels, np.int64), 2).copy())
    results, expected = (outcome(call, valid | {"labels": each})[0] for each in (labels, tensor))
    tensors = [(a, b) for a, b in zip(results, expected, strict=True) if isinstance(b, torch.Tensor)]
    assert tensors
    for a, b in tensors:
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_sizes_that_no_flow_has_are_refused_before_anything_is_built() -> None:
    for change, limit in (
        ({"num_blocks": 1001}, "num_blocks=1001: the limit is 1,000"),
        ({"channels": 2**21}, "channels=2097152: the limit is 1,048,576"),
        ({"num_blocks": 100, "layers_per_block": 101}, "10,100 layers in all blocks: the limit is 10,000"),
        ({"image_size": 1024}, "262,144 tokens: the limit is 65,536"),
        ({"in_channels": 2**19}, "2,097,152 channels of a token: the limit is 1,048,576"),
        ({"num_classes": 10**6 + 1}, "num_classes=1000001: the limit is 1,000,000"),
    ):
        with pytest.raises(ValueError, match=limit):
            replace(FLOW.config, **change)  # type: ignore[arg-type]
