"""Models that are used as they are: rerankers in evaluation and as teachers, decoders that find, mine or teach."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rayembed.config import Experiment
from rayembed.config.model import ModelConfig
from rayembed.data.prepare import prepare
from rayembed.data.store import Store
from rayembed.jobs import check, evaluate, score, train
from rayembed.jobs.miner import miner, with_embedder
from rayembed.jobs.pairs import score_pairs
from rayembed.jobs.rerank import base_of, check_rerankers, check_retriever, pair_scores, retriever
from rayembed.jobs.teacher import embedding_teacher, teacher_reads
from rayembed.jobs.vectors import Wanted, encode_stores, encoding_reads
from rayembed.models.encoding import encode
from rayembed.models.loading import load_embedder, tokenizer_of
from rayembed.models.settings_file import write_settings
from tests.jobs.conftest import TRAIN, MakeExperiment
from tests.jobs.reference_ranking import vectors
from tests.jobs.toy_pairs import write_source
from tests.jobs.without_ray import do_units_here
from tests.models.tiny_decoders import qwen_tokenizer, save_decoder

QUERIES, PASSAGES = ["ab cd", "abc" * 9], ["one two", "xyz" * 12, "q" * 7]  # a token a letter
LONG_QUERY, LONG_PASSAGE, WHOLE = 8 + 20 // 4, 20 + 8 // 2, 28
TRAINED = {"query_max_len": 8, "passage_max_len": 20}


def reranking(make_experiment: MakeExperiment, out: Path, base: Path, found_by: Path, **sections: Any) -> Experiment:  # noqa: ANN401
    """An experiment that trains a cross-encoder on short pairs."""
    own = {"name_or_path": str(base), "family": "reranker-encoder", "pooling": None, **sections.pop("model", {})}
    return make_experiment(out, model=own, data=TRAINED, evaluate={"retriever": str(found_by)}, **sections)


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Store, Store]:
    """Queries and passages of which some are cut."""
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("queries", QUERIES), ("corpus", PASSAGES)):
        lines = [json.dumps({"_id": f"{name}{i}", "text": text, "title": ""}) for i, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nqueries0\tcorpus0\t1\nqueries1\tcorpus1\t1\n"
    )
    data: Any = {"evaluation": str(folder)}
    made = Experiment(output_dir=str(tmp_path / "prepared"), model=ModelConfig(name_or_path="unused"), data=data)
    evaluation = prepare(made, rows=False, corpus=False).evaluation
    assert evaluation is not None
    return evaluation.queries, evaluation.corpus


@torch.inference_mode()
def as_trained(folder: Path, query: str, passage: str) -> float:
    """By transformers, the pair cut by the words of the card."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    asked = tokenizer(query, add_special_tokens=False)["input_ids"][:LONG_QUERY]
    read = tokenizer(passage, add_special_tokens=False)["input_ids"][: min(LONG_PASSAGE, WHOLE - 3 - len(asked))]
    ids = [tokenizer.cls_token_id, *asked, tokenizer.sep_token_id, *read, tokenizer.sep_token_id]
    return float(model(input_ids=torch.tensor([ids])).logits)


def test_evaluation_and_a_teacher_read_long_pairs_as_training_did(
    make_experiment: MakeExperiment,
    tiny_reranker: Path,
    tiny_model: Path,
    stores: tuple[Store, Store],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    do_units_here(monkeypatch)
    told = {"query_instruction_for_retrieval": "a", "query_instruction_format": "{}{} !"}
    experiment = reranking(make_experiment, tmp_path / "run", tiny_reranker, tiny_model, model=told)
    texts = [(f"a{query} !", passage) for query in QUERIES for passage in PASSAGES]
    expected = [as_trained(tiny_reranker, *pair) for pair in texts]
    candidates = [np.arange(len(PASSAGES))] * len(QUERIES)
    found = pair_scores(experiment, str(tiny_reranker), *stores, candidates)
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5)

    folder = shutil.copytree(tiny_reranker, tmp_path / "trained")
    write_settings(experiment, folder)
    pairs = [(query, passage) for query in QUERIES for passage in PASSAGES]
    np.testing.assert_allclose(taught(make_experiment, tmp_path / "by file", folder, pairs), expected, atol=1e-5)
    (folder / "rayembed.json").unlink()  # a foreign one is cut by score.max_len, and told no instruction
    other = taught(make_experiment, tmp_path / "foreign", folder, texts, max_len=WHOLE)
    same = [abs(a - b) < 1e-5 for a, b in zip(other, expected, strict=True)]
    assert same == [True, True, True, False, False, False], "it keeps more of a long query"


