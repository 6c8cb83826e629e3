"""An exported flow, run by ONNX Runtime, is the library's: every block, any run of tokens, and the denoising step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import jacobiflow as jf
from demo.export import export
from jacobiflow.flows.guidance import guided
from tests.helpers.problems import make_flow, to_float32

TOKENS, CLOSE = 16, {"rtol": 1e-4, "atol": 1e-4}
GUIDANCE = jf.Guidance(0.7, on="scale", attn_temperature=1.3)
CASES = [(3, True, GUIDANCE), (3, True, None), (0, True, GUIDANCE), (0, False, jf.Guidance(1.0, attn_temperature=2.0))]


@pytest.mark.parametrize(("classes", "nvp", "guidance"), CASES)
def test_every_block_at_any_tokens(classes: int, nvp: bool, guidance: Any, tmp_path: Path, one_thread: None) -> None:
    flow = to_float32(make_flow(num_classes=classes, nvp=nvp))
    model = export(flow, tmp_path, guidance)
    assert model == json.loads((tmp_path / "model.json").read_text())
    rows, gen = 1 if guidance is None else 2, torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 1, TOKENS, 4, generator=gen)
    labels = torch.tensor([1]) if classes else None
    shared = {"logit_scale": np.float32(model["logit_scale"])}
    if classes:
        shared["labels"] = np.array([1, classes][:rows])
    for name, block in zip(model["blocks"], flow.blocks, strict=True):
        session = onnxruntime.InferenceSession(tmp_path / name)
        solved = guided(block, guidance)
        expected = solved.update(x, z, 0, TOKENS, solved.init_cache(z, labels))[0].detach().numpy()

        def run(places: Any, kept: Any, keys: Any, session: Any = session) -> Any:
            inputs = {"x": x[0, places].numpy(), "z": z[0, places + 1].numpy(), "places": places}
            if guidance is not None:
                weights = [np.float32(model["guidance"][part])[places + 1] for part in ("log_scale", "shift")]
                inputs["guidance"] = np.stack(weights)[..., None]
            return session.run(None, {**inputs, **shared, "kept": keys[kept], "kept_places": kept})

        none = np.zeros((0, model["keys_per_token"]), np.float32)
        g, keys = run(np.arange(TOKENS - 1), np.arange(0), none)
        np.testing.assert_allclose(g, expected[1:], **CLOSE)
        for places, kept in ((np.arange(5, 9), np.arange(5)), (np.array([3]), np.arange(3)), *_others()):
            np.testing.assert_allclose(run(places, kept, keys)[0], expected[places + 1], **CLOSE)


def _others() -> list[tuple[Any, Any]]:
    """Tokens here and there, against the keys of all the others in any order."""
    return [(np.array([0, 4, 9, 13]), np.array([14, 1, 2, 3, 12, 5, 6, 7, 8, 10, 11]))]


@pytest.mark.parametrize(("classes", "nvp"), [(3, True), (0, False)])
def test_the_denoising_step(classes: int, nvp: bool, tmp_path: Path, one_thread: None) -> None:
    flow = to_float32(make_flow(num_classes=classes, nvp=nvp, noise_std=0.3))
    session = onnxruntime.InferenceSession(tmp_path / export(flow, tmp_path)["denoise"])
    images = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for label in (2, -1) if classes else (-1,):
        inputs = {"x": flow.to_tokens(images)[0][0].numpy()}
        if classes:
            inputs["label"] = np.array([label % (classes + 1)])
        expected = flow.to_tokens(jf.denoise(flow, images, torch.tensor([label]) if classes else None))[0]
        np.testing.assert_allclose(session.run(None, inputs)[0], expected[0], **CLOSE)
