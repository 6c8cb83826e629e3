"""STARFlow against the oracle in float64: samples, texts and guidance; and the files of the original code."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jacobiflow as jf
from tests.helpers.oracle import Guide, StarOracle
from tests.helpers.problems import latents, make_star, texts, to_float32

pytestmark = pytest.mark.usefixtures("one_thread")

GUIDANCE, GUIDE = jf.Guidance(2.0, annealed=False, rule="density"), Guide(2.0, False, "both", 1.0, "density")
RELEASED = {  # names and shapes in starflow_3B_t2i_256x256.pth
    "proj_in.weight": (3072, 4), "proj_in.bias": (3072,), "sos_embed": (1, 1, 4), "final_norm.weight": (3072,),
    "proj_out.weight": (8, 3072), "proj_out.bias": (8,), "attn_mask": (1152, 1152),
}  # fmt: skip
LAYER = {
    "attention.norm.weight": (3072,), "attention.norm.bias": (3072,), "attention.qkv.weight": (9216, 3072),
    "attention.qkv.bias": (9216,), "attention.proj.weight": (3072, 3072), "attention.proj.bias": (3072,),
    "mlp.norm.weight": (3072,), "mlp.norm.bias": (3072,), "mlp.main.0.weight": (12288, 3072),
    "mlp.main.0.bias": (12288,), "mlp.main.2.weight": (3072, 12288), "mlp.main.2.bias": (3072,),
}  # fmt: skip


def encode_text(prompts: list[str]) -> Tensor:
    """One state for each letter, as many as the longest prompt has, and one for its end."""
    states = torch.zeros(len(prompts), max(map(len, prompts)) + 1, 5, dtype=torch.float64)
    for n, prompt in enumerate(prompts):
        for i, letter in enumerate(prompt + "."):
            states[n, i] = torch.arange(5).add(ord(letter)).sin()
    return states


@pytest.mark.parametrize("strategy", ["sequential", "jacobi", "window:3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("guide", [None, GUIDE], ids=["plain", "guided"])
def test_samples_and_their_densities_are_the_oracle_s(strategy: str, dtype: torch.dtype, guide: Guide | None) -> None:
    """Fewer samples in the network than there are: those that are solved make room."""
    plain = make_star() if dtype == torch.float64 else to_float32(make_star())
    flow, z, states = plain.guided(GUIDANCE if guide else None), latents(make_star(), 5), texts(make_star(), 5)
    tolerance = None if strategy == "sequential" else 1e-10 if dtype == torch.float64 else 1e-5
    out = jf.sample(
        flow, latents=z.to(dtype), context=states.to(dtype), strategy=strategy, tolerance=tolerance, batch_size=2,
        log_prob=None if guide else True, settings=None,
    )  # fmt: skip
    reference, rounding = StarOracle(make_star()), 1e-8 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(out.x.double(), reference.decode(z, states, guide), rtol=0, atol=rounding)
    if guide is None:
        encoded, log_det = reference.encode(out.x, states)
        want = torch.distributions.Normal(0.0, 1.0).log_prob(encoded).sum(dim=(1, 2)) + log_det
        torch.testing.assert_close(out.log_prob.double(), want, rtol=0, atol=10 * rounding)


def test_a_sample_depends_on_its_own_prompt_only() -> None:
    """Not on the padding of its text, the other prompts, or the batch."""
    flow, prompts = deepcopy(make_star()).guided(GUIDANCE), ["ab", "", "a"]
    flow.encode_text, z = encode_text, latents(flow, 3)
    settings: dict[str, Any] = {"strategy": "jacobi", "tolerance": 1e-10}
    together = jf.sample(flow, latents=z, context=prompts, **settings).x
    for n, prompt in enumerate(prompts):
        states = encode_text([prompt])
        padded = torch.nn.functional.pad(states, (0, 0, 0, 3 - states.shape[1]))
        for context in (prompt, [prompt], states, padded):
            alone = jf.sample(flow, latents=z[n : n + 1], context=context, **settings).x[0]
            torch.testing.assert_close(alone, together[n], rtol=0, atol=1e-8)
    same = jf.sample(flow, latents=z[:1].expand(2, -1, -1), context="ab", **settings).x
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], together[1])
    flow = flow.guided(None)
    flow.blocks[-1].null_text.copy_(encode_text(["", "aa"])[0])
    empty = jf.sample(flow, latents=z[1:2], **settings).x[0]
    torch.testing.assert_close(empty, jf.sample(flow, latents=z[1:2], context=[""], **settings).x[0], rtol=0, atol=1e-8)


def test_a_text_that_does_not_fit_is_named() -> None:
    flow = jf.STARFlow(make_star().config)
    states = torch.zeros(2, 3, 5)
    errors: list[tuple[type[Exception], str, Any]] = [
        (ValueError, "no text encoder: set flow.encode_text", ["a", "b"]),
        (TypeError, "give prompts, or the states of texts", [1, 2]),
        (TypeError, r"give prompts, or states of texts \(N, L, 5\), L up to 3", states.long()),
        (ValueError, r"context of shape \(2, 4, 5\): give states", torch.zeros(2, 4, 5)),
        (ValueError, r"context of shape \(2, 5\): give states", torch.zeros(2, 5)),
        (ValueError, "context of 1 texts: give 2, one for each sample", states[:1]),
        (ValueError, "context", torch.full_like(states, torch.nan)),
        (ValueError, "context=.*: give a dense tensor with values", states.to_sparse()),
        (TypeError, "context=.*give prompts, or states", states.to(torch.float8_e4m3fn)),
        (ValueError, "no context: the states of the empty text are not in these weights", None),
    ]
    for kind, words, context in errors:
        with pytest.raises(kind, match=words):
            jf.sample(flow, 2, context=context)
    for wrong in (None, "a text", torch.zeros(5), torch.zeros(1, 3, 5), states.to_sparse()):
        flow.encode_text = lambda prompts, wrong=wrong: wrong
        with pytest.raises((ValueError, TypeError), match="encode_text"):
            jf.sample(flow, 2, context=["a", "b"])
    with pytest.raises(ValueError, match="guidance: the states of the empty text"):
        flow.guided(GUIDANCE)


def original(flow: jf.STARFlow) -> dict[str, Tensor]:
    """A state dict as the original code writes it."""
    state = {name: tensor for name, tensor in flow.state_dict().items() if "null_text" not in name}
    masks = {f"blocks.{i}.attn_mask": torch.ones(7, 7).tril() for i in range(flow.config.num_blocks)}
    return state | masks | {"feat_rope.freqs_cos": torch.zeros(7, 32), "feat_rope.freqs_sin": torch.zeros(7, 32)}


def test_the_original_s_file_is_read(tmp_path: Path) -> None:
    config = jf.STARFlowConfig(3, 2, 1, (64, 128), (2, 3), text_tokens=3, text_dim=5)
    flow, path = jf.STARFlow(config), tmp_path / "star.pth"
    torch.save(original(flow), path)
    loaded = jf.STARFlow.from_original(path, encode_text=encode_text)
    assert loaded.config == config
    assert loaded.recommended == jf.SamplingSettings(jf.Guidance(3.6, annealed=False, rule="density"), denoise=1.0)
    loaded.save_pretrained(tmp_path / "folder")
    again = jf.load(tmp_path / "folder")
    for other in (loaded, again):
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), flow.parameters(), strict=True))
        assert torch.equal(other.blocks[-1].null_text[:1], encode_text([""])[0].float())
    assert again.recommended == loaded.recommended
    assert jf.STARFlow.from_original(path).recommended.guidance is None
    with pytest.raises(TypeError, match="encode_text=5 of type int: give a function of a list of prompts"):
        jf.STARFlow.from_original(path, encode_text=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"encode_text of shape \(1, 4, 5\): give states of texts"):
        jf.STARFlow.from_original(path, encode_text=lambda prompts: torch.zeros(1, 4, 5))
    torch.save({name: tensor for name, tensor in original(flow).items() if "qkv.bias" not in name}, path)
    with pytest.raises(jf.CheckpointError, match=r"star\.pth: does not fit.*blocks\.0\.attn_blocks\.0\.attention\.qkv"):
        jf.STARFlow.from_original(path)
    torch.save({name: tensor for name, tensor in original(flow).items() if "proj_txt" not in name}, path)
    with pytest.raises(jf.CheckpointError, match=r"star\.pth: not the state dict of a STARFlow.*blocks\.1\.proj_txt"):
        jf.STARFlow.from_original(path)


def test_the_released_file_has_a_place_for_every_key() -> None:
    """At full size, on the meta device."""
    depths = jf.STARFlowConfig().layers_per_block
    shapes = {f"blocks.{i}.{name}": shape for i in range(6) for name, shape in RELEASED.items()}
    shapes |= {
        f"blocks.{i}.attn_blocks.{j}.{name}": shape
        for i, layers in enumerate(depths) for j in range(layers) for name, shape in LAYER.items()
    }  # fmt: skip
    shapes |= {"blocks.5.proj_txt.weight": (3072, 2048), "blocks.5.proj_txt.bias": (3072,), "var": (1024, 4)}
    with torch.device("meta"):
        flow = jf.STARFlow(jf.STARFlowConfig())
    ours = {name: tuple(tensor.shape) for name, tensor in flow.state_dict().items()}
    masks = {f"blocks.{i}.attn_mask" for i in range(6)}
    assert ours == {name: shape for name, shape in shapes.items() if name not in masks} | {
        "blocks.5.null_text": (128, 2048)
    }
    assert sum(parameter.numel() for parameter in flow.parameters()) == pytest.approx(3.86e9, rel=0.01)
    assert [block.permutation.order for block in flow.blocks] == ["flip", "identity"] * 3


def test_trained_weights_follow_their_captions() -> None:
    """Colours are those asked for."""
    prompts = ["red circle", "large blue circle", "hand dark skin", "hand light skin"]
    context = [prompt for prompt in prompts for _ in range(2)]
    colours = []
    samples = jf.sample(jf.load("emoji-star"), len(context), context=context, strategy="sequential", seed=3)
    for images in samples.images.split(2):
        drawn = (images.amin(dim=1) < 0.5).unsqueeze(1)  # not the white around it
        colours.append((images * drawn).sum(dim=(0, 2, 3)) / drawn.sum())
    red, blue, dark, light = colours
    assert (red.argmax(), blue.argmax()) == (0, 2)
    assert light.mean() > dark.mean() + 0.3
