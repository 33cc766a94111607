"""What the environment of a launcher says: refusals in one line, and which restarts belong together."""

import fcntl
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import selfsup_xbn
from selfsup_xbn.cli import main
from selfsup_xbn.errors import UserError
from selfsup_xbn.runs.lock import FolderLock
from selfsup_xbn.utils.launch import check_launch, launch_id
from tests.command_line import SMALL, refused

GROUP = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Remove what a launcher of this test may have set."""
    for name in (*GROUP, "LOCAL_RANK", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"SLURM_NTASKS": "4"}, ["SLURM_NTASKS is 4", "srun --ntasks-per-node 1 torchrun"]),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, ["OMPI_COMM_WORLD_SIZE is 3", "torchrun --nproc-per-node 3"]),
        ({"PMI_SIZE": "2"}, ["PMI_SIZE is 2", "torchrun --nproc-per-node 2"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE", "'two'"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE", "at least 1", "'0'"]),
        ({"RANK": "-1"}, ["RANK", "'-1'"]),
        (GROUP | {"RANK": ""}, ["RANK is not set"]),
        (GROUP | {"RANK": "2"}, ["RANK", "less than WORLD_SIZE, 2"]),
        (GROUP | {"MASTER_PORT": ""}, ["MASTER_PORT is not set"]),
        (GROUP | {"MASTER_PORT": "70000"}, ["MASTER_PORT", "70000"]),
        (GROUP | {"MASTER_ADDR": ""}, ["MASTER_ADDR is not set"]),
    ],
)
def test_bad_launch_is_refused_in_one_line(tmp_path, capsys, monkeypatch, variables, parts):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main([*SMALL, "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(part in message for part in parts)
    assert not (tmp_path / "run").exists()


def test_one_task_and_torchrun_within_srun_are_accepted(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    check_launch()
    for name, value in (GROUP | {"SLURM_NTASKS": "8"}).items():
        monkeypatch.setenv(name, value)
    check_launch()


def test_port_in_use_is_named(tmp_path, capsys, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        for name, value in (GROUP | {"MASTER_PORT": str(other.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        message = refused(capsys, [*SMALL, "--timeout", "5", "--out", str(tmp_path / "run")])
    assert f"MASTER_PORT: expected a free port, but another program uses {os.environ['MASTER_PORT']}" in message


def test_error_of_another_process_before_the_group_is_printed(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert main(["pretrain", "--bach-size", "3"]) == 2
    assert capsys.readouterr().err.startswith("process 3: error: unknown option '--bach-size'")


def test_restarts_share_a_launch_and_others_do_not(monkeypatch):
    def launch(file, machines="1"):
        values = {"TORCHELASTIC_ERROR_FILE": file, "GROUP_WORLD_SIZE": machines, "TORCHELASTIC_RUN_ID": "7"}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return launch_id()

    assert launch("/tmp/a/attempt_0/1/error.json") == launch("/tmp/a/attempt_2/0/error.json") != ""
    assert launch("/tmp/a/attempt_0/1/error.json") != launch("/tmp/b/attempt_0/1/error.json")
    assert launch("/tmp/a/attempt_0/1/error.json", "2") == launch("/tmp/b/attempt_1/0/error.json", "2") == "7"


def test_second_run_on_a_folder_is_refused(finished_run, capsys):
    descriptor = os.open(finished_run, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for option in ("--resume", "--overwrite"):
        assert "another process is writing to" in refused(capsys, [*SMALL, option, "--out", str(finished_run)])
    os.close(descriptor)
    assert main([*SMALL, "--resume", "--out", str(finished_run)]) == 0


def test_forked_worker_does_not_keep_the_lock(tmp_path):
    lock = FolderLock(tmp_path)
    assert lock.acquire()
    assert not lock.acquire()  # it has it
    with pytest.raises(UserError, match="another process is writing"):
        FolderLock(tmp_path).acquire()
    (started, start), (end, finish) = os.pipe(), os.pipe()
    if not (worker := os.fork()):
        os.write(start, b".")
        os.read(end, 1)
        os._exit(0)
    os.read(started, 1)
    lock.release()  # as the end of the process does
    try:
        assert FolderLock(tmp_path).acquire()
    finally:
        os.write(finish, b".")
        os.waitpid(worker, 0)


@pytest.mark.slow
def test_the_two_lines_to_read_under_torchrun(tmp_path):
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "selfsup_xbn", "pretrain"]
    env = os.environ | {"PYTHONPATH": str(Path(selfsup_xbn.__file__).parents[1])}
    missing = tmp_path / "photos"
    ended = subprocess.run([*program, "--data", f"folder:{missing}"], env=env, capture_output=True, text=True)
    assert ended.returncode == 1
    program, report = ended.stderr.split("Traceback", 1)
    assert re.search(rf"^(process 1: )?error: --data folder:{missing}: {missing} does not exist$", program, re.M)
    assert re.search(r"^  exitcode  : 2 ", report.split("\nRoot Cause", 1)[1], re.M)
