"""Folders that jobs write to: absolute, or a URI without keys."""

from pathlib import Path

import pytest

from rayembed.config.experiment import Experiment
from rayembed.config.loading import dump, load
from rayembed.config.places import written_folder


def test_local_folders_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert written_folder("runs/x") == str(tmp_path / "runs" / "x")
    assert written_folder("~/x") == "/home/me/x"
    assert written_folder("file:///runs/a%20b") == "/runs/a b"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        (
            "s3://bucket//a/run/?region=eu&endpoint_override=127.0.0.1:1&scheme=http",
            "s3://bucket/a/run?region=eu&endpoint_override=127.0.0.1:1&scheme=http",
        ),
        ("gs://bucket/run", "gs://bucket/run"),
        ("abfs://container@account.dfs.core.windows.net/run", "abfs://container@account.dfs.core.windows.net/run"),
        ("hdfs://host/run", "hdfs://host/run"),
    ],
)
def test_options_that_are_no_keys_stay(uri: str, expected: str) -> None:
    assert written_folder(uri) == expected
    assert written_folder(expected) == expected


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://key:word@bucket/run", r"^s3://bucket/run comes with keys or .* AWS_SECRET_ACCESS_KEY"),
        ("s3://bucket/run?secret_option=word", r"^s3://bucket/run comes with keys or with an option that may be one"),
        ("s3://bucket", r"^s3://bucket names no folder in a bucket; write s3://BUCKET/FOLDER"),
        ("gs://bucket/", "names no folder"),
        ("s3://bucket/a/../b", "names no folder"),
        ("s3://bucket/_runs", "a name for unfinished folders"),
        ("s3://bucket/run.partial", "a name for unfinished folders"),
    ],
)
def test_what_no_job_may_write_to(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        written_folder(uri)
    assert "word" not in str(refused.value)


def test_an_experiment_keeps_its_uris(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("output_dir: s3://b/run?region=eu\ncache_dir: gs://b/cache/\nmodel: {name_or_path: m}\n")
    experiment = load(str(file))
    assert (experiment.output_dir, experiment.cache_dir) == ("s3://b/run?region=eu", "gs://b/cache")
    file.write_text(dump(experiment))
    assert load(str(file)) == experiment
    with pytest.raises(ValueError, match="comes with keys"):
        Experiment(output_dir="s3://k:word@b/run", model={"name_or_path": "m"})  # type: ignore[arg-type]
