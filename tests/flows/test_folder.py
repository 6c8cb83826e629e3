"""Model folders: round trips bit for bit, the report beside the weights, and one clear line for all that is broken."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub.hub_mixin
import pytest
import torch
from checkpoints import SMALL, assert_same, error_of, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import make_maf
from safetensors.torch import load_file, save_file
from torch import Tensor

import jacobiflow as jf
from jacobiflow.flows import folder
from jacobiflow.flows.fingerprint import fingerprint

FLOWS: dict[str, Any] = {
    "TarFlow": make,
    "TarFlow of shifts": lambda: make(replace(SMALL, nvp=False, num_classes=0)),
    "TarFlow in float64": lambda: make().double(),
    "MAF": make_maf,
}
fixed_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of `make()`."""
    make().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's folder of bundled models, replaced by one that holds `tiny` and a stray file."""
    make().save_pretrained(tmp_path / "tiny")
    (tmp_path / "notes.txt").write_text("no model")
    monkeypatch.setattr(folder, "MODELS", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FLOWS)
def test_a_saved_flow_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    flow = FLOWS[name]()
    flow.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    document = {"model_type": flow.model_type, "format_version": 1, **asdict(flow.config)}
    assert json.loads((tmp_path / "config.json").read_text()) == document
    card = (tmp_path / "README.md").read_text()
    assert "library_name: jacobiflow" in card and f"# {tmp_path.name}" in card
    before = torch.get_rng_state()
    for loaded in (type(flow).from_pretrained(tmp_path), jf.load(tmp_path)):
        assert (type(loaded), loaded.config, loaded.training) == (type(flow), flow.config, False)
        assert_same(loaded.state_dict(), flow.state_dict())
        assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert_same(loaded.state_dict(), flow.state_dict())  # which does not hang on its file


def test_recommended_settings_are_kept_in_the_config(tmp_path: Path) -> None:
    flow = make()
    assert flow.recommended == jf.SamplingSettings()
    flow.recommended = jf.SamplingSettings(jf.Guidance(3.0, attn_temperature=1.4), denoise=1.0)
    flow.save_pretrained(tmp_path)
    guidance = {"weight": 3.0, "annealed": True, "on": "both", "attn_temperature": 1.4}
    found = json.loads((tmp_path / "config.json").read_text())["recommended"]
    assert found == {"guidance": guidance, "denoise": 1.0}
    assert jf.load(tmp_path).recommended == flow.recommended
    flow.recommended = {"denoise": 1.0}  # type: ignore[assignment]
    with pytest.raises(TypeError, match="recommended="):
        flow.save_pretrained(tmp_path)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_in_the_file_is_float32_in_memory(tmp_path: Path, stored: str) -> None:
    flow, half = make(), getattr(torch, stored)
    flow.save_pretrained(tmp_path, dtype=stored)
    raw = load_file(tmp_path / "model.safetensors")
    assert_same(raw, {name: tensor.to(half) for name, tensor in flow.state_dict().items()})
    assert_same(jf.load(tmp_path).state_dict(), {name: tensor.float() for name, tensor in raw.items()})
    assert_same(jf.load(tmp_path, dtype=half).state_dict(), raw)
    for dtype in ("int8", "add", torch.int64):
        with pytest.raises(ValueError, match="float16, bfloat16, float32, float64"):
            jf.load(tmp_path, dtype=dtype)


def test_a_subclass_reads_the_folder_of_its_class_and_a_config_may_leave_out_defaults(saved: Path) -> None:
    class Special(jf.TarFlow): ...

    special = Special.from_pretrained(saved)
    assert type(special) is Special and all(parameter.requires_grad for parameter in special.parameters())
    assert "model_type 'tarflow', which is no MAF; jacobiflow.load" in error_of(jf.MAF.from_pretrained, saved)
    flow = jf.TarFlow.from_pretrained(with_config(saved, {"noise_std": "left out", "nvp": "left out"}))
    assert flow.config == replace(SMALL, noise_std=0.0)
    assert jf.TarFlow.from_pretrained(with_config(saved, {"noise_std": 1})).config.noise_std == 1


