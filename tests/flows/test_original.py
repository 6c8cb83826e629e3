"""The original code's `.pth` files: round trips, and one clear line for all that is broken."""

from __future__ import annotations

import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SMALL, assert_same, error_of, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jacobiflow.flows.tarflow import TarFlow, TarFlowConfig
from jacobiflow.flows.tarflow.original import infer_config, read_original

ORIGINAL = replace(SMALL, channels=64, head_dim=64, expansion=4)


def original_state(flow: TarFlow) -> dict[str, Any]:
    """The state dict that the original code would have, written out from its list of keys."""
    tokens = flow.config.num_tokens
    masks = {f"blocks.{i}.attn_mask": torch.tril(torch.ones(tokens, tokens)) for i in range(flow.config.num_blocks)}
    return {name: tensor.clone() for name, tensor in (flow.state_dict() | masks).items()}


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    path = tmp_path / "model.pth"
    torch.save(original_state(make()), path)
    return path


@pytest.mark.parametrize("change", [{"nvp": True}, {"nvp": False, "num_classes": 0}])
def test_round_trip(tmp_path: Path, change: dict[str, Any]) -> None:
    flow = make(replace(ORIGINAL, **change))
    flow.to_original(tmp_path / "out.pth")
    assert_same(torch.load(tmp_path / "out.pth", weights_only=True), original_state(flow))
    loaded = TarFlow.from_original(tmp_path / "out.pth", flow.config)
    assert_same(loaded.state_dict(), flow.state_dict())
    assert loaded.config == flow.config
    assert not loaded.training


def test_half_precision_strides_the_old_format_and_the_prefix_of_parallel_training_are_read(pth: Path) -> None:
    state = original_state(make())
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    torch.save(half, pth)
    wanted = {name: tensor.float() for name, tensor in half.items() if not name.endswith("attn_mask")}
    assert_same(TarFlow.from_original(pth, SMALL).state_dict(), wanted)

    torch.save(state | {"var": state["var"].T.contiguous().T}, pth, _use_new_zipfile_serialization=False)
    loaded = TarFlow.from_original(pth, SMALL)
    assert_same(loaded.state_dict(), make().state_dict())
    assert loaded.var.is_contiguous()

    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(prefixed, pth)
    assert_same(TarFlow.from_original(pth, SMALL).state_dict(), make().state_dict())
    prefixed["var"] = prefixed.pop("module.var")  # of some names only
    torch.save(prefixed, pth)
    assert "no 'blocks.0.proj_in.weight'" in error_of(TarFlow.from_original, pth, SMALL)


def test_a_config_that_the_shapes_contradict_is_refused(pth: Path) -> None:
    for change, remedy in (
        ({"channels": 16, "num_blocks": 1000}, "channels=8 rather than 16, num_blocks=2 rather than 1000"),
        ({"layers_per_block": 2, "num_classes": 0}, "layers_per_block=1 rather than 2, num_classes=3 rather than 0"),
        ({"nvp": False, "expansion": 4}, "nvp=True rather than False, expansion=2 rather than 4"),
        ({"image_size": 256, "patch_size": 1}, "image_size=4 rather than 256, patch_size=2 rather than 1"),
        ({"in_channels": 3}, "in_channels=1 rather than 3"),
    ):
        message = error_of(TarFlow.from_original, pth, replace(SMALL, **change))  # type: ignore[arg-type]
        assert message == f"{pth}: does not fit the config: the shapes say {remedy}"


def test_a_tensor_that_does_not_fit_is_named(pth: Path) -> None:
    bias, ones = "blocks.0.proj_in.bias", torch.ones(8)
    for name, tensor, words in (
        ("blocks.0.attn_mask", torch.ones(4, 4), ": expected ones on and below the diagonal of (4, 4), zeros above"),
        ("blocks.1.attn_mask", None, "blocks.1.attn_mask: expected ones"),
        ("blocks.1.attn_mask", torch.ones(4, 4).tril().to_sparse(), "blocks.1.attn_mask: expected ones"),
        (bias, ones.bool(), "blocks.0.proj_in.bias torch.bool"),
        (bias, ones.to_sparse(), "expected dense floating-point values"),
        (bias, torch.nan * ones, "blocks.0.proj_in.bias has non-finite values"),
        ("blocks.999999999.x", ones, "one is numbered 999999999"),
        ("blocks.0.attn_mask.x", ones, "blocks.0.attn_mask.x (8,): unknown"),
    ):
        state = original_state(make()) | {name: tensor}
        torch.save({key: value for key, value in state.items() if value is not None}, pth)
        assert words in error_of(TarFlow.from_original, pth, SMALL)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(share=st.floats(0, 1, exclude_max=True), legacy=st.booleans())
