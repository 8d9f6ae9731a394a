"""What the sections say: the headline's verdict, tables, training facts, queries won and lost."""

import copy
import math
from typing import Any

import pytest

from rayembed.report.evaluation import (
    SHOWN,
    examples,
    head_rows,
    headline,
    metric_rows,
    other_facts,
    similarity_rows,
    task_rows,
)
from rayembed.report.rendering import counts_tables
from rayembed.report.training import training_section

TEST = {
    "metric": "ndcg@10",
    "base": 0.5,
    "tuned": 0.55,
    "difference": 0.05,
    "p_value": 0.01,
    "ci95": [0.02, 0.08],
    "wins": 1200,
    "ties": 5,
    "losses": 7,
    "num_queries": 1212,
}


def query_row(query_id: str, base: float, tuned: float) -> dict[str, Any]:
    return {"query_id": query_id, "query": query_id, "base": base, "tuned": tuned, "positives": ["a", "b", "c"]}


def test_headline_says_what_went_from_what_to_what() -> None:
    assert headline({"significance": TEST}).sentence == (
        "nDCG@10 rose from 0.5000 to 0.5500 (+0.0500; 95 % interval +0.0200 to +0.0800; p = 0.01): "
        "the tuned model won 1,200 of 1,212 queries, lost 7 and tied 5."
    )


@pytest.mark.parametrize(
    ("difference", "p_value", "verdict", "verb"),
    [
        (0.05, 0.049, "better", "rose"),
        (-0.05, 0.049, "worse", "fell"),
        (0.05, 0.05, "unclear", "rose"),
        (0, 1, "unclear", "stayed"),
    ],
)
def test_verdict_needs_significance(difference: float, p_value: float, verdict: str, verb: str) -> None:
    found = headline({"significance": TEST | {"difference": difference, "p_value": p_value}})
    assert found.verdict == verdict
    assert f"nDCG@10 {verb} " in found.sentence
    assert ("may be chance" in found.sentence) == (verdict == "unclear")


@pytest.mark.parametrize("metrics", [None, {"base": {}}])
def test_headline_without_a_test_claims_nothing(metrics: dict[str, Any] | None) -> None:
    assert headline(metrics).verdict == "unknown"


def test_every_metric_of_either_model_has_a_row() -> None:
    metrics = {
        "base": {"recall@10": 0.5, "ndcg@10": 0.2, "ndcg@5": 0.0, "recall@5": 0.1},
        "tuned": {"ndcg@10": 0.25, "ndcg@5": 0.1, "own@3": 0.3},
        "significance": TEST,
        "num_queries": 1212,
    }
    rows = metric_rows(metrics)
    assert [row.label for row in rows] == ["nDCG@5", "nDCG@10", "Recall@5", "Recall@10", "own@3"]
    assert [row.difference for row in rows] == ["+0.1000", "+0.0500", "–", "–", "–"]  # noqa: RUF001
    assert [row.relative for row in rows] == ["–", "+25.0 %", "–", "–", "–"]  # noqa: RUF001
    assert [row.tested for row in rows] == [False, True, False, False, False]
    assert other_facts(metrics) == [("num queries", "1,212")]


TASKS: dict[str, Any] = {
    "pairs": {
        "kind": "sts",
        "metric": "spearman",
        "base": 0.7,
        "tuned": 0.75,
        "ci95": [-0.01, 0.11],
        "num_texts": 2000,
    },
    "heaps": {"kind": "clustering", "metric": "v_measure", "base": 0.5, "tuned": 0.4, "num_texts": 21},
    "alone": {"kind": "classification", "metric": "accuracy", "base": 0.25, "num_texts": 3},
}


def test_every_task_has_a_row() -> None:
    first, second, third = task_rows({"tasks": TASKS})
    assert (first.name, first.kind, first.metric, first.texts) == ("pairs", "sts", "Spearman's correlation", "2,000")
    assert (first.base, first.tuned, first.difference) == ("0.7000", "0.7500", "+0.0500")
    assert first.interval == "\N{MINUS SIGN}0.0100 to +0.1100"
    assert (second.metric, second.difference, second.interval) == ("v-measure", "\N{MINUS SIGN}0.1000", "–")  # noqa: RUF001
    assert (third.base, third.tuned, third.difference, third.interval) == ("0.2500", "–", "–", "–")  # noqa: RUF001
    assert task_rows({"base": {}}) == []


