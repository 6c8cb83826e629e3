"""Model folders: exact round trips, reports beside the weights, and one line for what is broken."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import jacobiflow as jf
from jacobiflow.models.checkpoints import folder
from jacobiflow.models.checkpoints.fingerprint import fingerprint
from tests.helpers.checkpoints import SMALL, assert_same, error_of, make
from tests.helpers.fake_device import FakeDevice
from tests.helpers.problems import make_maf

TOKENS: Any = jf.TokenConfig(
    3, 2, (8, 16), 2, layers_per_block=(2, 1), context_dim=4, head_dim=4, orders=((2, 0, 1), "flip")
)
FLOWS: dict[str, Any] = {
    "TarFlow": make,
    "TarFlow of shifts in float64": lambda: make(replace(SMALL, nvp=False, num_classes=0)).double(),
    "TarFlow over tokens": lambda: make(TOKENS),
    "MAF": make_maf,
}
REPORTS = ("report.json", "report-guided.json")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of `make()`."""
    make().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", FLOWS)
def test_a_saved_flow_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    flow = FLOWS[name]()
    flow.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    document = {"model_type": flow.model_type, "format_version": 2, **asdict(flow.config)}
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(document))
    card = (tmp_path / "README.md").read_text()
    assert "library_name: jacobiflow" in card and f"# {tmp_path.name}" in card
    before = torch.get_rng_state()
    for loaded in (type(flow).from_pretrained(tmp_path), jf.load(tmp_path)):
        assert (type(loaded), loaded.config, loaded.training) == (type(flow), flow.config, False)
        assert_same(loaded.state_dict(), flow.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert_same(loaded.state_dict(), flow.state_dict())  # which is no view of its file


def test_recommended_settings_are_stored_in_the_config(tmp_path: Path) -> None:
    flow = make()
    flow.recommended = jf.SamplingSettings(jf.Guidance(3.0, attn_temperature=1.4), denoise=1.0)
    flow.save_pretrained(tmp_path)
    guidance = {"weight": 3.0, "annealed": True, "on": "both", "attn_temperature": 1.4, "rule": "linear"}
    recommended = json.loads((tmp_path / "config.json").read_text())["recommended"]
    assert recommended == {"guidance": guidance, "denoise": 1.0, "denoise_dtype": None}
    assert jf.load(tmp_path).recommended == flow.recommended
    flow.recommended = {"denoise": 1.0}  # type: ignore[assignment]
    with pytest.raises(TypeError, match="recommended="):
        flow.save_pretrained(tmp_path)


def test_names_of_classes_are_stored_in_the_config(tmp_path: Path) -> None:
    flow = jf.load("fashion-p2")
    assert flow.classes[3] == "dress" and flow.guided(jf.Guidance(1.0)).classes == flow.classes
    flow.save_pretrained(tmp_path)
    assert jf.load(tmp_path).classes == flow.classes
    flow.classes = ("cat", "dog")
    flow.save_pretrained(tmp_path)
    with pytest.raises(jf.CheckpointError, match="2 names of 10 classes; name all, or leave out classes"):
        jf.load(tmp_path)


def test_half_precision_in_the_file_is_float32_in_memory(tmp_path: Path) -> None:
    flow, half = make(), torch.float16
    flow.save_pretrained(tmp_path, dtype="float16")
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
    assert "a 'tarflow', not a MAF; use jacobiflow.load" in error_of(jf.MAF.from_pretrained, saved)
    flow = jf.TarFlow.from_pretrained(with_config(saved, {"noise_std": "left out", "nvp": "left out"}))
    assert flow.config == replace(SMALL, noise_std=0.0)
    assert jf.TarFlow.from_pretrained(with_config(saved, {"noise_std": 1})).config.noise_std == 1


def test_saving_replaces_the_folder_as_a_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", Mock(side_effect=OSError(28, "No space left on device")))
        assert "cannot be written (" in error_of(make(seed=1).save_pretrained, saved)
    flow = make()
    flow.blocks[1].proj_out.bias.data[0] = 1e6
    assert "blocks.1.proj_out.bias has non-finite" in error_of(flow.save_pretrained, saved, dtype="float16")
    assert_same(jf.load(saved).state_dict(), make().state_dict())
    assert len(list(saved.iterdir())) == 3
    make(seed=1).save_pretrained(saved)
    assert_same(jf.load(saved).state_dict(), make(seed=1).state_dict())


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("renames", [0, 1])
def test_a_killed_save_is_repaired_by_the_next_one(
    saved: Path, is_new: bool, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the old weights were removed, with the new config in place or not."""
    place = saved.parent / "new" if is_new else saved
    remaining, replace_file = iter([True] * renames), os.replace

    def killed(*paths: Any) -> None:
        if not next(remaining, False):
            raise KeyboardInterrupt
        replace_file(*paths)

    unlink = Path.unlink
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda path, **how: None if path.suffix == ".partial" else unlink(path, **how))
        make(seed=1).save_pretrained(place)
    error_of(jf.load, place)  # no model with the weights of one and the config of another
    make(seed=1).save_pretrained(place)
    assert_same(jf.load(place).state_dict(), make(seed=1).state_dict())
    assert len(list(place.iterdir())) == 3


def test_loading_takes_the_memory_of_the_model_and_of_one_tensor(tmp_path: Path) -> None:
    """Straight to the device in the dtype that was asked for, whichever is stored."""
    flow = make()
    flow.save_pretrained(tmp_path, dtype="bfloat16")
    stored = sum(tensor.nbytes for tensor in flow.state_dict().values()) // 2
    largest = max(tensor.nbytes for tensor in flow.state_dict().values())
    with FakeDevice() as device:
        for dtype, size in (("bfloat16", stored), (None, 2 * stored), ("float64", 4 * stored)):
            with device.counting() as counts:
                loaded = jf.load(tmp_path, device="cuda", dtype=dtype)
            assert size <= counts.peak <= size + largest
            assert fingerprint(loaded) == fingerprint(flow)
            del loaded


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "report.json"])
def test_saving_replaces_nothing_that_is_not_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"model_type": "bert"}')
    message = error_of(make().save_pretrained, tmp_path)
    assert f"{name}: not of a model that jacobiflow wrote; move it away" in message
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"model_type": "bert"}']


def calibrated(place: Path) -> jf.TarFlow:
    """The flow that `place` holds, with two reports beside it."""
    for name in REPORTS:
        (place / name).write_text(json.dumps({"fingerprint": fingerprint(make()), "more": name}))
    return jf.TarFlow.from_pretrained(place)


def test_a_saved_flow_keeps_its_reports_but_no_others(saved: Path, tmp_path: Path) -> None:
    flow = calibrated(saved)
    flow.save_pretrained(tmp_path / "copy", dtype="bfloat16")
    copy = jf.load(tmp_path / "copy")
    assert copy.report_files == tuple(tmp_path / "copy" / name for name in REPORTS)
    assert [file.read_bytes() for file in copy.report_files] == [(saved / name).read_bytes() for name in REPORTS]
    with torch.no_grad():
        flow.blocks[0].proj_out.weight.add_(0.1)
    flow.save_pretrained(tmp_path / "other")  # other weights
    assert jf.load(tmp_path / "other").report_files == ()


def test_a_tuning_of_an_earlier_version_is_not_used(saved: Path, tmp_path: Path) -> None:
    """A warning says so. The flow is loaded, and saved without the tuning."""
    (saved / "tuning-guided.json").write_text("{}")
    message = rf"^{saved}/tuning-guided\.json: not used, since tuning is retired; .*; call jacobiflow\.plan"
    with pytest.warns(UserWarning, match=message) as caught:
        flow = jf.load(saved)
    assert [warning.filename for warning in caught] == [__file__]
    flow.save_pretrained(tmp_path / "copy")
    assert not list((tmp_path / "copy").glob("tuning*"))


def test_bundled_models_are_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(folder, "MODELS", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert list(folder.list_bundled()) == ["tiny"]
    flow = jf.load("tiny")
    assert_same(flow.state_dict(), make().state_dict())
    assert not flow.training and not any(p.requires_grad for p in flow.parameters())
    make(seed=1).save_pretrained(tmp_path / "elsewhere/tiny")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(jf.load("tiny").var, make().var)  # before a folder of that name
    for place in ("./tiny", Path("tiny")):
        assert torch.equal(jf.load(place).var, make(seed=1).var)
    message = error_of(jf.load, "tinny")
    assert all(part in message for part in ("'tinny'", "bundled name (tiny)", "folder", "hub id 'owner/name'"))
    monkeypatch.setattr(folder, "MODELS", tmp_path / "none")
    assert "none here" in error_of(jf.load, "tinny")


def test_the_hub_is_asked_for_the_model_and_its_reports(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated(saved)
    download = Mock(return_value=str(saved))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    flow = jf.TarFlow.from_pretrained("me/flow", revision="v2")
    assert_same(flow.state_dict(), make().state_dict())
    assert flow.report_files == tuple(saved / name for name in REPORTS)
    files = ["config.json", "model.safetensors", *folder.REPORTS]
    download.assert_called_once_with("me/flow", revision="v2", allow_patterns=files)
    monkeypatch.undo()  # a hub that is not reached
    message = error_of(jf.TarFlow.from_pretrained, "me/flow", cache_dir=saved, local_files_only=True)
    assert all(part in message for part in ("me/flow", "LocalEntryNotFoundError", "connection"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (jf.load, make().push_to_hub):
        assert "pip install huggingface_hub" in error_of(call, "me/flow")
    assert_same(jf.load(saved).state_dict(), make().state_dict())  # which needs no hub


def test_push_to_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model as it is, its reports, and a card with front matter."""

    def upload(folder_path: str, revision: str, **_: object) -> None:
        cards.append(huggingface_hub.ModelCard.load(f"{folder_path}/README.md"))
        pushed.append(jf.load(folder_path))

    pushed, cards = list[Any](), list[huggingface_hub.ModelCard]()
    calls = {"upload_folder": upload, "create_repo.return_value.repo_id": "me/flow"}
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: Mock(**calls))
    flow = calibrated(saved)
    flow.push_to_hub("me/flow", revision="draft")
    data, text = cards[0].data, cards[0].text
    assert (data.library_name, data.tags) == ("jacobiflow", ["normalizing-flow", "tarflow"])
    assert "# me/flow\n" in text and 'jf.load("me/flow")' in text
    assert [file.name for file in pushed[0].report_files] == list(REPORTS)
    assert_same(pushed[0].state_dict(), make().state_dict())


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'"model_type"', b"9" * 5000], ids=range(5))
def test_a_broken_file_is_named(saved: Path, content: bytes) -> None:
    weights = saved / "model.safetensors"
    for damaged in (weights.read_bytes()[:-1], content):
        weights.write_bytes(damaged)
        assert "model.safetensors: missing or damaged" in error_of(jf.load, saved)
    (saved / "config.json").write_bytes(content)
    assert "config.json" in error_of(jf.load, saved)


