"""`tune`: fits, sweeps, residuals and errors, against the oracle's fixed points and the blocks solved anew."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_problems import fresh_latents, linear_flow, oracle_of, randn, way_back
from problems import BlockProblem, make_flow, make_maf
from running import put
from torch import Tensor

import jacobiflow as jf
from jacobiflow.calibration import BlockTuning, TuneSettings, Tuning
from jacobiflow.calibration.tuning import CountedRun, Run
from jacobiflow.flows.fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")

GUIDANCE = jf.Guidance(0.4, annealed=False, on="shift", attn_temperature=0.9)
SETTINGS = TuneSettings(
    tolerances=(1e-1, 1e-3), partitions=(jf.Window(4), jf.Whole()), fine=(2, 6), coarse=(3,), fine_after_coarse=(1, 4),
    coarse_to_tolerance=(2,), coarse_from=0.5,
)  # fmt: skip
FLOWS: dict[str, tuple[Callable[[], Any], int]] = {
    "classes": (lambda: make_flow(image_size=6, num_classes=3), 4),
    "guided": (lambda: make_flow(image_size=6, num_classes=2), 3),
    "MAF": (lambda: make_maf(num_classes=0), 3),
    "digits-p1": (lambda: jf.load("digits-p1"), 2),
}


@dataclass(frozen=True)
class Tuned:
    """A tuning, and each block at the solutions of the oracle for the same latents."""

    flow: Any
    tuning: Tuning
    blocks: list[BlockProblem]

    def solve(self, i: int, *pieces: Any, coarse: int = 0) -> Any:
        p = self.blocks[i]
        return jf.solve(p.block, p.z, jf.Solver(*pieces, coarse=coarse), p.labels)

    def image(self, i: int, x: Tensor) -> Tensor:
        """The tokens that block i's answer `x` becomes, all later blocks being solved exactly."""
        tokens, labels = oracle_of(self.flow).flip(i, x.double()), self.blocks[i].labels
        return way_back(self.flow, tokens, labels, self.tuning.guidance, i)[0].answer if i else tokens


@cache
def tuned(name: str) -> Tuned:
    make, samples = FLOWS[name]
    flow, guidance = make(), GUIDANCE if name == "guided" else None
    tuning = jf.tune(flow, guidance=guidance, samples=samples, seed=3, progress=False, settings=SETTINGS)
    labels = torch.arange(samples) % flow.config.num_classes if flow.config.num_classes else None
    tokens = fresh_latents(flow, samples, seed=3) * flow.var.double().sqrt()
    return Tuned(flow, tuning, way_back(flow, tokens, labels, guidance))


@pytest.mark.parametrize("name", FLOWS)
def test_what_runs_took_and_left_is_what_the_oracle_sees(name: str) -> None:
    """Sweeps in bfloat16 are tried for large runs only, and where the block has such a network."""
    found, low = tuned(name), name != "MAF"
    # float32's inputs differ from the oracle's in their last digits.
    slack, close = (1, {"rel": 0.1, "abs": 1e-4}) if name == "digits-p1" else (0, {"rel": 1e-4, "abs": 1e-9})
    tried = [((partition, 0), tolerance) for partition in (jf.Window(4), jf.Whole()) for tolerance in (1e-1, 1e-3)]
    tried += [((jf.Whole(), 2), tolerance) for tolerance in (1e-1, 1e-3)] * low
    for i, (p, block) in enumerate(zip(found.blocks, found.tuning.blocks, strict=True)):

        def left(x: Tensor, p: BlockProblem = p) -> tuple[float, float]:
            return float((p.g(x) - x).abs().max()), float((x - p.answer).abs().max())

        assert [((run.partition, run.coarse), run.tolerance) for run in block.runs] == tried
        for run in block.runs:
            pieces = run.partition, block.guess, jf.Tolerance(run.tolerance), block.correction
            solution = found.solve(i, *pieces, coarse=run.coarse)
            assert (torch.tensor(run.sweeps) + run.coarse - solution.sample_sweeps).abs().max() <= slack
            assert (run.residual, run.error) == pytest.approx(left(solution.x), **close)
        counted = {(run.coarse, run.fine): (run.residual, run.error) for run in block.counted}
        for coarse, fine in [(0, 2), (0, 6), *([(3, 1), (3, 4)] if low else [])]:
            pieces = jf.Whole(), block.guess, jf.MaxSweeps(fine), block.correction
            residual, error = left(found.solve(i, *pieces, coarse=coarse).x)
            assert ((coarse, fine) in counted) == (residual <= 1e-1)
            if residual <= 1e-1:
                assert counted.pop((coarse, fine)) == pytest.approx((residual, error), **close)
        assert counted == {}


