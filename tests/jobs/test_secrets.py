"""Keys in URIs and tokens of the environment are in nothing that is written or told; paths in data are not opened."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import fs

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.loading import ConfigError, load
from rayembed.config.model import ModelConfig
from rayembed.config.uris import PublicFormatter, public_text, without_keys_within
from rayembed.jobs.shipping import received, shipped
from tests.s3_server import plain_server

PLANTED = "pLaNtEd"  # what all planted secrets have in them
ENVIRONMENT = {
    name: f"{PLANTED}-{name}"
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN")
}
KEYS = f"{PLANTED}key:{PLANTED}secret"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URI of a bucket on a local S3 server, with keys in it and % for the path below it."""
    yield from plain_server(monkeypatch, KEYS)


def copied(folder: Path, bucket: str) -> None:
    """The files of a folder into the bucket."""
    filesystem, inner = fs.FileSystem.from_uri(bucket % "")
    filesystem.create_dir(inner)
    for path in folder.rglob("*.*"):
        with filesystem.open_output_stream(f"{inner}/{path.relative_to(folder).as_posix()}") as file:
            file.write(path.read_bytes())


def experiment_file(path: Path, model: Path, **data: Any) -> str:  # noqa: ANN401 - settings
    """An experiment that is checked, mined and evaluated in seconds."""
    settings = {
        "output_dir": str(path.with_suffix("")),
        "model": {"name_or_path": str(model), "pooling": "mean"},
        "data": {"train_group_size": 2, "query_max_len": 24, "passage_max_len": 48, **data},
        "encode": {"dtype": "float32"},
        "mine": {"range_for_sampling": "0-12", "negative_number": 3},
    }
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def watched(folder: Path, commands: Sequence[Sequence[str]], **environment: str) -> tuple[list[int], str, list[str]]:
    """Statuses of command lines, everything that was told, and the paths that were opened."""
    (folder / "commands.json").write_text(json.dumps(commands))
    words = [sys.executable, "-m", "tests.jobs.watched_jobs", folder / "commands.json", folder / "opened"]
    given = {**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parents[2]), "RAYEMBED_TRACEBACK": "1"}
    ended = subprocess.run(words, capture_output=True, text=True, env=given, timeout=280, check=False)
    (folder / "commands.json").unlink()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    statuses: list[int] = json.loads(ended.stdout.splitlines()[-1])
    return statuses, ended.stdout + ended.stderr, (folder / "opened").read_text().splitlines()


def files_with(folder: Path, word: str) -> list[str]:
    """Files below a folder whose bytes, or whose name, have the word in them."""
    found = [path for path in folder.rglob("*") if word.encode() in (path.read_bytes() if path.is_file() else b"")]
    return [str(path) for path in [*found, *(path for path in folder.rglob("*") if word in path.name)]]


