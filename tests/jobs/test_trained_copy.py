"""What a training leaves on a store, and what worker 0 of another machine goes on with."""

import json
from pathlib import Path

import pytest

from rayembed.data import copies, mirror, storage
from rayembed.jobs import trained_copy
from rayembed.jobs.trained_copy import COPIES, leave, received_settings, sending_before, telling_after
from rayembed.jobs.trained_copy import storage as storage_of
from tests.data.machines import Machines


def told(root: Path) -> str:
    """What the driver tells a worker, as it arrives."""
    folders = {"train_folder": str(root / "train.partial"), "model_folder": str(root / "model"), "parts": ["0"]}
    return json.dumps({**folders, COPIES: copies.registered()})


def test_ray_keeps_checkpoints_under_the_final_name(machines: Machines, tmp_path: Path) -> None:
    root = machines.use("driver")
    found = storage_of(root / "train.partial")
    assert found["storage_path"] == str(machines.store / "train")
    assert storage_of(tmp_path / "x") == {"storage_path": str(tmp_path / "x")}


def test_figures_are_there_before_the_checkpoint_is_and_another_machine_goes_on_with_them(machines: Machines) -> None:
    text = told(machines.use("driver"))
    machines.use("first", refreshed=False)
    settings = received_settings(json.loads(text), rank=0)
    assert COPIES not in settings
    folder = Path(settings["train_folder"])
    folder.mkdir(parents=True)
    seen: list[tuple[str, ...]] = []
    save = sending_before(lambda *words: seen.append((*words, *sorted(machines.there()))), folder, rank=0)
    (folder / "metrics.jsonl").write_text("1\n")
    (folder / "evaluations.jsonl").write_text("2\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "of_ray").write_text("not ours")
    save("saved")
    assert seen == [("saved", "train/_PARTIAL", "train/evaluations.jsonl", "train/metrics.jsonl")]

    machines.use("second", refreshed=False)
    for rank, expected in ((1, False), (0, True)):
        folder = Path(received_settings(json.loads(text), rank=rank)["train_folder"])
        assert (folder / "metrics.jsonl").exists() == expected
        assert (folder / "evaluations.jsonl").exists() == expected
    assert (folder / "metrics.jsonl").read_text() == "1\n"
    plain = sending_before(print, folder, rank=1)
    assert plain is print, "others send nothing"


def test_figures_of_an_evaluation_are_there_before_a_sweep_that_may_end_the_worker_knows_of_them(
    machines: Machines, tmp_path: Path
) -> None:
    folder = machines.use("worker") / "train.partial"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("1\n")
    seen: list[tuple[dict[str, float], str]] = []

    def tell(figures: dict[str, float]) -> None:
        seen.append((figures, machines.there()["train/evaluations.jsonl"]))

    for step in (4.0, 8.0):
        with (folder / "evaluations.jsonl").open("a") as file:
            file.write(f"{step}\n")
        telling_after(tell, folder, rank=0)({"step": step})
    assert seen == [({"step": 4.0}, "4.0\n"), ({"step": 8.0}, "4.0\n8.0\n")]
    assert "train/metrics.jsonl" not in machines.there(), "with the next checkpoint"
    assert telling_after(tell, folder, rank=1) is tell
    assert telling_after(tell, tmp_path, rank=0) is tell


def test_the_model_is_there_whole_and_the_adapter_before_it(machines: Machines) -> None:
    root = machines.use("driver")
    for name in ("train.partial", "adapter", "model"):
        storage.write_atomic(root / f".{name}", b"")
        (root / name).mkdir()
        (root / name / "x").write_text(name)
    order = list[str]()
    finish = mirror._finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror, "_finish", lambda own, key: order.append(key) or finish(own, key))  # type: ignore[func-returns-value]
        leave(root / "train.partial", root / "model", rank=1)
        assert machines.there() == {}
        leave(root / "train.partial", root / "model", rank=0)
    assert order == ["adapter", "model"]
    assert machines.there()["model/x"] == "model"
    assert machines.there()["train/x"] == "train.partial"


def test_a_checkpoint_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained_copy, "WAITS", (0.0, 0.0))
    for failures, passes in ((2, True), (3, False)):
        left = [OSError(str(number)) for number in range(failures)]

        def send(left: list[OSError] = left) -> str:
            if left:
                raise left.pop()
            return "there"

        if passes:
            assert trained_copy.persisted(send) == "there"
        else:
            with pytest.raises(OSError, match="0"):
                trained_copy.persisted(send)
