"""Settings that cannot be had together are refused with the reason, and those next to them are not."""

from typing import Any

import pytest
from pydantic import ValidationError

from rayembed.config import Experiment

BASE = {"name_or_path": "base"}


def experiment(**sections: Any) -> Experiment:  # noqa: ANN401 - what YAML may hold
    return Experiment(**{"output_dir": "run", "model": BASE, **sections})


def of(family: str, **settings: Any) -> dict[str, Any]:  # noqa: ANN401
    return {**BASE, "family": family, **settings}


RERANKER = {"model": of("reranker-encoder"), "evaluate": {"retriever": "other"}}
REFUSED: list[tuple[dict[str, Any], str, dict[str, Any]]] = [  # what is refused, why, and what makes it right
    ({"m3": {}}, "section m3 is for model.family m3, and this one is encoder", {"model": of("m3")}),
    ({"lora": {}}, "section lora is for model.family decoder and icl and reranker-decoder", {"model": of("icl")}),
    ({"icl": {}}, "section icl is for model.family icl", {"model": of("icl")}),
    ({"reranker": {}}, "section reranker is for model.family reranker-encoder", {"model": of("reranker-decoder")}),
    ({"model": of("m3", bidirectional=True)}, "model.bidirectional is for", {"model": of("icl", bidirectional=True)}),
    (
        {"model": of("encoder", additional_special_tokens=["<q>"])},
        "model.additional_special_tokens are for",
        {"model": of("decoder", additional_special_tokens=["<q>"])},
    ),
    (
        {"model": of("reranker-encoder"), "mine": {}},
        "has no vectors to mine with; set mine.model",
        {"mine": {"model": "other"}},
    ),
    ({"model": of("reranker-encoder"), "evaluate": {}}, "a reranker orders what another finds", RERANKER),
    ({"evaluate": {"retriever": "other"}}, "evaluate.retriever is other .*set it to null", {"evaluate": {}}),
    (
        {**RERANKER, "evaluate": {"retriever": "other", "tasks": [{"name": "a", "kind": "sts", "test": ["x"]}]}},
        "evaluate.tasks are of embedders",
        RERANKER,
    ),
    (
        {
            "model": of("icl"),
            "data": {"length_grouping": True, "batch_size_by_length": [{"max_len": 9, "batch_size": 2}]},
        },
        "data.batch_size_by_length counts the tokens of queries without their examples",
        {"icl": {"max_examples": 0}},
    ),
    (
        {"model": of("icl"), "train": {"guide_model": "other", "false_negative_margin": 0}},
        "train.guide_model would read examples and suffix",
        {"model": of("decoder")},
    ),
    ({"train": {"eval_steps": 5}}, "data.evaluation is null; set it to a BEIR folder", {"data": {"evaluation": "b"}}),
    (
        {**RERANKER, "data": {"evaluation": "b"}, "train": {"eval_steps": 5}},
        "a reranker-encoder has no vectors to rank passages by",
        {"train": {"eval_steps": None}},
    ),
    *(
        (
            {"data": {"evaluation": "b"}, "train": {name: value}},
            f"train.{name} is of evaluations during training, and train.eval_steps is null",
            {"train": {name: value, "eval_steps": 5}},
        )
        for name, value in (
            ("eval_passages", 100),
            ("eval_queries", 10),
            ("early_stopping_patience", 2),
            ("load_best_model_at_end", True),
        )
    ),
    (
        {"train": {"metric_for_best_model": "loss"}},
        "should match pattern",
        {"train": {"metric_for_best_model": "mrr@1"}},
    ),
    ({"train": {"loss_type": "pointwise_bce"}}, "pointwise_bce is of rerankers", {"model": of("reranker-encoder")}),
    (
        {"model": of("m3"), "train": {"loss_type": "improved_info_nce"}},
        "one vector",
        {"m3": {"unified_finetuning": False}},
    ),
    (
        {"train": {"loss_type": "symmetric_info_nce", "no_in_batch_neg": True}},
        "compares with other rows",
        {"train": {"no_in_batch_neg": True}},
    ),
    (
        {"train": {"loss_type": "symmetric_info_nce", "knowledge_distillation": True}},
        "learns from no teacher",
        {"train": {"knowledge_distillation": True}},
    ),
    ({"model": of("reranker-encoder"), "train": {"mrl_dims": [8]}}, "train.mrl_dims shortens", {"model": of("m3")}),
    (
        {"model": of("reranker-encoder"), "train": {"false_negative_margin": 0}},
        "train.false_negative_margin is of embedders",
        {"model": of("decoder")},
    ),
    (
        {"train": {"guide_model": "other"}},
        "train.guide_model needs train.false_negative_margin",
        {"train": {"guide_model": "other", "false_negative_margin": 0}},
    ),
    (
        {"train": {"false_negative_margin": 0, "no_in_batch_neg": True}},
        "train.false_negative_margin looks at other rows",
        {"train": {"false_negative_margin": 0}},
    ),
    (
        {"train": {"false_negative_margin": 0, "knowledge_distillation": True, "kd_loss_type": "margin_mse"}},
        "train.false_negative_margin has no effect on kd_loss_type margin_mse",
        {"train": {"false_negative_margin": 0, "knowledge_distillation": True, "kd_loss_type": "m3_kd_loss"}},
    ),
    (
        {"model": of("reranker-encoder"), "train": {"loss_type": "pointwise_bce", "kd_loss_type": "m3_kd_loss"}},
        "train.kd_loss_type m3_kd_loss is none of pointwise_bce",
        {"train": {"loss_type": "pointwise_bce"}},
    ),
    (
        {"model": of("m3"), "m3": {"flops_weight": 0.1, "unified_finetuning": False}, "train": {}},
        "m3.flops_weight needs m3.unified_finetuning",
        {"m3": {"flops_weight": 0.1}},
    ),
    (
        {"model": of("m3"), "m3": {"fix_encoder": True, "unified_finetuning": False}},
        "leaves nothing to train",
        {"m3": {"fix_encoder": True}},
    ),
    (
        {"train": {"global_batch_size": 3}, "ray": {"num_workers": 2}},
        "not a multiple of ray.num_workers 2",
        {"ray": {}},
    ),
    ({"train": {"fp16": True}}, "train.fp16 needs a GPU", {"ray": {"use_gpu": True}}),
    ({"train": {"bf16": True, "fp16": True}, "ray": {"use_gpu": True}}, "both true", {"train": {"bf16": True}}),
    (
        {"train": {"sub_batch_size": 8, "tokens_per_chunk": 512}},
        "both say how large a chunk is",
        {"train": {"tokens_per_chunk": 512}},
    ),
    ({"mine": {"rounds": 2}}, "nothing is trained between them", {"train": {}}),
    (
        {"model": of("reranker-encoder"), "mine": {"rounds": 2, "model": "other"}, "train": {}},
        "has no vectors to mine with, and mine.model would find the same again",
        {"mine": {"model": "other"}},
    ),
    ({"mine": {"denoise": True}}, "mine.denoise needs a teacher", {"score": {"model": "teacher"}}),
    ({"mine": {"pooling": "mean"}}, "mine.pooling is of mine.model", {"mine": {"pooling": "mean", "model": "other"}}),
]


@pytest.mark.parametrize(("given", "reason", "change"), REFUSED, ids=[reason[:48] for _, reason, _ in REFUSED])
def test_what_cannot_be_had_together_is_refused(given: dict[str, Any], reason: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=reason):
        experiment(**given)
    experiment(**{**given, **change})


def test_sections_of_a_family_are_in_force_without_being_written() -> None:
    assert [*experiment(model=of("m3")).family_sections()] == ["m3"]
    assert [*experiment(model=of("icl"), lora={}).family_sections()] == ["lora", "icl"]
    assert experiment(model=of("icl")).family_sections() == experiment(model=of("icl"), icl={}).family_sections()
    assert experiment().family_sections() == {}
