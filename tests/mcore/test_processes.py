"""Nobody outlives the one that started it, and two runs do not share a directory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.remoe import processes
from megatron.remoe.ranks import Ranks

pytestmark = pytest.mark.processes

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="death signals are Linux's")


def start(script: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", "from megatron.remoe import processes\n" + script],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ) | environment,
    )


def test_a_lock_is_held_until_its_process_and_its_children_end(tmp_path):
    path = tmp_path / ".lock"
    script = (
        "import os, time; from pathlib import Path; from megatron.remoe import processes\n"
        f"processes.hold_lock(Path({str(path)!r}), 'it')\n"
        "print('held', flush=True)\n"
        "if os.fork() == 0: time.sleep(1)\n"
        "else: os._exit(0)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    holder.wait()
    message = rf"it is in use by a run \(process {holder.pid} on .* since .*\); wait until it ends"
    with pytest.raises(ValueError, match=message):
        processes.hold_lock(path, "it")
    holder.stdout.read()  # until the child has ended
    os.close(processes.hold_lock(path, "it"))


@LINUX
def test_a_process_ends_with_the_one_that_started_it():
    child = "import time; from megatron.remoe import processes; processes.end_with_parent()\n"
    child += "print('ready', flush=True); time.sleep(60)"
    parent = start(
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()"
    )
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for_the_end_of(pid)


def wait_for_the_end_of(pid: int) -> None:
    end = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < end
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("parent", "code", "out"), [("mine", 0, "here\n"), ("another", 1, "")])
def test_a_process_whose_parent_has_ended_before_it_looked_ends(parent, code, out):
    pid = os.getpid() if parent == "mine" else os.getppid()
    process = start("processes.end_with_parent(); print('here')", **{processes.PARENT: str(pid)})
    assert process.communicate()[0] == out and process.returncode == code


@LINUX
def test_a_forked_process_ends_with_the_one_that_forked_it():
    process = start(
        "import os, time\n"
        "processes.end_children_with_me()\n"
        "pid = os.fork()\n"
        "if pid: print(pid, flush=True)\n"
        "time.sleep(60)"
    )
    pid = int(process.stdout.readline())
    time.sleep(0.2)  # until it has asked for its death signal
    assert is_running(pid)
    process.send_signal(signal.SIGKILL)
    assert process.stdout.read() == ""  # closed by both
    wait_for_the_end_of(pid)


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("raise RuntimeError('boom')", 1, "remoe: error: rank 3: RuntimeError: boom"),
        (
            "\n with processes.mistakes_in_one_line(): raise ValueError('x is 2; use 1')",
            2,
            "remoe: error: x is 2; use 1",
        ),
        ("raise SystemExit(17)", 17, "remoe: error: rank 3 ended with code 17"),
        ("raise SystemExit(0)", 0, "cleaned up"),
        ("pass", 0, "cleaned up"),
    ],
)
def test_a_rank_that_fails_leaves_without_cleaning_up(body, code, line):
    process = start(
        "import atexit; atexit.register(print, 'cleaned up')\n"
        f"with processes.exit_at_once(3): {body}"
    )
    lines = process.communicate()[0].splitlines()
    assert process.returncode == code and lines[-1] == line


@LINUX
def test_whether_a_process_listens_to_a_signal_is_seen():
    assert not processes.catches(2**22 + 1, signal.SIGTERM)  # no such process
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert not processes.catches(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *_: None)
        assert processes.catches(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, previous)


WAITS = """
import signal, time
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
print("ready", flush=True)
while not told: time.sleep(0.05)
time.sleep(0.5)  # A rank that saves; a second signal would arrive now.
print(len(told))
"""


@LINUX
def test_a_rank_is_told_to_stop_once_by_the_signal_of_its_config():
    from megatron.remoe.run.torchrun import Stop

    parent = start(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {WAITS!r}])")
    assert parent.stdout.readline() == "ready\n"
    flags = {"exit_signal_handler": True, "exit_signal": "SIGUSR1"}
    stop = Stop()
    stop.pass_on(parent, flags)  # Nobody has asked for it yet.
    stop.requested.set()
    while parent.poll() is None:
        stop.pass_on(parent, flags)
        time.sleep(0.05)
    assert (parent.returncode, parent.stdout.read()) == (0, "1\n")


def test_a_run_that_would_not_save_is_killed():
    from megatron.remoe.run.torchrun import Stop

    parent = start("import time; time.sleep(60)")
    Stop(requested=True).pass_on(parent, {})
    assert parent.wait(timeout=50) == -signal.SIGKILL


LISTENS = """
import signal, time
from pathlib import Path
ready, told = Path(__file__ + ".ready"), []
ready.with_suffix(".started").touch()
while not ready.exists(): time.sleep(0.05)  # A signal that comes now must not end a rank either.
signal.signal(signal.{name}, lambda *_: told.append(1))
ready.with_suffix(".listens").touch()
while not told: time.sleep(0.05)
"""


@LINUX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_is_left_to_its_ranks(tmp_path, number):
    """As Slurm sends it without B: in --signal, and a shell's `kill %1` to torchrun at least."""
    from megatron.remoe.run import torchrun

    script = tmp_path / "rank.py"
    script.write_text(LISTENS.format(name=number.name))
    command = torchrun.command([], 1)
    run = subprocess.Popen([*command[: command.index("megatron.remoe.pretrain") - 1], str(script)])
    try:
        for answer in ("started", "listens"):
            deadline = time.monotonic() + 60
            while not (tmp_path / f"rank.py.{answer}").exists():
                assert run.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            for pid in (run.pid, *processes.children(run.pid)):
                os.kill(pid, number)
            time.sleep(0.5)
            (tmp_path / "rank.py.ready").touch()
        assert run.wait(timeout=30) == 0
    finally:
        for pid in processes.children(run.pid):
            os.kill(pid, signal.SIGKILL)
        run.kill()
        run.wait()


