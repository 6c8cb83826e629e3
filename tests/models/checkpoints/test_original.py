"""The original code's `.pth` files: round trips, and one clear line for all that is broken."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import jacobiflow as jf
from jacobiflow.models.checkpoints.original import read_original
from jacobiflow.models.tarflow import TarFlow, TarFlowConfig, TokenConfig
from tests.helpers.checkpoints import SMALL, assert_same, error_of, make

ORIGINAL = replace(SMALL, width=64, head_dim=64, expansion=4)


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


def test_half_precision_strides_the_old_format_and_the_prefix_of_parallel_training_are_read(pth: Path) -> None:
    state = original_state(make())
    torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, pth)
    expected = {name: tensor.bfloat16().float() for name, tensor in make().state_dict().items()}
    assert_same(TarFlow.from_original(pth, SMALL).state_dict(), expected)
    torch.save(state | {"var": state["var"].T.contiguous().T}, pth, _use_new_zipfile_serialization=False)
    loaded = TarFlow.from_original(pth, SMALL)
    assert_same(loaded.state_dict(), make().state_dict())
    assert loaded.var.is_contiguous()
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, pth)
    assert_same(TarFlow.from_original(pth, SMALL).state_dict(), make().state_dict())
    assert str(pth) in error_of(TarFlow.from_original, pth, replace(SMALL, num_blocks=3))


def test_a_state_dict_in_a_checkpoint_is_read(pth: Path) -> None:
    flow = make(ORIGINAL)
    state, optimizer = original_state(flow), torch.optim.AdamW(flow.parameters()).state_dict()
    for prefix in ("", "model.", "net._orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        prefixed = {prefix + name: tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "state_dict": prefixed, "optimizer": optimizer}, pth)
        assert_same(TarFlow.from_original(pth, ORIGINAL).state_dict(), flow.state_dict())
    torch.save({"model": state, "ema": state}, pth)
    message = f"{pth}: holds several state dicts, 'model', 'ema'; save the one that you want: torch.save(torch.load("
    assert error_of(TarFlow.from_original, pth, ORIGINAL).startswith(message)


def test_code_does_not_run(tmp_path: Path) -> None:
    path, sentinel = tmp_path / "evil.pth", tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(sentinel),)

    torch.save({**original_state(make()), "extra": Evil()}, path)
    assert "code in it was not run" in error_of(TarFlow.from_original, path, SMALL)
    assert not sentinel.exists()
    torch.save(make(), path)
    message = f"{path}: a pickled module, or other objects of Python, and no state dict"
    assert message in error_of(TarFlow.from_original, path, SMALL)


def test_a_file_that_is_not_a_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    assert "no such file" in error_of(TarFlow.from_original, path, SMALL)
    assert "no such file" in error_of(TarFlow.from_original, tmp_path, SMALL)
    for is_zip in (False, True):  # the old format, and the new one
        torch.save(original_state(make()), path, _use_new_zipfile_serialization=is_zip)
        os.truncate(path, path.stat().st_size // 2)
        assert "damaged, or no file of torch.save" in error_of(TarFlow.from_original, path, SMALL)
    no_state = "not a dict of tensors by their names, but a dict with 'model', 'step'; give a file that "
    num_missing = len(make().state_dict()) - 1  # The prior's variance has a default.
    for content, words in (({"model": {}, "step": 3}, no_state), ({}, f"{num_missing} missing (")):
        torch.save(content, path)
        assert words in error_of(TarFlow.from_original, path, SMALL)


STATE = original_state(make(ORIGINAL))
WEIGHT, MASK = STATE["blocks.0.proj_in.weight"], STATE["blocks.0.attn_mask"]
WINDOW = MASK.tril() - MASK.tril(-2)  # attention to the last two tokens
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch's own: both kinds of tensors are deprecated or a prototype
    NESTED = torch.nested.nested_tensor([WEIGHT, WEIGHT[:1]])
    QUANTIZED = torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("proj_in.weight", WEIGHT.to_sparse(), "is not a dense tensor with values"),
        ("proj_in.weight", WEIGHT.to("meta"), "is not a dense tensor with values"),
        ("proj_in.weight", QUANTIZED, "is of torch.qint8"),
        ("proj_in.weight", NESTED, "is not a dense tensor with values"),
        ("proj_in.weight", WEIGHT.to(torch.float8_e4m3fn), "is of torch.float8_e4m3fn"),
        ("proj_in.weight", WEIGHT[:1, :1].expand(10**6, 10**6), "has more values than the file stores"),
        ("proj_in.weight", WEIGHT[0], r"has shape (4,)"),
        ("proj_in.weight", WEIGHT[:32], "width=32: is not a multiple of head_dim, 64; give 64,"),
        ("proj_out.weight", WEIGHT[0, 0], r"has shape ()"),
        ("pos_embed", WEIGHT.expand(2, 64, 4).contiguous(), r"has shape (2, 64, 4)"),
        ("attn_blocks.0.mlp.main.0.weight", WEIGHT[0], r"has shape (4,)"),
        ("attn_mask", MASK.T.contiguous(), "is not the causal mask"),
        ("attn_mask", WINDOW, "is not the causal mask"),
        ("attn_mask", MASK[0], "is not the causal mask"),
        ("attn_mask", MASK.to_sparse(), "is not a dense tensor with values"),
    ],
)
def test_an_entry_that_cannot_be_of_a_tarflow_is_named(tmp_path: Path, name: str, tensor: Tensor, words: str) -> None:
    path = tmp_path / "x.pth"
    torch.save(STATE | {f"blocks.0.{name}": tensor}, path)
    with pytest.raises(jf.InputError, match=re.escape(words)) as caught:
        TarFlow.from_original(path)
    assert "\n" not in str(caught.value)


def test_masks_of_any_size_and_dtype_are_read_and_names_are_text(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(STATE | {f"blocks.{i}.attn_mask": torch.ones(9, 9, dtype=torch.bool).tril() for i in range(2)}, path)
    assert_same(TarFlow.from_original(path, ORIGINAL).state_dict(), make(ORIGINAL).state_dict())
    with pytest.raises(TypeError, match="config=5 of type int: give a TarFlowConfig or a TokenConfig"):
        TarFlow.from_original(path, 5)  # type: ignore[arg-type]
    torch.save(STATE | {7: WEIGHT}, path)
    assert "not a dict of tensors by their names" in error_of(TarFlow.from_original, path)


def test_export_refuses(tmp_path: Path) -> None:
    assert "head_dim=4, expansion=2" in error_of(make().to_original, tmp_path / "x.pth")
    reversed_first = jf.TarFlow(jf.TokenConfig(4, 1, 64, num_blocks=2, layers_per_block=1, orders=("flip", "identity")))
    assert "orders: the original code reads tokens" in error_of(reversed_first.to_original, tmp_path / "x.pth")
    flow = make(ORIGINAL)
    assert "cannot be written" in error_of(flow.to_original, tmp_path)
    flow.var[0, 0] = torch.inf
    assert "not written: var" in error_of(flow.to_original, tmp_path / "x.pth")
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


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
    assert TarFlow.infer_config(state, "x.pth", patch_size) == config
    tokens = TokenConfig(
        side**2, config.token_dim, heads * 64, blocks, layers, num_classes, nvp=bool(nvp), expansion=expansion
    )
    assert TarFlow.infer_config(state, "x.pth") == tokens
    named = f"x_{patch_size}_{heads * 64}_{blocks}_{layers}_0.30.pth"
    assert TarFlow.infer_config(state, named) == replace(config, noise_std=0.3)
    assert TarFlow.infer_config(state, named.replace("_0.30", "9_0.30")) == tokens  # another number of layers


def test_the_file_of_sbg_becomes_a_flow_over_tokens(tmp_path: Path) -> None:
    """Its layers have a dropout, and it has no prior's variance."""
    config = TokenConfig(5, 3, width=(64, 128), num_blocks=2, layers_per_block=(2, 1))
    flow = TarFlow(config)
    state = {name.replace("mlp.main.2", "mlp.main.3"): tensor for name, tensor in flow.state_dict().items()}
    del state["var"]
    torch.save(state, tmp_path / "sbg.pth")
    loaded = TarFlow.from_original(tmp_path / "sbg.pth")
    assert loaded.config == config
    assert_same(loaded.state_dict(), flow.state_dict())


def test_shapes_of_no_tarflow(pth: Path) -> None:
    torch.save(original_state(make(ORIGINAL)), pth)
    state = read_original(pth)
    assert "a patch size of 3: its square must divide the 4 values" in error_of(TarFlow.infer_config, state, "x", 3)
    five = state | {"blocks.0.pos_embed": torch.ones(5, 64)}
    assert "5 tokens, but square images have a square number" in error_of(TarFlow.infer_config, five, "x", 2)
    missing = "not the state dict of a TarFlow: has 'w', but no 'blocks.0.pos_embed'"
    assert missing in error_of(TarFlow.infer_config, {"w": torch.ones(1)}, "x", 2)
