"""A step's tensors lie where those of the step before lay."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from rayembed.training.allocation import ONE_ARENA

FAULTS = """
import resource, sys, threading, torch
from rayembed.training.allocation import give_back_freed_memory, keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    found = torch.ones(40 * 2**20 // 4) + 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    return int(open("/proc/self/statm").read().split()[1])
def steps():
    for _ in range(8):  # blocks of the right size come with time: an aligned tensor needs a little more than it leaves
        faults()
    print(sum(faults() for _ in range(5)))
if sys.argv[2] == "thread":  # as Ray Train does
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
else:
    steps()
held = resident()
give_back_freed_memory()
print(held - resident())
"""


@pytest.fixture(scope="module")
def faults() -> dict[tuple[str, str], tuple[int, int]]:
    """Pages that had to be filled in five steps, and pages that were given back at the end."""
    found = {}
    for way in product(("kept", "as it comes"), ("main", "thread")):
        told = subprocess.run([sys.executable, "-c", FAULTS, *way], capture_output=True, text=True, check=True).stdout
        pages, back = map(int, told.split())
        found[way] = (pages, back)
    return found


@pytest.mark.parametrize("where", ["main", "thread"])
def test_pages_are_asked_for_once(faults: dict[tuple[str, str], tuple[int, int]], where: str) -> None:
    assert faults["as it comes", where][0] > 10_000
    assert faults["kept", where][0] < 1000


@pytest.mark.parametrize("where", ["main", "thread"])
def test_what_was_kept_can_be_given_back(faults: dict[tuple[str, str], tuple[int, int]], where: str) -> None:
    assert faults["kept", where][1] > 10_000


THREADS = """
import threading, torch
from rayembed.training.allocation import keep_freed_memory
keep_freed_memory()
def work():
    return [torch.ones(2**20) for _ in range(20)]
def of(name):
    (line,) = [line for line in open("/proc/self/smaps_rollup") if line.startswith(name)]
    return int(line.split()[1])
for _ in range(5):
    work()
before = of("Rss")
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(of("Rss") - before, of("AnonHugePages"))
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def in_a_thread(variables: dict[str, str]) -> tuple[int, int]:
    """KiB that a thread asks of the system for the work that the main thread has just done, and KiB in huge pages."""
    others = {name: value for name, value in os.environ.items() if name not in ONE_ARENA}
    command = [sys.executable, "-c", THREADS]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=others | variables).stdout
    asked, huge = map(int, told.split())
    return asked, huge


def test_threads_share_what_is_free_and_it_lies_in_huge_pages() -> None:
    asked, huge = in_a_thread(ONE_ARENA)
    assert asked < 2**14
    assert (huge > 2**16) == ("[never]" not in HUGE_PAGES.read_text())
    assert in_a_thread({})[0] > 2**16, "else nothing is shown"
