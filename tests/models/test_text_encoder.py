"""The T5 encoder, by small random weights that transformers itself writes and reads."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import jacobiflow as jf
from jacobiflow.models import t5_encoder
from tests.helpers.stand_ins import write_t5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t5")
    write_t5(path)
    return path


def test_states_of_a_prompt_do_not_depend_on_the_others(folder: Path) -> None:
    encode_text = t5_encoder(folder, text_tokens=3)
    states = encode_text(["red apple", "", "green apple red apple"])
    assert states.shape == (3, 3, 16)  # the longest is cut
    assert (states[1, 1:] == 0).all() and (states[1, 0] != 0).any()  # of the empty text there is its end
    for n, prompt in enumerate(["red apple", ""]):
        alone = encode_text([prompt])[0]
        torch.testing.assert_close(alone, states[n, : len(alone)], rtol=0, atol=1e-5)


def test_a_model_folder_names_the_encoder_of_its_prompts(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"text_tokens": 4, "text_dim": 16, "head_dim": 20, "text_encoder": str(folder)}
    flow = jf.STARFlow(jf.STARFlowConfig(1, 4, 2, 40, (1, 1), **sizes))
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    flow.save_pretrained(tmp_path / "star")
    flow = jf.load(tmp_path / "star")
    out = jf.sample(flow, 2, context=["red apple", "green apple"], latents=None)
    assert out.exact.all() and not torch.equal(out.images[0], out.images[1])


def test_prompts_that_are_no_caption_are_named(tmp_path: Path) -> None:
    """Words of the captions in another order are another prompt."""
    captions = ("blue heart", "red hand", "thumbsup")
    sizes = {"text_tokens": 4, "text_dim": 16, "head_dim": 20, "captions": captions}
    jf.STARFlow(jf.STARFlowConfig(1, 4, 2, 40, (1, 1), **sizes)).save_pretrained(tmp_path)
    encode_text = jf.load(tmp_path).encode_text
    assert encode_text is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_text(["Blue heart", ""])
    with pytest.warns(UserWarning, match=r'on "red heart" \(near it: "blue heart" or "red hand"\), and may'):
        encode_text(["red heart", "blue heart", "red heart"])
    with pytest.warns(UserWarning, match=r'on "thumbs up" \(near it: "thumbsup"\), "dragon", "fox", and 1 more, and'):
        encode_text(["thumbs up", "dragon", "fox", "owl"])
    with pytest.raises(ValueError, match=r"text_encoder=.*not both"):
        jf.STARFlowConfig(1, 4, 2, 40, (1, 1), **sizes, text_encoder="google/flan-t5-xl")


def test_what_is_no_encoder_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(jf.CheckpointError, match="not the hub id or folder of a T5 encoder"):
        t5_encoder(tmp_path)(["red apple"])
