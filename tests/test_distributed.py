"""Processes: what they share, how they end together, and the rank of each; parts."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import jacobiflow as jf
from jacobiflow.distributed import Part, Processes
from jacobiflow.distributed.launch import Launch, find_launch, first_host
from tests.helpers.process_groups import Ended, Job, run_jobs

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
RAISE = "raise jf.CheckpointError('no room')"
WAITS = {"gather": "p.gather(1)", "sleep": "time.sleep(60)", "claim": "[time.sleep(0.1) for _ in p.claim(range(999))]"}


def job(name: str, *lines: str, launcher: str = "torchrun", blocks: int = 1) -> Job:
    """Three processes that run lines with the processes as `p`, and print the error that ends them."""
    body = "".join(f"            {line}\n" for line in lines)
    start = "import os, signal, time\nimport jacobiflow as jf\ntry:\n"
    start += f"    for _ in range({blocks}):\n        with jf.processes() as p:\n"
    end = "except (jf.InputError, KeyboardInterrupt) as error:\n    print(type(error).__name__, error)"
    return Job(["python", f"{start}{body}{end}"], 3, name=name, launcher=launcher)


CALLS = (
    "print(p.rank, p.count, p.run_on_rank_zero(lambda: [rank, 7]), p.gather(rank))",
    "claims = p.gather(list(p.claim('abcdefgh')) + list(p.claim([])) + list(p.claim(range(5))))",
    "print(sorted(map(str, sum(claims, []))), list(p.map(lambda x: x * x, [3, 1, 2])))",
)
ENDS = {"raise": RAISE, "kill": "os.kill(os.getpid(), signal.SIGKILL)", "interrupt": "raise KeyboardInterrupt"}
FAILURES = ["interrupt-1-sleep"]
FAILURES += [f"{end}-{wait}" for end in ("raise", "kill") for wait in ("0-gather", "1-sleep", "2-claim", "0-claim")]


@pytest.fixture(scope="module", params=[5, pytest.param(1, marks=pytest.mark.slow)])
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ended]]:
    """How the processes of each job ended."""
    first = f"p.run_on_rank_zero(lambda: exec({RAISE!r}))"
    jobs = [*(job(name, *CALLS, launcher=name, blocks=2) for name in ("torchrun", "srun")), job("raise-0-first", first)]
    for name in FAILURES:
        end, rank, wait = name.split("-")
        jobs.append(job(name, "p.gather(0)", f"if rank == {rank}: {ENDS[end]}", WAITS[wait]))
    done = run_jobs([jobs[i : i + 4] for i in (0, 4, 8)], tmp_path_factory.mktemp("jobs"), request.param)
    return {name: ranks for jobs in done for name, ranks in jobs.items()}


@FORKS
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_three_processes_exchange_values_and_share_units(launcher: str, ended: dict[str, list[Ended]]) -> None:
    shared = f"{sorted([*'abcdefgh', *'01234'])} [9, 1, 4]\n"
    for rank, each in enumerate(ended[launcher]):
        assert (each.code, each.err) == (0, "")
        assert each.out == 2 * f"{rank} 3 [0, 7] [0, 1, 2]\n{shared}"


@FORKS
@pytest.mark.parametrize("name", [*FAILURES, "raise-0-first"])
def test_an_end_of_one_ends_all_with_its_message(name: str, ended: dict[str, list[Ended]]) -> None:
    """Whatever the others do. One prints the message and ends first; a launcher then kills the others."""
    end, rank, _ = name.split("-")
    others = list(ended[name])
    failed = others.pop(int(rank))
    # Without the store or a common call, the others notice a kill by signs of life that no longer come.
    assert all(e.seconds - failed.seconds < (25 if name in ("kill-1-sleep", "kill-2-claim") else 10) for e in others)
    if end == "interrupt":  # The first process prints what is kept.
        assert [each.out for each in ended[name]] == ["KeyboardInterrupt \n"] * 3
        assert min(ended[name], key=lambda each: each.seconds) is ended[name][0]
    elif end == "raise":
        assert (failed.code, failed.out) == (0, "CheckpointError no room\n")
        assert {each.out for each in others} == {"ProcessFailed no room\n"}
        assert all(each.seconds > failed.seconds for each in others)
    else:
        assert failed.code == -9
        for each in others:
            assert each.out.startswith("ProcessFailed ") and "ended without a message, or hangs" in each.out


@pytest.mark.parametrize(("num_gpus", "own"), [(4, 1), (1, 0)])
def test_a_process_alone_and_its_devices(
    num_gpus: int, own: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Mock()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    with jf.processes() as alone:
        assert (alone, alone.run_on_rank_zero(lambda: 7), alone.gather(3)) == (Processes(0, 1, 0), 7, [3])
        assert list(alone.claim("abc")) == ["a", "b", "c"] and list(alone.map(str, [1, 2])) == ["1", "2"]
    assert not torch.distributed.is_initialized()
    assert [alone.device(name) for name in ("cpu", "cuda", "cuda:3")] == ["cpu", "cuda", "cuda:3"]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    monkeypatch.setattr(os, "environ", {"TORCHELASTIC_RUN_ID": "test", **ranks})
    with jf.processes() as one:
        assert one.device("cpu") == "cpu"
    sixth = Processes(rank=5, count=8, local_rank=1)
    with pytest.raises(jf.InputError, match=r"^.*: process 5 does not see it; give one on a shared disk$"):
        sixth.check_sees(tmp_path / "manifest.json")
    assert [sixth.device(name) for name in ("cpu", "cuda:3")] == ["cpu", "cuda:3"]
    chosen.assert_not_called()
    assert sixth.device("cuda") == f"cuda:{own}"
    chosen.assert_called_once_with(own)


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
SRUN = {
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "gpu[03-07,9],login1",
}  # fmt: skip


def test_the_rank_of_a_process_by_torchrun_and_by_srun() -> None:
    assert find_launch({}) is find_launch({"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert find_launch({"RANK": "5"}) is None  # left by another program
    assert find_launch(TORCHRUN) == Launch(5, 8, 1, "node1", 29500, False, "0")
    first = {**TORCHRUN, "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert find_launch(first) == Launch(0, 8, 1, "node1", 29500, True, "2")
    find: Any = find_launch
    port = find(SRUN).port
    assert find(SRUN) == Launch(5, 8, 1, "gpu03", port, False) and 20_000 <= port < 30_000
    other = find({**SRUN, "SLURM_STEP_ID": "4", "SLURM_PROCID": "0"})
    assert other.port != port and other.hosts_store
    assert find({**SRUN, "MASTER_ADDR": "me", "MASTER_PORT": "77"}) == Launch(5, 8, 1, "me", 77, False)
    assert find_launch({**SRUN, **TORCHRUN, "SLURM_STEP_NUM_TASKS": "2"}) == find_launch(TORCHRUN)
    # SLURM writes numbers of one width in brackets, alone or as a range.
    nodes = {"node1": "node1", "a-b,c": "a-b", "gpu[03-07,9],login": "gpu03", "n[9]": "n9", "r-[10,7-8]-b,x": "r-10-b"}
    assert [first_host(each) for each in nodes] == [*nodes.values()]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**SRUN, **TORCHRUN}, "srun started 8 tasks, and torchrun connects 2 of them; give torchrun --nnodes 8, or"),
        ({**TORCHRUN, "RANK": "one"}, "a variable of torchrun or srun is not a number"),
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}, "MASTER_PORT is not set; start"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"}, "SLURM_LOCALID is not set; start"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "names no machine; set MASTER_ADDR to that of process 0"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "0"}, "rank 5 of 0 processes, by RANK .* start the processes by"),
        ({**TORCHRUN, "WORLD_SIZE": "-2"}, "rank 5 of -2 processes"),
        ({**SRUN, "SLURM_PROCID": "8"}, "rank 8 of 8 processes"),
        ({**TORCHRUN, "RANK": "-1"}, "rank -1 of 8 processes"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT=99999: give a port from 1 to 65535"),
    ],
)
def test_variables_that_contradict_or_lack_are_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(jf.InputError, match=message):
        find_launch(variables)


def test_a_name_of_no_machine_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=socket.gaierror(-2, "Name or service not known")))
    monkeypatch.setattr(os, "environ", TORCHRUN)
    message = r"process 5 of 8 cannot reach the others by node1:29500 \(.*not known\); check .*MASTER_ADDR"
    with pytest.raises(jf.InputError, match=message), jf.processes():
        pass


@given(st.integers(1, 12), st.integers(0, 40))
def test_parts_share_all_units_once(count: int, num: int) -> None:
    shares = [list(Part(i + 1, count).share(range(num))) for i in range(count)]
    assert sorted(unit for share in shares for unit in share) == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [Part.parse(str(Part(i + 1, count))) for i in range(count)] == [Part(i + 1, count) for i in range(count)]


@pytest.mark.parametrize("text", ["9/8", "0/3", "x", "1/0", "-1/2", "1/2/3", "", "1 / 2", "9999999/9999999"])
def test_no_part(text: str) -> None:
    with pytest.raises(jf.InputError, match=r"^part=.*: give I/N.*1/8 for the first of eight"):
        Part.parse(text)
