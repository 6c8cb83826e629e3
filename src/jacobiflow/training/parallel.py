"""A flow and its average over one or more processes: replicated by DDP, or sharded by FSDP."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from jacobiflow.models.flow import Flow
from jacobiflow.training.config import TrainConfig
from jacobiflow.training.loading import Batch
from jacobiflow.training.processes import rank, world_size


class Losses(NamedTuple):
    """The loss of each sample, and the sum over the samples of the squared latents."""

    loss: Float[Tensor, " b"]
    square_sum: Float[Tensor, "t c"]


class FlowLoss(nn.Module):
    """The loss of a flow, in nats per dimension without the constant: mean(z^2) / 2 - log-det / D of each sample."""

    def __init__(self, flow: Flow, bf16: bool) -> None:
        super().__init__()
        self.flow, self.bf16 = flow, bf16

    def forward(self, x: Tensor, context: Tensor | None) -> Losses:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            z, log_det = self.flow.normalize(x, context)
        return Losses(0.5 * z.square().flatten(1).mean(dim=1) - log_det / z[0].numel(), z.detach().square().sum(dim=0))


class ParallelFlow:
    """A flow in training, and the exponential moving average of its weights.

    Args:
        flow: The flow. Its weights are trained in place, unless they are sharded.

    Attributes:
        loss: Computes the losses of the flow.
        average: Computes those of the averaged flow.
    """

    def __init__(self, flow: Flow, config: TrainConfig) -> None:
        self.flow, self.config = flow, config
        self.is_sharded = config.shard and world_size() > 1
        if world_size() > 1:
            for tensor in flow.state_dict().values():
                dist.broadcast(tensor, src=0)
        self.loss = FlowLoss(flow, config.bf16)
        self._average = AveragedModel(self.loss, multi_avg_fn=self._lerp)  # type: ignore[arg-type]
        self.average: FlowLoss = self._average.module.requires_grad_(False)  # type: ignore[assignment]
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

    def backward(self, batch: Batch, is_last_part: bool) -> Losses:
        """Adds the gradients of a part of a step, and exchanges them with the other processes after the last part."""
        if self.is_sharded:
            self.loss.set_requires_gradient_sync(is_last_part)  # type: ignore[operator]
        model = self._replicated
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last_part else nullcontext():
            losses = model(*to_flow(batch, self.flow))
            # Both DDP and FSDP divide the sum of the gradients by the number of processes.
            (losses.loss.sum() * (world_size() / self.config.batch_size)).backward()
        return losses

    @torch.no_grad()
    def losses_of_average(self, batch: Batch) -> Losses:
        """Computes the losses of the averaged flow."""
        return self.average(*to_flow(batch, self.flow))

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Returns the sum of the values of all processes."""
        if world_size() > 1:
            dist.all_reduce(values)
        return values

    def update_average(self) -> None:
        """Moves the averaged weights towards the weights, and copies the buffers."""
        self._average.update_parameters(self.loss)

    def _lerp(self, average: list[Tensor], weights: list[Tensor], num_averaged: Tensor | int) -> None:
        # The decay rises to `ema_decay`, so that the average soon forgets the initial weights.
        step = int(num_averaged)
        decay = min(self.config.ema_decay, step / (9 + step))
        torch._foreach_lerp_(average, weights, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors of the flow and its average by their names, sharded as they are."""
        flows = {"flow": self.loss.flow, "average": self.average.flow}
        tensors = {f"{kind}.{name}": x for kind, flow in flows.items() for name, x in flow.state_dict().items()}
        return {**tensors, "num_averaged": self._average.n_averaged}

    def averaged_flow(self) -> Flow | None:
        """Returns the averaged flow in the first process, and None in the others; all of them call this.

        If it is sharded, it is the flow that a model folder stores, with the whole weights in the memory of the CPU.
        """
        flow = self.average.flow
        if self.is_sharded:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_model_state_dict(flow.stored, options=options)  # It is empty in the other processes.
            if rank() == 0:
                with torch.device("meta"):
                    whole = type(flow.stored)(flow.stored.config)
                whole.load_state_dict(state, assign=True)
                whole.requires_grad_(False).recommended = flow.recommended
                whole.classes = flow.classes
                return whole
        return flow if rank() == 0 else None


def to_flow(batch: Batch, flow: Flow) -> tuple[Tensor, Tensor | None]:
    """Returns data and context on the flow's device, with unconditional values in place of dropped contexts."""
    device = flow.var.device
    x = batch.x.to(device, non_blocking=True)
    if batch.context is None or not (flow.has_conditions or bool(getattr(flow.config, "context_channels", False))):
        return x, None
    context = batch.context.to(device, non_blocking=True)
    if flow.reads_text or not context.is_floating_point():
        is_dropped = batch.is_dropped.to(device).view(-1, *[1] * (context.ndim - 1))
        context = torch.where(is_dropped, flow.blocks[-1].unconditional(context), context)
    return x, context
