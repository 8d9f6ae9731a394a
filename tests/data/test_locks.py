"""One process at a time: of those that want to write the same store, or work in the same copy."""

import fcntl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rayembed.data.locks import give_back, holds, take
from rayembed.data.store import PASSAGES, Store, StoreWriter

SLOW_WRITER = """
import sys, time
from pathlib import Path
from rayembed.data.store import PASSAGES, StoreWriter
writer = StoreWriter(Path(sys.argv[1]), PASSAGES, 2)
for row in range(6):
    writer.add({"id": str(row), "text": "t"})
print("begun", flush=True)
time.sleep(1)
for row in range(6, 10):
    writer.add({"id": str(row), "text": "t"})
writer.finish()
"""


def test_a_lock_is_of_one_process_until_it_is_given_back(tmp_path: Path) -> None:
    lock = tmp_path / "folder" / "lock"
    assert take(lock)
    assert take(lock), "this process has it"
    assert holds(lock)
    with lock.open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    give_back(lock)
    give_back(lock)
    assert not holds(lock)
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_it_is_waited_for_as_long_as_was_asked(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        began = time.monotonic()
        assert not take(lock, seconds=0.3)
        assert 0.3 <= time.monotonic() - began < 5
        assert not holds(lock)
        threading.Timer(0.3, lambda: fcntl.flock(other, fcntl.LOCK_UN)).start()
        assert take(lock, seconds=20)
    give_back(lock)


def test_two_commands_that_want_one_store_write_it_one_after_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    other = subprocess.Popen([sys.executable, "-c", SLOW_WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "begun\n"
    writer = StoreWriter(folder, PASSAGES, 2)
    for row in range(10):
        writer.add({"id": str(row), "text": "t"})
    own = writer.finish()
    assert other.wait(30) == 0
    ids = [name for part in Store.open(folder).iter_parts() for name in part.column("id").to_pylist()]
    assert ids == [str(row) for row in range(10)]
    assert own.num_rows == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == [".locks", "rows"]