def test_heads_have_a_row_each_by_the_tested_metric() -> None:
    means = {"dense": {"ndcg@10": 0.5, "ndcg@1": 0.1}, "weighted_sum": {"ndcg@10": 0.6, "ndcg@1": 0.2}}
    rows = head_rows({"metric": "ndcg@10", "heads": {"tuned": means, "base": {"dense": {"ndcg@10": 0.4}}}})
    assert [(row.label, row.base, row.tuned, row.difference, row.relative) for row in rows] == [
        ("dense", "0.4000", "0.5000", "+0.1000", "+25.0 %"),
        ("weighted sum", "–", "0.6000", "–", "–"),  # noqa: RUF001
    ]
    assert head_rows({"metric": "ndcg@10", "base": {}}) == []


def test_tasks_and_heads_are_no_facts() -> None:
    assert other_facts({"tasks": TASKS, "heads": {"base": {}}, "num_queries": 3}) == [("num queries", "3")]


def test_headline_of_tasks_alone_names_each() -> None:
    found = headline({"tasks": TASKS})
    assert (found.verdict, found.badge) == ("unknown", "tasks alone")
    assert found.sentence == (
        "pairs: Spearman's correlation 0.7000 → 0.7500; heaps: v-measure 0.5000 → 0.4000; alone: accuracy 0.2500. "
        "No retrieval was judged."
    )
    with_retrieval = headline({"tasks": TASKS, "base": {"ndcg@10": 0.5}, "significance": TEST})
    assert with_retrieval == headline({"significance": TEST})
    assert headline({"tasks": TASKS, "base": {"ndcg@10": 0.5}}).badge == "not tested"


def test_similarities_have_a_column_a_model() -> None:
    side = {"mean": 0.5, "std": 0.125}
    summary = {"auc": 0.9, "overlap": 0.25, "gap": 0.1, "positives": side, "negatives": side}
    rows = {name: values for name, _, values in similarity_rows({"base": summary, "tuned": summary | {"auc": 0.95}})}
    assert rows["AUC"] == ["0.900", "0.950"]
    assert rows["negatives, standard deviation"] == ["0.125", "0.125"]


def test_examples_are_those_won_and_lost_most() -> None:
    rows = [query_row(f"q{number:02}", 0.5, 0.5 + (number - 20) / 100) for number in range(35)]
    found = examples(lambda: iter(rows))
    assert found is not None
    assert [entry.query_id for entry in found.won] == [f"q{number:02}" for number in range(34, 34 - SHOWN, -1)]
    assert [entry.query_id for entry in found.lost] == [f"q{number:02}" for number in range(SHOWN)]
    assert (found.lost[0].base, found.lost[0].tuned, found.lost[0].difference) == ("0.500", "0.300", "\u22120.200")
    assert (found.lost[0].positive, found.lost[0].more_positives) == ("a", 2)
    assert found.lost[0].tops == [("base", None), ("tuned", None)]


def test_ties_are_neither_won_nor_lost_and_equal_differences_go_by_id() -> None:
    rows = [query_row("b", 0, 1), query_row("tie", 1, 1), query_row("a", 0, 1)]
    found = examples(lambda: iter(rows))
    assert found is not None
    assert [entry.query_id for entry in found.won] == ["a", "b"]
    assert found.lost == []


def test_no_rows_no_examples() -> None:
    assert examples(lambda: iter([])) is None


def training_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": 1 / step, "seconds": 2.0, "queries_per_second": step} for step in range(1, count + 1)
    ]


def test_training_facts_are_of_the_steps() -> None:
    section = training_section(training_rows(40))
    assert section is not None
    facts = dict(section.facts)
    first, last = (sum(1 / step for step in steps) / 10 for steps in (range(1, 11), range(31, 41)))
    assert facts["steps"] == "40"
    assert facts["loss, mean of first and last 10 steps"] == f"{first:.4f} → {last:.4f}"
    assert facts["time in steps"] == "1 min 20 s"
    assert facts["queries a second, median"] == "20.5"
    assert [panel.title for panel in section.panels] == ["Loss", "Queries a second"]
    assert section.note == ""


