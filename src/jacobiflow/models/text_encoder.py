"""The text encoder of the released STARFlow, from the package transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.errors import CheckpointError, InputValueError, first_line

EncodeText = Callable[[list[str]], Float[Tensor, "n l k"]]
"""Returns the states of N prompts, of L tokens or fewer, with zeros in place of padding."""


def t5_encoder(
    name: str | Path = "google/flan-t5-xl", text_tokens: int = 128, device: str | torch.device = "cpu"
) -> EncodeText:
    """Returns the encoder of a T5 model as the `encode_text` of a `STARFlow`.

    It needs transformers: pip install transformers. Its model is loaded here, from a hub id or a folder. A prompt
    of more than `text_tokens` tokens is cut.

    Example:
        >>> from jacobiflow.models import t5_encoder
        >>> encode_text = t5_encoder("google/flan-t5-xl")  # doctest: +SKIP
        >>> flow = jf.STARFlow.from_original("starflow.pth", encode_text=encode_text)  # doctest: +SKIP
    """
    try:
        from transformers import AutoTokenizer, T5EncoderModel
    except ImportError as error:
        raise InputValueError("a T5 encoder needs transformers: pip install transformers") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
        model = T5EncoderModel.from_pretrained(str(name)).eval().requires_grad_(False).to(device)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: not the hub id or folder of a T5 encoder ({first_line(error)})") from error

    def encode(prompts: list[str]) -> Float[Tensor, "n l k"]:
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=text_tokens, return_tensors="pt")
        mask = tokens["attention_mask"].to(device)
        states = model(input_ids=tokens["input_ids"].to(device), attention_mask=mask).last_hidden_state
        return states * mask.unsqueeze(-1)

    return encode
