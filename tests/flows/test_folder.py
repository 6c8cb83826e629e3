"""Model folders, files of the original code, and presets: round trips, and one clear error for all that is broken."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.hub_mixin
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from jacobiflow.flows import folder as checkpoints
from jacobiflow.flows.folder import CheckpointError
from jacobiflow.flows.presets import PRESETS
from jacobiflow.flows.tarflow import TarFlow, TarFlowConfig

SMALL = TarFlowConfig(
    in_channels=1, image_size=4, patch_size=2, channels=8, num_blocks=2, layers_per_block=1, num_classes=3,
    head_dim=4, expansion=2, noise_std=0.1,
)  # fmt: skip
ORIGINAL = replace(SMALL, channels=64, head_dim=64, expansion=4)

fixed_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def make(config: TarFlowConfig = SMALL, seed: int = 0) -> TarFlow:
    """A flow whose every tensor is random, `var` positive."""
    flow = TarFlow(config)
    generator = torch.Generator().manual_seed(seed)
    state = {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in flow.state_dict().items()}
    flow.load_state_dict(state | {"var": state["var"].square() + 0.1})
    return flow


def assert_same(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


def original_state(flow: TarFlow) -> dict[str, Tensor]:
    """The state dict that the original code would have, written out from its list of keys."""
    tokens = flow.config.num_tokens
    masks = {f"blocks.{i}.attn_mask": torch.tril(torch.ones(tokens, tokens)) for i in range(flow.config.num_blocks)}
    return {name: tensor.clone() for name, tensor in (flow.state_dict() | masks).items()}


def error_of(call: object, *args: object, **kwargs: object) -> str:
    """The message of the CheckpointError that the call raises; one line."""
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's folder of bundled models, replaced by one that holds `tiny` and a stray file."""
    folder = tmp_path / "bundled-models"
    checkpoints.save(make(), folder / "tiny")
    (folder / "notes.txt").write_text("no model")
    monkeypatch.setattr(checkpoints, "_MODELS", folder)
    return folder


@pytest.fixture
def folder(models: Path) -> Path:
    return models / "tiny"


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    path = tmp_path / "model.pth"
    torch.save(original_state(make()), path)
    return path


class TestModelFolder:
    @pytest.mark.parametrize("nvp", [True, False])
    @pytest.mark.parametrize("num_classes", [0, 3])
    def test_round_trip_is_bit_for_bit(self, tmp_path: Path, nvp: bool, num_classes: int) -> None:
        flow = make(replace(SMALL, nvp=nvp, num_classes=num_classes))
        flow.save_pretrained(tmp_path / "model")
        loaded = TarFlow.from_pretrained(tmp_path / "model")
        assert loaded.config == flow.config and type(loaded.config) is TarFlowConfig
        assert_same(loaded.state_dict(), flow.state_dict())
        images = torch.randn(2, 1, 4, 4)
        assert torch.equal(loaded.log_prob(images), flow.log_prob(images))
        assert not loaded.training and all(p.requires_grad and not p.is_meta for p in loaded.parameters())

    def test_files(self, tmp_path: Path) -> None:
        make().save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors", "README.md"}
        assert not list(tmp_path.glob("*.partial"))
        document = json.loads((tmp_path / "config.json").read_text())
        assert document == {"model_type": "tarflow", "format_version": 1, **asdict(SMALL)}
        assert "library_name: jacobiflow" in (tmp_path / "README.md").read_text()

    @pytest.mark.parametrize("stored", ["float16", "bfloat16"])
    def test_half_storage_loads_as_float32(self, tmp_path: Path, stored: str) -> None:
        flow, half = make(), getattr(torch, stored)
        checkpoints.save(flow, tmp_path, dtype=stored)
        raw = load_file(tmp_path / "model.safetensors")
        assert_same(raw, {name: tensor.to(half) for name, tensor in flow.state_dict().items()})
        assert_same(
            TarFlow.from_pretrained(tmp_path).state_dict(), {name: tensor.float() for name, tensor in raw.items()}
        )
        as_stored = checkpoints.load(tmp_path, dtype=half)
        assert_same(as_stored.state_dict(), raw)

    def test_float64_is_kept(self, tmp_path: Path) -> None:
        flow = make().double()
        flow.save_pretrained(tmp_path)
        assert_same(TarFlow.from_pretrained(tmp_path).state_dict(), flow.state_dict())

    def test_loading_draws_no_random_numbers_and_leaves_the_file(self, folder: Path) -> None:
        before = torch.get_rng_state()
        flow = TarFlow.from_pretrained(folder)
        assert torch.equal(torch.get_rng_state(), before)
        kept = flow.var.clone()
        (folder / "model.safetensors").write_bytes(bytes((folder / "model.safetensors").stat().st_size))
        assert torch.equal(flow.var, kept)

    def test_subclass(self, folder: Path) -> None:
        class Special(TarFlow):
            pass

        assert type(Special.from_pretrained(folder)) is Special

    def test_save_replaces_as_a_whole(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints, "serialize", full)
        assert "No space left" in error_of(make(seed=1).save_pretrained, folder)
        assert_same(TarFlow.from_pretrained(folder).state_dict(), make().state_dict())
        assert not list(folder.glob("*.partial"))
        monkeypatch.undo()
        make(seed=1).save_pretrained(folder)
        assert_same(TarFlow.from_pretrained(folder).state_dict(), make(seed=1).state_dict())

    def test_save_refuses(self, tmp_path: Path) -> None:
        flow = make()
        with torch.no_grad():
            flow.blocks[1].proj_out.bias[0] = 1e6
        assert "blocks.1.proj_out.bias has non-finite" in error_of(checkpoints.save, flow, tmp_path / "m", "float16")
        assert not (tmp_path / "m").exists()
        (tmp_path / "file").write_text("")
        assert "cannot be written" in error_of(flow.save_pretrained, tmp_path / "file")
        with pytest.raises(ValueError, match="leave it out"):
            flow.save_pretrained(tmp_path, config=ORIGINAL)


