"""Live TarFlow blocks: of the original code, of SBG, and of forks, recognised by their structure and a trial."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from jacobiflow.adapters.adapter import AcceleratedModule, Adapter
from jacobiflow.adapters.library_module import has_forward_hooks, library_class
from jacobiflow.adapters.tarflow_trial import MAX_GUIDANCE, TEMPERATURES, TrialResult, run_trial
from jacobiflow.errors import UnsupportedError
from jacobiflow.native import describe as describe_native
from jacobiflow.native import load_library
from jacobiflow.native.tensors import check_autocast, check_untraced, is_traced
from jacobiflow.native.transformer import CausalTransformer, GuidanceWeights, RowInputs
from jacobiflow.utils.snapshot import Snapshot

_PARTS = ("proj_in", "pos_embed", "attn_blocks", "proj_out", "permutation", "reverse")
# The settings that native code has for these layers.
_SETTINGS: dict[Any, dict[str, Any]] = {nn.LayerNorm: {"eps": 1e-5}, nn.GELU: {"approximate": "none"}}


@dataclass(frozen=True)
class _ReverseArgs:
    """The arguments that `reverse` of a TarFlow block may have, with the defaults of the original code."""

    x: Any
    y: Any = None
    cond: Any = None
    guidance: Any = 0.0
    guide_what: Any = "ab"
    attn_temp: Any = 1.0
    annealed_guidance: Any = False


def is_block(module: nn.Module) -> bool:
    """Returns True if a module has the attributes of a TarFlow block."""
    return all(hasattr(module, name) for name in _PARTS)


def try_block(block: Any, trials: dict[bytes | None, TrialResult]) -> Adapter:
    """Returns the adapter of a block whose parts, and whose results in a trial, are those of a TarFlow block.

    The result of its trial is added to those of earlier blocks, see `run_trial`. Raises UnsupportedError if they are
    not those of a TarFlow block.
    """
    kind: Any = library_class(block)
    signature = inspect.signature(kind.reverse)
    for name in signature.parameters:
        if name not in ("self", *(field.name for field in fields(_ReverseArgs))):
            raise UnsupportedError(f"its reverse takes {name}")
    if "reverse" in vars(block):
        raise UnsupportedError("its reverse was replaced")
    _check_parts(block)
    if load_library() is None:
        raise UnsupportedError(f"native code is {describe_native()}")
    if is_traced() or any(map(has_forward_hooks, block.modules())):
        raise UnsupportedError("it cannot be tried while PyTorch traces, or with hooks")
    parameters = signature.parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}

    def reverse(block: Any, **arguments: Any) -> tuple[Tensor, Tensor]:
        return _reverse(block, _ReverseArgs(**defaults | arguments))

    result = run_trial(block, reverse, signature.parameters, trials)
    modules = list(block.modules())
    bases = dict.fromkeys(base for part in modules for base in library_class(part).__mro__)
    names = {
        "signature": signature, "trial_result": result, "shapes": _shapes(block),
        "buffers_before": {name: buffer.clone() for name, buffer in block.named_buffers()},
        "snapshot": Snapshot(modules, map(vars, bases)),
    }  # fmt: skip
    return Adapter(kind, ("reverse",), type("_AcceleratedBlock", (_AcceleratedBlock,), names), list_transforms=None)


def _shapes(block: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in block.named_parameters()}


def _check_parts(block: Any) -> None:
    """Raises UnsupportedError with the name of the first part that a TarFlow block lacks, or has otherwise."""
    expected: dict[Any, type[nn.Module]] = {block.proj_in: nn.Linear, block.proj_out: nn.Linear}
    if getattr(block, "cond_proj", None) is not None:
        expected[block.cond_proj] = nn.Linear
    for i, layer in enumerate(block.attn_blocks):
        try:
            attention, mlp, (up, activation, *dropout, down) = layer.attention, layer.mlp, layer.mlp.main
            expected |= dict.fromkeys((attention.norm, mlp.norm), nn.LayerNorm)
            expected |= dict.fromkeys((attention.qkv, attention.proj, up, down), nn.Linear)
        except (AttributeError, TypeError, ValueError) as error:
            raise UnsupportedError(f"attn_blocks.{i} is not that of a TarFlow block") from error
        expected |= {activation: nn.GELU, **dict.fromkeys(dropout, nn.Dropout)}
    names = {part: name for name, part in block.named_modules()}
    for part, kind in expected.items():
        has_settings = all(getattr(part, key, None) == value for key, value in _SETTINGS.get(kind, {}).items())
        if type(part) is not kind or not has_settings or getattr(part, "bias", part) is None:
            raise UnsupportedError(f"{names.get(part)} is not that of a TarFlow block")


def _reverse(block: Any, arguments: _ReverseArgs) -> tuple[Tensor, Tensor]:
    """Returns the result of a block's `reverse` and the log-determinant by native code. May raise UnsupportedError."""
    x, z = arguments.x, block.permutation(arguments.x)
    tokens = z.shape[1]
    context = other = None
    if arguments.cond is not None:
        context = block.cond_proj(block.permutation(arguments.cond))
    elif getattr(block, "class_embed", None) is not None:
        other = block.class_embed.mean(dim=0, keepdim=True)
        context = other if arguments.y is None else block.class_embed[arguments.y]
    guidance = None
    if arguments.guidance > 0:
        weights = x.new_full((tokens,), arguments.guidance)
        if arguments.annealed_guidance:
            weights *= torch.arange(tokens, device=x.device) / max(tokens - 1, 1)
        zeros = torch.zeros_like(weights)
        of_scale, of_shift = (weights if parameter in arguments.guide_what else zeros for parameter in "ab")
        guidance = GuidanceWeights(of_scale, of_shift, rule="linear")
    layers = [_layer(layer) for layer in block.attn_blocks]
    network = CausalTransformer(
        proj_in=block.proj_in.weight,
        position=block.permutation(block.pos_embed, dim=0)[:tokens] + block.proj_in.bias,
        layers=layers,
        heads=block.attn_blocks[0].attention.num_heads,
        proj_out=block.proj_out.weight,
        out_bias=block.proj_out.bias,
        has_scale=len(block.proj_out.bias) == 2 * x.shape[2],
    )

    def row_inputs(rows: slice) -> RowInputs:
        parts, num = [RowInputs(context if context is None or len(context) == 1 else context[rows])], len(z[rows])
        if guidance is not None:
            parts.append(RowInputs(other, x.new_ones(num) / arguments.attn_temp))
        return RowInputs.stack(parts, num)

    x, log_det = network.invert(z, row_inputs, guidance)
    return block.permutation(x, inverse=True), log_det


