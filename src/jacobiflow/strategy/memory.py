"""How much memory drawing a batch takes, and how many samples fit."""

from __future__ import annotations

from jacobiflow.checks import check_count
from jacobiflow.errors import InputValueError
from jacobiflow.flows.image_flow import ImageFlow, check_flow
from jacobiflow.guidance import Guidance, check_guidance, in_force
from jacobiflow.memory import free_memory

_SHARE = 0.8  # of the free memory that a batch may take: what is freed is not all used again
_STATES = 12  # arrays of tokens that a solve holds at a time


def batch_bytes(flow: ImageFlow, num: int, guidance: Guidance | None = None) -> int | None:
    """Bytes that `num` samples take at most while a block is solved, beside the weights; `None` where the flow does not
    say.

    By the shapes: keys and values, twice under guidance, what a sweep of all tokens makes, and the tokens.
    """
    check_flow(flow)
    num = check_count("num", num)
    check_guidance(guidance)
    row, config = flow.blocks[0].row_bytes(), flow.config
    if row is None:
        return None
    tokens = _STATES * config.num_tokens * config.token_channels * max(flow.var.element_size(), 4)
    return num * (tokens + row * (1 if in_force(guidance) is None else 2))


def exceeds_memory(flow: ImageFlow, num: int, guidance: Guidance | None = None) -> bool:
    """Tells if `num` samples need more than four fifths of the free memory; False if that is not known."""
    needed, free = batch_bytes(flow, num, guidance), free_memory(flow.var.device)
    return needed is not None and free is not None and needed > _SHARE * free


def fitting_batch(flow: ImageFlow, most: int, guidance: Guidance | None = None) -> int:
    """The largest power of two, or else `most`, of samples that fit in four fifths of the memory that is free.

    **Raises** `ValueError` where not even one does, or the flow or the system does not say how much memory there is.
    """
    most = check_count("most", most)
    needed, free = batch_bytes(flow, 1, guidance), free_memory(flow.var.device)
    if needed is None or free is None:
        raise InputValueError(
            "batch_size='auto': this flow, or this system, does not say how much memory; give a number"
        )
    num = int(_SHARE * free) // needed
    if num < 1:
        raise InputValueError(
            f"a sample needs {needed / 2**30:.1f} GiB beside the weights, and {free / 2**30:.1f} GiB are free"
        )
    return most if num >= most else 1 << (num.bit_length() - 1)
