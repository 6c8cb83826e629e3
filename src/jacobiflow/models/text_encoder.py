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


_MAX_NAMED = 3  # unknown prompts in a warning


def split_words(text: str) -> list[str]:
    """Returns the words of a text in lower case."""
    return re.findall(r"[a-z0-9]+", text.lower())


def word_encoder(
    prompts: list[str], captions: Sequence[str], text_tokens: int, text_dim: int
) -> Float[Tensor, "n {text_tokens} {text_dim}"]:
    """Returns a random vector for each word, which depends on the word only, and one for the end of the text.

    A text of more than `text_tokens` - 1 words is cut. It warns of prompts that are not among the captions on which the
    model was trained, except for the empty text, and suggests captions in their place.

    Example:
        >>> from jacobiflow.models import word_encoder
        >>> captions = ["yellow heart", "red heart"]
        >>> states = word_encoder(captions, captions, text_tokens=4, text_dim=8)
        >>> [bool((one == other).all()) for one, other in zip(*states)]  # differ in the first word
        [False, True, True, True]
    """
    texts = [split_words(prompt) for prompt in prompts]
    unknown = dict.fromkeys(text for text in map(" ".join, texts) if text and text not in captions)
    if unknown:
        named = [f'"{text}"{_suggest_captions(text, captions)}' for text in list(unknown)[:_MAX_NAMED]]
        named += [f"and {len(unknown) - _MAX_NAMED} more"] * (len(unknown) > _MAX_NAMED)
        warnings.warn(
            f"the model was not trained on {', '.join(named)}, and may draw anything; jacobiflow info lists its "
            "captions",
            stacklevel=2,
        )
    states = torch.zeros(len(prompts), text_tokens, text_dim, device="cpu")
    for i, words in enumerate(texts):
        for j, word in enumerate([*words[: text_tokens - 1], "."]):
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
            states[i, j] = torch.from_numpy(np.random.default_rng(seed).standard_normal(text_dim))
    return states


def _suggest_captions(text: str, captions: Sequence[str]) -> str:
    """Returns a caption that is spelled like a text, or two that share a word with it, in parentheses."""
    words = {word for word in text.split() if len(word) > 1}
    shared = [caption for caption in captions if words & set(caption.split())]
    nearest = get_close_matches(text, captions, n=1, cutoff=0.8) or get_close_matches(text, shared, n=2, cutoff=0)
    names = " or ".join(f'"{caption}"' for caption in nearest)
    return f" (near it: {names})" if names else ""


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
