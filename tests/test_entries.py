"""Every public function and class refuses what it cannot take, by name: a kind by TypeError, a value by ValueError."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jacobiflow as jf
from jacobiflow.data import Noise
from jacobiflow.training import TrainingConfig, image_transform
from tests.helpers.invented import make_report
from tests.helpers.problems import make_flow, make_maf

FLOW, MAF, PLAN = make_flow(num_classes=3, noise_std=0.1), make_maf(), jf.Strategy.uniform(jf.Solver(), 2)
REPORT = make_report([1, 1])
IMAGES, LABELS, Z = torch.zeros(2, 1, 8, 8), torch.tensor([0, 2]), torch.zeros(2, 16, 4)

# A valid value of an argument, wrong kinds, and wrong values. `None` is also wrong where it is not the default.
Argument = tuple[Any, tuple[Any, ...], tuple[Any, ...]]
KINDS = ("2", 1.5, True, math.nan, torch.tensor(2), np.float64(2), np.True_, np.array(2))
NUMBERS = ("1", True, torch.tensor(1.0), [], np.True_, np.array(1.0), np.complex64(1))
COUNT: Argument = (2, KINDS, (0, -1, 10**30))
UNLIMITED: Argument = (2, KINDS, (0, -1))
FROM_0: Argument = (0, KINDS, (-1,))
NUMBER: Argument = (1.0, NUMBERS, (-1, math.nan, math.inf, -math.inf))
POSITIVE: Argument = (1.0, NUMBERS, (0, *NUMBER[2]))
FLAG: Argument = (False, (0, 1, "no"), ())

ABSENT = (Z.to_sparse(), Z.to("meta"))  # without the values that PyTorch's operations need
FLOAT8 = torch.float8_e4m3fn
TOKENS: Argument = (
    Z,
    (7, [1], Z.numpy(), Z.long(), Z.bool(), Z.cfloat(), Z.to(FLOAT8)),
    (Z[0], Z[:, :9], Z[..., :3], *ABSENT),
)
FINITE: Argument = (Z, TOKENS[1], (*TOKENS[2], Z * math.nan))
PIXELS: Argument = (
    IMAGES,
    ([1], IMAGES.numpy(), IMAGES.byte(), IMAGES.cfloat(), IMAGES.to(FLOAT8)),
    (IMAGES[0], IMAGES[:0], *ABSENT),
)
NO_CONTEXT = (7, [0, 1], LABELS.numpy(), LABELS.double(), LABELS.bool(), LABELS.byte())
NO_LABELS = (1.5, True, ["0", 2], [0, None], [[0], [0, 2]], {0: 2}, LABELS.double(), LABELS.bool().numpy())
HUGE_LABELS = (np.broadcast_to(np.array(0), 10**13), LABELS[:1].byte().expand(10**13))  # would fill 80 TB
ABSENT_LABELS = (LABELS.to_sparse(), LABELS.to("meta"))
NO_ROWS = (LABELS[:1], LABELS.repeat(2), LABELS.view(1, 2), *ABSENT_LABELS)
WRONG_LABELS = (*NO_ROWS, "2", ["0", "2"], [0, 3], [0], 3, *HUGE_LABELS)


def colour_transform(translate: int = 0, hue: float = 0.0) -> object:
    return image_transform((3, 32, 32), translate=translate, hue=hue)


def each(names: str, argument: Argument) -> dict[str, Argument]:
    return dict.fromkeys(names.split(), argument)


ARGUMENTS: dict[str, Argument] = {
    **each("num batch_size num_convergence_samples segments num_tokens num_blocks", COUNT),
    **each("in_channels image_size", COUNT),
    **each("layers_per_block patch_size width head_dim expansion hidden_features hidden_layers", COUNT),
    **each("count size max_sweeps", UNLIMITED),
    "num_classes": FROM_0, **each("attn_temperature tolerance_factor", POSITIVE),
    **each("tolerance denoise rate ebound noise_std std call_cost weight", NUMBER),
    **each("return_intermediates sensitivity per_class bf16 annealed nvp per_segment", FLAG),
    **each("certify", (True, (), ("x", 1))), "norm": (2, (), ("x", True)), "on": ("both", (), ("x", 7)),
    "seed": (0, KINDS, (-1, 2**63)), "start": (0, KINDS, (-1, 2**63)),
    "progress": (None, (0, False, "no"), ()),
    "flow": (FLOW, ("digits-p1", FLOW.config, jf.TarFlow), (copy.deepcopy(FLOW).to(FLOAT8),)),
    "block": (FLOW.blocks[0], (FLOW, 7, jf.Solver()), ()),
    "images": (*PIXELS[:2], (*PIXELS[2], IMAGES[..., :7])), "labels": (LABELS, NO_LABELS, WRONG_LABELS),
    "context": (LABELS, NO_CONTEXT, (*NO_ROWS, LABELS + 1)), **each("z latents", FINITE), "x": TOKENS,
    "solver": (jf.Solver(), (PLAN, "jacobi"), ()),
    "strategy": (PLAN, (7, b"auto", jf.Solver(), (jf.Solver(),)), ("x" * 999,)),
    "settings": (None, (7, jf.Guidance(1.0)), ("best",)),
    "guidance": (None, (1.5, True, "both"), ()), "report": (None, ("report.json", 7, PLAN), ()),
    "device": ("cpu", (7, torch.float32), ("x", "cuda:x")), "dtype": (None, (7, []), ("int64",)),
    "prediction": (None, ("x", PLAN), ()), "path": ("x", (7,), ()),
    "name": ("new", (7,), ()), "text": ("jacobi", (7,), ()), "fingerprint": (None, (7,), ()),
    "solvers": ((jf.Solver(),), (jf.Solver(), ("x",)), ((), [])),
    "logit_alpha": (1e-6, NUMBERS, (*POSITIVE[2], 0.5)),
}  # fmt: skip
NAMED = {"context": "labels"}

DATA = {"x": ARGUMENTS["images"], "context": ARGUMENTS["labels"]}
CALLS: list[tuple[Callable[..., Any], str, dict[str, Argument]]] = [
    (jf.sample, "flow num labels seed settings strategy tolerance certify sensitivity batch_size "
        "return_intermediates", {}),
    (jf.sample, "flow latents labels progress", {}), (jf.decode, "flow z context strategy tolerance certify log_prob",
     {"context": (LABELS, NO_LABELS, WRONG_LABELS), "log_prob": FLAG}),
    (jf.denoise, "flow images labels rate batch_size", {}),
    (jf.calibrate, "flow images labels norm segments num_convergence_samples per_class batch_size seed",
     {"images": (IMAGES, (7, "x", {}), (IMAGES[:1], IMAGES[:0], *ABSENT))}),
    (jf.plan, "flow batch_size tolerance bf16", {"tolerance": POSITIVE}),
    (jf.load, "name device dtype", {"name": ("digits-p1", (7,), ("x", "x" * 300, Path("x" * 300), "x\0"))}),
    *((call, "x context", DATA) for call in (FLOW.encode, FLOW.log_prob)),
    *((jf.solve, "block z solver context certify batch_size tolerance",
       {"solver": (jf.Solver(way), (PLAN, "jacobi"), ())})
      for way in (jf.Whole(), jf.Sequential())),
    (jf.solve, "block z solver context", {"block": (MAF.blocks[0], (MAF,), ()), "z": (Z[..., :1], *FINITE[1:])}),
    (jf.Problem(FLOW.blocks[0], Z).residual, "x", {}),
    (jf.Segments, "count", {}), (jf.Window, "size", {}),
    *((jf.Solver, name, {name: (getattr(jf.Solver(), name), ("jacobi", 7, jf.Whole), ())})
      for name in ("partition", "guess", "stopping")),
    (jf.Solver, "tolerance_factor", {}), (jf.Bf16Sweeps, "count", {}),
    (jf.Stopping, "max_sweeps ebound", {"max_sweeps": (2, KINDS, (0, (5, 0, 2)))}),
    (jf.Guidance, "weight annealed on attn_temperature", {}), (jf.SamplingSettings, "guidance denoise", {}),
    (jf.find_report, "flow", {}),
    (jf.TarFlowConfig, "in_channels image_size patch_size width num_blocks layers_per_block num_classes nvp "
     "head_dim expansion noise_std", {}),
    (jf.MAFConfig, "in_channels image_size hidden_features num_blocks hidden_layers num_classes logit_alpha", {}),
    (jf.TarFlow, "config", {"config": (FLOW.config, ({}, MAF.config), ())}),
    (jf.MAF, "config", {"config": (MAF.config, ({}, FLOW.config), ())}),
    (jf.Strategy, "solvers fingerprint tolerance prediction", {}),
    (jf.Strategy.uniform, "solver num_blocks tolerance", {}),
    (jf.Strategy.parse, "text report num_blocks", {}), (PLAN.with_tolerance, "tolerance", {}),
    (jf.Strategy.from_report, "report tolerance per_segment call_cost", {"report": (REPORT, (7, PLAN), ())}),
    *((made.check, "flow", {}) for made in (PLAN, REPORT)),
    *((call, "path", {}) for made in (PLAN, REPORT) for call in (made.save, made.load)),
    (REPORT.mean_sweeps, "source tolerance guess", {"source": ("noise", (), ("x", 7)), "guess": (None, (), (7, "x"))}),
    (REPORT.guess, "block", {"block": (0, KINDS, (-1, 2))}),
    (jf.accelerate, "flow tolerance", {"flow": (FLOW, (), ())}),
    (jf.register_piece, "name", {"name": ("new", (7,), ("", "a b", "a+b", "a:1"))}),
    (Noise, "std", {}),
    (colour_transform, "translate hue", {"translate": FROM_0, "hue": NUMBER}),
    (TrainingConfig, "steps batch_size learning_rate weight_decay warmup ema_decay max_grad_norm label_dropout seed", {
        "steps": COUNT, "warmup": FROM_0, **each("learning_rate max_grad_norm", POSITIVE), "weight_decay": NUMBER,
        "batch_size": UNLIMITED, **each("ema_decay label_dropout", (0.5, NUMBERS, (*NUMBER[2], 1.0)))}),
]  # fmt: skip


def as_numpy(value: Any) -> Any:
    """A number, or a tuple of numbers, as NumPy scalars; anything else as it is."""
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


@pytest.mark.parametrize("number", range(len(CALLS)), ids=lambda i: f"{i} {CALLS[i][0].__qualname__}")
def test_an_entry_refuses_what_it_cannot_take_by_name_and_takes_numbers_of_numpy(number: int) -> None:
    call, names, own = CALLS[number]
    arguments = {name: (ARGUMENTS | own)[name] for name in names.split()}
    usual = {name: valid for name, (valid, *_) in arguments.items()}
    for name, (valid, kinds, values) in arguments.items():
        is_required = valid is not None and "None" not in str(inspect.signature(call).parameters[name].annotation)
        kinds = (*kinds, None) if kinds and is_required else kinds
        for error, wrong in [(TypeError, kind) for kind in kinds] + [(ValueError, value) for value in values]:
            with pytest.raises(error) as caught:
                call(**usual | {name: wrong})
            message, words = str(caught.value), (name, NAMED.get(name, name))
            assert any(word.removesuffix("s") in message for word in words)
            assert len(message) <= 300
    if any(as_numpy(value) is not value for value in usual.values()):
        with suppress(jf.InputError):  # of something else: that there is nothing to accelerate
            result = call(**{name: as_numpy(value) for name, value in usual.items()})
            assert not any(isinstance(part, np.generic) for part in parts(result))
