"""Kinds of context: what a flow is conditioned on, and the labels, numbers and texts that users give for it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from jacobiflow.blocks.context import NO_CONTEXT, Context
from jacobiflow.blocks.guidance import Guidance
from jacobiflow.errors import InputTypeError, InputValueError
from jacobiflow.models.latents import FIRST_CALIBRATION_LATENT, MAX_SAMPLES, draw_latents
from jacobiflow.models.text_encoder import EncodeText
from jacobiflow.utils.checks import (
    FLOATS,
    check_count,
    check_finite,
    check_floating,
    check_kind,
    check_rows,
    format_value,
)

Labels = int | str | Sequence[int] | Sequence[str] | np.ndarray | Tensor
"""Classes by number or by name: one for all samples, or a sequence, array or tensor (N,) with one for each."""

ContextLike = Context | Labels
"""Labels, numbers (N, K) for each sample or (N, T, K) for each token, prompts, or a `Context` of them."""


def labels_or_context(labels: Labels | None, context: ContextLike | None) -> ContextLike | None:
    """Returns the argument that is given. Raises ValueError if both are."""
    if labels is not None and context is not None:
        raise InputValueError("labels and context: give one of them")
    return labels if context is None else context


class ContextKind(ABC):
    """The kind of context on which the samples of a flow are conditioned.

    Attributes:
        is_optional: The flow also models samples without the context, from which guidance leads away.
    """

    is_optional: ClassVar[bool] = False

    def resolve(self, values: ContextLike | None, num: int | None = None) -> Context:
        """Returns the context of `num` samples, checked; without `num` that of as many samples as there are values.

        A single label or prompt is that of all samples.
        """
        if isinstance(values, Context):
            if values.temperature is not None:
                raise InputValueError("context with a temperature: give Guidance(weight, attn_temperature=...) instead")
            values = values.values
        return self._resolve(values, num)

    @abstractmethod
    def _resolve(self, values: Any, num: int | None) -> Context: ...

    @abstractmethod
    def example(self, num: int) -> Context:
        """Returns a context of `num` samples, for timing the flow."""

    def check_guidance(self, guidance: Guidance) -> None:  # noqa: B027
        """Raises ValueError if there are no unconditional samples, from which guidance would lead away."""


class NoContextKind(ContextKind):
    """Samples are unconditional."""

    def _resolve(self, values: Any, num: int | None) -> Context:
        if values is not None:
            raise InputValueError("labels or a context given, but this flow takes none: leave them out")
        return NO_CONTEXT

    def example(self, num: int) -> Context:
        return NO_CONTEXT


@dataclass(frozen=True)
class Classes(ContextKind):
    """Each sample is of one of `num` classes, which may have names. A label below 0 is no class."""

    num: int
    names: Sequence[str] = ()
    is_optional = True

    def _resolve(self, values: Any, num: int | None) -> Context:
        if values is None:
            return NO_CONTEXT
        labels = self._convert(values, num or 1)
        if num is not None and len(labels) != num:
            message = f"give {num} classes, one for each sample"
            raise InputValueError(message, argument="labels", value=format_value(values))
        if (labels >= self.num).any():
            raise InputValueError(_describe_unknown(labels, self.num))
        return Context(labels)

    def _convert(self, labels: Any, num: int) -> Int[Tensor, " n"]:
        """Converts labels to a tensor of int64 or int32; a single class is that of all `num` samples."""
        give = "a class, or a tensor or list (N,) of classes, by number or by name"
        if isinstance(labels, str):
            labels = class_number(labels, self.names)
        elif isinstance(labels, list | tuple) and all(isinstance(label, str) for label in labels):
            labels = [class_number(label, self.names) for label in labels]
        elif isinstance(labels, Tensor | np.ndarray):
            check_kind("labels", labels, Tensor | np.ndarray, give)
            check_count("number of labels", math.prod(labels.shape), 0, MAX_SAMPLES)
        if not isinstance(labels, Tensor):
            try:
                array = np.array(labels)  # Arrays may be read-only or have negative strides.
                labels = torch.as_tensor(array, device="cpu")
            except (TypeError, ValueError) as error:
                raise InputTypeError(f"give {give}", argument="labels", value=format_value(labels)) from error
        labels = labels if labels.ndim else labels.repeat(num)
        if labels.dtype in (torch.uint8, torch.uint16, torch.int8, torch.int16):
            labels = labels.long()
        _check_labels("labels", labels, give)
        return labels

    def example(self, num: int) -> Context:
        return Context(torch.arange(num, device="cpu") % self.num)


def class_number(name: str, names: Sequence[str]) -> int:
    """Returns the number of the class of a name, in upper or lower case."""
    if name in names:
        return names.index(name)
    folded = [each.casefold() for each in names]
    if folded.count(name.casefold()) == 1:
        return folded.index(name.casefold())
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    classes = f"the classes are {', '.join(names)}" if names else "this model has no names of classes, give numbers"
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise InputValueError(f"no such class{hint}; {classes}", argument="labels", value=name)


def class_names(labels: Tensor | None, names: Sequence[str]) -> list[str]:
    """Returns the name of each label, or such as "class 3" without names; an empty list without labels."""
    numbers = [] if labels is None else labels.tolist()
    return ["no class" if number < 0 else names[number] if names else f"class {number}" for number in numbers]


@dataclass(frozen=True)
class Numbers(ContextKind):
    """Each sample has K numbers, or K numbers for each of its T tokens."""

    num_tokens: int
    size: int

    def _resolve(self, values: Any, num: int | None) -> Context:
        self.check(values)
        if num is not None:
            check_rows("context", values, num, "samples")
        check_finite("context", values)
        return Context(values)

    def check(self, values: Any) -> None:
        """Checks that a context is numbers (N, K) or (N, T, K)."""
        sizes = f"(N, {self.size}), or (N, {self.num_tokens}, {self.size})"
        give = f"floating-point numbers {sizes} with a row for each token"
        check_kind("context", values, Tensor, give)
        shapes = ((self.size,), (self.num_tokens, self.size))
        if values.dtype not in FLOATS or tuple(values.shape[1:]) not in shapes:
            raise InputValueError(f"context={format_value(values)}: give {give}")

    def example(self, num: int) -> Context:
        return Context(draw_latents(num, 1, self.size, start=FIRST_CALIBRATION_LATENT).squeeze(1))

    def check_guidance(self, guidance: Guidance) -> None:
        message = "for classes and texts only, and this flow's context is numbers"
        raise InputValueError(message, argument="guidance", value=guidance)


@dataclass(frozen=True, eq=False)
class Texts(ContextKind):
    """Each sample has a text, given as a prompt or as the states of its tokens (L, K), L up to `num_tokens`.

    Attributes:
        null_text: The states of the empty text; 0 if they are not known.
        encode_text: Returns the states of prompts; `None` if only states can be given.
    """

    null_text: Float[Tensor, "l k"]
    encode_text: EncodeText | None
    is_optional = True

    def _resolve(self, values: Any, num: int | None) -> Context:
        if values is None:
            self._check_null_text("no context")
            return NO_CONTEXT
        if isinstance(values, str):
            values = [values] * (num or 1)
        states = self.pad("context", values if isinstance(values, Tensor) else self._encode_prompts(values))
        if num is not None and len(states) != num:
            raise InputValueError(f"context of {len(states)} texts: give {num}, one for each sample")
        return Context(states)

    def _encode_prompts(self, prompts: Any) -> Float[Tensor, "n l k"]:
        if not isinstance(prompts, Sequence) or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputTypeError(f"context={format_value(prompts)}: give prompts, or the states of texts as a tensor")
        if self.encode_text is None:
            raise InputValueError(
                "prompts given, but this flow has no text encoder: set flow.encode_text to a function of a list of "
                "prompts that returns their states"
            )
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        states = self.encode(list(rows))
        return states[[rows[prompt] for prompt in prompts]]

    def encode(self, prompts: list[str]) -> Float[Tensor, "n l k"]:
        """Returns the states of prompts by the text encoder."""
        check_kind("encode_text", self.encode_text, Callable, "a function of a list of prompts")
        states = self.encode_text(prompts)  # type: ignore[misc]
        check_floating("result of encode_text", states, (len(prompts), "L", "K"))
        return states

    def pad(self, name: str, states: Tensor) -> Float[Tensor, "n l k"]:
        """Returns states of texts, padded with zeros to the length of `null_text`; messages call them `name`."""
        length, size = self.null_text.shape
        give = f"states of texts (N, L, {size}), L up to {length}"
        check_kind(name, states, Tensor, give)
        if states.dtype not in FLOATS:
            raise InputTypeError(f"{name}={format_value(states)}: give prompts, or {give}")
        if states.ndim != 3 or states.shape[1] > length or states.shape[2] != size:
            raise InputValueError(f"{name} of shape {tuple(states.shape)}: give {give}")
        check_finite(name, states)
        missing = length - states.shape[1]
        return F.pad(states, (0, 0, 0, missing)) if missing else states

    def example(self, num: int) -> Context:
        if self.null_text.any():
            return Context(self.null_text.expand(num, -1, -1))
        length, size = self.null_text.shape
        return Context(draw_latents(num, length, size, start=FIRST_CALIBRATION_LATENT))

    def check_guidance(self, guidance: Guidance) -> None:
        self._check_null_text("guidance")

    def _check_null_text(self, name: str) -> None:
        if not self.null_text.any():
            raise InputValueError(
                f"{name}: the states of the empty text are not in these weights; convert them again with a text "
                "encoder, or set flow.blocks[-1].null_text"
            )


def embed_classes(table: Float[Tensor, "k ..."] | None, labels: Int[Tensor, " b"] | None) -> Tensor | None:
    """Looks up the row of a table for each label; the mean over classes for labels below 0 and for `None`.

    On a CPU it raises ValueError for a label that is not a class. On a GPU only `Classes.resolve` notices.
    """
    if table is None:
        return None
    mean = table.mean(dim=0, keepdim=True)
    if labels is None:
        return mean
    _check_labels("context", labels, "a torch.Tensor (N,) of whole numbers")
    try:
        rows = table[labels.clamp(min=0)]
    except IndexError:
        raise InputValueError(f"context: {_describe_unknown(labels, len(table))}") from None
    return torch.where((labels < 0).view(-1, *[1] * (table.ndim - 1)), mean, rows)


def _check_labels(name: str, labels: Any, give: str) -> None:
    check_kind(name, labels, Tensor, give)
    if labels.dtype not in (torch.int64, torch.int32):
        raise InputTypeError(f"{name}={format_value(labels)}: give {give}")
    if labels.ndim != 1:
        raise InputValueError(f"{name}={format_value(labels)}: give {give}")


def _describe_unknown(labels: Int[Tensor, " n"], num_classes: int) -> str:
    """Describes which of the labels is not a class."""
    return f"label {int(labels.max())}: this flow has classes 0 to {num_classes - 1} (below 0: no class)"
