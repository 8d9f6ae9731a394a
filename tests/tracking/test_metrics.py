"""A resumed log continues at its step; TensorBoard gets the same figures."""

import json
import logging
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rayembed.tracking.metrics import MetricsLog


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log(folder: Path, steps: range, *, last_step: int, loss: float = 1.0) -> None:
    with MetricsLog(folder, last_step=last_step) as metrics:
        for step in steps:
            metrics.write({"step": step, "loss": loss / step, "queries_per_second": 10.0})


def events(folder: Path) -> list[Event]:
    """All events on disk: records of length, its checksum, the event, its checksum."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            found.append(Event.FromString(data[place + 12 : place + 12 + length]))
            place += length + 16
    return found


def test_every_step_is_a_line(tmp_path: Path) -> None:
    log(tmp_path / "train", range(1, 4), last_step=0)
    assert lines(tmp_path / "train") == [
        {"step": step, "loss": 1 / step, "queries_per_second": 10.0} for step in (1, 2, 3)
    ]


def test_names_of_alarms_are_in_the_line_and_not_in_tensorboard(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, last_step=0) as metrics:
        metrics.write({"step": 1, "loss": 0.0}, alarms=["zero_loss"])
        metrics.write({"step": 2, "loss": 1.0}, alarms=[])
    assert [*map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())] == [
        {"step": 1, "loss": 0.0, "alarms": ["zero_loss"]},
        {"step": 2, "loss": 1.0},
    ]
    assert {value.tag for event in events(tmp_path) for value in event.summary.value} == {"train/loss"}


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, last_step=0) as metrics:
        metrics.write({"step": 1, "loss": 0.5})
        assert lines(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_a_resumed_run_replaces_what_the_killed_one_did_later(tmp_path: Path) -> None:
    log(tmp_path, range(1, 8), last_step=0)
    log(tmp_path, range(5, 7), last_step=4, loss=2.0)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] * line["step"] for line in found] == pytest.approx([1, 1, 1, 1, 2, 2])


def test_half_a_line_is_removed(tmp_path: Path) -> None:
    log(tmp_path, range(1, 3), last_step=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    log(tmp_path, range(3, 4), last_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_new_run_begins_an_empty_log(tmp_path: Path) -> None:
    log(tmp_path, range(1, 6), last_step=0)
    log(tmp_path, range(1, 3), last_step=0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_tensorboard_holds_the_figures_by_step(tmp_path: Path) -> None:
    log(tmp_path, range(1, 4), last_step=0)
    found = {(v.tag, e.step): v.simple_value for e in events(tmp_path) for v in e.summary.value}
    expected = {("train/loss", step): 1 / step for step in (1, 2, 3)}
    expected |= {("train/queries_per_second", step): 10.0 for step in (1, 2, 3)}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("last_step", [0, 4])
def test_tensorboard_is_told_from_which_step_earlier_figures_are_void(tmp_path: Path, last_step: int) -> None:
    log(tmp_path, range(last_step + 1, last_step + 3), last_step=last_step)
    starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [last_step + 1]


def test_the_log_is_closed_when_training_fails(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path, last_step=0)

    def train() -> None:
        with metrics:
            metrics.write({"step": 1, "loss": 0.5})
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train()
    with pytest.raises(ValueError, match="closed file"):
        metrics.write({"step": 2, "loss": 0.5})
    assert [event.step for event in events(tmp_path) if event.summary.value] == [1]


def evaluate(folder: Path, steps: range, *, last_evaluation: int, value: float) -> list[dict[str, float]]:
    with MetricsLog(folder, last_step=4, last_evaluation=last_evaluation) as metrics:
        for step in steps:
            metrics.write_evaluation({"step": step, "eval": {"ndcg@10": value}, "of": "all"})
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_evaluations_go_on_where_the_checkpoint_knows_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log(tmp_path, range(1, 5), last_step=0)
    assert not (tmp_path / "evaluations.jsonl").exists(), "nothing was evaluated"
    found = evaluate(tmp_path, range(0, 5, 2), last_evaluation=-1, value=0.5)
    assert [line["step"] for line in found] == [0, 2, 4]
    curve = [(v.tag, e.step, v.simple_value) for e in events(tmp_path) for v in e.summary.value if "eval" in v.tag]
    assert curve == [("eval/ndcg_10", step, 0.5) for step in (0, 2, 4)], "TensorBoard knows no @"
    assert "illegal" not in caplog.text
    found = evaluate(tmp_path, range(4, 7, 2), last_evaluation=2, value=0.75)
    assert [(line["step"], line["eval"]) for line in found] == [
        (0, {"ndcg@10": 0.5}),
        (2, {"ndcg@10": 0.5}),
        (4, {"ndcg@10": 0.75}),
        (6, {"ndcg@10": 0.75}),
    ]
    assert evaluate(tmp_path, range(0), last_evaluation=-1, value=0) == [], "a new run"
