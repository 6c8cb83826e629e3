"""An exported flow, run by ONNX Runtime, is the library's: every token of every block, and the gradient."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import jacobiflow as jf
from tests.helpers.problems import make_flow, to_float32
from tools.page.graphs import round_rows
from tools.page.live_page import export

TOKENS, CLASSES, CLOSE = 16, 3, {"rtol": 1e-4, "atol": 1e-4}
GUIDANCE = jf.Guidance(0.7, on="scale", attn_temperature=1.3)


@pytest.mark.slow
def test_graphs_are_the_flow(tmp_path: Path, one_thread: None) -> None:
    flow = to_float32(make_flow(num_classes=CLASSES, noise_std=0.3))
    for parameter in flow.parameters():
        parameter.data = torch.mul(*round_rows(parameter.data)) if parameter.ndim == 2 else parameter.data
    model = export(flow, tmp_path, GUIDANCE)
    x, z = torch.randn(2, 1, TOKENS, 4, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([1])
    guided_blocks = map(flow.guided(GUIDANCE).inverse_block, range(flow.config.num_blocks))
    for weights, block, guided in zip(model["weights"], flow.blocks, guided_blocks, strict=True):
        for file, name in (("weights", weights), ("step", model["step"]), ("gradient", model["gradient"])):
            (tmp_path / file).write_bytes(gzip.decompress((tmp_path / name).read_bytes()))
        step, gradient = (onnxruntime.InferenceSession(tmp_path / name) for name in ("step", "gradient"))
        expected = guided.update(x, z, 0, TOKENS, guided.init_cache(z, jf.Context(label)))[0].detach().numpy()
        keys = np.zeros((0, model["keys_per_token"]), np.float32)
        for t in range(1, TOKENS):
            inputs = {"x": x[0, t - 1 : t].numpy(), "z": z[0, t : t + 1].numpy(), "cache": keys, "label": label.numpy()}
            y, new = step.run(None, inputs)
            np.testing.assert_allclose(y, expected[t : t + 1], **CLOSE)
            keys = np.concatenate((keys, new))

        image = x.clone().requires_grad_()
        log_scale, shift = block.affine_whole(image, jf.Context(label))
        encoded = (image - shift) * (-log_scale).exp()
        (dx,) = torch.autograd.grad((encoded * z).sum() - log_scale.sum(), image)
        outputs = gradient.run(None, {"x": x[0].numpy(), "dz": z[0].numpy(), "label": label.numpy()})
        for actual, exact in zip(outputs, (encoded.detach()[0], dx[0]), strict=True):
            np.testing.assert_allclose(actual, exact, **CLOSE)
