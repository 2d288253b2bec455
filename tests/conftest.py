"""What all tests share."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess
from types import SimpleNamespace

import pytest
import torch
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
# four seconds otherwise; the tests start about a hundred.
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
    """Let a test, with the fixtures that it sets up, start Python only if it has the mark.

    `make test-fast` leaves out the tests that are marked as `processes`. On a machine with a GPU
    every test may start processes, because torch compiles its kernels in some.
    """
    if item.get_closest_marker("processes") or torch.cuda.is_available():
        return (yield)

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("this test starts a process; mark it with pytest.mark.processes")

    def open_process(self, command, *args, **options):
        # Libraries ask programs about the machine: matplotlib, for one, fc-list about its fonts.
        if not isinstance(command, str) and command[0] == sys.executable:
            refuse()
        opened(self, command, *args, **options)

    opened = subprocess.Popen.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", open_process)
        patch.setattr(BaseProcess, "start", refuse)
        patch.setattr(os, "fork", refuse)
        return (yield)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser without a window, which logs its console and what it asks for."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no chromium with chromedriver; install them to open reports")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    found.downloads = downloads
    yield found
    found.quit()
