"""Several processes train as one does: the same losses and weights, replicated or sharded, also after a death."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from jacobiflow.training import read_metrics
from tests.helpers.process_groups import Ended, Job, run_jobs
from tests.helpers.training_runs import last_step

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

PROGRAM = """
import os, signal, torch
import jacobiflow as jf
from jacobiflow.data import digits
from jacobiflow.training import TrainConfig, train

class Digits(torch.utils.data.Dataset):
    data, num_read = digits(), 0

    def __len__(self):
        return 300

    def __getitem__(self, index):
        self.num_read += 1
        if rank == {victim} and self.num_read == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.data[index]

def stop(metrics):
    if metrics.step == {stop}:
        signal.raise_signal(signal.SIGTERM)

SIZES = {{"num_blocks": 2, "layers_per_block": 2, "num_classes": 10, "nvp": False, "head_dim": 8, "noise_std": 0.1}}
with jf.processes() as processes:
    torch.manual_seed(rank)  # The weights of the first process count.
    flow = jf.TarFlow(jf.TarFlowConfig(1, 8, 4, 16, **SIZES))
    config = TrainConfig(
        14, batch_size=12, warmup=4, bf16=False, checkpoint_every=5, shard={shard}, recompute=True, accumulation=2
    )
    train(flow, Digits(), config, "{out}", held_out=digits(), on_step=stop, processes=processes)
    local = [getattr(each, "_local_tensor", each).numel() for each in flow.parameters()]
    print(sum(local) / sum(each.numel() for each in flow.parameters()))
"""


def job(out: str, ranks: int, victim: int = -1, stop: int = -1, shard: bool = False) -> list[Job]:
    return [Job(["python", PROGRAM.format(out=out, victim=victim, stop=stop, shard=shard)], ranks, None, out, "srun")]


ROUNDS = [
    job("alone", 1), job("sharded", 2, shard=True),
    job("resumed by 1", 2, stop=7), job("resumed by 1", 1), job("resumed by 3", 2, stop=7), job("resumed by 3", 3),
    job("killed 0", 2, victim=0), job("killed 0", 2), job("killed 1", 2, victim=1), job("killed 1", 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ended(folder: Path) -> dict[str, list[list[Ended]]]:
    """How the processes of each run ended, round after round."""
    found: dict[str, list[list[Ended]]] = {}
    for jobs in run_jobs(ROUNDS, folder):
        for name, ranks in jobs.items():
            found.setdefault(name, []).append(ranks)
    return found


@pytest.mark.parametrize("name", ["sharded", "resumed by 1", "resumed by 3", "killed 0", "killed 1"])
def test_losses_and_weights_are_those_of_one_process(
    name: str, folder: Path, ended: dict[str, list[list[Ended]]]
) -> None:
    """But for the biases of keys: attention does not depend on them, so that their gradients are rounding."""
    assert [rank.code for rank in ended[name][-1]] == [0] * len(ended[name][-1]), ended[name][-1]
    have, want = read_metrics(folder / name), read_metrics(folder / "alone")
    assert [metrics.loss for metrics in have] == pytest.approx([metrics.loss for metrics in want], abs=1e-5)
    assert last_step(folder / name) == have[-1].step == 14
    assert have[-1].held_out_loss == pytest.approx(want[-1].held_out_loss, abs=1e-5)
    mine, other = (load_file(folder / each / "model.safetensors") for each in (name, "alone"))
    assert max(float((mine[key] - other[key]).abs().max()) for key in other if "qkv.bias" not in key) < 1e-5


def test_a_sharded_process_holds_half_of_the_parameters(ended: dict[str, list[list[Ended]]]) -> None:
    assert [float(rank.out) for rank in ended["sharded"][0]] == pytest.approx([0.5, 0.5], abs=0.02)


def test_a_signal_to_one_process_ends_all_after_the_same_step(ended: dict[str, list[list[Ended]]]) -> None:
    for name in ("resumed by 1", "resumed by 3"):
        assert all(rank.code == 1 for rank in ended[name][0])
        assert sum("KeyboardInterrupt\n" in rank.err for rank in ended[name][0]) >= 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_ends_the_others_with_one_message(victim: int, ended: dict[str, list[list[Ended]]]) -> None:
    killed, other = ended[f"killed {victim}"][0][victim], ended[f"killed {victim}"][0][1 - victim]
    assert (killed.code, other.code) == (-signal.SIGKILL, 1)
    assert (
        other.err.count("jacobiflow.distributed.watch.ProcessFailed: ") == 1 and "ended without a message" in other.err
    )
    assert other.seconds - killed.seconds < 30
