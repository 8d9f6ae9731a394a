"""A step's tensors lie where those of the step before lay."""

import subprocess
import sys
from itertools import product

import pytest

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
