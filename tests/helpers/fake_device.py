"""A GPU without one: tensors that say they are on `cuda:0`, compute on the CPU, and count what a GPU would be asked.

    with FakeDevice() as device:
        flow = jf.load("fashion-p2", device="cuda")
        with device.counting() as counts:
            jf.sample(flow, num=4)
    print(counts.operations, counts.read_backs)

An operation of a tensor there with one of the host raises, as it would on a GPU.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

DEVICE = torch.device("cuda:0")
_aten = torch.ops.aten
# They wait for the device, since the size of what they return depends on values.
_WAITS = {_aten.nonzero, _aten.masked_select, _aten.unique_dim, _aten._unique2, _aten.is_nonzero, _aten.equal}
# They launch nothing, though their schema says that they make a new tensor.
_FREE = {
    _aten._unsafe_view, _aten._fused_sdp_choice, _aten.lift_fresh, _aten._reshape_alias, _aten.empty, _aten.empty_like,
    _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided,
}  # fmt: skip
_tensor: Any = Tensor
_PROPERTIES = {_tensor.device.__get__: DEVICE, _tensor.is_cuda.__get__: True, _tensor.is_cpu.__get__: False}


@dataclass
class Counts:
    """The work of a device."""

    operations: Counter[str] = field(default_factory=Counter)  # kernels that PyTorch would launch, by name
    attention: Counter[str] = field(default_factory=Counter)  # by mask: "causal", "none" or "explicit"
    to_device: int = 0  # copies from the host
    read_backs: int = 0  # values and copies that the host waited for
    captures: int = 0  # of graphs
    live: int = 0  # bytes
    peak: int = 0


class OnDevice(Tensor):
    """A tensor there; `host` has its values."""

    host: Tensor
    device_of: FakeDevice

    @staticmethod
    def __new__(cls, host: Tensor, device_of: FakeDevice) -> OnDevice:
        return Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            layout=host.layout, device=torch.device("cpu"),
        )  # fmt: skip

    def __init__(self, host: Tensor, device_of: FakeDevice) -> None:
        self.host, self.device_of = host, device_of
        device_of.hold(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = OnDevice(self.host.clone(), self.device_of)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.host.__reduce_ex__(protocol)  # `torch.save`: a run resumes on any device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PROPERTIES:
            return _PROPERTIES[func]
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        if func is Tensor.tolist:
            args[0].device_of.read_back()
            return args[0].host.tolist()
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        device = next(tensor for tensor in tensors if isinstance(tensor, OnDevice)).device_of
        for tensor in tensors:
            if not isinstance(tensor, OnDevice) and tensor.ndim and not device.mixing:
                raise RuntimeError(f"{func}: expected all tensors on the same device, found cuda:0 and {tensor.device}")
        device.count(func, args, kwargs)
        if func.overloadpacket is _aten._fused_sdp_choice:
            return 1  # the fused kernel, as on a GPU
        on_host = tree_map(lambda leaf: leaf.host if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
        out = func(*on_host[0], **on_host[1]) if device.capturing is None else device.capturing.record(func, *on_host)
        if func.overloadpacket is _aten._local_scalar_dense:
            return out
        wrapped = tree_map(lambda leaf: OnDevice(leaf, device) if isinstance(leaf, Tensor) else leaf, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)


class _Copy(torch.autograd.Function):
    """To the device or back, and the gradient the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: FakeDevice) -> Any:
        ctx.device = device
        if isinstance(x, OnDevice):
            device.read_back()
            return x.host.clone()
        device.counts.to_device += 1
        return OnDevice(x.detach().to("cpu", copy=True), device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Copy.apply(gradient, ctx.device), None


class Graph:
    """A `torch.cuda.CUDAGraph`: the operations of a capture, run again on the same memory."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.written: list[tuple[Tensor, Tensor]] = []
        self.attention = Counter[str]()

    def pool(self) -> Graph:
        return self

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Nothing is computed while it is made: what the operations wrote is put back."""
        assert self.device.is_current  # A stream of another device would capture nothing.
        self.device.counts.captures += 1
        self.device.capturing = self
        try:
            yield
        finally:
            self.device.capturing = None
            for tensor, before in reversed(self.written):
                tensor.copy_(before)

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        writes = zip(func._schema.arguments, args, strict=False)
        changed = [arg for argument, arg in writes if argument.alias_info is not None and argument.alias_info.is_write]
        self.written += [(tensor, tensor.clone()) for tensor in changed]
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        self.device.counts.operations["replay"] += 1
        self.device.counts.attention.update(self.attention)
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for kept, new in zip(tree_iter(out), tree_iter(again), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class FakeDevice(TorchFunctionMode):
    """While it is entered, "cuda" is a device; see the module."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.mixing, self.is_current = Counts(), False, False
        self.capturing: Graph | None = None
        self._holders: Counter[int] = Counter()
        self._patches = ExitStack()

    @contextmanager
    def _as_current(self, device: torch.device) -> Iterator[None]:
        self.is_current = device.type == "cuda"
        yield
        self.is_current = False

    def __enter__(self) -> FakeDevice:
        cuda = {
            "get_device_name": lambda device: "fake", "synchronize": lambda device: None,
            "mem_get_info": lambda device: (80 << 30, 80 << 30), "current_stream": MagicMock(), "Stream": MagicMock(),
            "stream": lambda stream: nullcontext(), "set_stream": lambda stream: None,
            "CUDAGraph": partial(Graph, self),
            "device": self._as_current, "graph": lambda graph, pool, stream, capture_error_mode: graph.capture(),
        }  # fmt: skip
        for name, value in cuda.items():
            self._patches.enter_context(patch.object(torch.cuda, name, value))
        autocast = torch.autocast
        self._patches.enter_context(
            patch.object(torch, "autocast", lambda device, *args, **kwargs: autocast("cpu", *args, **kwargs))
        )
        # Views of a tensor of our own cannot be inference tensors.
        mode = patch.object(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext())
        self._patches.enter_context(mode)
        # A module gets new parameters: those of the host cannot take the memory of one that is there.
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        self._patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._patches.close()

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Counts from here on; `peak` and `live` are of what is made meanwhile."""
        outer, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            self.counts = outer

    def count(self, func: Any, args: Any, kwargs: Any) -> None:
        packet = func.overloadpacket
        masks = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, OnDevice) and leaf.dtype == torch.bool]
        indexing = packet in (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_)
        if packet in _WAITS or (indexing and any(mask.ndim for mask in masks)):
            self.read_back()
        if packet is _aten._local_scalar_dense:
            self.read_back()
        elif self.capturing is None and not func.is_view and packet not in _FREE:
            self.counts.operations[packet.__name__] += 1
        if "scaled_dot_product" in packet.__name__ and "backward" not in packet.__name__:
            causal = len(args) > 4 and args[4]
            mask = kwargs.get("attn_mask")
            self.attention["causal" if causal else "none" if mask is None else "explicit"] += 1

    @property
    def attention(self) -> Counter[str]:
        """The counts of attention: of a graph while it is captured, to be added at each replay."""
        return self.counts.attention if self.capturing is None else self.capturing.attention

    def read_back(self) -> None:
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.counts.read_backs += 1

    def hold(self, tensor: OnDevice) -> None:
        """Note the memory of a tensor until it is gone."""
        storage = tensor.host.untyped_storage()
        key, size, counts = storage._cdata, storage.nbytes(), self.counts
        self._holders[key] += 1
        if self._holders[key] == 1:
            counts.live += size
            counts.peak = max(counts.peak, counts.live)
        weakref.finalize(tensor, self._release, key, size, counts)

    def _release(self, key: int, size: int, counts: Counts) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            counts.live -= size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is scaled_dot_product_attention:
            return self._attend(func, args, kwargs)
        if func is Tensor.cpu:
            return self._to(args[0], "cpu")
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is torch._C._nn._parse_to:
            named = [arg for arg in (*args, kwargs.pop("device", None)) if isinstance(arg, str | torch.device)]
            others = [arg for arg in args if not isinstance(arg, str | torch.device)]
            is_there = any(map(_is_there, named))
            device, *rest = func(*([] if is_there else named), *others, **kwargs)
            return (DEVICE if is_there else device, *rest)
        if _is_there(kwargs.get("device")):
            made = func(*args, **(kwargs | {"device": "cpu"}))
            if resolve_name(func) in ("torch.tensor", "torch.as_tensor"):
                self.counts.to_device += 1
            else:
                self.counts.operations[getattr(func, "__name__", str(func))] += 1
            return OnDevice(made, self).requires_grad_(made.requires_grad)
        return func(*args, **kwargs)

    def _attend(self, func: Any, args: Any, kwargs: Any) -> Any:
        bias = kwargs.get("attn_mask")
        if isinstance(bias, CausalBias):  # a GPU has kernels for it, the CPU takes a mask
            self.attention.update(causal=1, explicit=-1)
            hidden = ~bias._lower_right(torch.device("cpu"))
            mask = torch.zeros(hidden.shape, dtype=args[0].dtype).masked_fill(hidden, -torch.inf)
            kwargs["attn_mask"] = OnDevice(mask, self)
        self.mixing = True  # its slow kernel makes a mask of its own, where it believes the tensors to be
        try:
            return func(*args, **kwargs)
        finally:
            self.mixing = False

    def _to(self, x: Tensor, *args: Any, device: Any = None, dtype: Any = None, **kwargs: Any) -> Tensor:
        for arg in args:
            if isinstance(arg, Tensor):
                device, dtype = arg.device, arg.dtype
            elif isinstance(arg, str | torch.device):
                device = arg
            elif isinstance(arg, torch.dtype):
                dtype = arg
        if device is not None and _is_there(device) != isinstance(x, OnDevice):
            x = _Copy.apply(x, self)
        return x.to(dtype or x.dtype, **kwargs)


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"