@pytest.mark.slow
@pytest.mark.long
def test_nothing_that_is_written_or_told_has_a_secret(
    bucket: str, beir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Of jobs that end well, of wrong data and settings, and of storage that does not answer."""
    copied(beir, bucket)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "rows.jsonl").write_text('{"query": "q"}\n')
    copied(tmp_path / "bad", bucket)
    files, toy = tmp_path / "files", bucket % ""
    files.mkdir()
    runs = {
        "good": {"train": [toy], "corpus": [toy], "evaluation": toy},
        "bad": {"train": [bucket % "/rows.jsonl"]},
        "gone": {"train": [(bucket % "/none.jsonl").replace("127.0.0.1:", "127.0.0.1:1")]},
        "option": {"train": [f"s3://{KEYS}@bucket/a.jsonl?no_such_option={PLANTED}"]},
        "typed": {"train": {"a": toy}, "corpus": [toy], "evaluation": [toy]},
    }
    made = {name: experiment_file(files / f"{name}.yaml", tiny_model, **data) for name, data in runs.items()}
    commands = [["check", made["good"]], ["mine", made["good"]], ["run", made["good"], "--dry-run"]]
    commands += [["check", made[name]] for name in ("bad", "gone", "option", "typed")]
    commands += [["check", made["good"], f"data.train=[s3://{KEYS}@bucket/none]", f"data.corpus.x=s3://{KEYS}@b"]]
    commands += [["check", made["good"], f"data.train='{bucket % '/none'}'"], ["doctor", made["good"], "--dry-run"]]
    statuses, told, _ = watched(tmp_path, commands, AWS_RETRY_MODE="standard", AWS_MAX_ATTEMPTS="1", **ENVIRONMENT)
    assert statuses == [0, 0, 0, 1, 1, 1, 2, 2, 1, 0]
    assert [line for line in told.splitlines() if PLANTED in line] == []
    assert "s3://bucket/rows.jsonl:1" in told, "what is told still names the file"
    for name in made.values():
        Path(name).unlink()  # they are the user's
    assert (files / "good" / "config.yaml").is_file()
    assert (files / "good" / "mine" / "audit.html").is_file()
    assert files_with(files, PLANTED) == []
    assert files_with(files, "s3://bucket"), "the search finds what is there"


@pytest.mark.long
def test_texts_and_names_in_data_are_never_taken_for_paths(beir: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Queries, passages, ids, prompts that name a pipe, which who opens it waits at for ever, or a place elsewhere."""
    files, bait = tmp_path / "files", tmp_path / "bait.jsonl"
    files.mkdir()
    os.mkfifo(bait)
    names = [str(bait), f"file://{bait}", f"@{bait}", "../../../escaped", "s3://bucket/x", f"package://{bait}"]
    passages = [{"_id": name, "title": name, "text": f"{name} {name}"} for name in names]
    passages += [{"_id": f"p{i}", "text": f"other passage {i} of some words"} for i in range(12)]
    rows = [
        {"query": name, "pos": [f"{name} {name}"], "neg": [str(bait)], "prompt": name, "id": name} for name in names
    ]
    (files / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    (files / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"train": [str(files / "rows.jsonl")], "corpus": [str(files / "corpus.jsonl")], "evaluation": str(beir)}
    made = experiment_file(files / "run.yaml", tiny_model, **given)
    statuses, told, opened = watched(tmp_path, [["check", made], ["mine", made]])
    assert statuses == [0, 0], told
    assert any("run.yaml" in path for path in opened)
    assert [path for path in opened if "bait" in path or "escaped" in path] == []
    assert [*tmp_path.rglob("*escaped*"), *tmp_path.parent.glob("*escaped*")] == []


def test_what_is_shipped_has_no_keys() -> None:
    uri = f"s3://{KEYS}@bucket/a?region=x&token={PLANTED}"
    experiment = Experiment(
        output_dir="x", model=ModelConfig(name_or_path="hub/id"), data=DataConfig(train=[uri], evaluation=uri)
    )
    assert PLANTED not in shipped(experiment)
    assert received(shipped(experiment)).data.train == ["s3://bucket/a?region=x"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("When reading 's3://k:s/e@b/a?token=t': no", "When reading 's3://b/a': no"),
        ("s3://k:s@b/a,s3://k:s@c/a s3://k:s@d", "s3://b/a,s3://c/a s3://d"),
        ('["abfs://box:word@account/a"]', '["abfs://box@account/a"]'),
        ("http://127.0.0.1:8265/x and a@b:c", "http://127.0.0.1:8265/x and a@b:c"),
    ],
)
def test_keys_within_a_message(text: str, expected: str) -> None:
    assert public_text(text) == expected


def test_keys_within_json() -> None:
    value: Mapping[str, Any] = {"a": ["s3://k:s@b/x", 1, None], "b": {"c": "s3://k:s@b/y"}}
    assert without_keys_within(value) == {"a": ["s3://b/x", 1, None], "b": {"c": "s3://b/y"}}


def test_tracebacks_in_logs() -> None:
    try:
        raise OSError("s3://k:s@b/x")
    except OSError:
        record = logging.LogRecord("a", logging.ERROR, "f", 1, "%s failed", ("s3://k:s@b/y",), sys.exc_info())
    line = PublicFormatter("%(message)s").format(record)
    assert line.startswith("s3://b/y failed\nTraceback")
    assert line.endswith("OSError: s3://b/x")


def test_refused_settings_show_no_keys(tmp_path: Path) -> None:
    """Also where a long value is cut short in the middle of them."""
    (tmp_path / "e.yaml").write_text(
        f"output_dir: x\nmodel: {{name_or_path: y}}\nseed: 's3://{'k' * 30}:{PLANTED * 9}@b'"
    )
    with pytest.raises(ConfigError) as refused:
        load(str(tmp_path / "e.yaml"))
    assert PLANTED not in str(refused.value)
    assert "kkk" not in str(refused.value)