def test_saving_replaces_the_folder_as_a_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", Mock(side_effect=OSError(28, "No space left on device")))
        assert "No space left" in error_of(make(seed=1).save_pretrained, saved)
    assert_same(jf.load(saved).state_dict(), make().state_dict())
    assert len(list(saved.iterdir())) == 3
    make(seed=1).save_pretrained(saved)
    assert_same(jf.load(saved).state_dict(), make(seed=1).state_dict())


def snapshot(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("renames", [0, 1])
def test_a_save_that_was_killed_is_recognised_and_done_again(
    saved: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the old config was removed, with the new weights in place or not."""
    left, replace_file = iter([True] * renames), os.replace

    def killed(*paths: Any) -> None:
        if not next(left, False):
            raise KeyboardInterrupt
        replace_file(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda path, **_: os.remove(path) if path.name == "config.json" else None)
        make(seed=1).save_pretrained(saved)
    assert not (saved / "config.json").exists()
    assert len(snapshot(saved)) == 4 - renames
    assert all("left by a process that was killed" in line or "missing" in line for line in jf.flows.problems(saved))
    make(seed=1).save_pretrained(saved)
    assert_same(jf.load(saved).state_dict(), make(seed=1).state_dict())
    assert len(snapshot(saved)) == 3
    assert list(jf.flows.problems(saved)) == []


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": '{"model_type": "bert"}'}, "config.json: not of a model that jacobiflow wrote; move it away"),
        ({"model.safetensors": "mine"}, "model.safetensors: weights without a config.json that jacobiflow wrote; move"),
        ({"model.safetensors": "mine", f".config.json.{'0' * 16}.partial": "{}"}, "weights without a config.json"),
        ({"report.json": "mine"}, "report.json: not a report of jacobiflow; move it away"),
    ],
)
def test_saving_replaces_nothing_that_is_not_ours(
    saved: Path, tmp_path: Path, files: dict[str, str], words: str
) -> None:
    flow, place = calibrated(saved), tmp_path / "other"
    place.mkdir()
    for name, content in files.items():
        (place / name).write_text(content)
    before = snapshot(place)
    assert words in error_of(flow.save_pretrained, place)
    assert snapshot(place) == before


def test_all_problems_of_a_folder_are_named(saved: Path) -> None:
    assert list(jf.flows.problems(saved)) == []
    (saved / "config.json").write_text("mine")
    (saved / "model.safetensors").write_text("mine")
    found = list(jf.flows.problems(saved))
    for problem, words in zip(found, ("not JSON", "cut short or damaged"), strict=True):
        assert problem.startswith(str(saved)) and words in problem
    assert "no folder" in "".join(jf.flows.problems(saved / "none"))


def test_saving_refuses(tmp_path: Path) -> None:
    flow = make()
    with torch.no_grad():
        flow.blocks[1].proj_out.bias[0] = 1e6
    assert "blocks.1.proj_out.bias has non-finite" in error_of(flow.save_pretrained, tmp_path / "m", dtype="float16")
    assert not (tmp_path / "m").exists()
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error_of(flow.save_pretrained, tmp_path / "file")
    with pytest.raises(ValueError, match="leave it out"):
        flow.save_pretrained(tmp_path, config=replace(SMALL, channels=16))


REPORTS = ("report.json", "report-guided.json")


def calibrated(place: Path) -> jf.TarFlow:
    """The flow that `place` holds, with two reports beside it."""
    for name in REPORTS:
        (place / name).write_text(json.dumps({"fingerprint": fingerprint(make()), "more": name}))
    return jf.TarFlow.from_pretrained(place)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_saved_flow_keeps_its_reports_but_no_others(saved: Path, tmp_path: Path, dtype: str | None) -> None:
    flow = calibrated(saved)
    flow.save_pretrained(tmp_path / "copy", dtype=dtype)
    copy = jf.load(tmp_path / "copy")
    assert copy.report_files == tuple(tmp_path / "copy" / name for name in REPORTS)
    assert [file.read_bytes() for file in copy.report_files] == [(saved / name).read_bytes() for name in REPORTS]
    flow.save_pretrained(saved)  # over itself
    assert jf.load(saved).report_files == tuple(saved / name for name in REPORTS)
    with torch.no_grad():
        flow.blocks[0].proj_out.weight.add_(0.1)
    flow.save_pretrained(tmp_path / "other", dtype=dtype)  # other weights
    assert jf.load(tmp_path / "other").report_files == ()
    for broken in ("{", "[]", "{}"):
        for name in REPORTS:
            (saved / name).write_text(broken)
        jf.TarFlow.from_pretrained(saved).save_pretrained(tmp_path / "other")
        assert jf.load(tmp_path / "other").report_files == ()


def test_bundled_models_are_loaded_by_name(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(folder.bundled()) == ["tiny"]
    flow = jf.load("tiny")
    assert_same(flow.state_dict(), make().state_dict())
    assert not flow.training and not any(p.requires_grad for p in flow.parameters())
    assert {t.dtype for t in jf.load("tiny", dtype="float64").state_dict().values()} == {torch.float64}
    make(seed=1).save_pretrained(models / "elsewhere/tiny")
    monkeypatch.chdir(models / "elsewhere")
    assert torch.equal(jf.load("tiny").var, make().var)  # before a folder of that name
    for place in ("./tiny", Path("tiny")):
        assert torch.equal(jf.load(place).var, make(seed=1).var)
    for name in ("tinny", "notes.txt"):
        message = error_of(jf.load, name)
        assert all(part in message for part in (repr(name), "bundled name (tiny)", "folder", "hub id 'owner/name'"))
    monkeypatch.setattr(folder, "MODELS", models / "none")
    assert "none here" in error_of(jf.load, "tinny")


def test_the_hub_is_asked_for_the_model_and_its_reports(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated(saved)
    download = Mock(return_value=str(saved))
    monkeypatch.setattr(folder, "snapshot_download", download)
    flow = jf.TarFlow.from_pretrained("me/flow", revision="v2")
    assert_same(flow.state_dict(), make().state_dict())
    assert flow.report_files == tuple(saved / name for name in REPORTS)
    files = ["config.json", "model.safetensors", "report.json", "report-*.json"]
    download.assert_called_once_with("me/flow", revision="v2", allow_patterns=files)
    monkeypatch.undo()  # a hub that is not reached
    message = error_of(jf.TarFlow.from_pretrained, "me/flow", cache_dir=saved, local_files_only=True)
    assert all(part in message for part in ("me/flow", "LocalEntryNotFoundError", "connection"))


def test_push_to_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model as it is, its reports and settings, and a card with front matter."""

    def upload(folder_path: Path, **_: object) -> None:
        cards.append(huggingface_hub.ModelCard.load(folder_path / "README.md"))
        pushed.append(jf.load(folder_path))

    pushed, cards = list[Any](), list[huggingface_hub.ModelCard]()
    calls = {"upload_folder": upload, "create_repo.return_value.repo_id": "me/flow"}
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", lambda **_: Mock(**calls))
    flow = calibrated(saved)
    flow.recommended = jf.SamplingSettings(jf.Guidance(2.0, on="scale", attn_temperature=1.4), denoise=1)
    flow.push_to_hub(
        "me/flow", model_card_kwargs={"license": "mit", "datasets": ["me/images"], "sections": "## Limits"}
    )
    assert pushed[0].recommended == flow.recommended
    data, text = cards[0].data, cards[0].text
    assert (data.library_name, data.license, data.datasets) == ("jacobiflow", "mit", ["me/images"])
    assert (data.pipeline_tag, "normalizing-flow" in data.tags) == ("unconditional-image-generation", True)
    assert "# me/flow\n" in text and text.endswith("## Limits\n") and 'jf.load("me/flow")' in text
    settings = (
        "annealed guidance of the scale of weight 2 at attention temperature 1.4 and one denoising step of rate 1"
    )
    assert f"Recommended settings: {settings}." in text
    assert [file.name for file in pushed[0].report_files] == list(REPORTS)
    assert_same(pushed[0].state_dict(), make().state_dict())


def test_a_missing_file(saved: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (saved / name).unlink()
        assert f"{name}: missing" in error_of(jf.load, saved)
        (saved / name).mkdir()
        assert name in error_of(jf.load, saved)


@fixed_folder
@given(share=st.floats(0, 1, exclude_max=True))
def test_weights_that_were_cut_short(saved: Path, share: float) -> None:
    make().save_pretrained(saved)
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    assert "copy it again" in error_of(jf.load, saved)


@fixed_folder
@given(text=st.text(max_size=20) | st.just("[" * 100_000))
def test_a_config_that_is_no_object(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text, encoding="utf-8")
    assert "config.json" in error_of(jf.load, saved)


def with_config(place: Path, change: dict[str, Any]) -> Path:
    """`place`, its config changed; a field of "left out" removed."""
    document = (json.loads((place / "config.json").read_text()) | change).items()
    (place / "config.json").write_text(json.dumps({k: value for k, value in document if value != "left out"}))
    return place


@pytest.mark.parametrize(
    ("flow", "change", "words"),
    [
        (make, {"heads": 3, "width": 1}, "unknown field 'heads'; unknown field 'width'"),
        (make, {"channels": None, "nvp": 1}, "channels=None is no int; nvp=1 is no bool"),
        (make, {"num_blocks": True, "noise_std": "0"}, "num_blocks=True is no int; noise_std='0' is no float"),
        (make, {"channels": "left out", "noise_std": "left out"}, "config.json: channels missing"),
        (make, {"patch_size": 3}, "patch_size=3 does not divide image_size=4"),
        (make, {"model_type": "bert"}, "model_type 'bert'; there are maf, "),
        (make, {"model_type": "maf"}, "unknown field 'patch_size'"),
        (make, {"format_version": 2}, "format 2"),
        (make, {"channels": 4 * 10**18}, "channels=4000000000000000000: the limit is 1,048,576"),
        (make, {"channels": 16}, "the shapes say channels=8 rather than 16"),
        (make, {"recommended": {"denoise": -1}}, "config.json: recommended settings: denoise=-1: give 0"),
        (make_maf, {"recommended": {"denoise": 1}}, "a denoise rate of 1, but noise_std is 0: there is no Gaussian"),
        (make_maf, {"logit_alpha": 0.7}, "logit_alpha=0.7: give a small positive number"),
        (make_maf, {"image_size": 99}, "the shapes say image_size=4 rather than 99"),
        (make_maf, {"hidden_layers": 1, "num_classes": 0}, "hidden_layers=2 rather than 1, num_classes=3 rather than"),
        (make_maf, {"hidden_features": 24, "num_blocks": 9}, "hidden_features=20 rather than 24, num_blocks=2 rather"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, flow: Any, change: dict[str, Any], words: str) -> None:
    flow().save_pretrained(tmp_path)
    message = error_of(jf.load, with_config(tmp_path, change))
    assert str(tmp_path) in message and words in message


def test_every_tensor_that_does_not_fit_is_named(saved: Path) -> None:
    def said_of(**changed: Tensor) -> str:
        save_file(state | {name.replace("__", "."): t for name, t in changed.items()}, saved / "model.safetensors")
        return error_of(jf.load, saved)

    state = load_file(saved / "model.safetensors")
    del state["blocks.0.proj_in.bias"]
    integers = torch.zeros(8, dtype=torch.int64)
    message = said_of(extra=torch.zeros(2), blocks__1__pos_embed=torch.zeros(4, 9), blocks__1__proj_out__bias=integers)
    assert "blocks.0.proj_in.bias (8,): missing" in message
    assert "extra (2,): unknown" in message
    assert "blocks.1.pos_embed (4, 9): expected (4, 8)" in message
    assert "blocks.1.proj_out.bias torch.int64" in message
    state = make().state_dict()
    message = said_of(blocks__1__pos_embed=torch.full((4, 8), torch.inf), var=torch.zeros(4, 4))
    assert "blocks.1.pos_embed has non-finite values; var has values that are not positive" in message