class TestLoad:
    def test_bundled(self) -> None:
        assert list(checkpoints.bundled()) == ["tiny"]
        flow = checkpoints.load("tiny")
        assert_same(flow.state_dict(), make().state_dict())
        assert not flow.training and not any(p.requires_grad for p in flow.parameters())

    def test_a_bundled_name_comes_before_a_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoints.save(make(seed=1), tmp_path / "tiny")
        monkeypatch.chdir(tmp_path)
        assert torch.equal(checkpoints.load("tiny").var, make().var)
        for folder in ("./tiny", Path("tiny")):
            assert torch.equal(checkpoints.load(folder).var, make(seed=1).var)

    @pytest.mark.parametrize("dtype", [torch.float64, "float64"])
    def test_dtype(self, dtype: torch.dtype | str) -> None:
        assert {t.dtype for t in checkpoints.load("tiny", dtype=dtype).state_dict().values()} == {torch.float64}

    @pytest.mark.parametrize("dtype", ["int8", "add", "no", torch.int64])
    def test_wrong_dtype(self, dtype: torch.dtype | str) -> None:
        with pytest.raises(ValueError, match="float16, bfloat16, float32, float64"):
            checkpoints.load("tiny", dtype=dtype)

    @pytest.mark.parametrize("name", ["tinny", "a/b/c", "notes.txt", "models/notes.txt"])
    def test_unknown_name(self, models: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        (models / "models").mkdir()
        (models / "models" / "notes.txt").write_text("exists, so is not asked of the hub")
        monkeypatch.chdir(models)
        message = error_of(checkpoints.load, name)
        assert all(part in message for part in (repr(name), "bundled name (tiny)", "folder", "hub id 'owner/name'"))

    def test_no_bundled_models(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checkpoints, "_MODELS", tmp_path / "none")
        assert "none here" in error_of(checkpoints.load, "tiny")

    def test_hub(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = {}

        def download(repo: str, **options: object) -> str:
            asked.update(options, repo=repo)
            return str(folder)

        monkeypatch.setattr(checkpoints, "snapshot_download", download)
        assert_same(TarFlow.from_pretrained("me/flow", revision="v2").state_dict(), make().state_dict())
        assert asked == {"repo": "me/flow", "revision": "v2", "allow_patterns": ["config.json", "model.safetensors"]}

    def test_hub_offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        message = error_of(TarFlow.from_pretrained, "me/flow", cache_dir=tmp_path, local_files_only=True)
        assert "me/flow" in message and LocalEntryNotFoundError.__name__ in message and "connection" in message

    def test_push_to_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Api:
            def __init__(self, **_: object) -> None: ...

            def create_repo(self, repo_id: str, **_: object) -> SimpleNamespace:
                return SimpleNamespace(repo_id=repo_id)

            def upload_folder(self, repo_id: str, folder_path: Path, **_: object) -> str:
                assert (folder_path / "README.md").is_file()
                assert_same(TarFlow.from_pretrained(folder_path).state_dict(), make().state_dict())
                return f"pushed {repo_id}"

        monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
        assert make().push_to_hub("me/flow") == "pushed me/flow"


class TestBrokenFolder:
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_missing_file(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        assert f"{name}: missing" in error_of(TarFlow.from_pretrained, folder)
        (folder / name).mkdir()
        assert name in error_of(TarFlow.from_pretrained, folder)

    @fixed_folder
    @given(share=st.floats(0, 1, exclude_max=True))
    def test_truncated_weights(self, folder: Path, share: float) -> None:
        whole = (folder.parent / "tiny" / "model.safetensors").read_bytes()
        cut = folder.parent / "cut"
        cut.mkdir(exist_ok=True)
        (cut / "config.json").write_bytes((folder / "config.json").read_bytes())
        (cut / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
        assert "copy it again" in error_of(TarFlow.from_pretrained, cut)

    @fixed_folder
    @given(text=st.text(max_size=20) | st.just("[" * 100_000))
    def test_config_that_is_no_object(self, folder: Path, text: str) -> None:
        (folder / "config.json").write_text(text, encoding="utf-8")
        assert "config.json" in error_of(TarFlow.from_pretrained, folder)

    @pytest.mark.parametrize(
        ("change", "parts"),
        [
            ({"heads": 3, "width": 1}, ["unknown field 'heads'", "unknown field 'width'"]),
            ({"channels": None, "nvp": 1}, ["channels=None is no int", "nvp=1 is no bool"]),
            ({"channels": 8.0, "image_size": "4"}, ["channels=8.0 is no int", "image_size='4' is no int"]),
            ({"num_blocks": True}, ["num_blocks=True is no int"]),
            ({"noise_std": "0"}, ["noise_std='0' is no float"]),
            ({"noise_std": float("nan")}, ["noise_std=nan"]),
            ({"patch_size": 3}, ["patch_size=3 does not divide image_size=4"]),
            ({"model_type": "bert"}, ["model_type 'bert'"]),
            ({"format_version": 2}, ["format 2"]),
            ({"num_blocks": 10**9}, ["1000000000 blocks", "num_blocks=2 rather than 1000000000"]),
            ({"in_channels": 10**30}, ["no flow has the sizes"]),
            ({"channels": 4 * 10**18}, ["no flow has the sizes"]),
        ],
    )
    def test_wrong_config(self, folder: Path, change: dict[str, object], parts: list[str]) -> None:
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(document | change))
        message = error_of(TarFlow.from_pretrained, folder)
        assert all(part in message for part in [str(folder), *parts]), message

    def test_missing_fields(self, folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        del document["noise_std"], document["channels"]
        (folder / "config.json").write_text(json.dumps(document))
        message = error_of(TarFlow.from_pretrained, folder)
        assert "channels missing" in message and "noise_std missing" in message

    def test_whole_number_of_noise(self, folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(document | {"noise_std": 0}))
        assert TarFlow.from_pretrained(folder).config == replace(SMALL, noise_std=0.0)

    def test_every_tensor_that_does_not_fit_is_listed(self, folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        del state["blocks.0.proj_in.bias"]
        state["blocks.0.extra"] = torch.zeros(2)
        state["blocks.1.pos_embed"] = torch.zeros(4, 9)
        state["blocks.1.proj_out.bias"] = torch.zeros(8, dtype=torch.int64)
        save_file(state, folder / "model.safetensors")
        message = error_of(TarFlow.from_pretrained, folder)
        for part in (
            "blocks.0.proj_in.bias (8,): missing",
            "blocks.0.extra (2,): unknown",
            "blocks.1.pos_embed (4, 9): (4, 8) wanted",
            "blocks.1.proj_out.bias torch.int64",
        ):
            assert part in message

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite(self, folder: Path, value: float) -> None:
        state = load_file(folder / "model.safetensors")
        state["blocks.1.pos_embed"][1, 1] = value
        state["var"][0] = 0
        save_file(state, folder / "model.safetensors")
        message = error_of(TarFlow.from_pretrained, folder)
        assert "blocks.1.pos_embed has non-finite values" in message and "not positive" in message


class TestOriginal:
    @pytest.mark.parametrize("nvp", [True, False])
    @pytest.mark.parametrize("num_classes", [0, 3])
    def test_round_trip(self, tmp_path: Path, nvp: bool, num_classes: int) -> None:
        flow = make(replace(ORIGINAL, nvp=nvp, num_classes=num_classes))
        checkpoints.export_original(flow, tmp_path / "out.pth")
        state = torch.load(tmp_path / "out.pth", weights_only=True)
        assert_same(state, original_state(flow))
        loaded = TarFlow.from_original(tmp_path / "out.pth", flow.config)
        assert_same(loaded.state_dict(), flow.state_dict())
        assert loaded.config == flow.config and not loaded.training

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_becomes_float32(self, tmp_path: Path, dtype: torch.dtype) -> None:
        half = {name: tensor.to(dtype) for name, tensor in original_state(make()).items()}
        torch.save(half, tmp_path / "half.pth")
        wanted = {name: tensor.float() for name, tensor in half.items() if not name.endswith("attn_mask")}
        assert_same(TarFlow.from_original(tmp_path / "half.pth", SMALL).state_dict(), wanted)

    def test_parallel_prefix(self, tmp_path: Path) -> None:
        prefixed = {f"module.{name}": tensor for name, tensor in original_state(make()).items()}
        torch.save(prefixed, tmp_path / "ddp.pth")
        assert_same(TarFlow.from_original(tmp_path / "ddp.pth", SMALL).state_dict(), make().state_dict())
        prefixed["var"] = prefixed.pop("module.var")
        torch.save(prefixed, tmp_path / "ddp.pth")
        message = error_of(TarFlow.from_original, tmp_path / "ddp.pth", SMALL)
        assert "module.blocks.0.pos_embed (4, 8): unknown" in message

    def test_legacy_format_and_strides(self, tmp_path: Path) -> None:
        state = original_state(make())
        state["var"] = state["var"].T.contiguous().T
        torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        loaded = TarFlow.from_original(tmp_path / "old.pth", SMALL)
        assert_same(loaded.state_dict(), make().state_dict())
        assert loaded.var.is_contiguous()

    @pytest.mark.parametrize(
        ("change", "mend"),
        [
            ({"channels": 16}, "channels=8 rather than 16"),
            ({"num_blocks": 3}, "num_blocks=2 rather than 3"),
            ({"num_blocks": 1}, "num_blocks=2 rather than 1"),
            ({"layers_per_block": 2}, "layers_per_block=1 rather than 2"),
            ({"num_classes": 0}, "num_classes=3 rather than 0"),
            ({"nvp": False}, "nvp=True rather than False"),
            ({"expansion": 4}, "expansion=2 rather than 4"),
            ({"patch_size": 1}, "patch_size=2 rather than 1"),
            ({"image_size": 8, "patch_size": 4}, "image_size=4 rather than 8, patch_size=2 rather than 4"),
            ({"in_channels": 3}, "in_channels=1 rather than 3"),
            ({"num_blocks": 100, "channels": 16}, "channels=8 rather than 16, num_blocks=2 rather than 100"),
        ],
    )
    def test_mend_of_the_config(self, pth: Path, change: dict[str, int], mend: str) -> None:
        message = error_of(TarFlow.from_original, pth, replace(SMALL, **change))
        assert f"(the shapes say {mend})" in message and str(pth) in message

    def test_a_large_token_count_by_mistake_is_cheap(self, pth: Path) -> None:
        message = error_of(TarFlow.from_original, pth, replace(SMALL, image_size=4096, patch_size=1))
        assert "blocks.0.attn_mask (4, 4): (16777216, 16777216) wanted" in message

    def test_mask(self, tmp_path: Path) -> None:
        state = original_state(make())
        state["blocks.0.attn_mask"] = torch.ones(4, 4)
        del state["blocks.1.attn_mask"]
        torch.save(state, tmp_path / "m.pth")
        message = error_of(TarFlow.from_original, tmp_path / "m.pth", SMALL)
        assert "blocks.0.attn_mask (4, 4): ones on and below" in message
        assert "blocks.1.attn_mask (4, 4): missing" in message and "shapes say" not in message

    def test_odd_tensors(self, tmp_path: Path) -> None:
        state = original_state(make())
        state["blocks.0.proj_in.weight"] = state["blocks.0.proj_in.weight"].to_sparse()
        state["blocks.0.proj_in.bias"] = state["blocks.0.proj_in.bias"].bool()
        state["blocks.1.proj_in.bias"] = state["blocks.1.proj_in.bias"].to("meta")
        torch.save(state, tmp_path / "m.pth")
        message = error_of(TarFlow.from_original, tmp_path / "m.pth", SMALL)
        assert message.count("dense floating-point values wanted") == 3
        state = original_state(make())
        state["var"][0, 0] = torch.nan
        torch.save(state, tmp_path / "m.pth")
        assert "var has non-finite values" in error_of(TarFlow.from_original, tmp_path / "m.pth", SMALL)

    @fixed_folder
    @given(share=st.floats(0, 1, exclude_max=True), legacy=st.booleans())
    def test_truncated(self, tmp_path: Path, share: float, legacy: bool) -> None:
        path = tmp_path / f"cut{legacy}.pth"
        torch.save(original_state(make()), path, _use_new_zipfile_serialization=not legacy)
        os.truncate(path, int(share * path.stat().st_size))
        assert str(path) in error_of(TarFlow.from_original, path, SMALL)

    @pytest.mark.parametrize("zipped", [False, True])
    def test_code_does_not_run(self, tmp_path: Path, zipped: bool) -> None:
        path, sentinel = tmp_path / "evil.pth", tmp_path / "ran"

        class Evil:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.mkdir, (str(sentinel),)

        content = {**original_state(make()), "extra": Evil()}
        if zipped:
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(Evil(), protocol=2))
        assert "was not run; give a file that torch.save" in error_of(TarFlow.from_original, path, SMALL)
        assert not sentinel.exists()
        if not zipped:  # the trap is live
            pickle.loads(path.read_bytes())
            assert sentinel.exists()

    def test_no_state_dict(self, tmp_path: Path) -> None:
        path = tmp_path / "x.pth"
        assert "No such file" in error_of(TarFlow.from_original, path, SMALL)
        path.write_text("once upon a time")
        assert "no PyTorch file" in error_of(TarFlow.from_original, path, SMALL)
        path.write_bytes(b"")
        assert "cut short" in error_of(TarFlow.from_original, path, SMALL)
        torch.save([torch.ones(2)], path)
        assert "holds a list, not a dict" in error_of(TarFlow.from_original, path, SMALL)
        torch.save({"model": original_state(make()), "step": 3, 4: torch.ones(1)}, path)
        assert "entries other than tensors: 'model', 'step', 4;" in error_of(TarFlow.from_original, path, SMALL)
        torch.save({}, path)
        assert "only 0 tensors" in error_of(TarFlow.from_original, path, SMALL)
        assert "Is a directory" in error_of(TarFlow.from_original, tmp_path, SMALL)

    def test_export_refuses(self, tmp_path: Path) -> None:
        assert "head_dim=4, expansion=2" in error_of(checkpoints.export_original, make(), tmp_path / "x.pth")
        flow = make(ORIGINAL)
        assert "cannot be written" in error_of(checkpoints.export_original, flow, tmp_path)
        flow.var[0, 0] = torch.inf
        assert "not written: var" in error_of(checkpoints.export_original, flow, tmp_path / "x.pth")
        assert not [path for path in tmp_path.iterdir() if path.is_file()]

    def test_convert(self, pth: Path, tmp_path: Path) -> None:
        config = replace(
            checkpoints.infer_config(checkpoints.read_original(pth), patch_size=2, head_dim=4), noise_std=0.1
        )
        assert config == SMALL
        checkpoints.convert(pth, tmp_path / "model", config)
        assert_same(TarFlow.from_pretrained(tmp_path / "model").state_dict(), make().state_dict())


class TestInferConfig:
    @settings(deadline=None, max_examples=40)
    @given(
        in_channels=st.integers(1, 4),
        side=st.integers(1, 4),
        patch_size=st.integers(1, 3),
        heads=st.integers(1, 2),
        num_blocks=st.integers(1, 3),
        layers_per_block=st.integers(1, 2),
        num_classes=st.integers(0, 3),
        nvp=st.booleans(),
        expansion=st.integers(1, 3),
    )
    def test_tells_every_shape(self, side: int, patch_size: int, heads: int, **sizes: int) -> None:
        config = TarFlowConfig(image_size=side * patch_size, patch_size=patch_size, channels=heads * 64, **sizes)
        with torch.device("meta"):
            state = TarFlow(config).state_dict()
        assert checkpoints.infer_config(state, patch_size=patch_size) == config
        assert checkpoints.infer_config(state, in_channels=config.in_channels) == config

    def test_what_it_needs(self) -> None:
        state = make().state_dict()
        assert "in_channels * patch_size² = 4" in error_of(checkpoints.infer_config, state)
        assert "must be 4" in error_of(checkpoints.infer_config, state, patch_size=3)
        assert "must be 4" in error_of(checkpoints.infer_config, state, in_channels=2)
        assert "must be 4" in error_of(checkpoints.infer_config, state, in_channels=2, patch_size=2)
        assert "patch_size=0" in error_of(checkpoints.infer_config, state, patch_size=0)
        with pytest.raises(ValueError, match="head_dim=64"):
            checkpoints.infer_config(state, patch_size=2)

    @pytest.mark.parametrize(
        "change",
        [
            {"blocks.0.pos_embed": torch.ones(5, 8)},
            {"blocks.0.pos_embed": torch.ones(5)},
            {"blocks.0.proj_out.weight": torch.ones(5, 8)},
            {"blocks.0.proj_in.weight": torch.ones(0, 4)},
            {"blocks.0.class_embed": torch.tensor(1.0)},
        ],
    )
    def test_other_models(self, change: dict[str, Tensor]) -> None:
        message = error_of(checkpoints.infer_config, make().state_dict() | change, patch_size=2)
        assert "not the state dict of a TarFlow" in message
        assert "no 'blocks.0" in error_of(checkpoints.infer_config, {"weight": torch.ones(1)}, patch_size=2)


class TestPresets:
    @pytest.mark.parametrize(
        ("name", "tokens", "token_channels", "channels", "classes", "noise"),
        [
            ("img128cond", 1024, 48, 1024, 1000, 0.15),
            ("afhq", 1024, 192, 768, 3, 0.07),
            ("img64uncond", 1024, 12, 768, 0, 0.05),
            ("img64cond", 256, 48, 1024, 1000, 0.05),
        ],
    )
    def test_shapes(
        self, name: str, tokens: int, token_channels: int, channels: int, classes: int, noise: float
    ) -> None:
        config = PRESETS[name].config
        assert (config.num_tokens, config.token_channels) == (tokens, token_channels)
        assert (config.channels, config.num_classes, config.noise_std) == (channels, classes, noise)
        with torch.device("meta"):
            state = TarFlow(config).state_dict()
        layer = [f"attention.{name}" for name in ("norm", "qkv", "proj")] + ["mlp.norm", "mlp.main.0", "mlp.main.2"]
        modules = ["proj_in", "proj_out"] + [f"attn_blocks.{m}.{part}" for m in range(8) for part in layer]
        tensors = ["pos_embed"] + [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
        if classes:
            tensors.append("class_embed")
            assert state["blocks.7.class_embed"].shape == (classes, 1, channels)
        assert set(state) == {"var"} | {f"blocks.{n}.{tensor}" for n in range(8) for tensor in tensors}
        assert state["blocks.0.proj_out.weight"].shape == (2 * token_channels, channels)
        assert state["var"].shape == (tokens, token_channels)

    def test_settings_of_the_tables(self) -> None:
        rows = {
            name: (preset.guidance_weight, preset.denoise, preset.attn_temperature, preset.strategy)
            for name, preset in PRESETS.items()
        }
        assert rows == {
            "img128cond": (1.5, 0.97, 1.0, "[6-8-32-10]"),
            "img64uncond": (0.2, 0.9, 0.3, "[0/6-8-32-20]"),
            "afhq": (3.4, 1.4, 1.0, "[7-8-32-10]"),
            "img64cond": (2.0, 1.0, 1.0, "[0/7-16/8-10/13-6]"),
        }
        assert all(preset.annealed for preset in PRESETS.values())
