"""Copies of a run folder on machines that work at the same time: each sees what the others did."""

import time
from pathlib import Path
from typing import Any

import pytest

from rayembed.data import copies, mirror, storage
from rayembed.data.object_store import Found
from rayembed.data.store import PASSAGES, StoreWriter
from tests.data import machines as made
from tests.data.machines import URI, Machines


def test_what_another_machine_went_on_writing_is_not_replaced_when_a_folder_is_published(machines: Machines) -> None:
    root = machines.use("first")
    storage.write_atomic(root / "train.partial" / "job.json", b"{}")
    storage.write_atomic(root / "train.partial" / "metrics.jsonl", b"1\n")
    root = machines.use("driver")
    (root / "train.partial" / "own.txt").write_text("own")
    with machines.away("worker"):
        path = copies.local(URI) / "train.partial" / "metrics.jsonl"
        mirror.here(path).write_text("1\n2\n")
        mirror.send(path)
    storage.publish_folder(root / "train")
    mirror.send_folder(root)
    assert machines.there()["train/metrics.jsonl"] == "1\n2\n"
    assert machines.there()["train/own.txt"] == "own"
    assert mirror.here(root / "train" / "metrics.jsonl").read_text() == "1\n2\n"


def test_a_folder_of_a_copy_is_brought_up_to_date_and_what_is_beside_it_is_left_alone(machines: Machines) -> None:
    """Trials of a sweep: each has a folder, all have the cache, and they run at the same time."""
    machines.use("a")
    trials = copies.local(URI) / "trials"
    for name in ("one", "other"):
        storage.write_atomic(trials / name / "train.partial" / "job.json", b"{}")
        (trials / name / "train.partial" / "metrics.jsonl").write_text("not sent")
    cache = trials.parent / "cache"
    storage.write_atomic(cache / "tokens" / "gone.json", b"{}")
    mirror.remove(machines.store / "cache" / "tokens")
    (cache / "rows.partial").mkdir()
    (cache / "begun").mkdir()
    with machines.away("b"):
        mirror.folder_here(copies.local(URI) / "trials")
        storage.publish_folder(copies.local(URI) / "trials" / "one" / "train")
    time.sleep(0.15)
    for folder in (trials / "one", cache):
        mirror.refresh(folder)
    assert sorted(path.name for path in (trials / "one").rglob("*")) == ["job.json", "train"]
    assert (trials / "other" / "train.partial" / "metrics.jsonl").read_text() == "not sent"
    assert sorted(path.name for path in cache.iterdir()) == ["begun", "rows.partial"], "others are about to fill them"
    with machines.away("c"):
        mirror.refresh(copies.local(URI) / "trials" / "one")
        assert [path.name for path in copies.local(URI).rglob("*.json")] == ["job.json"], "of this trial alone"


def test_nothing_is_taken_for_known_after_a_copy_was_brought_up_to_date(machines: Machines) -> None:
    machines.use("a")
    root = copies.local(URI)
    storage.write_atomic(root / "large.bin", b"first")
    with machines.away("b"):
        storage.write_atomic(copies.local(URI) / "large.bin", b"second")
    mirror.refresh(root)
    assert (root / "large.bin").read_bytes() == b"first", "too young to be removed"
    assert mirror.here(root / "large.bin").read_bytes() == b"second"


def test_a_folder_that_another_machine_removed_is_marked_as_unfinished_again(machines: Machines) -> None:
    machines.use("a")
    root = copies.local(URI)
    for name in ("first", "second"):
        storage.write_atomic(root / "rows.partial" / f"{name}.json", b"{}")
        with machines.away("b"):
            mirror.remove(copies.local(URI) / "rows.partial")
        assert machines.there() == {}
        mirror.refresh(root)
    storage.write_atomic(root / "rows.partial" / "third.json", b"{}")
    assert sorted(machines.there()) == ["rows/_PARTIAL", "rows/third.json"]


def test_a_store_that_is_published_while_another_process_brings_the_cache_up_to_date_stays_whole(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = machines.use("a")
    writer = StoreWriter(root / "cache" / "rows", PASSAGES, 2)
    for row in range(5):
        writer.add({"id": str(row), "text": "t"})
    storage.write_atomic(writer.working / "report.json", b"{}")
    time.sleep(0.3)
    own, driver = mirror.local_names, copies._MIRRORS

    def publish_after_the_listing(*told: Any) -> dict[Path, Found]:  # noqa: ANN401
        found = own(*told)
        trial = copies._MIRRORS
        monkeypatch.setattr(mirror, "local_names", own)
        monkeypatch.setattr(copies, "_MIRRORS", driver)
        writer.finish()
        monkeypatch.setattr(copies, "_MIRRORS", trial)
        return found

    with machines.away("a"):
        cache = copies.local(URI) / "cache"
        monkeypatch.setattr(mirror, "local_names", publish_after_the_listing)
        mirror.refresh(cache)
    monkeypatch.setattr(copies, "_MIRRORS", driver)
    assert {"report.json", "store.json", "part-00000.arrow"} <= {path.name for path in (cache / "rows").iterdir()}


@pytest.mark.parametrize("name", ["checkpoints", "done"])
def test_a_run_folder_may_be_named_as_folders_that_are_not_looked_at(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(made, "URI", f"s3://bucket/{name}")
    root = machines.use("a")
    storage.write_atomic(root / "mine.partial" / "job.json", b"{}")
    assert (machines.use("b") / "mine.partial" / "job.json").exists()
