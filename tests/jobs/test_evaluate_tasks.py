"""Tasks beside retrieval: the figures against vectors made one text at a time, what is refused, what is told."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import BertModel

from rayembed.config import Experiment
from rayembed.evaluation.tasks import v_measure
from rayembed.jobs import check, evaluate, export
from rayembed.jobs import evaluate_tasks as judging
from rayembed.jobs.evaluate_tasks import memory, task_texts
from rayembed.jobs.folders import ChangedError
from rayembed.report import build_report
from tests.conftest import tiny_tokenizer
from tests.jobs.conftest import TRAIN, MakeExperiment
from tests.jobs.reference_ranking import vectors
from tests.jobs.without_ray import do_units_here

WORDS = ["baba", "didi", "gugu", "koko", "lala", "momo", "nene", "pipi"]
PROMPT = "say: "
MAX_LEN = 48  # the longer of the two lengths


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs() -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(0), []
    for _ in range(20):
        first, second = (rng.choice(WORDS, 3).tolist() for _ in range(2))
        rows.append(
            {"sentence1": " ".join(first), "sentence2": " ".join(second), "score": len({*first} & {*second}) / 3}
        )
    return rows


def labelled(seed: int, number: int) -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(seed), []
    for i in range(number):
        words = [WORDS[i % 3], *rng.choice(WORDS, 2).tolist()]
        rows.append({"text": f"{' '.join(words)} {seed} {i}", "label": i % 3})
    return rows


def write_tasks(folder: Path) -> list[dict[str, Any]]:
    """Entries of evaluate.tasks and their files."""
    sts = write_lines(folder / "pairs.jsonl", pairs())
    train, test = (write_lines(folder / f"{i}.jsonl", labelled(i, 30 - 9 * i)) for i in range(2))
    return [
        {"name": "similar", "kind": "sts", "test": [sts], "prompt": PROMPT},
        {"name": "kinds", "kind": "classification", "train": [train], "test": [test], "classifier": "knn"},
        {"name": "heaps", "kind": "clustering", "test": [test]},
    ]


@pytest.fixture(scope="module")
def experiment(
    make_experiment: MakeExperiment, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Experiment:
    """With tasks alone, a tuned model of other weights, and an instruction that is for retrieval."""
    folder = tmp_path_factory.mktemp("tasks")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = BertModel.from_pretrained(tiny_model)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "run" / "model")
    tiny_tokenizer().save_pretrained(folder / "run" / "model")
    return make_experiment(
        folder / "run",
        data={"train": [], "corpus": [], "evaluation": None},
        model={"query_instruction_for_retrieval": "find: "},
        encode={"queries_per_unit": 16},
        evaluate={"tasks": write_tasks(folder)},
    )


@pytest.fixture(scope="module")
def units(experiment: Experiment) -> Iterator[list[str]]:
    """The experiment evaluated without Ray; what was encoded for it."""
    with pytest.MonkeyPatch.context() as patch:
        done = do_units_here(patch)
        evaluate.run(experiment)
        yield done


def metrics_of(experiment: Experiment) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(experiment.output_dir) / "evaluate" / "metrics.json").read_text())
    return found


def with_tasks(experiment: Experiment, tasks: list[Any]) -> Experiment:
    """With other tasks: TaskConfigs, or mappings as YAML has them."""
    assert experiment.evaluate is not None
    return replace(experiment, evaluate=replace(experiment.evaluate, tasks=tasks))


def slow_spearman(model: Path) -> float:
    of = [vectors(model, [PROMPT + row[side] for row in pairs()], MAX_LEN) for side in ("sentence1", "sentence2")]
    return float(stats.spearmanr(np.sum(of[0] * of[1], axis=1), [row["score"] for row in pairs()]).statistic)


def slow_accuracy(model: Path) -> float:
    train, test = labelled(0, 30), labelled(1, 21)
    learned, asked = (vectors(model, [row["text"] for row in rows], MAX_LEN) for rows in (train, test))
    right = 0
    for vector, row in zip(asked, test, strict=True):
        nearest = sorted(range(30), key=lambda i: -float(learned[i] @ vector))[:5]
        votes = [train[i]["label"] for i in nearest]
        right += min(range(3), key=lambda label: (-votes.count(label), label)) == row["label"]
    return right / 21


def slow_clustering(model: Path) -> float:
    found = vectors(model, [row["text"] for row in labelled(1, 21)], MAX_LEN)
    return v_measure(found, [str(row["label"]) for row in labelled(1, 21)], seed=42)


def test_the_figures_are_those_of_vectors_made_one_by_one(
    experiment: Experiment, units: list[str], tiny_model: Path
) -> None:
    metrics = metrics_of(experiment)
    assert metrics.keys() == {"tasks"}, "no retrieval was asked for"
    tasks = metrics["tasks"]
    for name, model in (("base", tiny_model), ("tuned", Path(experiment.output_dir) / "model")):
        assert tasks["similar"][name] == pytest.approx(slow_spearman(model), abs=1e-6)
        assert tasks["kinds"][name] == pytest.approx(slow_accuracy(model))
        assert tasks["heaps"][name] == pytest.approx(slow_clustering(model))
    for name, metric, number in (("similar", "spearman", 40), ("kinds", "accuracy", 21), ("heaps", "v_measure", 21)):
        task = tasks[name]
        assert (task["metric"], task["num_texts"]) == (metric, number)
        assert task["base"] != task["tuned"]
        if name != "heaps":
            difference, (low, high) = task["tuned"] - task["base"], task["ci95"]
            assert low < high
            assert abs((low + high) / 2 - difference) < abs(difference), "not that of base minus tuned"
    assert "ci95" not in tasks["heaps"]


def test_each_text_is_encoded_once_a_model(units: list[str]) -> None:
    texts = [-(-number // 16) for number in (40, 21, 30)]  # units of 16; two tasks have the same test file
    assert len(units) == 2 * sum(texts)


def test_nothing_is_done_twice_and_changed_rows_are_noticed(experiment: Experiment, units: list[str]) -> None:
    before = len(units)
    evaluate.run(experiment)
    assert len(units) == before
    assert evaluate.plan(experiment) == (
        "evaluate: task similar (sts, 40 texts to encode), task kinds (classification, 51 texts to encode), task heaps "
        "(clustering, 21 texts to encode); base and tuned (judging tasks holds up to 0.0 MB at once); is up to date"
    )
    assert experiment.evaluate is not None
    file = Path(experiment.evaluate.tasks[1].train[0])
    rows = file.read_text()
    try:
        file.write_text(rows.replace('"label": 2', '"label": 1', 1))
        with pytest.raises(ChangedError, match=r"tasks\.kinds\.train: was \w+, is \w+") as error:
            evaluate.run(experiment)
        assert "similar" not in str(error.value)
    finally:
        file.write_text(rows)
    changes: list[dict[str, Any]] = [{"prompt": "other: "}, {"max_len": 40}, {"classifier": "logistic_regression"}]
    for change in changes:
        changed = [replace(task, **change) if task.name == "kinds" else task for task in experiment.evaluate.tasks]
        with pytest.raises(ChangedError, match=rf"tasks\.kinds\.{next(iter(change))}"):
            evaluate.run(with_tasks(experiment, changed))


def test_tasks_that_moved_are_the_same(experiment: Experiment, units: list[str], tmp_path: Path) -> None:
    before = len(units)
    assert experiment.evaluate is not None
    file = Path(experiment.evaluate.tasks[0].test[0])
    moved = tmp_path / file.name
    moved.write_text(file.read_text())
    first, *others = experiment.evaluate.tasks
    evaluate.run(with_tasks(experiment, [replace(first, test=[str(moved)]), *others]))
    assert len(units) == before


def test_a_row_brings_its_own_prompt(experiment: Experiment, tmp_path: Path) -> None:
    rows = [{**pairs()[0], "prompt": "own: "}, {**pairs()[1], "prompt": ""}, pairs()[2]]
    entry = {"name": "own", "kind": "sts", "test": [write_lines(tmp_path / "rows.jsonl", rows)], "prompt": PROMPT}
    own = with_tasks(experiment, [entry])
    (store,) = task_texts(own, evaluate._data(own).tasks[0])
    found = [(row["text"], row["prompt"]) for part in store.iter_parts() for row in part.to_pylist()]
    assert found == [(row[side], row.get("prompt") or PROMPT) for row in rows for side in ("sentence1", "sentence2")]


def test_a_task_may_keep_fewer_tokens(experiment: Experiment, units: list[str], tiny_model: Path) -> None:
    assert experiment.evaluate is not None
    short = replace(experiment.evaluate.tasks[0], name="short", prompt=None, max_len=8)
    own = with_tasks(experiment, [short])
    task = evaluate._data(own).tasks
    found = judging.evaluate_tasks(own, task, {"base": str(tiny_model)}, num_resamples=10)["short"]["base"]
    of = [vectors(tiny_model, [row[side] for row in pairs()], 8) for side in ("sentence1", "sentence2")]
    wanted = stats.spearmanr(np.sum(of[0] * of[1], axis=1), [row["score"] for row in pairs()]).statistic
    assert found == pytest.approx(float(wanted), abs=1e-6)
    with pytest.raises(ValueError, match=r"max_len of task 'short' is 129, but .* at most 128 tokens"):
        check.run(with_tasks(own, [replace(short, max_len=129)]))


def test_one_model_is_judged_at_a_time_and_pairs_by_parts(
    experiment: Experiment, units: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told of the memory is what is held: one task's vectors, of pairs a part."""
    data, events, held = evaluate._data(experiment), list[str](), list[int]()
    encode, rows = judging.encode_stores, judging.Vectors.rows
    for kind, judge in judging.JUDGES.items():

        def judged(*given: Any, kind: str = kind, judge: Any = judge) -> Any:  # noqa: ANN401 - of a judge
            events.append(kind)
            return judge(*given)

        monkeypatch.setitem(judging.JUDGES, kind, judged)

    def encoded(*given: Any, model: str) -> Any:  # noqa: ANN401 - of encode_stores
        events.append(Path(model).name)
        return encode(*given, model=model)

    def read(self: Any, first: int, last: int) -> Any:  # noqa: ANN401 - of Vectors
        held.append(last - first)
        return rows(self, first, last)

    monkeypatch.setattr(judging, "encode_stores", encoded)
    monkeypatch.setattr(judging.Vectors, "rows", read)
    monkeypatch.setattr(judging, "PAIRS", 3)
    models = evaluate._models(experiment)
    found = judging.evaluate_tasks(experiment, data.tasks, models, num_resamples=100)
    kinds = ["sts", "classification", "clustering"]
    assert events == [name for model in models.values() for name in (Path(model).name, *kinds)]
    assert held == [6, 6, 6, 6, 6, 6, 4] * 2
    before = metrics_of(experiment)["tasks"]
    assert found["similar"]["tuned"] == pytest.approx(before["similar"]["tuned"])
    assert memory(experiment, data.tasks) == 64 * 51 * 8, "two copies in float32 of what the classifier reads"
    assert memory(experiment, data.tasks[:1]) == 64 * 6 * 12, "a part of the pairs, in float32 and float64"