def _layer(layer: Any) -> dict[str, Tensor]:
    """Returns the weights and biases of a layer, by their names in native code."""
    modules = {
        "norm": layer.attention.norm, "qkv": layer.attention.qkv, "proj": layer.attention.proj,
        "mlp_norm": layer.mlp.norm, "up": layer.mlp.main[0], "down": layer.mlp.main[-1],
    }  # fmt: skip
    tensors = {name: module.weight for name, module in modules.items()}
    return tensors | {f"{name}_bias": module.bias for name, module in modules.items()}


class _AcceleratedBlock(AcceleratedModule):
    """A block whose `reverse` is native code, unless the block has changed or the trial compared no such call."""

    library_class: ClassVar[Any]
    signature: ClassVar[inspect.Signature]
    trial_result: ClassVar[TrialResult]
    snapshot: ClassVar[Snapshot]
    shapes: ClassVar[dict[str, torch.Size]]
    buffers_before: ClassVar[dict[str, Tensor]]
    pos_embed: Tensor
    proj_in: nn.Linear

    def reverse(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the block's own `reverse` does."""
        try:
            result = self._native_reverse(args, kwargs)
        except UnsupportedError as error:
            self.acceleration.record_fallback(self, str(error))
            return super().reverse(*args, **kwargs)  # type: ignore[misc]
        return result if self.trial_result.has_log_det else result[0]

    def _native_reverse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        try:
            call = self.signature.bind(self, *args, **kwargs)
        except TypeError as error:  # The block's own message names its function.
            raise UnsupportedError("arguments that do not fit its signature") from error
        call.apply_defaults()
        arguments = {name: value for name, value in call.arguments.items() if name != "self"}
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        check_untraced()
        if not all(tensor.is_cpu for tensor in tensors):
            raise UnsupportedError("tensors were not on the CPU")
        if self._has_changed():
            raise UnsupportedError("the block has changed (undo the change, or call jf.accelerate again)")
        check_autocast()
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *self.parameters())):
            raise UnsupportedError("gradients were enabled (use torch.no_grad())")
        if not self.trial_result.in_training and any(part.training for part in self.modules()):
            raise UnsupportedError("the block was in training mode (call model.eval())")
        if not self._is_tried(_ReverseArgs(**arguments)):
            raise UnsupportedError("the trial did not compare such arguments")
        with torch.no_grad():
            result = _reverse(self, _ReverseArgs(**arguments))
        if (overflows := ~result[0].isfinite().all(dim=(1, 2))).any():  # The block's own code computes these rows.
            rows = {name: value[overflows] if isinstance(value, Tensor) else value for name, value in arguments.items()}
            repaired = super().reverse(**rows)  # type: ignore[misc]
            for ours, theirs in zip(result, repaired if isinstance(repaired, tuple) else (repaired,), strict=False):
                ours[overflows] = theirs
        self.acceleration.record_use(self, 0, "native")
        return result

    def _has_changed(self) -> bool:
        """Returns True if more than the values of weights has changed since the trial."""
        buffers = dict(self.named_buffers())
        if not self.snapshot.is_current() or buffers.keys() != self.buffers_before.keys():
            return True
        try:
            is_same = all(torch.equal(buffer, self.buffers_before[name]) for name, buffer in buffers.items())
        except RuntimeError:  # They are on another device.
            is_same = False
        return not is_same or _shapes(self) != self.shapes

    def _is_tried(self, call: _ReverseArgs) -> bool:
        """Returns True if the trial compared arguments of this form."""
        x, y = call.x, call.y
        if not (
            type(call.guidance) in (int, float) and 0 <= call.guidance <= MAX_GUIDANCE
            and type(call.guide_what) is str and call.guide_what in ("a", "b", "ab")
            and type(call.attn_temp) in (int, float) and TEMPERATURES[0] <= call.attn_temp <= TEMPERATURES[1]
            and type(call.annealed_guidance) is bool and isinstance(x, Tensor) and x.ndim == 3
        ):  # fmt: skip
            return False
        rows, tokens, positions = x.shape[0], x.shape[1], len(self.pos_embed)
        if not (
            rows and 0 < tokens <= positions and (tokens == positions or self.trial_result.takes_fewer_tokens)
            and _has_form(x, torch.float32, rows, tokens, self.proj_in.in_features)
        ):  # fmt: skip
            return False
        projection, embeddings = getattr(self, "cond_proj", None), getattr(self, "class_embed", None)
        if projection is not None:
            form = torch.float32, rows, tokens, projection.in_features
            return y is None and call.guidance == 0 and _has_form(call.cond, *form)
        if call.cond is not None or y is None:
            return call.cond is None
        if embeddings is None or not _has_form(y, torch.int64, rows):
            return False
        return bool(((y >= 0) & (y < len(embeddings))).all())  # Forks give negative labels a meaning of their own.


def _has_form(value: Any, dtype: torch.dtype, *shape: int) -> bool:
    return type(value) is Tensor and value.dtype is dtype and value.is_cpu and value.shape == shape
