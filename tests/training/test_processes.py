"""Several processes train as one does: the same losses and weights, replicated or sharded, also after a death."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

import jacobiflow as jf
from jacobiflow.training import read_metrics
from tests.helpers.process_groups import Job, run_jobs
from tests.helpers.training_runs import last_step

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

PROGRAM = """
import os, signal, torch
import jacobiflow as jf
from jacobiflow.data import ImageDataset
from jacobiflow.training import TrainConfig, train

class Digits(ImageDataset):
    num_read = 0

    def __getitem__(self, index):
        Digits.num_read += 1
        if rank == {victim} and Digits.num_read == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)

def stop(metrics):
    if metrics.step == {stop}:
        signal.raise_signal(signal.SIGTERM)

SIZES = {{"num_blocks": 2, "layers_per_block": 2, "num_classes": 10, "nvp": False, "head_dim": 8, "noise_std": 0.1}}
images = torch.randint(256, (300, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
labels = torch.arange(300) % 10
with jf.processes() as processes:
    torch.manual_seed(rank)  # The weights of the first process count.
    flow = jf.TarFlow(jf.TarFlowConfig(1, 8, 4, 16, **SIZES))
    config = TrainConfig(
        6, batch_size=12, warmup=4, bf16=False, checkpoint_every=2, shard={shard}, recompute=True, accumulation=2
    )
    held_out = ImageDataset(images[:31], labels[:31])
    data = Digits(images, labels, tuple("abcdefghij"))
    train(flow, data, config, "{out}", held_out=held_out, on_step=stop, processes=processes)
    local = [getattr(each, "_local_tensor", each).numel() for each in flow.parameters()]
    print(sum(local) / sum(each.numel() for each in flow.parameters()))
"""


def job(out: str, ranks: int, victim: int = -1, stop: int = -1, shard: bool = False) -> Job:
    return Job(["python", PROGRAM.format(out=out, victim=victim, stop=stop, shard=shard)], ranks, None, out, "srun")


JOBS = [  # Each folder is begun by one job, and ended by the other.
    (job("sharded", 2, stop=3, shard=True), job("sharded", 3, shard=True)),
    (job("killed 0", 2, victim=0), job("killed 0", 2)),
]
MORE_JOBS = [
    (job("resumed by 1", 2, stop=3, shard=True), job("resumed by 1", 1)),
    (job("resumed by 3", 2, stop=3), job("resumed by 3", 3, shard=True)),
    (job("killed 1", 2, victim=1), job("killed 1", 2)),
]


class Runs:
    """The folders of runs, and how the processes of their two jobs ended."""

    def __init__(self, folder: Path, jobs: list[tuple[Job, Job]], speed: float) -> None:
        rounds = run_jobs([[job("alone", 1), jobs[0][0]], *([first] for first, _ in jobs[1:])], folder, speed)
        self.folder, self.first = folder, {name: ranks for jobs in rounds for name, ranks in jobs.items()}
        rounds = run_jobs([[last for _, last in jobs]], folder, speed)
        self.last = rounds[0]


@pytest.fixture(
    scope="module", params=[(JOBS, 5), pytest.param((JOBS + MORE_JOBS, 1), marks=pytest.mark.slow)], ids=["two", "all"]
)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), *request.param)


def test_losses_and_weights_are_those_of_one_process(runs: Runs) -> None:
    """But for the biases of keys: attention does not depend on them, so that their gradients are rounding."""
    want, other = read_metrics(runs.folder / "alone"), load_file(runs.folder / "alone" / "model.safetensors")
    for name, ranks in runs.last.items():
        assert [rank.code for rank in ranks] == [0] * len(ranks), ranks
        have = read_metrics(runs.folder / name)
        assert [metrics.loss for metrics in have] == pytest.approx([metrics.loss for metrics in want], abs=1e-5)
        assert last_step(runs.folder / name) == have[-1].step == 6
        assert have[-1].held_out_loss == pytest.approx(want[-1].held_out_loss, abs=1e-5)
        mine = load_file(runs.folder / name / "model.safetensors")
        assert max(float((mine[key] - other[key]).abs().max()) for key in other if "qkv.bias" not in key) < 1e-5
        assert jf.load(runs.folder / name).classes == tuple("abcdefghij")


def test_a_sharded_process_holds_its_share_of_the_parameters(runs: Runs) -> None:
    assert [float(rank.out) for rank in runs.last["sharded"]] == pytest.approx([1 / 3] * 3, abs=0.1)


def test_a_signal_to_one_process_ends_all_after_the_same_step(runs: Runs) -> None:
    for name in {"sharded", "resumed by 1", "resumed by 3"} & runs.first.keys():
        assert all(rank.code == 1 for rank in runs.first[name])
        assert sum("KeyboardInterrupt\n" in rank.err for rank in runs.first[name]) >= 1


def test_a_death_ends_the_others_with_one_message(runs: Runs) -> None:
    for victim in (int(name[-1]) for name in runs.first if name.startswith("killed")):
        killed, other = runs.first[f"killed {victim}"][victim], runs.first[f"killed {victim}"][1 - victim]
        assert (killed.code, other.code) == (-signal.SIGKILL, 1)
        assert other.err.count("jacobiflow.distributed.watch.ProcessFailed: ") == 1
        assert "ended without a message" in other.err
        assert other.seconds - killed.seconds < 30