def test_what_is_told_without_retrieval(experiment: Experiment, units: list[str]) -> None:
    out, tasks = Path(experiment.output_dir), metrics_of(experiment)["tasks"]
    told = evaluate.summary(out / "evaluate").split("; ")
    similar = tasks["similar"]
    assert told[0].startswith(f"similar: spearman {similar['base']:.4f} -> {similar['tuned']:.4f} (")
    assert "95 % interval" in told[0]
    assert len(told) == 3
    page = build_report(out, "tasks").read_text()
    assert page.count("this run judges tasks alone") == 2
    assert f"{similar['tuned']:.4f}" in page
    write_lines(out / "train" / "metrics.jsonl", [{"loss": 1.0}])
    card = export.card(experiment, out, "least cosine 1.0")
    assert f"| similar (40 texts) | spearman | {similar['base']:.4f} | {similar['tuned']:.4f} | " in card
    assert f"| {tasks['heaps']['tuned']:.4f} |  |" in card
    assert "Not evaluated yet" not in card
    assert "passages of" not in card


def test_with_retrieval_both_are_judged(
    experiment: Experiment, units: list[str], beir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    assert experiment.evaluate is not None
    both = replace(
        with_tasks(experiment, experiment.evaluate.tasks[:1]),
        output_dir=str(tmp_path / "run"),
        cache_dir=experiment.cache(),
        data=replace(experiment.data, evaluation=str(beir)),
    )
    plan = evaluate.plan(both)
    assert plan.startswith("evaluate: 20 queries against 120 passages (about ")
    assert "task similar (sts, 40 texts to encode); base (judging tasks holds" in plan
    evaluate.run(both)
    metrics = metrics_of(both)
    assert metrics["tasks"]["similar"]["base"] == metrics_of(experiment)["tasks"]["similar"]["base"]
    assert metrics["tasks"]["similar"].keys() == {"kind", "metric", "base", "num_texts"}, "no tuned model is there"
    assert metrics["num_queries"] == 20
    assert evaluate.summary(tmp_path / "run" / "evaluate").startswith("base ndcg@10 ")


BAD: dict[str, tuple[list[dict[str, Any]] | None, str]] = {
    "another kind": ([{"query": "q", "positive": "p"}], r"rows\.jsonl:1: query: is of type normal; allowed: .* class"),
    "a wrong label": (
        [*labelled(3, 4), {"text": "t", "label": [1]}],
        r"rows\.jsonl:5: label: found a list, allowed: a text or a whole number",
    ),
    "one label": (labelled(3, 1), r"rows\.jsonl: task 'own': all 1 rows have the label '0', and two are needed"),
    "a BEIR folder": (
        None,
        r"qrels/train\.tsv:2: query: is of type normal; allowed: rows of type class, with text, label",
    ),
    "no rows": ([], r"rows\.jsonl: evaluate\.tasks: holds no training row"),
    "the rows learned from": (labelled(3, 6), r"rows\.jsonl: task 'own': its train rows are its test rows; give eval"),
    "a label that was never learned": (
        [*labelled(3, 4), {"text": "t", "label": "new"}],
        r"rows\.jsonl: task 'own': its train rows lack 1 labels that 1 test rows have, the first of them 'new'",
    ),
}


@pytest.mark.parametrize("job", [check, evaluate])
@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_refused_before_any_worker_starts(
    experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    beir: Path,
    kind: str,
    job: Any,  # noqa: ANN401
) -> None:
    monkeypatch.setattr("rayembed.jobs.evaluate.ray_session", lambda _: pytest.fail("Ray was started"))
    rows, message = BAD[kind]
    source = str(beir) if rows is None else write_lines(tmp_path / "rows.jsonl", rows)
    entry: dict[str, Any] = {"name": "own", "kind": "clustering", "test": [source]}
    if kind == "the rows learned from":
        entry |= {"kind": "classification", "train": entry["test"]}
    elif "learned" in kind:
        entry |= {"kind": "classification", "train": [write_lines(tmp_path / "train.jsonl", labelled(4, 9))]}
    with pytest.raises(ValueError, match=message):
        job.run(replace(with_tasks(experiment, [entry]), output_dir=str(tmp_path / "run")))


def test_scored_pairs_are_refused_by_file_and_line_too(experiment: Experiment, tmp_path: Path) -> None:
    files = {
        "labels": (labelled(3, 4), r"labels\.jsonl:1: text: is of type class; allowed: .* sts, with sentence1"),
        "constant": ([{**row, "score": 1} for row in pairs()], r"task 'own': the scores of its 20 pairs are all 1, "),
        "missing": (None, r"missing\.jsonl: evaluate\.tasks: there is no such file"),
    }
    for name, (rows, message) in files.items():
        path = tmp_path / f"{name}.jsonl"
        if rows is not None:
            write_lines(path, rows)
        own = with_tasks(experiment, [{"name": "own", "kind": "sts", "test": [str(path)]}])
        with pytest.raises(ValueError, match=message):
            check.run(replace(own, output_dir=str(tmp_path / "run")))


def test_rows_that_were_trained_on_are_refused_as_well(experiment: Experiment, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [{"query": "q", "positive": "p"}])
    own = with_tasks(experiment, [{"name": "own", "kind": "sts", "test": [file]}])
    both = replace(own, output_dir=str(tmp_path / "run"), data=replace(own.data, train=[file]))
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: query: is of type normal"):
        check.run(both)


def test_check_counts_tasks_by_themselves(experiment: Experiment, tmp_path: Path) -> None:
    text = check.run(replace(experiment, output_dir=str(tmp_path / "run"))).read_text()
    assert "tasks: rows " in text
    assert "0 errors" in text
    plan = check.plan(experiment)
    assert "pairs.jsonl" in plan
    assert "0.jsonl" in plan


def test_settings_that_are_refused(make_experiment: MakeExperiment, tiny_reranker: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)
    with pytest.raises(ValueError, match=r"evaluate\.tasks has the names similar, similar; allowed: each once"):
        make_experiment(tmp_path / "run", evaluate={"tasks": tasks[:1] * 2})
    model = {"name_or_path": str(tiny_reranker), "family": "reranker-encoder", "pooling": None}
    with pytest.raises(ValueError, match=r"evaluate\.tasks are of embedders, and a reranker-encoder has no vectors"):
        make_experiment(tmp_path / "run", model=model, evaluate={"tasks": tasks, "retriever": "any"}, train=TRAIN)
