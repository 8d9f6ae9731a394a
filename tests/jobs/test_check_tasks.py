"""What is told of tasks: texts that are cut, seen in training, or put otherwise than they were trained."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayembed.config import Experiment
from rayembed.jobs import check, evaluate
from rayembed.jobs.check_tasks import task_notes
from rayembed.models.loading import tokenizer_of
from tests.jobs.conftest import TRAIN, MakeExperiment
from tests.jobs.test_evaluate_tasks import PROMPT, labelled, pairs, write_lines


def made(make_experiment: MakeExperiment, folder: Path, trained: list[dict[str, Any]], **task: Any) -> Experiment:  # noqa: ANN401 - as YAML has it
    rows = task.pop("rows")
    entry = {"name": "own", "kind": "sts", "test": [write_lines(folder / "test.jsonl", rows)], **task}
    return make_experiment(
        folder / "run",
        data={"train": [write_lines(folder / "train.jsonl", trained)], "corpus": [], "evaluation": None},
        model={"query_instruction_for_retrieval": "find: "},
        train={**TRAIN, "global_batch_size": 4},
        evaluate={"tasks": [entry]},
    )


def told(experiment: Experiment) -> list[str]:
    return [line for line in check.run(experiment).read_text().splitlines() if "task own" in line]


@pytest.mark.parametrize(
    ("of_rows", "of_task", "shown"),
    [
        ({}, None, None),
        ({"prompt": PROMPT}, PROMPT, None),
        ({}, PROMPT, "task own puts 'say: ' before its texts, and the training rows of type sts have no prompt; set"),
        (
            {"prompt": PROMPT},
            None,
            "task own puts no prompt before its texts, and the training .* type sts have 'say: '",
        ),
    ],
)
def test_a_prompt_that_was_not_trained_is_told(
    of_rows: dict[str, str], of_task: str | None, shown: str | None, make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    rows = pairs()
    own = made(make_experiment, tmp_path, [row | of_rows for row in rows[:12]], rows=rows[12:], prompt=of_task)
    lines = [line for line in told(own) if " puts " in line]
    assert len(lines) == (shown is not None)
    if shown is not None:
        assert re.search(shown, lines[0])


def test_pairs_that_were_trained_on_are_counted_in_either_order(
    make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    rows = [{"sentence1": f"text {i}", "sentence2": f"other {i}", "score": i} for i in range(20)]
    turned = {"sentence1": "other 7", "sentence2": "text 7", "score": 1}
    half = {"sentence1": "text 9", "sentence2": "other 10", "score": 1}
    own = made(make_experiment, tmp_path, rows[:8], rows=[rows[0], turned, half, *rows[12:]])
    seen = [line for line in told(own) if "among" in line]
    assert seen == [
        "warning: task own: 2 of its 11 test pairs are among the rows of data.train too; its figures say less of new "
        "ones"
    ]
    assert not [line for line in told(replace(own, train=None)) if "among" in line], "nothing is trained"


def test_texts_that_the_classifier_learns_from_are_counted(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    rows = labelled(4, 9)
    learned = write_lines(tmp_path / "learned.jsonl", [*rows[:4], *labelled(5, 9)])
    task = {"kind": "classification", "train": [learned], "rows": rows}
    own = made(make_experiment, tmp_path, [*labelled(6, 9), *rows[:3]], **task)
    seen = [line.partition(" of its 9 test texts are among ")[::2] for line in told(own) if "among" in line]
    assert [(first[-1], last.partition(" too")[0]) for first, last in seen] == [
        ("4", "its train rows"),
        ("3", "the rows of data.train"),
    ]
    data = evaluate._data(own)
    assert [line for line in task_notes(own, data.tasks) if "among" in line] == [
        line for line in told(own) if "its train rows" in line
    ], "evaluate tells what it knows"


def test_the_share_of_texts_that_are_cut_is_told(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    rows = [{"sentence1": "x" * i, "sentence2": "y" * (i + 1), "score": i} for i in range(1, 21)]
    own = made(make_experiment, tmp_path, rows[:8], rows=rows[8:], max_len=14, prompt="a: ")
    tokenizer = tokenizer_of(own.model)
    lengths = [
        len(tokenizer("a: " + row[side])["input_ids"]) for row in rows[8:] for side in ("sentence1", "sentence2")
    ]
    share = 100 * sum(length > 14 for length in lengths) / len(lengths)
    assert 0 < share < 100
    line = told(own)[0]
    assert line.startswith(
        f"task own: {sum(lengths) / len(lengths):.0f} tokens a text on average, {share:.1f} % longer"
    )
    assert line.endswith("than 14 (its max_len) are cut (of 24 sampled)")
    whole = replace(own, evaluate=replace(own.evaluate, tasks=[replace(own.evaluate.tasks[0], max_len=None)]))  # type: ignore[union-attr, type-var]
    assert "0.0 % longer than 48 (the longer length of queries and passages) are cut" in told(whole)[0]
