"""Text encoders of a STARFlow: T5, from the package transformers, and one of random word vectors."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jacobiflow.errors import CheckpointError, InputValueError, first_line

EncodeText = Callable[[list[str]], Float[Tensor, "n l k"]]
"""Returns the states of N prompts, of L tokens or fewer, with zeros in place of padding."""


def split_words(text: str) -> list[str]:
    """Returns the words of a text in lower case."""
    return re.findall(r"[a-z0-9]+", text.lower())


def word_encoder(
    prompts: list[str], captions: Sequence[str], text_tokens: int, text_dim: int
) -> Float[Tensor, "n {text_tokens} {text_dim}"]:
    """Returns a random vector for each word, which depends on the word only, and one for the end of the text.

    A text of more than `text_tokens` - 1 words is cut. It warns of prompts that are not among the captions on which the
    model was trained, except for the empty text.

    Example:
        >>> from jacobiflow.models import word_encoder
        >>> captions = ["yellow heart", "red heart"]
        >>> states = word_encoder(captions, captions, text_tokens=4, text_dim=8)
        >>> [bool((one == other).all()) for one, other in zip(*states)]  # differ in the first word
        [False, True, True, True]
    """
    texts = [split_words(prompt) for prompt in prompts]
    unknown = [text for text in map(" ".join, texts) if text and text not in captions]
    if unknown:
        others = f" and {len(unknown) - 1} more" * (len(unknown) > 1)
        nearest = ", ".join(f'"{caption}"' for caption in get_close_matches(unknown[0], captions, cutoff=0))
        warnings.warn(
            f'the model was not trained on "{unknown[0]}"{others}, and may draw anything; near it are {nearest}; '
            "jacobiflow info lists all captions",
            stacklevel=2,
        )
    states = torch.zeros(len(prompts), text_tokens, text_dim)
    for i, words in enumerate(texts):
        for j, word in enumerate([*words[: text_tokens - 1], "."]):
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
            states[i, j] = torch.from_numpy(np.random.default_rng(seed).standard_normal(text_dim))
    return states


def t5_encoder(
    name: str | Path = "google/flan-t5-xl", text_tokens: int = 128, device: str | torch.device = "cpu"
) -> EncodeText:
    """Returns the encoder of a T5 model as the `encode_text` of a `STARFlow`.

    It needs transformers: pip install transformers. The first prompt loads the model, from a hub id or a folder. A
    prompt of more than `text_tokens` tokens is cut.

    Example:
        >>> from jacobiflow.models import t5_encoder
        >>> encode_text = t5_encoder("google/flan-t5-xl")  # doctest: +SKIP
        >>> flow = jf.STARFlow.from_original("starflow.pth", encode_text=encode_text)  # doctest: +SKIP
    """

    @cache
    def load() -> tuple[Any, Any]:
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as error:
            raise InputValueError("a T5 encoder needs transformers: pip install transformers") from error
        try:
            model = T5EncoderModel.from_pretrained(str(name)).eval().requires_grad_(False).to(device)
            return AutoTokenizer.from_pretrained(str(name)), model
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name}: not the hub id or folder of a T5 encoder ({first_line(error)})") from error

    def encode(prompts: list[str]) -> Float[Tensor, "n l k"]:
        tokenizer, model = load()
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=text_tokens, return_tensors="pt")
        mask = tokens["attention_mask"].to(device)
        states = model(input_ids=tokens["input_ids"].to(device), attention_mask=mask).last_hidden_state
        return states * mask.unsqueeze(-1)

    return encode
