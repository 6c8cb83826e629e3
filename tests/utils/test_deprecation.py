from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import jacobiflow as jf
from jacobiflow import training
from jacobiflow.cli import options
from jacobiflow.cli.app import app, main
from jacobiflow.utils.deprecation import renamed_arguments, renamed_attributes


@renamed_attributes(size="width", measure="area")
@renamed_arguments(size="width")
@dataclass(frozen=True)
class Shape:
    width: int
    height: int = 2

    def area(self) -> int:
        return self.width * self.height


def test_old_names_of_a_class_work_and_warn_at_the_line_that_uses_them() -> None:
    message = r"^size= is now width=; jacobiflow 0\.4 removes the old name$"
    with pytest.warns(DeprecationWarning, match=message) as caught:
        shape = Shape(size=3)  # type: ignore[call-arg]
    assert shape == Shape(3) and caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"^Shape\.size is now width; ") as caught:
        assert shape.size == 3  # type: ignore[attr-defined]
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"^Shape\.measure is now area; "):
        assert shape.measure() == 6  # type: ignore[attr-defined]


def test_both_names_are_refused_and_new_ones_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(TypeError, match="size is the old name of width; leave it out"):
        Shape(size=3, width=3)  # type: ignore[call-arg]
    assert replace(Shape(3), width=4).area() == 8 and not recwarn.list


@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (jf.TarFlowConfig, {"channels": 64}, {"width": 64}),
        (jf.STARFlowConfig, {"text_channels": 8}, {"text_dim": 8}),
        (jf.ProseConfig, {"token_channels": 3}, {"token_dim": 3}),
        (training.TrainingConfig, {"ema": 0.5, "clip": 2.0, "drop_label": 0.2},
         {"ema_decay": 0.5, "max_grad_norm": 2.0, "label_dropout": 0.2}),
    ],
)  # fmt: skip
def test_configs_take_old_arguments(make: Any, old: dict[str, Any], new: dict[str, Any]) -> None:
    others: dict[Any, dict[str, int]] = {
        jf.TarFlowConfig: {"in_channels": 1, "image_size": 8, "patch_size": 2, "num_blocks": 2, "layers_per_block": 1},
        training.TrainingConfig: {"steps": 1},
    }
    with pytest.warns(DeprecationWarning):
        assert make(**others.get(make, {}), **old) == make(**others.get(make, {}), **new)


def test_functions_and_samples_have_old_names() -> None:
    flow = jf.load("digits-p1")
    with pytest.warns(DeprecationWarning, match="return_trace= is now return_intermediates="):
        samples: Any = jf.sample(flow, 2, return_trace=True, strategy="sequential")
    with pytest.warns(DeprecationWarning, match="Samples.trace is now intermediates"):
        assert samples.trace is samples.intermediates
    with pytest.warns(DeprecationWarning, match="Outcome.lost is now num_nonfinite"):
        assert samples.outcome.lost == 0
    z, solver = torch.ones(1, 64, 1), jf.Solver(jf.Sequential())
    with pytest.warns(DeprecationWarning) as caught:
        solution = jf.solve_certified(flow.blocks[0], z, solver, slots=1)
    assert solution.exact.all() and {warning.filename for warning in caught} == {__file__}
    assert [str(warning.message).partition(";")[0] for warning in caught] == [
        "jacobiflow.solve_certified is now jacobiflow.solve", "slots= is now batch_size=",
    ]  # fmt: skip


def test_a_warning_of_a_function_with_old_arguments_is_at_the_line_of_the_caller() -> None:
    with pytest.warns(UserWarning, match="not certified") as caught:
        jf.sample(jf.load("digits-p1"), 1, strategy="jacobi-3")
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [(jf, "Report", "CalibrationReport"), (jf, "Weights", "ImportanceWeights"), (jf, "register", "register_piece"),
     (training, "TrainConfig", "TrainingConfig"), (training, "StepReport", "TrainMetrics")],
)  # fmt: skip
def test_modules_have_old_names(module: Any, old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is now .*{new}; ") as caught:
        assert getattr(module, old) is getattr(module, new)
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        module.Nothing  # noqa: B018


def test_a_retired_name_is_refused_with_the_last_version_that_has_it() -> None:
    message = "jacobiflow.tune is retired; jacobiflow 0.1.0 is the last version with it; call jacobiflow.plan"
    with pytest.raises(AttributeError, match=f"^{message}$"):
        jf.tune  # noqa: B018


def test_old_options_are_replaced_by_options_that_exist() -> None:
    commands = [app[name].assemble_argument_collection() for name in ("train", "calibrate")]
    names = {name for command in commands for option in command for name in option.names}
    assert {*options.RENAMED.values()} <= names and not names & options.RENAMED.keys()


def test_a_command_takes_old_options_and_prints_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--images", "digits", "--out", "x", "--ema=2", "--mirror"]) == 2
    error = capsys.readouterr().err
    assert "warning: --ema is now --ema-decay; jacobiflow 0.4 removes the old name\n" in error
    assert "warning: --mirror is now --horizontal-flip; " in error
    assert "--steps" in error.splitlines()[-1]
