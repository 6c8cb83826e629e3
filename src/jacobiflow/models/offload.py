"""Blocks of a flow that is larger than its device, of which one at a time is copied there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jacobiflow.blocks.base import FlowBlock, TokensLogDet
from jacobiflow.blocks.context import Context
from jacobiflow.blocks.tokens import Tokens
from jacobiflow.errors import InputValueError


class BlockLoader:
    """Copies the blocks of a flow to a device, one at a time.

    A copy stays until another block is asked for. On a GPU the next block is copied meanwhile, on another stream.

    Attributes:
        flow: Holds all blocks.
        copies: The copies on the device, by the index of the block.
    """

    def __init__(self, flow: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.flow, self.device, self.dtype = flow, device, dtype
        self.copies: dict[int, FlowBlock] = {}
        blocks = {id(tensor) for tensor in _tensors(flow.blocks)}
        others = [tensor for tensor in _tensors(flow) if id(tensor) not in blocks]
        self._others = _copies_of(others, device, dtype)
        self._last = -2  # No block is one step from it.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            for tensor in _tensors(flow.blocks):
                tensor.data = tensor.data.pin_memory()  # A GPU reads pinned memory without the processor.
        self._versions = _versions_of(flow)

    def view(self) -> Any:
        """Returns a view of the flow that computes by the copies of this loader; all else of it is on the device."""
        view, modules = copy.copy(self.flow), self.flow._modules
        others = {name: module for name, module in modules.items() if name != "blocks"}
        view._modules = copy.deepcopy(others, dict(self._others)) | {"blocks": modules["blocks"]}
        view._buffers = copy.deepcopy(self.flow._buffers, dict(self._others))
        view.block_loader = self
        return view

    def load(self, index: int) -> FlowBlock:
        """Returns the copy of a block. The caller keeps no reference to it when it asks for another block.

        Raises:
            InputValueError: If the flow has other weights than before.
        """
        if _versions_of(self.flow) != self._versions:
            raise InputValueError("flow: its weights have changed since it was offloaded; offload it again")
        num, step, copied = len(self.flow.blocks), index - self._last, self.copies.get(index)
        if step == 0 and copied is not None:
            if self._stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(self._stream)
            return copied
        if abs(step) != 1:  # A pass starts: sampling at the last block, encoding at the first.
            step = -1 if index == num - 1 else 1
        # The other copies are freed first. Another thread that samples from this flow has a dictionary of its own.
        self.copies = copies = {} if copied is None else {index: copied}
        self._last = index
        if copied is None:
            copies[index] = self._copy(index)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            if 0 <= index + step < num:
                copies[index + step] = self._copy(index + step)
        return copies[index]

    def _copy(self, index: int) -> FlowBlock:
        """Copies a block; on a GPU after all that was asked of it so far, since the memory may still be in use."""
        block = self.flow.blocks[index]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            tensors = _copies_of(_tensors(block), self.device, self.dtype)
        copied: FlowBlock = copy.deepcopy(block, self._others | tensors)
        return copied

    def encode(self, index: int, x: Tokens, context: Context) -> TokensLogDet:
        """Returns `encode` of a block. The backward pass loads the block again: the graph does not hold its weights."""
        if not torch.is_grad_enabled():
            return self.load(index).encode(x, context)
        options: Any = {"use_reentrant": False, "preserve_rng_state": False}
        result: TokensLogDet = checkpoint(lambda x: self.load(index).encode(x, context), x, **options)
        return result


def without_values(flow: Any, dtype: torch.dtype) -> Sequence[FlowBlock]:
    """Returns the blocks of a flow on the meta device, in a dtype."""
    blocks: Sequence[FlowBlock] = copy.deepcopy(flow.blocks, _copies_of(_tensors(flow), torch.device("meta"), dtype))
    return blocks


def _copies_of(tensors: list[Tensor], device: torch.device, dtype: torch.dtype) -> dict[int, Any]:
    """Returns copies of tensors by their ids, as `copy.deepcopy` takes them. Whole numbers keep their dtype."""
    copies = dict[int, Any]()
    for tensor in tensors:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        with torch.inference_mode(False), torch.no_grad():  # A copy made in inference mode could have no gradients.
            # The device changes the dtype: the processor would do so in memory that is not pinned.
            moved = tensor.detach().to(device, non_blocking=True).to(kind, copy=True)
            copies[id(tensor)] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
    return copies


def _versions_of(flow: Any) -> list[tuple[int, int]]:
    """Returns what changes if the values of a tensor do."""
    return [(each.data_ptr(), 0 if each.is_inference() else each._version) for each in _tensors(flow)]


def _tensors(module: Any) -> list[Tensor]:
    return list(chain(module.parameters(), module.buffers()))
