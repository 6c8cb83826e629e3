"""Processes: what they share, how they end together, and the rank of each; parts."""

from __future__ import annotations

import os
import socket
from pathlib import Path
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
RAISE = "if rank == {}: raise jf.CheckpointError('no room')"
KILL = "if rank == {}: os.kill(os.getpid(), signal.SIGKILL)"
WAITS = {"gather": "p.gather(1)", "sleep": "time.sleep(60)", "claim": "[time.sleep(0.1) for _ in p.claim(range(999))]"}


def program(*lines: str) -> list[str]:
    """A program that runs lines with the processes as `p`, and prints the error that ends it."""
    body = "".join(f"        {line}\n" for line in lines)
    start = "import os, signal, time\nimport jacobiflow as jf\ntry:\n    with jf.processes() as p:\n"
    return [
        "python",
        f"{start}{body}except (jf.InputError, KeyboardInterrupt) as error:\n    print(type(error).__name__, error)",
    ]


# ----------------------------------------------------------------------------------------------------------- together

SHARED = program(
    "print(p.rank, p.count, p.run_on_rank_zero(lambda: [rank, 7]), p.gather(rank))",
    "claims = p.gather(list(p.claim('abcdefgh')) + list(p.claim([])) + list(p.claim(range(5))))",
    "print(sorted(map(str, sum(claims, []))), list(p.map(lambda x: x * x, [3, 1, 2])))",
)
FAILURES = [
    Job(program(end.format(rank), WAITS[wait]), 3, name=f"{name}-{rank}-{wait}")
    for name, end in (("raise", RAISE), ("kill", KILL))
    for rank, wait in ((0, "gather"), (1, "sleep"), (2, "claim"), (0, "claim"))
]
ROUNDS = [
    [Job(SHARED, 3, name=launcher, launcher=launcher) for launcher in ("torchrun", "srun")],
    [
        Job(program("p.run_on_rank_zero(lambda: jf.SampleFolder.open('no-room'))"), name="first raises"),
        Job(program("if rank == 1: raise KeyboardInterrupt", WAITS["sleep"]), 3, name="interrupted"),
    ],
    FAILURES[:4], FAILURES[4:],
]  # fmt: skip


@pytest.fixture(scope="module", params=[5, pytest.param(1, marks=pytest.mark.slow)])
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ended]]:
    """How the processes of each job ended."""
    rounds = run_jobs(ROUNDS, tmp_path_factory.mktemp("jobs"), request.param)
    return {name: ranks for jobs in rounds for name, ranks in jobs.items()}


@FORKS
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_three_processes_exchange_values_and_share_units(launcher: str, ended: dict[str, list[Ended]]) -> None:
    shared = f"{sorted([*'abcdefgh', *'01234'])} [9, 1, 4]\n"
    for rank, each in enumerate(ended[launcher]):
        assert (each.code, each.err) == (0, "")
        assert each.out == f"{rank} 3 [0, 7] [0, 1, 2]\n{shared}"


@FORKS
@pytest.mark.parametrize("name", [job.name for job in FAILURES])
def test_an_error_or_a_kill_of_one_ends_all_with_its_message(name: str, ended: dict[str, list[Ended]]) -> None:
    """Whatever the others do. The first that reports an error prints it; the others know that it does."""
    kind, number, _ = name.split("-")
    failed, others = ended[name][int(number)], [each for i, each in enumerate(ended[name]) if i != int(number)]
    # Without the store or a common call, the others notice a kill by signs of life that no longer come.
    limit = 25 if name in ("kill-1-sleep", "kill-2-claim") else 10
    assert all(each.seconds - failed.seconds < limit for each in others)
    if kind == "raise":
        assert (failed.code, failed.out) == (0, "CheckpointError no room\n")
        assert {each.out for each in others} == {"ProcessFailed no room\n"}
        assert all(each.seconds > failed.seconds for each in others), "a launcher kills all once one has ended"
    else:
        assert failed.code == -9
        for each in others:
            assert each.out.startswith("ProcessFailed ") and "ended without a message, or hangs" in each.out


@FORKS
def test_an_error_on_the_first_process_while_others_wait_for_it(ended: dict[str, list[Ended]]) -> None:
    first, second = ended["first raises"]
    assert first.out.startswith("SampleFolderError no-room: no such folder")
    assert second.out == first.out.replace("SampleFolderError", "ProcessFailed")
    assert second.seconds > first.seconds


@FORKS
def test_an_interrupt_of_one_ends_all_as_interrupted(ended: dict[str, list[Ended]]) -> None:
    """The first process, which prints what is kept, ends before the others, which a launcher then kills."""
    first, *others = ended["interrupted"]
    assert [each.out for each in ended["interrupted"]] == ["KeyboardInterrupt \n"] * 3
    assert all(each.seconds > first.seconds for each in others)


# -------------------------------------------------------------------------------------------------------------- alone


