"""Copies of a run folder on machines that work at the same time: each sees what the others did."""

import time

from rayembed.data import copies, mirror, storage
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
