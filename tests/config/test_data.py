"""Settings of several datasets: entries are checked one by one, and those that need each other are."""

from pathlib import Path

import pytest

from rayembed.config.data import DatasetConfig, LengthBatchSize
from rayembed.config.loading import ConfigError, dump, load


def write(tmp_path: Path, data: str) -> str:
    path = tmp_path / "e.yaml"
    path.write_text(f"output_dir: out\nmodel: {{name_or_path: m}}\ndata: {data}\n")
    return str(path)


def test_entries_are_read_and_written_back(tmp_path: Path) -> None:
    data = (
        "{datasets: [{name: 'a*', batch_size: 3, no_in_batch_neg: false}, {name: b, loss: angle, weight: 1e-1}], "
        "length_grouping: true, batch_size_by_length: [{max_len: 64, batch_size: 8}, {max_len: 128, batch_size: 4}]}"
    )
    experiment = load(write(tmp_path, data))
    assert experiment.data.datasets == [
        DatasetConfig(name="a*", batch_size=3, no_in_batch_neg=False),
        DatasetConfig(name="b", loss="angle", weight=0.1),
    ]
    assert experiment.data.batch_size_by_length[1] == LengthBatchSize(max_len=128, batch_size=4)
    again = tmp_path / "again.yaml"
    again.write_text(dump(experiment))
    assert load(str(again)) == experiment


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ("{datasets: [{name: a}, {nam: b}]}", "data.datasets: entry 2 has the unknown key nam; did you mean name?"),
        ("{datasets: [{name: a, colour: b}]}", "data.datasets: entry 1 has the unknown key colour; allowed are name, "),
        ("{datasets: [{batch_size: 2}]}", "data.datasets: entry 1: name: Field required"),
        ("{datasets: [{name: a, batch_size: 0}]}", "data.datasets: entry 1: batch_size: Input should be greater than"),
        ("{datasets: [{name: a, loss: mse}]}", "data.datasets: entry 1: loss: Input should be 'info_nce'"),
        ("{datasets: [3]}", "data.datasets: entry 1: entry: Input should be"),
        ("{datasets: 3}", "data.datasets: found 3, must be a list"),
        (
            "{batch_size_by_length: [{max_len: 8, batch_size: 1}]}",
            "data.batch_size_by_length needs data.length_grouping",
        ),
        (
            "{length_grouping: true, batch_size_by_length: [{max_len: 8, batch_size: 1}, {max_len: 8, batch_size: 2}]}",
            "data.batch_size_by_length has max_len [8, 8]; allowed: each greater than the last",
        ),
        ("{drop_threshold: 3}", "data.drop_threshold is about small data sets; set data.small_threshold above 0 too"),
        ("{mixing: random}", 'data.mixing: found "random", must be proportional, temperature or round_robin'),
    ],
)
def test_what_is_wrong_is_told_by_entry_and_key(tmp_path: Path, data: str, line: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {line}")
