"""What all tests share."""

import multiprocessing
import os
import signal
import subprocess
from multiprocessing.process import BaseProcess
from types import SimpleNamespace

import pytest
from hypothesis import settings

from megatron.remoe import ranks

# Machines are shared, and a test is right or wrong however long it takes.
settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; more threads than cores would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job in the background of a shell ignores Ctrl-C, and so would what the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Ranks are forked from a process that has imported torch and Megatron, which takes each of them
# four seconds otherwise. The tests start about two hundred.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.preload"])
ranks.multiprocessing = SimpleNamespace(get_context=lambda method: _server)

# Fixtures that start ranks, whatever module they are of.
_RANKS = {"call", "one_rank", "rank", "ranks"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if _RANKS & set(item.fixturenames):
            item.add_marker("processes")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Let a test, or a fixture that it sets up, start processes only if it is marked as such.

    `make test-fast` leaves out the tests with the mark, and only these.
    """
    if item.get_closest_marker("processes") or os.environ.get("CPULOG"):
        return (yield)

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("this test starts a process; mark it with pytest.mark.processes")

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((subprocess.Popen, "__init__"), (os, "fork"), (BaseProcess, "start")):
            patch.setattr(owner, name, refuse)
        return (yield)