def with_config(place: Path, change: dict[str, Any]) -> Path:
    """`place`, its config changed; a field of "left out" removed."""
    document = (json.loads((place / "config.json").read_text()) | change).items()
    (place / "config.json").write_text(json.dumps({k: value for k, value in document if value != "left out"}))
    return place


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"width": 1}, "width"),
        ({"width": "left out"}, "width"),
        ({"patch_size": 3}, "patch_size=3: does not divide the side of the images, 4"),
        ({"model_type": "bert"}, "model_type 'bert'; there are maf, "),
        ({"format_version": 3}, "format 3"),
        ({"width": 16}, "blocks.0.proj_in.weight"),
        ({"recommended": {"denoise": -1}}, "denoise=-1.0: give 0"),
    ],
)
def test_a_config_that_does_not_fit(saved: Path, change: dict[str, Any], key: str) -> None:
    message = error_of(jf.load, with_config(saved, change))
    assert str(saved) in message and key in message


@pytest.mark.parametrize(
    ("recommended", "words"),
    [
        (
            {"denoise": 1.0},
            "denoise=1.0: the training images had no noise, or it is not known; give 0, or convert again with "
            "--noise-std",
        ),
        ({"guidance": {"weight": 1.0, "attn_temperature": 2.0}}, "a MAFBlock has no attention; leave it at 1"),
    ],
)
def test_recommended_settings_are_those_that_the_flow_can_be_sampled_with(
    tmp_path: Path, recommended: dict[str, Any], words: str
) -> None:
    make_maf().save_pretrained(tmp_path)
    message = error_of(jf.load, with_config(tmp_path, {"recommended": recommended}))
    assert str(tmp_path / "config.json") in message and words in message


def test_every_tensor_that_does_not_fit_is_named(saved: Path) -> None:
    def error_with(**changed: Tensor) -> str:
        save_file(state | {name.replace("__", "."): t for name, t in changed.items()}, saved / "model.safetensors")
        return error_of(jf.load, saved)

    state = load_file(saved / "model.safetensors")
    del state["blocks.0.proj_in.bias"]
    message = error_with(extra=torch.zeros(2), blocks__1__pos_embed=torch.zeros(4, 9))
    assert all(name in message for name in ("blocks.0.proj_in.bias", "extra", "blocks.1.pos_embed"))
    state = make().state_dict()
    infinite = torch.full((4, 8), torch.inf)
    for other in (torch.int64, torch.float8_e4m3fn):
        wrong = torch.zeros(4, 8).to(other)
        message = error_with(blocks__0__pos_embed=wrong, blocks__1__pos_embed=infinite, var=torch.zeros(4, 4))
        assert f"blocks.0.pos_embed is of {other}; blocks.1.pos_embed has non-finite values; var has" in message
