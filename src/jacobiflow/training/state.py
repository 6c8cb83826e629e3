"""A flow in training: its weights, their average and the optimizer, in one process or more."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from jacobiflow.models.contexts import NoContextKind
from jacobiflow.models.flow import Flow
from jacobiflow.models.transformer.block import TransformerBlock
from jacobiflow.training.checkpoint import gather
from jacobiflow.training.config import TrainingConfig
from jacobiflow.training.loading import Batch
from jacobiflow.training.processes import rank, world_size


class FlowLoss(nn.Module):
    """The loss of a flow, in nats per dimension without the constant: mean(z^2) / 2 - log-det / D of each sample."""

    def __init__(self, flow: Flow, bf16: bool) -> None:
        super().__init__()
        self.flow, self.bf16 = flow, bf16

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Float[Tensor, " b"], Float[Tensor, "b t c"]]:
        """Returns the loss of each sample, and its latents."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            z, log_det = self.flow.encode(x, context, is_scaled=False)
        return 0.5 * z.square().flatten(1).mean(dim=1) - log_det / z[0].numel(), z.detach()


class TrainState:
    """A flow in training, the exponential moving average of its weights, and the optimizer.

    Several processes hold copies of them, which DDP keeps equal, or shards of them, by FSDP.

    Args:
        flow: The flow. Its weights are trained in place, unless they are sharded.

    Attributes:
        loss: The loss of the flow.
        average: The loss of the averaged flow.
        seconds: Seconds of training so far.
    """

    def __init__(self, flow: Flow, config: TrainingConfig) -> None:
        self.flow, self.config = flow, config
        self.is_sharded = config.shard and world_size() > 1
        if world_size() > 1:
            for tensor in flow.state_dict().values():
                dist.broadcast(tensor, src=0)
        self.loss = FlowLoss(flow, config.bf16)
        with torch.device("cpu"):  # PyTorch counts the updates on the default device.
            self._average = AveragedModel(self.loss, multi_avg_fn=self._lerp)  # type: ignore[arg-type]
        self.average: FlowLoss = self._average.module.requires_grad_(False)  # type: ignore[assignment]
        for block in flow.blocks:
            if isinstance(block, TransformerBlock):
                block.recomputes_layers = config.recompute
        self._replicated: Any = self.loss
        if self.is_sharded:
            mesh = init_device_mesh(flow.var.device.type, (world_size(),))
            for module in (self.loss, self.average):
                for block in module.flow.blocks:
                    for layer in getattr(block, "attn_blocks", ()):
                        fully_shard(layer, mesh=mesh)
                fully_shard(module, mesh=mesh)
        elif world_size() > 1:
            self._replicated = DistributedDataParallel(self.loss)
        self._average.update_parameters(self.loss)  # The first call copies the weights.
        parameters = self.loss.parameters()
        self._optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=config.weight_decay)
        for parameter in self.loss.parameters():  # AdamW makes the same ones in its first step.
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[parameter] = {"step": torch.tensor(0.0, device="cpu"), **moments}
        self.seconds = torch.zeros((), dtype=torch.float64, device="cpu")

    def backward(self, batch: Batch, is_last_part: bool) -> tuple[Tensor, Tensor]:
        """Adds the gradients of a part of a step. DDP exchanges them after the last part, and FSDP after each.

        Returns:
            The sum over the samples of this process of the losses, and of the squared latents (T, C).
        """
        model = self._replicated
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last_part else nullcontext():
            losses, z = model(*to_flow(batch, self.flow))
            # Both DDP and FSDP divide the sum of the gradients by the number of processes.
            (losses.sum() * (world_size() / self.config.batch_size)).backward()
        return losses.detach().sum(), z.square().sum(dim=0)

    def update(self, rate: float) -> float:
        """Updates the weights and their average by the gradients, and removes these; returns their norm."""
        norm = nn.utils.clip_grad_norm_(self.loss.parameters(), self.config.max_grad_norm)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._average.update_parameters(self.loss)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _lerp(self, average: list[Tensor], weights: list[Tensor], num_averaged: Tensor | int) -> None:
        # The decay rises to `ema_decay`, so that the average soon forgets the initial weights.
        step = int(num_averaged)
        decay = min(self.config.ema_decay, step / (9 + step))
        torch._foreach_lerp_(average, weights, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of a checkpoint by their names, sharded as they are."""
        average = {f"average.{name}": tensor for name, tensor in self._average.state_dict().items()}
        optimizer = {
            f"optimizer.{name}.{key}": tensor
            for name, parameter in self.loss.named_parameters()
            for key, tensor in self._optimizer.state[parameter].items()
        }
        return {**self.loss.state_dict(), **average, **optimizer, "seconds": self.seconds}

    def averaged_flow(self) -> Flow | None:
        """Returns the averaged flow in the first process, and None in the others; all of them call this.

        If it is sharded, it is the flow that a model folder stores, with the whole weights in the memory of the CPU.
        """
        flow = self.average.flow
        if not self.is_sharded:
            return flow if rank() == 0 else None
        state = gather(flow.stored.state_dict())
        if rank() > 0:
            return None
        with torch.device("meta"):
            whole = type(flow.stored)(flow.stored.config)
        whole.load_state_dict(state, assign=True)
        whole.requires_grad_(False).recommended = flow.recommended
        whole.classes = flow.classes
        return whole


def sum_over_processes(values: Tensor) -> Tensor:
    """Returns the sum of the values of all processes."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def to_flow(batch: Batch, flow: Flow) -> tuple[Tensor, Tensor | None]:
    """Returns data and context on the flow's device, with unconditional values in place of dropped contexts."""
    device = flow.var.device
    x = batch.x.to(device, non_blocking=True)
    if batch.context is None or isinstance(flow.context_kind, NoContextKind):
        return x, None
    context = batch.context.to(device, non_blocking=True)
    if flow.context_kind.is_optional:
        is_dropped = batch.is_dropped.to(device).view(-1, *[1] * (context.ndim - 1))
        context = torch.where(is_dropped, flow.blocks[-1].unconditional(context), context)
    return x, context
