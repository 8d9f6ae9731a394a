"""Copies of a run folder: what the store has is the truth, a file is there before it has its name here, never half."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from rayembed.data import copies, mirror, storage
from rayembed.data.object_store import ObjectStore
from rayembed.data.store import PASSAGES, Store, StoreWriter
from tests.data.machines import URI, Machines


def noted(patch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Keys that a method of the store is called with; a list that grows."""
    found, method = list[str](), getattr(ObjectStore, name)

    def noting(own: ObjectStore, key: str, path: Path) -> object:
        found.append(key)
        return method(own, key, path)

    patch.setattr(ObjectStore, name, noting)
    return found


def older(path: Path) -> None:
    """Gives a file in the store another time than it had."""
    time_then = path.stat().st_mtime_ns - 5 * 10**9
    os.utime(path, ns=(time_then, time_then))


def test_plain_paths_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_MIRRORS", {})
    path = tmp_path / "a" / "b"
    storage.write_atomic(path, b"1")
    assert mirror.here(path) == path
    assert (copies.shown(path), copies.uri_of(str(path)), copies.place_of(path)) == (str(path), str(path), None)
    assert mirror.names(tmp_path) is None
    assert [mirror.count_up(tmp_path / "tries" / "x") for _ in range(3)] == [0, 1, 2]
    assert mirror.is_there(path)
    mirror.remove(path)
    assert not mirror.is_there(path)
    mirror.remove(tmp_path / "tries")
    mirror.remove(tmp_path / "nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_copy_has_the_name_of_the_folder_and_its_place_on_the_store(machines: Machines) -> None:
    root = machines.use("a")
    assert root.name == "one"
    assert copies.local(URI) == root
    assert copies.shown(root / "mine.partial" / "x.json") == "s3://bucket/runs/one/mine/x.json"
    assert copies.shown(root) == "s3://bucket/runs/one"
    assert copies.uri_of(str(root)) == URI
    assert copies.uri_of(str(root / "rounds" / "1 2")) == "s3://bucket/runs/one/rounds/1%202?region=x&scheme=http"
    assert not copies.is_mirrored(str(root) + "x/y")
    assert copies.is_mirrored(root.with_name("one.partial") / "y"), "all of it may be one working folder"


def test_a_file_is_sent_before_it_has_its_name_here(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machines.use("a")
    storage.write_atomic(root / "deep" / "file", b"old")
    assert machines.there() == {"deep/file": "old"}

    def broken(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("rayembed.data.object_store.WAITS", (0.0,))
    monkeypatch.setattr(ObjectStore, "_write", broken)
    message = r"writing s3://bucket/runs/one/deep/file \(3 bytes\) failed: no network; what was there before is whole"
    with pytest.raises(OSError, match=message):
        storage.write_atomic(root / "deep" / "file", b"new")
    assert machines.there() == {"deep/file": "old"}
    assert [path.name for path in (root / "deep").iterdir()] == ["file"]
    assert (root / "deep" / "file").read_bytes() == b"old"


def test_a_file_is_fetched_once_and_again_when_the_store_has_another(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.use("a").mkdir(parents=True)
    storage.save_npy(copies.local(URI) / "x.npy", np.arange(3))
    fetched = noted(monkeypatch, "_get")

    root = machines.use("b")
    assert not (root / "x.npy").exists(), "large files come when they are opened"
    for _ in range(2):
        assert np.load(mirror.here(root / "x.npy")).tolist() == [0, 1, 2]
    root = machines.use("b")
    mirror.here(root / "x.npy")
    assert fetched == ["x.npy"]

    storage.save_npy(machines.use("a") / "x.npy", np.arange(1, 4))  # as many bytes
    older(machines.store / "x.npy")
    root = machines.use("b")
    assert np.load(mirror.here(root / "x.npy")).tolist() == [1, 2, 3]
    assert mirror.here(root / "none") == root / "none"
    assert not (root / "none").exists()


def test_many_files_are_fetched_together(machines: Machines) -> None:
    root = machines.use("a")
    for number in range(20):
        storage.write_atomic(root / "parts" / f"{number}.npy", str(number).encode())
    root = machines.use("b")
    mirror.all_here(root / "parts" / f"{number}.npy" for number in range(0, 20, 2))
    assert len(list((root / "parts").iterdir())) == 10
    mirror.folder_here(root)
    assert sorted(int(path.read_text()) for path in (root / "parts").iterdir()) == list(range(20))


def test_a_folder_is_unfinished_on_every_machine_until_it_is_published(machines: Machines) -> None:
    def mine(root: Path) -> dict[str, list[str]]:
        return {path.name: sorted(own.name for own in path.iterdir()) for path in root.glob("mine*")}

    root = machines.use("a")
    final = root / "mine"
    working = storage.working_folder(final)
    storage.write_atomic(working / "job.json", b"{}")
    storage.write_atomic(working / "part-0.npy", b"0")
    assert set(machines.there()) == {"mine/_PARTIAL", "mine/job.json", "mine/part-0.npy"}
    assert mine(machines.use("b")) == {"mine.partial": ["job.json"]}

    root = machines.use("a")
    (root / "mine.partial" / "plain.txt").write_text("not sent yet")
    storage.publish_folder(root / "mine")
    assert set(machines.there()) == {"mine/_SUCCESS", "mine/job.json", "mine/part-0.npy", "mine/plain.txt"}
    assert mine(root) == {"mine": ["job.json", "part-0.npy", "plain.txt"]}
    root = machines.use("b")
    assert mine(root) == {"mine": ["job.json", "plain.txt"]}

    mirror.reopen(root / "mine")
    assert mine(machines.use("c")) == {"mine.partial": ["job.json", "plain.txt"]}


def test_what_stops_a_publishing_leaves_the_folder_unfinished(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last file cannot be sent."""
    root, put = machines.use("a"), ObjectStore._put

    def failing(own: ObjectStore, key: str, source: Path) -> object:
        if key.endswith("b.npy"):
            raise OSError("500")
        return put(own, key, source)

    working = storage.working_folder(root / "mine")
    working.mkdir(parents=True)
    for name in ("a", "b"):
        (working / f"{name}.npy").write_text(name)
    with monkeypatch.context() as patch:
        patch.setattr("rayembed.data.object_store.WAITS", ())
        patch.setattr(ObjectStore, "_put", failing)
        with pytest.raises(OSError, match=r"mine/b\.npy"):
            storage.publish_folder(root / "mine")
    assert "mine/_SUCCESS" not in machines.there()
    assert [path.name for path in root.iterdir()] == ["mine.partial"]
    with storage.whole_folder(root / "mine"):
        pass
    assert machines.there() == {"mine/_SUCCESS": "", "mine/a.npy": "a", "mine/b.npy": "b"}


def test_a_folder_in_an_unfinished_folder(machines: Machines) -> None:
    root = machines.use("a")
    with storage.whole_folder(root / "cache" / "texts") as working:
        writer = StoreWriter(working / "queries", PASSAGES, 2)
        for number in range(5):
            writer.add({"id": f"p{number}", "text": "x"})
        writer.finish()
        assert "cache/texts/queries/_SUCCESS" in machines.there()
        half = machines.use("b")
        assert (half / "cache" / "texts.partial" / "queries" / "store.json").is_file()
        machines.use("a")
    root = machines.use("b")
    store = Store.open(root / "cache" / "texts" / "queries")
    assert store.find_ids(["p3", "p9", "p0"]).tolist() == [3, -1, 0]
    assert [part.num_rows for part in store.iter_parts()] == [2, 2, 1]


def test_what_the_store_has_not_goes_from_the_copy(machines: Machines) -> None:
    root = machines.use("a")
    storage.write_atomic(root / "done" / "1.json", b"{}")
    storage.write_atomic(root / "kept.json", b"{}")
    (machines.store / "done" / "1.json").unlink()
    (root / ".mine").write_text("hidden: of this machine")
    (root / "cache" / "of_another.partial").mkdir(parents=True)
    (root / "cache" / "of_another.partial" / "x").write_text("another run of this machine is writing it")
    time.sleep(0.15)  # what is younger may have been sent since the listing
    (root / "young.json").write_text("{}")
    mirror.refresh(root)
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert found == [".mine", "cache/of_another.partial/x", "kept.json", "young.json"]
    assert not (root / "done").exists()


def test_a_worker_forgets_what_was_removed_since_it_was_here(machines: Machines) -> None:
    for name in ("a", "b"):
        storage.write_atomic(machines.use(name) / "mine.partial" / "done" / "0.json", b"{}")
    mirror.remove(machines.use("a") / "mine.partial")
    assert machines.there() == {}
    time.sleep(0.15)
    root = machines.use("c")
    root = copies.local(URI)
    assert not mirror.is_there(root / "mine.partial" / "done" / "0.json")
    folder = machines.use("b", refreshed=False) / "mine.partial"  # as a worker uses it
    assert (folder / "done" / "0.json").exists()
    mirror.tidy(folder)
    assert not (folder / "done" / "0.json").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_that_is_removed_half_is_never_found_whole(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    root = machines.use("a")
    with storage.whole_folder(root / "mine") as working:
        storage.write_atomic(working / "job.json", b"{}")
        storage.write_atomic(working / "part", b"0")
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(ObjectStore, "delete_all", lambda own, key: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                mirror.remove(root / "mine")
        else:
            mirror.remove(root / "mine")
    assert set(machines.there()) == (set() if finished else {"mine/_PARTIAL", "mine/part"})
    root = machines.use("b")
    assert not (root / "mine").exists()
    assert not (root / "mine.partial" / "job.json").exists()


def test_neither_the_run_folder_nor_what_is_to_be_replaced_is_removed(machines: Machines) -> None:
    root = machines.use("a")
    storage.write_atomic(root / "file", b"1")
    with pytest.raises(ValueError, match="s3://bucket/runs/one is a whole run folder, which is never deleted"):
        mirror.remove(root)
    with storage.whole_folder(root / "data"):
        pass
    storage.working_folder(root / "data").mkdir()
    mirror.remove(storage.working_folder(root / "data"))
    assert set(machines.there()) == {"file", "data/_SUCCESS"}
    assert root.is_dir()


def test_all_of_a_mirror_may_be_one_folder(machines: Machines) -> None:
    root = machines.use("a")
    with storage.whole_folder(root) as working:
        (working / "corpus.jsonl").write_text("{}")
    assert set(machines.there()) == {"_SUCCESS", "corpus.jsonl"}
    root = machines.use("b")
    assert root.is_dir()
    mirror.remove(root)
    assert machines.there() == {}


def test_a_whole_folder_is_replaced_by_another(machines: Machines) -> None:
    root = machines.use("a")
    for files in ({"config.json": "1", "two.safetensors": "2"}, {"config.json": "3"}):
        for path in (root / "model").glob("*"):
            path.unlink()
        (root / "model").mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / "model" / name).write_text(text)
        mirror.send_whole(root / "model")
        assert machines.there() == {"model/_SUCCESS": ""} | {f"model/{name}": text for name, text in files.items()}
    storage.write_atomic(root / "other.json", json.dumps({"model": str(root / "model")}).encode())
    root = machines.use("b")
    mirror.model_here({"arguments": [json.dumps({"name": str(root / "model")})]}, "{no json")
    assert (root / "model" / "config.json").read_text() == "3"


def test_only_what_was_written_is_sent_at_the_end(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = noted(monkeypatch, "_put")
    storage.write_atomic(machines.use("a") / "one.json", b"{}")
    root = machines.use("a")
    for name in ("report.html", "cache/x", "mine.partial/y", "train/tensorboard/z", ".hidden"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("1")
    for _ in range(2):
        mirror.send_folder(root, but=["cache"])
    assert sorted(sent) == ["one.json", "report.html", "train/tensorboard/z"]
    (root / "report.html").write_text("22")
    mirror.send_folder(root, but=["cache"])
    assert sent[-1] == "report.html"
    assert machines.there()["report.html"] == "22"


def test_paths_of_another_machine_become_those_of_this_one(machines: Machines) -> None:
    theirs = machines.use("a")
    told = json.loads(json.dumps([copies.registered(), {"x": [str(theirs / "m"), json.dumps({"y": str(theirs)})]}]))
    ours = machines.use("b")
    found = copies.as_here(told[1], told[0])
    assert found == {"x": [str(ours / "m"), json.dumps({"y": str(ours)})]}
    assert storage.fingerprint(str(ours / "m")) == storage.fingerprint("s3://bucket/runs/one/m")
    assert storage.identity(str(ours / "m")) == "s3://bucket/runs/one/m"


def test_tries_are_counted_over_all_machines(machines: Machines) -> None:
    def count() -> int:
        return mirror.count_up(copies.local(URI) / "mine.partial" / "tries" / "part-00000")

    machines.use("a")
    assert [count(), count()] == [0, 1]
    machines.use("b")
    assert count() == 2
    mirror.remove(copies.local(URI) / "mine.partial" / "tries")
    assert count() == 0


def test_the_scratch_folder_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAYEMBED_SCRATCH", raising=False)
    monkeypatch.setattr(copies, "_MIRRORS", {})
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 7)
    with pytest.raises(PermissionError, match="RAYEMBED_SCRATCH"):
        copies.local(URI)


def test_a_listed_folder_is_expanded_to_files_that_are_here(machines: Machines) -> None:
    root = machines.use("a")
    for name in ("part-00000.jsonl", "part-00001.jsonl", "stats.json", "done/part-00000.json"):
        storage.write_atomic(root / "mine" / name, b"{}")

    def stamps(folder: Path) -> list[str]:
        return [storage.stamp(path) for path in storage.expand(str(folder))]

    first = stamps(root / "mine")
    root = machines.use("b")
    assert [Path(path).name for path in storage.expand(str(root / "mine"))] == ["part-00000.jsonl", "part-00001.jsonl"]
    assert stamps(root / "mine") == first, "the same on every machine"
    assert not (root / "mine" / "done" / "part-00000.json").exists()
