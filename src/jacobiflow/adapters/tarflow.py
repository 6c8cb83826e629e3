"""Live TarFlow blocks: of the original code, of SBG, and of forks, recognised by their structure and a trial."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from jacobiflow.adapters.acceleration import AcceleratedModule, Adapter
from jacobiflow.adapters.library_module import library_class
from jacobiflow.adapters.snapshot import has_forward_hooks
from jacobiflow.adapters.tarflow_state import BlockState, copy_state, is_same_state, read_state
from jacobiflow.adapters.tarflow_trial import MAX_GUIDANCE, TEMPERATURES, Trial, TrialResult
from jacobiflow.errors import UnsupportedError, first_line
from jacobiflow.native import describe as describe_native
from jacobiflow.native import load_library
from jacobiflow.native.tensors import is_traced
from jacobiflow.native.transformer import CausalTransformer, GuidanceTerms

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


def find_blocks(modules: Iterable[nn.Module]) -> tuple[dict[nn.Module, Adapter], dict[nn.Module, str]]:
    """Tries all TarFlow blocks; returns the adapters of those that can be accelerated, and the obstacles of others."""
    adapters: dict[nn.Module, Adapter] = {}
    obstacles: dict[nn.Module, str] = {}
    results: list[tuple[BlockState, TrialResult]] = []
    for module in modules:
        if all(hasattr(module, name) for name in _PARTS):
            try:
                adapters[module] = _try_block(module, results)
            except UnsupportedError as error:
                obstacles[module] = str(error)
    return adapters, obstacles


def _try_block(block: Any, results: list[tuple[BlockState, TrialResult]]) -> Adapter:
    """Returns the adapter of a block whose parts and results are those of a TarFlow block.

    Blocks that differ only in the values of their weights share the trial with random weights. So the result of this
    block is added to the `results` of earlier blocks.
    """
    kind: Any = library_class(block)
    signature = inspect.signature(kind.reverse)
    known_names = {"self", *(field.name for field in fields(_ReverseArgs))}
    for name in signature.parameters:
        if name not in known_names:
            raise UnsupportedError(f"its reverse takes {name}")
    if "reverse" in vars(block):
        raise UnsupportedError("its reverse was replaced")
    _check_parts(block)
    if load_library() is None:
        raise UnsupportedError(f"native code is {describe_native()}")
    if is_traced():
        raise UnsupportedError("it cannot be tried while PyTorch traces, or has hooks on all modules")
    parameters = signature.parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}

    def reverse(block: Any, **arguments: Any) -> tuple[Tensor, Tensor]:
        return _reverse(block, _ReverseArgs(**defaults | arguments))

    try:
        state, trial = copy_state(read_state(block)), Trial(block, reverse, signature.parameters)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedError(f"it cannot be tried: {type(error).__name__}: {first_line(error)}") from error
    trial.compare_own_weights()
    shared = next((result for other, result in results if is_same_state(other, state)), None)
    result = shared or trial.compare_random_weights()
    results.append((state, result))
    names = {"tried_signature": signature, "tried_state": state, "trial_result": result}
    return Adapter(kind, ("reverse",), type("_AcceleratedBlock", (_AcceleratedBlock,), names), list_transforms=None)


def _check_parts(block: Any) -> None:
    """Raises UnsupportedError with the name of the first part that a TarFlow block lacks, or has otherwise."""
    layers = {
        "attention.norm": nn.LayerNorm, "attention.qkv": nn.Linear, "attention.proj": nn.Linear,
        "mlp.norm": nn.LayerNorm, "mlp.main.0": nn.Linear, "mlp.main.1": nn.GELU,
    }  # fmt: skip
    expected: dict[str, Any] = {"proj_in": nn.Linear, "proj_out": nn.Linear}
    if getattr(block, "cond_proj", None) is not None:
        expected["cond_proj"] = nn.Linear
    for i, layer in enumerate(block.attn_blocks):
        expected |= {f"attn_blocks.{i}.{name}": kind for name, kind in layers.items()}
        main = getattr(getattr(layer, "mlp", None), "main", ())
        if len(main) == 4:
            expected[f"attn_blocks.{i}.mlp.main.2"] = nn.Dropout
        expected[f"attn_blocks.{i}.mlp.main.{max(len(main), 3) - 1}"] = nn.Linear
    parts = dict(block.named_modules())
    for name, kind in expected.items():
        part: Any = parts.get(name)
        if (
            type(part) is not kind
            or any(getattr(part, key) != value for key, value in _SETTINGS.get(kind, {}).items())
            or (kind in (nn.Linear, nn.LayerNorm) and (part.weight is None or part.bias is None))
        ):
            raise UnsupportedError(f"{name} is not that of a TarFlow block")


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
    extrapolation = None
    if arguments.guidance > 0:
        weights = x.new_full((tokens,), arguments.guidance)
        if arguments.annealed_guidance:
            weights *= torch.arange(tokens, device=x.device) / max(tokens - 1, 1)
        zeros = torch.zeros_like(weights)
        of_scale, of_shift = (weights if parameter in arguments.guide_what else zeros for parameter in "ab")
        extrapolation = GuidanceTerms(of_scale, of_shift, other, arguments.attn_temp, by_density=False)
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
    x, log_det = network.invert(z, lambda rows: context, extrapolation)
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
    tried_signature: ClassVar[inspect.Signature]
    tried_state: ClassVar[BlockState]
    trial_result: ClassVar[TrialResult]
    pos_embed: Tensor
    proj_in: nn.Linear

    def reverse(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the block's own `reverse` does."""
        try:
            result = self._native_reverse(args, kwargs)
        except UnsupportedError:
            return self._own_reverse(*args, **kwargs)
        return result if self.trial_result.has_log_det else result[0]

    def _native_reverse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        try:
            call = self.tried_signature.bind(self, *args, **kwargs)
        except TypeError as error:  # The block's own message names its function.
            raise UnsupportedError("arguments that do not fit its signature") from error
        call.apply_defaults()
        arguments = {name: value for name, value in call.arguments.items() if name != "self"}
        if is_traced() or self._has_changed() or not self._is_tried(_ReverseArgs(**arguments)):
            raise UnsupportedError("a block that has changed, or arguments that were not tried")
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *self.parameters())):
            raise UnsupportedError("gradients")
        with torch.no_grad():
            result = _reverse(self, _ReverseArgs(**arguments))
        if (overflows := ~result[0].isfinite().all(dim=(1, 2))).any():  # The block's own code computes these rows.
            rows = {name: value[overflows] if isinstance(value, Tensor) else value for name, value in arguments.items()}
            repaired = self._own_reverse(**rows)
            for ours, theirs in zip(result, repaired if isinstance(repaired, tuple) else (repaired,), strict=False):
                ours[overflows] = theirs
        self.acceleration.record_use(self, 0, "native")
        return result

    def _has_changed(self) -> bool:
        return any(map(has_forward_hooks, self.modules())) or not is_same_state(self.tried_state, read_state(self))

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
            and (self.trial_result.in_training or not any(part.training for part in self.modules()))
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

    def _own_reverse(self, *args: Any, **kwargs: Any) -> Any:
        self.acceleration.record_use(self, 0, "library")
        return super().reverse(*args, **kwargs)  # type: ignore[misc]


def _has_form(value: Any, dtype: torch.dtype, *shape: int) -> bool:
    return type(value) is Tensor and value.dtype is dtype and value.is_cpu and value.shape == shape
