"""A step's tensors lie where those of the step before lay."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from rayembed.training.allocation import give_back_freed_memory, keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    found = torch.ones(40 * 2**20 // 4) + 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    return int(open("/proc/self/statm").read().split()[1])
for _ in range(8):  # blocks of the right size come with time: an aligned tensor needs a little more than it leaves
    faults()
print(sum(faults() for _ in range(5)))
held = resident()
give_back_freed_memory()
print(held - resident())
"""


@pytest.fixture(scope="module")
def faults() -> dict[str, tuple[int, int]]:
    """Pages that had to be filled in five steps, and pages that were given back at the end."""
    found = {}
    for way in ("kept", "as it comes"):
        told = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True).stdout
        pages, back = map(int, told.split())
        found[way] = (pages, back)
    return found


def test_pages_are_asked_for_once(faults: dict[str, tuple[int, int]]) -> None:
    assert faults["as it comes"][0] > 10_000
    assert faults["kept"][0] < 1000


def test_what_was_kept_can_be_given_back(faults: dict[str, tuple[int, int]]) -> None:
    assert faults["kept"][1] > 10_000
