"""An exported flow, run by ONNX Runtime, is the library's: every block, any run of tokens, and the denoising step."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import jacobiflow as jf
from tests.helpers.problems import make_flow, to_float32
from tools.page.live_page import export, round_weights

TOKENS, CLASSES, CLOSE = 16, 3, {"rtol": 1e-4, "atol": 1e-4}
GUIDANCE = jf.Guidance(0.7, on="scale", attn_temperature=1.3)


def test_graphs_are_the_flow(tmp_path: Path, one_thread: None) -> None:
    flow = round_weights(to_float32(make_flow(num_classes=CLASSES, noise_std=0.3)))
    model = export(flow, tmp_path, GUIDANCE)
    assert model == json.loads((tmp_path / "model.json").read_text())
    for path in tmp_path.glob("*.gz"):
        path.write_bytes(gzip.decompress(path.read_bytes()))
    x, z = torch.randn(2, 1, TOKENS, 4, generator=torch.Generator().manual_seed(0))
    shared = {"logit_scale": np.float32(model["logit_scale"]), "labels": np.array([1, CLASSES])}
    for name, block in zip(model["blocks"], flow.guided(GUIDANCE).inverse_blocks, strict=True):
        session = onnxruntime.InferenceSession(tmp_path / name)
        expected = block.update(x, z, 0, TOKENS, block.init_cache(z, jf.Context(torch.tensor([1]))))[0].detach().numpy()

        def run(places: Any, others: Any, keys: Any, session: Any = session) -> Any:
            weights = [np.float32(model["guidance"][part])[places + 1] for part in ("log_scale", "shift")]
            tokens = {"x": x[0, places].numpy(), "z": z[0, places + 1].numpy(), "places": places}
            cache = {"cache": keys[others], "cache_places": others, "guidance": np.stack(weights)[..., None]}
            return session.run(None, {**tokens, **cache, **shared})

        none = np.zeros((0, model["keys_per_token"]), np.float32)
        g, keys = run(np.arange(TOKENS - 1), np.arange(0), none)
        np.testing.assert_allclose(g, expected[1:], **CLOSE)
        places, others = np.array([0, 4, 9, 13]), np.array([14, 1, 2, 3, 12, 5, 6, 7, 8, 10, 11])
        for run_of_tokens in ((np.arange(5, 9), np.arange(5)), (np.array([3]), np.arange(3)), (places, others)):
            np.testing.assert_allclose(run(*run_of_tokens, keys)[0], expected[run_of_tokens[0] + 1], **CLOSE)

    session, images = onnxruntime.InferenceSession(tmp_path / model["denoise"]), flow.from_tokens(x)
    expected = flow.to_tokens(jf.denoise(flow, images, torch.tensor([2])))[0]
    denoised = session.run(None, {"x": x[0].numpy(), "label": np.array([2])})[0]
    np.testing.assert_allclose(denoised, expected, **CLOSE)