def taught(
    make_experiment: MakeExperiment,
    out: Path,
    teacher: Path,
    pairs: list[tuple[str, str]],
    **settings: Any,  # noqa: ANN401
) -> list[float]:
    """Scores of a teacher, in the order of the pairs."""
    experiment = make_experiment(out, score={"model": str(teacher), **settings})
    out.mkdir()
    known = score_pairs(experiment, write_source(out / "pairs.json", [pairs]), what="score")
    found: list[float] = known.lookup(pairs).tolist()
    return found


def test_what_pairs_are_read_with_names_the_cache(
    make_experiment: MakeExperiment, tiny_reranker: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_reranker, tmp_path / "trained")
    foreign = teacher_reads(make_experiment(tmp_path / "run", score={"model": str(folder)}))
    assert {*foreign} == {
        *("kind", "weights", "max_len", "dtype", "use_gpu", "tokens_per_batch"),
        *("query_instruction_for_rerank", "passage_instruction_for_rerank"),
    }
    assert foreign["max_len"] == 512
    own = {"query_instruction_for_retrieval": "a", "query_instruction_format": "{}{} !"}
    write_settings(reranking(make_experiment, tmp_path / "run", tiny_reranker, tiny_model, model=own), folder)
    trained = teacher_reads(make_experiment(tmp_path / "run", score={"model": str(folder)}))
    assert trained["weights"] != foreign["weights"]
    assert (trained["max_len"], trained["trained"], trained["formats"]) == (28, [8, 20], ["{}{} !", "{}{}"])


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal embedder of others, whose tokenizer ends no text, with sentence-transformers files."""
    folder = save_decoder(tmp_path_factory.mktemp("decoder") / "model", qwen_tokenizer())
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Normalize")]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def by_family_decoder(folder: Path, texts: list[str]) -> NDArray[np.float32]:
    config = ModelConfig(name_or_path=str(folder), family="decoder")
    model, tokenizer = load_embedder(config), tokenizer_of(config)
    return encode(model, tokenizer, texts, max_len=100, tokens_per_batch=4096, dtype=torch.float32)


AS: dict[str, Callable[[Experiment], Experiment]] = {
    "retriever": retriever,
    "miner": miner,
    "teacher": embedding_teacher,
}


@pytest.mark.parametrize("role", AS)
def test_a_decoder_is_read_as_one_wherever_it_is_used(
    role: str,
    make_experiment: MakeExperiment,
    tiny_reranker: Path,
    decoder: Path,
    stores: tuple[Store, Store],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    do_units_here(monkeypatch)
    lengths = {"encode": {"query_max_len": 100, "passage_max_len": 100}}
    uses = {"mine": {"model": str(decoder)}, "score": {"model": str(decoder), "kind": "embedder"}}
    made = reranking(make_experiment, tmp_path / "run", tiny_reranker, decoder, **lengths, **uses)
    queries, corpus = stores
    asked = AS[role](made)
    assert asked.model.family == "decoder"
    for store, side, texts in ((queries, "query", QUERIES), (corpus, "passage", PASSAGES)):
        (found,) = encode_stores(asked, [Wanted(store, side)])
        np.testing.assert_allclose(found.take(np.arange(len(texts))), by_family_decoder(decoder, texts), atol=1e-5)


def test_a_decoder_that_teaches_gives_its_inner_products(
    make_experiment: MakeExperiment, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do_units_here(monkeypatch)
    pairs = list(zip(["a", "ab cd"], ["b cd", "x y z"], strict=True))
    queries, passages = (by_family_decoder(decoder, list(texts)) for texts in zip(*pairs, strict=True))
    found = taught(make_experiment, tmp_path / "run", decoder, pairs, kind="embedder", max_len=100)
    np.testing.assert_allclose(found, np.sum(queries * passages, axis=1), atol=1e-5)


def test_a_miner_comes_with_what_its_file_says(make_experiment: MakeExperiment, decoder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(decoder, tmp_path / "icl")
    own = {"name_or_path": str(decoder), "family": "icl", "query_instruction_for_retrieval": "find", "pooling": None}
    write_settings(make_experiment(tmp_path / "run", model=own, icl={"icl_suffix_str": " ="}), folder)
    found = miner(make_experiment(tmp_path / "run", mine={"model": str(folder)}))
    assert found.icl is not None
    assert (found.icl.icl_suffix_str, found.model.family, found.model.pooling) == (" =", "icl", "last_token")
    assert found.model.query_instruction_for_retrieval == "find"
    trained = make_experiment(tmp_path / "run", model=own, icl={}, mine={"model": str(decoder)})
    assert (miner(trained).icl, miner(trained).model.family) == (None, "decoder")
    assert with_embedder(trained, ModelConfig(name_or_path=str(decoder))).icl is None


@pytest.mark.parametrize("role", AS)
def test_an_embedder_that_was_trained_here_reads_texts_of_its_own_lengths(
    role: str,
    make_experiment: MakeExperiment,
    tiny_reranker: Path,
    tiny_model: Path,
    stores: tuple[Store, Store],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    do_units_here(monkeypatch)
    folder, (queries, corpus) = shutil.copytree(tiny_model, tmp_path / "trained"), stores
    own = {"model": {"pooling": "mean"}, "data": {"query_max_len": 6, "passage_max_len": 15}}
    write_settings(make_experiment(tmp_path / "run", **own), folder)

    def made(**encode: int) -> Experiment:
        uses = {"mine": {"model": str(folder)}, "score": {"model": str(folder), "kind": "embedder"}}
        return reranking(make_experiment, tmp_path / "run", tiny_reranker, folder, **uses, encode=encode)

    asked = AS[role](made())
    assert encoding_reads(asked)["max_len"] == [6, 15]
    for store, side, texts, length in ((queries, "query", QUERIES, 6), (corpus, "passage", PASSAGES, 15)):
        (found,) = encode_stores(asked, [Wanted(store, side)])
        expected = vectors(tiny_model, texts, length)
        np.testing.assert_allclose(found.take(np.arange(len(texts))), expected, atol=1e-5)
    told = AS[role](made(query_max_len=9))
    assert encoding_reads(told)["max_len"] == [9, 15]


def test_an_embedder_that_teaches_reads_passages_of_its_own_length(
    make_experiment: MakeExperiment, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do_units_here(monkeypatch)
    folder = shutil.copytree(tiny_model, tmp_path / "trained")
    own = {"model": {"pooling": "mean"}, "data": {"query_max_len": 6, "passage_max_len": 15}}
    write_settings(make_experiment(tmp_path / "run", **own), folder)
    pairs = [(query, passage) for query in QUERIES for passage in PASSAGES]
    cases: list[tuple[dict[str, Any], int]] = [({}, 15), ({"max_len": 30}, 30)]
    for settings, length in cases:
        out = tmp_path / f"run-{length}"
        found = taught(make_experiment, out, folder, pairs, **settings)
        sides = ([query for query, _ in pairs], 6), ([passage for _, passage in pairs], length)
        queries, passages = (vectors(tiny_model, texts, number) for texts, number in sides)
        np.testing.assert_allclose(found, np.sum(queries * passages, axis=1), atol=1e-5)
        reads = teacher_reads(make_experiment(out, score={"model": str(folder), **settings}))
        assert (reads["query_max_len"], reads["max_len"]) == (6, length)


def test_a_retriever_that_is_none_is_refused_before_any_work(
    make_experiment: MakeExperiment, tiny_reranker: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def made(found_by: Path, **sections: Any) -> Experiment:  # noqa: ANN401 - what YAML may hold
        return reranking(make_experiment, tmp_path / "run", tiny_reranker, found_by, **sections)

    check_retriever(made(tiny_model))
    for job in (check, evaluate):
        with pytest.raises(FileNotFoundError, match=r"model '/nowhere/such': no checkpoint found"):
            job.run(made(Path("/nowhere/such")))
        with pytest.raises(
            ValueError, match=r"evaluate\.retriever .* is a classifier of pairs .* set it to an embedder"
        ):
            job.run(made(tiny_reranker))
        with pytest.raises(ValueError, match=r"encode\.query_max_len is 129, but .* at most 128 tokens"):
            job.run(made(tiny_model, encode={"query_max_len": 129}))
    assert not (tmp_path / "run" / "evaluate").exists()


@pytest.fixture
def two_labels(tiny_reranker: Path, tmp_path: Path) -> Path:
    """A classifier that is no reranker."""
    folder = shutil.copytree(tiny_reranker, tmp_path / "two")
    settings = json.loads((folder / "config.json").read_text())
    labels = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    (folder / "config.json").write_text(json.dumps({**settings, **labels}))
    return folder


def test_a_reranker_that_cannot_score_is_refused_before_anything_is_encoded(
    make_experiment: MakeExperiment, two_labels: Path, tiny_reranker: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        done = do_units_here(patch)
        patch.setattr(score, "ray_session", lambda _: pytest.fail("Ray was started"))
        judged = reranking(make_experiment, tmp_path / "run", two_labels, tiny_model)
        long = reranking(make_experiment, tmp_path / "run", tiny_reranker, tiny_model)
        long = replace(long, data=replace(long.data, passage_max_len=125))
        scored = make_experiment(tmp_path / "run", score={"model": str(two_labels), "max_len": 64})
        for job in (check, evaluate):
            with pytest.raises(
                ValueError, match=r"two has 2 labels, and a reranker has one .* set model\.name_or_path"
            ):
                job.run(judged)
            with pytest.raises(ValueError, match=r"data\.query_max_len \+ data\.passage_max_len is 133, but"):
                job.run(long)
        for job in (check, score):
            with pytest.raises(ValueError, match=r"two has 2 labels, and a reranker has one score; set score\.model"):
                job.run(scored)
    assert done == []
    fine = reranking(make_experiment, tmp_path / "run", tiny_model, tiny_model)  # it gets a head in training
    check_rerankers(fine, [base_of(fine)])


def test_a_classifier_of_several_labels_is_refused_before_a_worker_starts(
    make_experiment: MakeExperiment, two_labels: Path, tiny_reranker: Path, tiny_model: Path, tmp_path: Path
) -> None:
    told: dict[str, Any] = {"train": {**TRAIN, "temperature": None}}
    train.check_model(reranking(make_experiment, tmp_path / "run", tiny_reranker, tiny_model, **told))
    train.check_model(reranking(make_experiment, tmp_path / "run", tiny_model, tiny_model, **told))
    refused = reranking(make_experiment, tmp_path / "run", two_labels, tiny_model, **told)
    with pytest.raises(
        ValueError, match=f"{re.escape(str(two_labels))} is a classifier of 2 labels; a reranker has one"
    ):
        train.check_model(refused)


def test_rounds_are_not_for_rerankers(
    make_experiment: MakeExperiment, tiny_reranker: Path, tiny_model: Path, tmp_path: Path
) -> None:
    told: dict[str, Any] = {"train": {**TRAIN, "temperature": None}}
    once = {"mine": {"model": str(tiny_model), "rounds": 1}}
    reranking(make_experiment, tmp_path / "run", tiny_reranker, tiny_model, **told, **once)
    twice = {"mine": {"model": str(tiny_model), "rounds": 2}}
    with pytest.raises(
        ValueError, match=r"mine\.rounds is 2, .* reranker-encoder has no vectors .* set mine\.rounds: 1"
    ):
        reranking(make_experiment, tmp_path / "run", tiny_reranker, tiny_model, **told, **twice)