@pytest.mark.parametrize("name", FLOWS)
def test_fits_and_what_an_error_becomes_in_the_image(name: str) -> None:
    """A correction is kept where it saves sweeps: of all samples, of all tokens to the typical tolerance."""
    found = tuned(name)
    exact = found.image(0, found.blocks[0].answer)
    for i, (p, block) in enumerate(zip(found.blocks, found.tuning.blocks, strict=True)):
        guess = jf.CausalLinear.fit(p.answer.to(p.z), p.z)
        chord = jf.Chord.fit(p.block, p.answer.to(p.z), p.z, guess, p.labels)
        plain, saving = (found.solve(i, jf.Whole(), guess, jf.Tolerance(1e-3), c) for c in (jf.Plain(), chord))
        kept = bool(saving.sample_sweeps.sum() < plain.sample_sweeps.sum())
        assert isinstance(block.correction, jf.Chord if kept else jf.Plain)
        assert not kept or block.correction.kernel.allclose(chord.kernel, 1e-2, 1e-2)
        assert block.guess.kernel.allclose(guess.kernel, 1e-3, 1e-3)
        x = (saving if kept else plain).x
        ratio = (found.image(i, x) - exact).abs().max() / (x - p.answer).abs().max()
        assert block.amplification == pytest.approx(float(ratio), rel=0.2 if name == "digits-p1" else 1e-5)


def test_fits_recover_the_kernel_of_a_linear_block() -> None:
    """x_t = z_t + a x_(t-1) is the sum of a^d z_(t-d). A block that does not depend on x needs no correction."""
    a, few = 0.8, TuneSettings((1e-6,), typical=1e-6, partitions=(jf.Whole(),), fine=(), coarse=(), coarse_from=2)
    (block,) = jf.tune(linear_flow([a], nvp=False), samples=64, settings=few, progress=False).blocks
    assert block.guess.kernel[:4].flatten().tolist() == pytest.approx([a**d for d in range(4)], abs=0.01)
    assert block.correction.kernel[:4].flatten().tolist() == pytest.approx([a**d for d in range(1, 5)], abs=0.06)
    assert (max(block.runs[0].sweeps) < 8, len(block.runs), block.amplification) == (True, 1, 1.0)
    (block,) = jf.tune(linear_flow([0.0], 0.3), samples=4, settings=few, progress=False).blocks
    assert block.correction == jf.Plain()


def test_settings_say_what_is_tried() -> None:
    few = TuneSettings((1e-2,), fit=False, fine=(9,), coarse=(), coarse_to_tolerance=(2,), coarse_from=1.0)
    for block in jf.tune(make_flow(image_size=6), samples=2, settings=few, progress=False).blocks:
        assert (block.guess, block.correction) == (jf.Latent(), jf.Plain())
        ways = [(jf.Window(9), 0), (jf.Window(9), 2)]  # the only candidate
        assert [(run.partition, run.coarse) for run in block.runs] == ways
        assert [(run.coarse, run.fine) for run in block.counted] == [(0, 9)]
        assert block.counted[0].error < 1e-9  # Proposition 1
    few = replace(few, tolerances=(1e-1,), coarse_share=3.0)  # two sweeps are less than three times one
    for block in jf.tune(make_flow(image_size=6), samples=2, settings=few, progress=False).blocks:
        assert [run.coarse for run in block.runs] == [0]
    for wrong in ({"tolerances": ()}, {"partitions": ()}):
        with pytest.raises(ValueError, match="give one tolerance and one partition or more"):
            TuneSettings(**wrong)  # type: ignore[arg-type]


