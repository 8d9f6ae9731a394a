"""The job check refuses before any work what would fail after hours of it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayembed.jobs import check, mine
from tests.jobs.conftest import MakeExperiment


def test_it_says_how_much_there_is_and_what_is_cut(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    path = check.run(make_experiment(tmp_path / "run", encode={"passage_max_len": 10}))
    text = path.read_text()
    assert path == tmp_path / "run" / "check.txt"
    assert "0 errors" in text.splitlines()[-1]
    assert "longer than 48 (data.passage_max_len) are cut" in text
    assert "100.0 % longer than 10 (encode.passage_max_len) are cut" in text


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"evaluation": None}, "evaluate": {}}, "set data.evaluation to a BEIR folder"),
        ({"data": {"train": []}, "mine": {}}, "section mine; set data.train"),
        ({"data": {"passage_max_len": 129}}, r"data.passage_max_len is 129, but .* at most 128 tokens"),
        ({"encode": {"query_max_len": 400}}, "encode.query_max_len is 400"),
        ({"mine": {"model": "nowhere/such"}}, "model 'nowhere/such': no checkpoint found"),
        ({"score": {"model": "nowhere/such"}}, "model 'nowhere/such': no checkpoint found"),
        ({"ray": {"num_workers": 64, "use_gpu": True}}, "needs as many GPUs; this machine has"),
        ({"ray": {"num_workers": [63, 64], "use_gpu": True}}, "ray.num_workers 63 needs as many GPUs"),
        ({"mine": {}, "train": {"knowledge_distillation": True}}, "has no teacher scores; add a section score"),
    ],
)
def test_refused(make_experiment: MakeExperiment, tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check.run(make_experiment(tmp_path / "run", **sections))


def test_the_model_may_not_be_the_folder_that_training_replaces(
    make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    made = make_experiment(tmp_path / "run")
    with pytest.raises(ValueError, match="the folder that training replaces"):
        replace(made, model=replace(made.model, name_or_path=str(tmp_path / "run" / "model")))


@pytest.mark.parametrize("job", [check, mine])
def test_a_window_that_no_passage_is_in_is_refused(job: Any, make_experiment: MakeExperiment, tmp_path: Path) -> None:  # noqa: ANN401
    made = make_experiment(tmp_path / "run", mine={"range_for_sampling": "120-130"})
    with pytest.raises(ValueError, match=r"range_for_sampling is 120-130, and the corpus has 120 passages: no rank is"):
        job.run(made)


def test_a_length_that_the_miner_cannot_read_is_refused(
    make_experiment: MakeExperiment, tiny_model: Path, tmp_path: Path
) -> None:
    made = make_experiment(tmp_path / "run", mine={"model": str(tiny_model)}, encode={"passage_max_len": 129})
    with pytest.raises(ValueError, match=r"encode\.passage_max_len is 129, but .* at most 128 tokens; lower it"):
        mine.run(made)


def test_rows_that_sit_out_are_said_where_they_are_many(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"query": f"q {i}", "pos": [f"p {i}"], "neg": ["n"]}) + "\n" for i in range(30)))
    texts = []
    for size in (16, 29):
        train = {"global_batch_size": size}
        made = make_experiment(tmp_path / f"run-{size}", data={"train": [str(rows)], "corpus": []}, train=train)
        texts.append(check.run(made).read_text())
    assert "warning: 14 of 30 rows fill no whole batch of 16 queries and sit out each epoch" in texts[0]
    assert "fill no whole batch" not in texts[1]
    totals = [re.findall(r"^(\d+) errors?, (\d+) warnings?$", text, re.MULTILINE) for text in texts]
    assert totals == [[("0", "11")], [("0", "10")]], "ten are of the evaluation set"


def test_what_mining_will_do_that_one_may_not_expect_is_said(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "q", "pos": ["p"], "neg": ["n", "m"]}\n')
    sections = {"data": {"train": [str(rows)]}, "mine": {"range_for_sampling": "110-999"}}
    text = check.run(make_experiment(tmp_path / "run", **sections)).read_text()
    assert "warning: mine.range_for_sampling 110-999 holds fewer than 15 of the" in text
    assert "the other negatives are missing" in text, "no passage ranks after the window"
    within = {**sections, "mine": {"range_for_sampling": "30-40"}}
    assert "drawn at random" in check.run(make_experiment(tmp_path / "within", **within)).read_text()
    assert "warning: mine will replace 2 negatives that the rows bring" in text
    fine = check.run(make_experiment(tmp_path / "other", mine={"range_for_sampling": "0-50"})).read_text()
    assert "warning: mine" not in fine


def test_a_rerankers_texts_are_measured_as_its_pairs_keep_them(
    make_experiment: MakeExperiment, tiny_reranker: Path, tmp_path: Path
) -> None:
    """A query keeps 24 + 48 / 4 tokens, a passage 48 + 24 / 2, both with 3 special ones 72; a letter is a token."""
    lengths = [(30, 20), (36, 60), (37, 61), (20, 48), (20, 49), (10, 60)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"query": "q" * q, "pos": ["p" * p], "neg": ["n"]}) + "\n" for q, p in lengths))
    made = make_experiment(
        tmp_path / "run",
        model={"name_or_path": str(tiny_reranker), "family": "reranker-encoder", "pooling": None},
        data={"train": [str(rows)], "corpus": [], "evaluation": None, "train_group_size": 2},
    )
    text = check.run(made).read_text()
    assert "16.7 % longer than 36 (data.query_max_len and a quarter of data.passage_max_len) are cut (of 6" in text
    assert "16.7 % longer than 60 (data.passage_max_len and half of data.query_max_len) are cut (of 6" in text
    assert (
        "50.0 % longer than 72 (data.query_max_len 24 and data.passage_max_len 48 together) lose the end of their "
        "passage (of 6 sampled)"
    ) in text


def test_only_rows_that_want_negatives_are_said_to_lack_them(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    def lines(name: str, rows: list[dict[str, Any]]) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    train = [
        lines("pairs", [{"sentence1": f"a {i}", "sentence2": "b", "score": i} for i in range(8)]),
        lines("labels", [{"text": f"t {i}", "label": i % 2} for i in range(8)]),
        lines("one", [{"query": f"q {i}", "pos": [f"p {i}"], "neg": ["n"]} for i in range(8)]),
        lines("more", [{"query": f"r {i}", "pos": [f"s {i}"], "neg": ["n", "m"]} for i in range(8)]),
    ]
    data: dict[str, Any] = {"train": train, "corpus": [], "evaluation": None, "train_group_size": 3}
    sections: dict[str, Any] = {"train": {"global_batch_size": 4}, "data": data}
    text = check.run(make_experiment(tmp_path / "run", **sections)).read_text()
    assert "8 of 32 rows have fewer than 2 negatives (train_group_size of their dataset - 1): theirs are used" in text
    data["datasets"] = [{"name": "*one*", "train_group_size": 2}, {"name": "*more*", "train_group_size": 5}]
    text = check.run(make_experiment(tmp_path / "run", **sections)).read_text()
    assert "8 of 32 rows have fewer than 4 negatives" in text
    data["datasets"] = data["datasets"][:1]
    assert "fewer than" not in check.run(make_experiment(tmp_path / "run", **sections)).read_text()


def test_errors_are_in_the_file_too(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "q", "pos": []}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: pos"):
        check.run(make_experiment(tmp_path / "run", data={"train": [str(rows)]}))
    assert "1 error, " in (tmp_path / "run" / "check.txt").read_text()
