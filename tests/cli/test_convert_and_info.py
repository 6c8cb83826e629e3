"""`jacobiflow convert` and `jacobiflow info`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from running import figures

import jacobiflow as jf


def original(path: Path, seed: int = 0) -> jf.TarFlow:
    torch.manual_seed(seed)
    flow = jf.TarFlow(jf.TarFlowConfig(3, 4, 2, channels=64, num_blocks=2, layers_per_block=1, num_classes=2))
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.02)
    flow.to_original(path)
    return flow


def test_convert_replaces_no_other_model(run: Any, refuse: Any, files: Any, work: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        original(tmp_path / f"{seed}.pth", seed)
    line = f"convert {tmp_path}/0.pth --patch-size 2 --noise-std 0.2 --out {tmp_path}/folder"
    assert run(line).code == 0
    before = files()
    assert run(line).code == 0  # the same model again
    assert files() == before
    for other in (line.replace("0.pth", "1.pth"), line.replace("0.2", "0.3")):
        refuse(other, "folder: holds another model; give another folder, or move it away")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    refuse(line.replace("/folder", "/mine"), "config.json: not of a model that jacobiflow wrote")
    torch.save(torch.load(tmp_path / "0.pth") | {"blocks.999999999.x": torch.zeros(1)}, tmp_path / "0.pth")
    refuse(line.replace("/folder", "/new/inner"), "one is numbered 999999999")


def test_convert_then_sample(run: Any, tmp_path: Path) -> None:
    flow = original(tmp_path / "original.pth")
    line = f"convert {tmp_path}/original.pth --patch-size 2 --noise-std 0.2 --out {tmp_path}/folder --json {tmp_path}/f"
    result = run(line)
    assert (result.code, result.out, result.err) == (0, f"wrote the model folder {tmp_path}/folder\n", "")
    read = jf.load(tmp_path / "folder")
    assert read.config.noise_std == 0.2
    for name, tensor in flow.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)
    shown = figures(tmp_path / "f")
    assert (shown["model"], shown["in_channels"], shown["num_classes"]) == (f"{tmp_path}/folder", 3, 2)
    line = f"sample --model {tmp_path}/folder --num 2 --denoise 1 --strategy jacobi --out {tmp_path}/out"
    assert run(line).code == 0
    with np.load(tmp_path / "out" / "shards" / "00000.npz") as arrays:
        assert arrays["arr_0"].shape == (2, 4, 4, 3)


def test_info(run: Any, tmp_path: Path) -> None:
    result = run(f"info --model model --json {tmp_path}/f")
    assert (result.code, result.err) == (0, "")
    shown, flow = figures(tmp_path / "f"), jf.load("./model")
    assert shown["parameters"] == sum(parameter.numel() for parameter in flow.parameters())
    assert (shown["num_tokens"], shown["token_channels"], shown["noise_std"]) == (16, 4, 0.1)
    assert (shown["torch"], shown["zuko"]) == (torch.__version__, version("zuko"))
    for name, value in shown.items():
        assert name in result.out
        assert str(value) in result.out.replace(",", "")