@pytest.mark.parametrize(("num_gpus", "own"), [(4, 1), (1, 0)])
def test_a_process_alone_and_its_devices(num_gpus: int, own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Mock()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    with jf.processes() as alone:
        assert (alone, alone.run_on_rank_zero(lambda: 7), alone.gather(3)) == (Processes(0, 1, 0), 7, [3])
        assert list(alone.claim("abc")) == ["a", "b", "c"] and list(alone.map(str, [1, 2])) == ["1", "2"]
    assert not torch.distributed.is_initialized()
    assert [alone.device(name) for name in ("cpu", "cuda", "cuda:3")] == ["cpu", "cuda", "cuda:3"]
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in {"TORCHELASTIC_RUN_ID": "test", **variables}.items():
        monkeypatch.setenv(name, value)
    with jf.processes() as one:
        assert one.device("cpu") == "cpu"
    sixth = Processes(rank=5, count=8, local_rank=1)
    assert [sixth.device(name) for name in ("cpu", "cuda:3")] == ["cpu", "cuda:3"]
    chosen.assert_not_called()
    assert sixth.device("cuda") == f"cuda:{own}"
    chosen.assert_called_once_with(own)


def test_a_file_that_a_process_does_not_see(tmp_path: Path) -> None:
    with pytest.raises(jf.InputError, match=r"^.*: process 3 does not see it; give one on a shared disk$"):
        Processes(3, 8).check_sees(tmp_path / "manifest.json")


# ------------------------------------------------------------------------------------------------------------- launch

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
    assert find_launch({"RANK": "5", "WORLD_SIZE": "8"}) is None  # left by another program
    assert find_launch(TORCHRUN) == Launch(5, 8, 1, "node1", 29500, False, "0")
    first = {**TORCHRUN, "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert find_launch(first) == Launch(0, 8, 1, "node1", 29500, True, "2")
    launch = find_launch(SRUN)
    assert launch == Launch(5, 8, 1, "gpu03", launch.port if launch else 0, False)
    assert launch is not None and 20_000 <= launch.port < 30_000
    other = find_launch({**SRUN, "SLURM_STEP_ID": "4", "SLURM_PROCID": "0"})
    assert other is not None and other.port != launch.port and other.hosts_store
    given_port = find_launch({**SRUN, "MASTER_ADDR": "me", "MASTER_PORT": "77"})
    assert given_port is not None and (given_port.host, given_port.port) == ("me", 77)
    assert find_launch({**SRUN, **TORCHRUN, "SLURM_STEP_NUM_TASKS": "2"}) == find_launch(TORCHRUN)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**SRUN, **TORCHRUN}, "srun started 8 tasks, and torchrun connects 2 of them; give torchrun --nnodes 8, or"),
        ({**TORCHRUN, "RANK": "one"}, "a variable of torchrun or srun is not a number"),
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}, "MASTER_PORT is not set; start"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"}, "SLURM_LOCALID is not set; start"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "names no machine; set MASTER_ADDR to that of process 0"),
        (
            {**SRUN, "SLURM_STEP_NUM_TASKS": "0"},
            "rank 5 of 0 processes, by RANK and .* start them by torchrun",
        ),
        ({**TORCHRUN, "WORLD_SIZE": "-2"}, "rank 5 of -2 processes"),
        ({**SRUN, "SLURM_PROCID": "8"}, "rank 8 of 8 processes"),
        ({**TORCHRUN, "RANK": "-1"}, "rank -1 of 8 processes"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT=99999: give a port from 1 to 65535"),
    ],
    ids=range(10),
)
def test_variables_that_contradict_or_lack_are_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(jf.InputError, match=message):
        find_launch(variables)


def test_a_name_of_no_machine_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=socket.gaierror(-2, "Name or service not known")))
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    message = r"process 5 of 8 cannot reach the others by node1:29500 \(.*not known\); check .*MASTER_ADDR"
    with pytest.raises(jf.InputError, match=message), jf.processes():
        pass


NAME = st.from_regex(r"[a-z][a-z-]{0,8}", fullmatch=True)
RANGE = st.tuples(st.integers(0, 99), st.integers(1, 50), st.integers(1, 4))


@given(NAME, st.lists(RANGE, min_size=0, max_size=4), NAME, st.lists(NAME, max_size=3))
def test_the_first_host_of_a_node_list(
    name: str, ranges: list[tuple[int, int, int]], suffix: str, more: list[str]
) -> None:
    """SLURM writes numbers of one width in brackets, alone or as a range."""
    texts = [f"{start:0{width}}" + f"-{start + length:0{width}}" * (length > 1) for start, length, width in ranges]
    first = f"{ranges[0][0]:0{ranges[0][2]}}" if ranges else ""
    nodes = name + (f"[{','.join(texts)}]{suffix}" if ranges else "")
    assert first_host(",".join([nodes, *more])) == (f"{name}{first}{suffix}" if ranges else name)


# -------------------------------------------------------------------------------------------------------------- parts


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