def test_a_tuning_repeats_and_takes_labels_in_turn() -> None:
    flow, made, state = tuned("classes").flow, tuned("classes").tuning, torch.get_rng_state()
    assert (made.fingerprint, made.num_tokens, made.samples, made.seed) == (fingerprint(flow), 9, 4, 3)
    assert (made.guidance, tuned("guided").tuning.guidance) == (None, GUIDANCE)

    def tune(*labels: int, **changed: Any) -> Tuning:
        arguments = {"samples": 4, "seed": 3, "progress": False, "settings": SETTINGS} | changed
        return jf.tune(flow, torch.tensor(labels), **arguments)

    assert tune(0, 1, 2) == made  # all classes, in turn
    assert tune(0, 1) == tune(0, 1, 0, 1) != tune(0, 1, 0, 2)
    assert tune(0, 1, 2, seed=1) != made
    for one, other in zip(tune(0, 1, 2, batch_size=3).blocks, made.blocks, strict=True):
        assert [run.sweeps for run in one.runs if not run.coarse] == [r.sweeps for r in other.runs if not r.coarse]
        assert one.amplification == pytest.approx(other.amplification, rel=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    made.check(flow)
    with pytest.raises(ValueError, match="the tuning is of another flow"):
        made.check(tuned("guided").flow)


def test_calibrate_tunes_under_the_labels_of_the_images_that_it_traces() -> None:
    flow, labels = linear_flow([0.5, -0.7], num_classes=3), torch.tensor([2, 0, 1, 0])
    flow.blocks[0].class_embed.data[:, 0, 0] = torch.arange(3)
    report = jf.calibrate(flow, randn(4, 1, 3, 3), labels, guidance=GUIDANCE, segments=2, traced=2, chord=True, seed=5)
    assert report.tuning == jf.tune(flow, torch.tensor([2, 1]), GUIDANCE, samples=2, seed=5, progress=False)


def test_what_does_not_fit_is_refused_by_name() -> None:
    conditional, unconditional = make_flow(image_size=6, num_classes=3), make_flow(image_size=6)
    overflowing = copy.deepcopy(unconditional)
    overflowing.blocks[1].proj_out.bias.data[:4] = 1e4
    for flow, changed, message in (
        (conditional, {"samples": 1}, "samples=1: give a whole number, at least 2"),
        (unconditional, {"labels": torch.tensor([0])}, "unconditional"),
        (overflowing, {}, "2 of 2 fresh latents overflow in the exact inverse of block 1; lower"),
    ):
        with pytest.raises(ValueError, match=message):
            jf.tune(flow, **{"samples": 2, "progress": False, **changed})


# ------------------------------------------------------------------------------------------------------------ as a file

KERNEL, SHIFT = torch.tensor([1.0, 0.25, -0.5]).view(3, 1, 1), torch.tensor([[0.5], [-1.0]])
RUNS = (Run(jf.Window(8), 1e-3, (3, 4), 1e-4, 2e-4), Run(jf.Window(2), 1e-3, (2, 2), float("inf"), 2e-4, 2))
PLAIN = BlockTuning(jf.CausalLinear(KERNEL, SHIFT), jf.Plain(), RUNS, (CountedRun(0, 3, 1e-3, 2e-3),), 1.5)
CHORD = BlockTuning(jf.CausalLinear(KERNEL, SHIFT), jf.Chord(KERNEL), RUNS[:1], (), 1.0)
MADE = Tuning("f" * 64, 2, jf.Guidance(0.5), 2, 7, (PLAIN, CHORD))


def version_1() -> dict[str, Any]:
    """`MADE` as 0.1.0 wrote it."""
    kernel = {"shape": [3, 1, 1], "float32": "AACAPwAAgD4AAAC/"}
    guess = {"kernel": kernel, "shift": {"shape": [2, 1], "float32": "AAAAPwAAgL8="}}
    run = {"window": 8, "tolerance": 1e-3, "sweeps": [3, 4], "residual": 1e-4, "error": 2e-4, "coarse": 0}
    low = {"window": 2, "tolerance": 1e-3, "sweeps": [2, 2], "residual": None, "error": 2e-4, "coarse": 2}
    counted = [{"coarse": 0, "fine": 3, "residual": 1e-3, "error": 2e-3}]
    return {
        "schema_version": 1, "fingerprint": "f" * 64, "num_tokens": 2, "samples": 2, "seed": 7,
        "guidance": {"weight": 0.5, "annealed": True, "on": "both", "attn_temperature": 1.0},
        "blocks": [
            {**guess, "chord": None, "runs": [run, low], "counted": counted, "amplification": 1.5},
            {**guess, "chord": kernel, "runs": [run], "counted": [], "amplification": 1.0},
        ],
    }  # fmt: skip


def test_a_tuning_comes_back_from_its_file_and_from_one_of_version_1(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    other = replace(PLAIN, guess=jf.MeanAffine(SHIFT, SHIFT), correction=jf.Chord(KERNEL.double() / 3))
    for made in (MADE, replace(MADE, blocks=(other,)), tuned("digits-p1").tuning):
        made.save(path)
        assert Tuning.load(path) == made
    path.write_text(json.dumps(version_1()))
    assert Tuning.load(path) == MADE
    path.write_text('{"schema_version"')
    with pytest.raises(ValueError, match=r"tuning .*tuning\.json: .*; make it anew"):
        Tuning.load(path)


def test_an_entry_that_does_not_fit_is_named_in_either_version() -> None:
    for path, entry, message in (
        (["schema_version"], 3, "not a tuning of schema_version 2"),
        (["num_tokens"], 0, "num_tokens=0"),
        (["samples"], 3, "block 0 lacks runs of 3 samples"),
        (["blocks"], [], "no blocks"),
        (["blocks", 1], {}, "missing"),
        (["blocks", 1, "runs", 0], 3, r"runs\[0\]|wrong kind"),
        (["blocks", 1, "runs", 0, "sweeps"], [1, -2], "sweeps=-2"),
        (["blocks", 0, "counted", 0, "fine"], 0, "fine=0"),
    ):
        for value in (MADE.to_json(), version_1()):
            with pytest.raises(ValueError, match=message):
                Tuning.from_json(put(value, path, entry))
