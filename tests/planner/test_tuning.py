"""`tune`: what is fitted saves sweeps, at the latents that nobody else sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import jacobiflow as jf
from jacobiflow.models.latents import draw_latents
from tests.helpers.invented import GUIDANCE, Halfway, make_report, make_tuning, small, tuned

pytestmark = pytest.mark.usefixtures("one_thread")


def total_sweeps(flow: jf.TarFlow, tuning: jf.Tuning | None) -> int:
    """Sweeps of all tokens to 1e-3, over the blocks, at latents that were not fitted to."""
    x, sweeps = flow.prior_tokens(draw_latents(4, 16, 4, seed=7)), 0
    for i in reversed(range(len(flow.blocks))):
        permutation, pieces = flow.blocks[i].permutation, {} if tuning is None else vars(tuning.blocks[i])
        solution = jf.solve(
            flow.inverse_block(i), permutation(x), jf.Solver(**pieces), torch.arange(4) % 3, certify=False
        )
        sweeps += int(solution.sample_sweeps.sum())
        x = permutation.inverse(solution.x)
    return sweeps


@pytest.mark.parametrize("guidance", [None, GUIDANCE])
def test_fitted_pieces_save_sweeps_on_other_latents(guidance: jf.Guidance | None) -> None:
    flow = small().guided(guidance)
    notes = list[tuple[int, int, str]]()
    tuning = jf.tune(flow, progress=lambda *note: notes.append(note))
    assert (tuning.guidance, tuning.samples, tuning.seed, len(tuning.blocks)) == (guidance, 16, 0, 2)
    assert notes[-2:] == [(1, 2, "tuning"), (2, 2, "tuning")]
    assert total_sweeps(flow, tuning) < total_sweeps(flow, None)
    tuning.check(flow)


def test_classes_are_taken_in_turn() -> None:
    assert jf.tune(small(), [2, 1], samples=4, seed=5) == jf.tune(
        small(), torch.tensor([2, 1, 2, 1]), samples=4, seed=5
    )
    assert jf.tune(small(), 1, samples=4) != jf.tune(small(), samples=4) == jf.tune(small(), [0, 1, 2], samples=4)


def test_a_tuning_comes_back_from_its_file_and_fits_its_flow_only(tmp_path: Path) -> None:
    tuning = replace(tuned(), blocks=(tuned().blocks[0], replace(tuned().blocks[1], correction=Halfway(100))))
    tuning.save(tmp_path / "t.json")
    assert jf.Tuning.load(tmp_path / "t.json") == tuning != tuned()
    assert len({tuning, tuned(), jf.Tuning.load(tmp_path / "t.json")}) == 2
    with pytest.raises(ValueError, match=r"the tuning is of another flow.*tune this one"):
        tuning.check(small(1))
    with pytest.raises(ValueError, match="tuning of 1 blocks, but the flow has 2"):
        replace(tuning, blocks=tuning.blocks[:1]).check(small())
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tuning .*t\.json: .*; make it anew with jacobiflow plan --tune"):
        jf.Tuning.load(tmp_path / "t.json")


def test_a_tuning_is_found_by_its_guidance_and_copied_with_the_model(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "a")
    assert jf.find_tuning(jf.load(tmp_path / "a")) is None
    make_report([1, 1]).save(tmp_path / "a" / "report.json")
    make_tuning(guidance=GUIDANCE).save(tmp_path / "a" / "tuning-guided.json")
    assert jf.find_tuning(jf.load(tmp_path / "a")) == tmp_path / "a" / "tuning-guided.json"  # for want of a better one
    make_tuning().save(tmp_path / "a" / "tuning.json")
    jf.load(tmp_path / "a").save_pretrained(tmp_path / "b")
    for guidance, name in ((None, "tuning.json"), (GUIDANCE, "tuning-guided.json"), (jf.Guidance(3.0), "tuning.json")):
        assert jf.find_tuning(jf.load(tmp_path / "b").guided(guidance)) == tmp_path / "b" / name


def test_labels_that_do_not_fit_and_a_single_sample_are_refused() -> None:
    with pytest.raises(ValueError, match="samples=1: give a whole number, at least 2"):
        jf.tune(small(), samples=1)
    for labels, message in (([3], "label 3"), (torch.arange(0), "labels: empty; give one or more")):
        with pytest.raises(ValueError, match=message):
            jf.tune(small(), labels)