def test_a_file_that_was_cut_short(tmp_path: Path, share: float, legacy: bool) -> None:
    path = tmp_path / "cut.pth"
    torch.save(original_state(make()), path, _use_new_zipfile_serialization=not legacy)
    os.truncate(path, int(share * path.stat().st_size))
    assert str(path) in error_of(TarFlow.from_original, path, SMALL)


@pytest.mark.parametrize("save", [torch.save, lambda code, path: path.write_bytes(pickle.dumps(code, protocol=2))])
def test_code_does_not_run(tmp_path: Path, save: Any) -> None:
    path, sentinel = tmp_path / "evil.pth", tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(sentinel),)

    save({**original_state(make()), "extra": Evil()}, path)
    assert "was not run; give a file that torch.save" in error_of(TarFlow.from_original, path, SMALL)
    assert not sentinel.exists()


def test_what_is_larger_than_its_file_is_refused(pth: Path, tmp_path: Path) -> None:
    state, weight = original_state(make()), "blocks.0.proj_in.weight"
    for change, words in (
        ({"blocks.0.pos_embed": torch.zeros(()).expand(10**11, 8)}, "a tensor (100000000000, 8) of 4 bytes"),
        ({f"blocks.{i}.x": state[weight] for i in range(3000)}, "that share their memory"),
        (
            dict.fromkeys((f"blocks.{i}.x" for i in range(3000)), torch.zeros(1)),
            "3,000 of blocks.*; the limit is 1,000",
        ),
        (dict.fromkeys((f"blocks.{i}.x" for i in range(900)), torch.zeros(1)), "no 'blocks.2.attn_blocks.0.mlp.main"),
        ({f"blocks.{'9' * 5000}.x": torch.zeros(1)}, ".x (1,): unknown"),
    ):
        torch.save(state | change, pth)
        assert words in error_of(TarFlow.from_original, pth, SMALL)
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(pth) as archive, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, bytes(10**6) if name.endswith("data/0") else archive.read(name))
    assert "says that it holds" in error_of(TarFlow.from_original, bomb, SMALL)


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    assert "No such file" in error_of(TarFlow.from_original, path, SMALL)
    assert "Is a directory" in error_of(TarFlow.from_original, tmp_path, SMALL)
    path.write_text("once upon a time")
    assert "no PyTorch file" in error_of(TarFlow.from_original, path, SMALL)
    for content, words in (
        ([torch.ones(2)], "holds a list, not a dict"),
        ({"model": {}, "step": 3, 4: torch.ones(1)}, "entries other than tensors: 'model', 'step', 4;"),
        ({}, "not the state dict of a TarFlow: no 'blocks.0.proj_in.weight'"),
    ):
        torch.save(content, path)
        assert words in error_of(TarFlow.from_original, path, SMALL)


def test_export_refuses(tmp_path: Path) -> None:
    assert "head_dim=4, expansion=2" in error_of(make().to_original, tmp_path / "x.pth")
    flow = make(ORIGINAL)
    assert "cannot be written" in error_of(flow.to_original, tmp_path)
    flow.var[0, 0] = torch.inf
    assert "not written: var" in error_of(flow.to_original, tmp_path / "x.pth")
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_shapes_say_the_config(data: st.DataObject) -> None:
    in_channels, side, patch_size, heads, blocks, layers, num_classes, nvp, expansion = (
        data.draw(st.integers(low, high))
        for low, high in ((1, 4), (1, 4), (1, 3), (1, 2), (1, 3), (1, 2), (0, 3), (0, 1), (1, 3))
    )
    sizes = (in_channels, side * patch_size, patch_size, heads * 64, blocks, layers, num_classes)
    config = TarFlowConfig(*sizes, nvp=bool(nvp), expansion=expansion)
    with torch.device("meta"):
        state = TarFlow(config).state_dict()
    assert infer_config(state, patch_size=patch_size) == config
    assert infer_config(state, in_channels=config.in_channels) == config


def test_what_shapes_do_not_say(pth: Path) -> None:
    state = read_original(pth)
    assert replace(infer_config(state, patch_size=2, head_dim=4), noise_std=0.1) == SMALL
    assert "in_channels * patch_size² = 4" in error_of(infer_config, state)
    for given_sizes in ({"patch_size": 3}, {"in_channels": 2}, {"in_channels": 2, "patch_size": 2}):
        assert "must be 4" in error_of(infer_config, state, **given_sizes)
    assert "patch_size=0" in error_of(infer_config, state, patch_size=0)
    with pytest.raises(ValueError, match="head_dim=64"):
        infer_config(state, patch_size=2)
    for name, shape in (("pos_embed", (5, 8)), ("proj_out.weight", (5, 8)), ("proj_in.weight", (0, 4))):
        message = error_of(infer_config, make().state_dict() | {f"blocks.0.{name}": torch.ones(shape)}, patch_size=2)
        assert "not the state dict of a TarFlow" in message