RANK = """
import os, signal, time
from pathlib import Path
from megatron.remoe import processes
processes.end_with_parent()
processes.end_children_with_me()
signal.signal(signal.SIGTERM, lambda *_: None)  # as Megatron's exit-signal handler does
pid = os.fork()  # a data loader, which inherits that
os.write(1, f"process {{pid or os.getpid()}}\\n".encode())  # in one piece
ready = Path(__file__ + ".ready")  # says that rank 0 is deaf to SIGTERM
if pid and os.environ["RANK"] == "0":
    ready.touch()
with processes.exit_at_once(int(os.environ["RANK"])):
    while True:
        if pid and os.environ["RANK"] == "1" and ready.exists():
            {fault}
        time.sleep(0.1)
"""


@LINUX
def test_ranks_start_again_once_when_one_of_them_ends_at_its_start():
    class Unlucky(Ranks):
        starts = 0

        def _start(self, size: int) -> None:
            super()._start(size)
            Unlucky.starts += 1
            if Unlucky.starts == 1:
                raise EOFError

    with Unlucky(1) as ranks:
        assert ranks.run(abs, -3) == [3]
    assert Unlucky.starts == 2


def test_answers_to_a_call_that_failed_are_not_those_of_the_next():
    with Ranks(2) as ranks:
        with pytest.raises(AssertionError, match="rank 0:\n(.*\n)*ZeroDivisionError"):
            ranks.run(divided_by_rank, 1)
        assert ranks.run(abs, -3) == [3, 3]


def divided_by_rank(number: int) -> float:
    return number / int(os.environ["RANK"])


def test_when_one_rank_raises_or_dies_all_end(tmp_path):
    """torchrun gives the other, which does not hear SIGTERM, 30 seconds."""
    faults = {"raise": "raise RuntimeError('broken')", "die": "os.kill(os.getpid(), 9)"}
    agents = {}
    for name, fault in faults.items():
        script = tmp_path / f"{name}.py"
        script.write_text(RANK.format(fault=fault))
        command = [sys.executable, "-m", "megatron.remoe.agent", "--standalone"]
        agents[name] = subprocess.Popen(
            [*command, "--nproc-per-node=2", str(script)], stdout=subprocess.PIPE, text=True
        )
    for name, agent in agents.items():
        lines = agent.communicate(timeout=90)[0].splitlines()
        assert agent.returncode == 1
        pids = {int(line.split()[1]) for line in lines if line.startswith("process ")}
        assert len(pids) == 2  # of the data loaders, each named by itself and by its rank
        for pid in pids:
            wait_for_the_end_of(pid)
        assert ("remoe: error: rank 1: RuntimeError: broken" in lines) == (name == "raise")