def test_a_step_that_ran_again_counts_once_as_it_ran_last() -> None:
    rows = training_rows(3)
    again = [*copy.deepcopy(rows[1:]), {"step": 4, "loss": 9.0}]
    section = training_section(rows + again)
    assert section is not None
    facts = dict(section.facts)
    assert facts["steps"] == "4"
    assert facts["steps run again after a restart"] == "2"
    assert facts["time in steps"] == "6.0 s"


def test_steps_with_alarms_are_counted_by_name() -> None:
    rows = training_rows(4)
    rows[1]["alarms"], rows[3]["alarms"] = ["zero_loss"], ["score_collapse", "zero_loss"]
    section = training_section(rows)
    assert section is not None
    alarms = [fact for fact in section.facts if "alarm" in fact[0]]
    assert alarms == [("steps with alarm score collapse", "1"), ("steps with alarm zero loss", "2")]


def test_steps_are_drawn_in_their_order() -> None:
    ordered, shuffled = training_section(training_rows(30)), training_section(training_rows(30)[::-1])
    assert ordered == shuffled


def test_steps_that_are_not_finite_are_left_out_and_counted() -> None:
    rows = training_rows(5)
    rows[2]["loss"] = math.inf
    rows[3]["loss"] = math.nan
    section = training_section(rows)
    assert section is not None
    assert "2 steps that are not finite are left out" in section.panels[0].caption
    assert "over 3 steps" in section.panels[0].image


def test_long_runs_say_that_lines_are_means() -> None:
    section = training_section(training_rows(500))
    assert section is not None
    assert "about 2.5 steps" in section.note


def evaluation(step: int, value: float, **more: object) -> dict[str, Any]:
    words = "20 queries of split dev against all 120 passages"
    return {"step": step, "eval": {"ndcg@10": value, "mrr@10": 0.5}, "metric": "ndcg@10", "of": words, **more}


def test_the_dev_metric_is_a_curve_beside_the_loss() -> None:
    lines = [evaluation(0, 0.5), evaluation(4, 0.7), evaluation(2, 0.6), evaluation(6, 0.7)]
    section = training_section(training_rows(6), lines)
    assert section is not None
    assert [panel.title for panel in section.panels] == ["Loss", "nDCG@10 on the dev split", "Queries a second"]
    assert section.panels[1].caption == "20 queries of split dev against all 120 passages"
    assert "over 4 evaluations, from 0.5 to 0.7" in section.panels[1].image
    facts = dict(section.facts)
    assert facts["dev nDCG@10, first, best and last"] == "0.5000 (step 0) → 0.7000 (step 4) → 0.7000 (step 6)"
    assert "stopped early" not in facts
    assert "the model is that of" not in facts


def test_evaluations_of_other_texts_are_not_drawn_beside_the_last_ones() -> None:
    lines = [evaluation(0, 0.9, of="200 of 3,600 passages"), evaluation(2, 0.6), evaluation(4, 0.7)]
    section = training_section(training_rows(4), lines)
    assert section is not None
    assert "over 2 evaluations, from 0.6" in section.panels[1].image


@pytest.mark.parametrize(("step", "words"), [(2, "step 2"), (0, "no step: the base model was the best")])
def test_the_report_says_which_step_the_model_is_of_and_that_training_stopped_early(step: int, words: str) -> None:
    lines = [evaluation(0, 0.5), evaluation(2, 0.7), evaluation(4, 0.6, stopped_early=True, model_step=step)]
    section = training_section(training_rows(4), lines)
    assert section is not None
    facts = dict(section.facts)
    assert facts["stopped early"].startswith("after step 4")
    assert facts["the model is that of"] == words


def test_counts_are_one_table_a_level() -> None:
    stats = {"num_rows": 1000, "dropped": {"is_query": 3, "deep": {"a": 1}}, "model": "m"}
    assert counts_tables(stats) == [
        ("", [("num rows", "1,000"), ("model", "m")]),
        ("dropped", [("is query", "3"), ("deep", '{"a": 1}')]),
    ]
    assert counts_tables(None) is None
    assert counts_tables({}) == []
