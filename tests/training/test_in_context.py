"""Queries of a batch after in-context examples: by hand, on any number of workers, and as FlagEmbedding puts them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.families import IclConfig
from rayembed.config.model import ModelConfig
from rayembed.config.train import TrainConfig
from rayembed.data.datasets import read_datasets
from rayembed.data.in_context import draw_examples
from rayembed.data.mixing import batch_plan
from rayembed.data.plan import choose_group
from rayembed.data.store import ROWS, StoreWriter
from rayembed.data.tasks import CLASS
from rayembed.data.tokens import TokenStore, write_tokens
from rayembed.models.decoders import append_eos
from rayembed.models.encoding import tokenize
from rayembed.models.in_context import QueryReader
from rayembed.training.batches import BatchSource
from rayembed.training.in_context import InContext
from tests.models.tiny_decoders import llama3_tokenizer
from tests.training.made_batches import source_of
from tests.training.test_batches import texts

SUFFIX, BATCH = ".to,", 4
TOKENIZER = append_eos(llama3_tokenizer())
MODEL = ModelConfig(name_or_path="none", family="icl", query_instruction_for_retrieval="Find. ")
LETTERS = "abcdefghijkl"


def row(letter: str, dataset: str, kind: str | None, **columns: Any) -> dict[str, Any]:  # noqa: ANN401 - of a row
    pos = columns.get("pos", [])
    empty = {"pos": [], "pos_ids": [f"{dataset}{letter}{i}" for i in range(len(pos))], "neg": [], "neg_ids": []}
    return {"query_id": dataset + letter, "dataset": dataset, "type": kind, "query": f"q {letter}", **empty, **columns}


def rows_of_kinds() -> list[dict[str, Any]]:
    """12 rows of each kind."""
    made = []
    for letter in LETTERS:
        negatives = {"neg": [f"wrong {letter}", f"worse {letter}"], "neg_ids": [f"w{letter}", f"v{letter}"]}
        made.append(row(letter, "find", None, pos=[f"right {letter}", f"good {letter}"], **negatives))
        made.append(
            row(letter, "alike", "symmetric_clustering", pos=[f"near {letter}"], label=f"kind {letter}", **negatives)
        )
        made.append(row(letter, "class", "class", label=f"label {ord(letter) % 3}", prompt="Which. "))
        made.append(row(letter, "pairs", "sts", pos=[f"other {letter}"], pos_scores=[1.0]))
    return sorted(made, key=lambda one: str(one["dataset"]))


def made_source(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> BatchSource:  # noqa: ANN401 - of icl
    writer = StoreWriter(folder / "rows", ROWS, 7)
    for own in rows:
        writer.add(own)
    store = writer.finish()
    icl = IclConfig(icl_suffix_str=SUFFIX, **settings)
    reader = QueryReader(TOKENIZER, icl)
    write_tokens(
        pa.Table.from_pylist(rows, schema=ROWS),
        folder,
        "0",
        model=MODEL,
        tokenize=partial(tokenize, TOKENIZER),
        tokenize_query=reader.tokens,
        query_max_len=40,
        passage_max_len=30,
    )
    experiment = Experiment(
        output_dir="unused",
        model=MODEL,
        icl=icl,
        data=DataConfig(train_group_size=3),
        train=TrainConfig(global_batch_size=BATCH),
    )
    datasets = read_datasets(store, experiment)
    return source_of(
        TokenStore(folder, ["0"]),
        datasets,
        batch_plan(datasets, experiment),
        in_context=InContext(rows=store, reader=reader, model=MODEL, query_max_len=40, seed=experiment.seed),
        pad_token=int(TOKENIZER.pad_token_id),  # type: ignore[arg-type]
        padding_side="left",
    )


def written(batch: Any, side: int) -> list[str]:  # noqa: ANN401 - a Batch
    """The texts of a batch, without the tokens at both ends."""
    return [str(TOKENIZER.decode(ids[1:-1])) for ids in texts(batch.inputs[side])]


def batches_of(source: BatchSource, dataset: str) -> list[tuple[int, Any]]:
    numbers = range(3 * source.plan.batches_per_epoch)
    names = {number: source.datasets.items[source.plan.dataset(number)].name for number in numbers}
    return [(number, source.batch(number)) for number in numbers if names[number] == dataset]


@pytest.mark.parametrize(
    ("dataset", "instruction", "answers"),
    [
        ("find", "Find. ", {f"{word} {letter}" for word in ("right", "good") for letter in LETTERS}),
        ("alike", "Find. ", {f"kind {letter}" for letter in LETTERS}),
        ("class", "Which. ", {"label 0", "label 1", "label 2"}),
    ],
)
def test_examples_are_rows_of_the_batch_with_their_answers(
    tmp_path: Path, dataset: str, instruction: str, answers: set[str]
) -> None:
    source, numbers, met = made_source(tmp_path, rows_of_kinds()), set(), set()
    for number, batch in batches_of(source, dataset):
        of_batch = {f"q {LETTERS[place % 12]}" for place in source.plan.rows(number).tolist()}
        for read in written(batch, 0):
            *examples, own = read.split("\n\n")
            pairs = [example.removeprefix(instruction).split(SUFFIX) for example in examples]
            queries, found = {query for query, _ in pairs}, {answer for _, answer in pairs}
            bare = own.removeprefix(instruction).removesuffix(SUFFIX)
            assert own == f"{instruction}{bare}{SUFFIX}"
            numbers.add(len(examples))
            if examples:
                assert {bare, *queries} <= of_batch
                assert len({bare, *queries}) == 1 + len(examples), "each once, and not itself"
                assert found <= answers
                met |= found
    assert numbers == {*range(batch.num_queries)}
    assert len(met) > 2


def test_the_longest_text_is_of_a_query_with_examples(tmp_path: Path) -> None:
    source = made_source(tmp_path, rows_of_kinds())
    of_queries = max(len(read) for number in range(6) for read in texts(source.batch(number).inputs[0]))
    assert len(source.longest_text()[0]) == 40 + IclConfig().examples_max_len >= of_queries
    bare = made_source(tmp_path / "bare", rows_of_kinds(), max_examples=0)
    assert len(bare.longest_text()[0]) == bare.tokens.lengths().max()


def test_scored_pairs_and_empty_settings_have_no_examples(tmp_path: Path) -> None:
    source = made_source(tmp_path, rows_of_kinds())
    for _, batch in batches_of(source, "pairs"):
        assert all(read.count(SUFFIX) == 1 for side in (0, 1) for read in written(batch, side))
    without = made_source(tmp_path / "without", rows_of_kinds(), max_examples=0)
    assert all(read.count(SUFFIX) == 1 for _, batch in batches_of(without, "find") for read in written(batch, 0))
    some = made_source(tmp_path / "some", rows_of_kinds(), retrieval_use_examples=False)
    assert all(read.count(SUFFIX) == 1 for _, batch in batches_of(some, "find") for read in written(batch, 0))
    assert any(read.count(SUFFIX) > 1 for _, batch in batches_of(some, "class") for read in written(batch, 0))


def test_passages_end_in_the_suffix_only_where_they_are_texts_like_the_queries(tmp_path: Path) -> None:
    source = made_source(tmp_path, rows_of_kinds())
    ends = {
        name: {read.endswith(SUFFIX) for _, batch in batches_of(source, name) for read in written(batch, 1)}
        for name in ("find", "alike", "class", "pairs")
    }
    assert ends == {"find": {False}, "alike": {True}, "class": {True}, "pairs": {True}}


def test_on_two_workers_a_query_has_the_same_examples(tmp_path: Path) -> None:
    source = made_source(tmp_path, rows_of_kinds())
    for number in range(source.plan.batches_per_epoch):
        parts = [replace(source, rank=rank, world_size=2).batch(number) for rank in range(2)]
        assert [read for part in parts for read in written(part, 0)] == written(source.batch(number), 0)


def test_an_example_never_gives_the_answer_away(tmp_path: Path) -> None:
    rows = rows_of_kinds()
    of_query = {}
    for i, own in enumerate(one for one in rows if one["dataset"] == "find"):  # pairs of rows share a positive
        own["pos"][1] = f"good {LETTERS[i // 2 * 2]}"
        of_query[own["query"]] = own["pos"]
    source, shared = made_source(tmp_path, rows), set()
    for _, batch in batches_of(source, "find"):
        for read in written(batch, 0):
            *examples, own = read.split("\n\n")
            known = of_query[own.removeprefix("Find. ").removesuffix(SUFFIX)]
            assert not {*known} & {example.split(SUFFIX)[1] for example in examples}
            shared |= {known[1] in of_query[example.split(SUFFIX)[0].removeprefix("Find. ")] for example in examples}
    assert shared == {False, True}, "a row that shares a positive may show another of its own"
    labelled = made_source(tmp_path / "labelled", [one for one in rows if one["dataset"] == "class"])
    for _, batch in batches_of(labelled, "class"):
        for read, positive in zip(written(batch, 0), written(batch, 1)[::3], strict=True):
            assert positive not in read


def test_an_example_may_be_of_the_query_s_own_class(tmp_path: Path) -> None:
    """As in FlagEmbedding's form, the positive of a class is its name; else the answer would be what is not shown."""
    rows = []
    for i, letter in enumerate(LETTERS):
        name, other = ("even", "odd") if i % 2 == 0 else ("odd", "even")
        rows.append(row(letter, "name", "symmetric_class", pos=[name], neg=[other], neg_ids=[other]))
    source, same = made_source(tmp_path, rows), set()
    for _, batch in batches_of(source, "name"):
        for read, positive in zip(written(batch, 0), written(batch, 1)[:: batch.dataset.group_size], strict=True):
            same |= {example.split(SUFFIX)[1] == positive for example in read.split("\n\n")[:-1]}
    assert same == {False, True}


def test_what_is_read_as_a_query_keeps_its_suffix_when_passages_are_shuffled(tmp_path: Path) -> None:
    rows = rows_of_kinds()
    for own in rows:
        own["pos"] = [f"{text} {LETTERS * 2}" for text in own["pos"]]
    source = replace(made_source(tmp_path, rows), shuffle_ratio=1.0)
    ends = {
        name: {read.endswith(SUFFIX) for _, batch in batches_of(source, name) for read in written(batch, 1)[::3]}
        for name in ("alike", "find")
    }
    assert ends == {"alike": {True}, "find": {False}}
    plain = replace(source, shuffle_ratio=0.0)
    number = batches_of(source, "find")[0][0]
    assert written(source.batch(number), 1) != written(plain.batch(number), 1), "others are shuffled"


def test_keys_are_of_the_queries_without_examples(tmp_path: Path) -> None:
    source = made_source(tmp_path, rows_of_kinds())
    for number in range(4):
        bare = replace(source, in_context=None).batch(number)
        assert source.batch(number).keys.queries.tolist() == bare.keys.queries.tolist()


@pytest.mark.parity
@pytest.mark.parametrize("dataset", ["find", "alike"])
def test_texts_are_those_of_flag_embedding(tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own dataset class, told our draws; it keeps 512 tokens for the query out of its length."""
    budget = 50
    source = made_source(
        tmp_path, rows_of_kinds(), example_query_max_len=8, example_passage_max_len=6, examples_max_len=budget
    )
    assert source.in_context is not None
    for number, batch in batches_of(source, dataset):
        rows, epoch = source.plan.rows(number).tolist(), source.plan.dataset_epoch(number)
        own = source.in_context.rows.take(np.array(rows)).to_pylist()
        theirs = flag_embedding_batch(monkeypatch, own, rows, epoch, source.plan.seed, length=512 + budget + 2)
        for side in (0, 1):
            assert texts(batch.inputs[side]) == TOKENIZER(theirs[side])["input_ids"]


def flag_embedding_batch(
    monkeypatch: pytest.MonkeyPatch,
    own: list[dict[str, Any]],
    rows: Sequence[int],
    epoch: int,
    seed: int,
    *,
    length: int,
) -> tuple[list[str], list[str]]:
    from FlagEmbedding.finetune.embedder.decoder_only.icl import dataset as module

    kind = own[0]["type"]
    answers: list[Any] = []
    for place, value in zip(rows, own, strict=True):  # positive and negatives of each row, then examples of each
        positive, negatives = choose_group(seed, epoch, place, num_pos=len(value["pos"]), num_neg=2, group_size=3)
        answers += [positive, negatives.tolist()]
    for place in rows:
        wanted, others = draw_examples(seed, epoch, place, batch=rows, most=5)
        answers += [wanted, *([[rows.index(other) for other in others[:wanted]]] if wanted else [])]
    scripted = iter(answers)
    drawn = SimpleNamespace(choice=lambda _: next(scripted), sample=lambda *_: next(scripted))
    monkeypatch.setattr(module, "random", drawn)
    peer: Any = object.__new__(module.DecoderOnlyEmbedderICLSameDatasetTrainDataset)
    peer.tokenizer = TOKENIZER
    peer.args = SimpleNamespace(
        query_instruction_format="{}{}",
        query_instruction_for_retrieval="Find. ",
        passage_instruction_for_retrieval=None,
        knowledge_distillation=False,
        icl_suffix_str=SUFFIX,
        retrieval_use_examples=True,
        example_query_max_len=8,
        example_passage_max_len=6,
        query_max_len=length,
        passage_max_len=30,
    )
    peer.suffix = TOKENIZER(SUFFIX + str(TOKENIZER.eos_token), add_special_tokens=False)["input_ids"]
    peer.prefix, peer.shuffle_ratio = [0], 0.0
    peer._get_train_group_size = lambda _: (3, kind)
    raw = {name: [value[name] for value in own] for name in ("query", "pos", "neg", "type")}
    raw["category"] = [value["label"] for value in own]
    queries, passages, _ = peer._create_batch_data(raw)
    assert next(scripted, None) is None, "all draws were asked for"
    return queries, passages


def test_an_example_of_a_class_has_no_instruction_for_retrieval(tmp_path: Path) -> None:
    source = made_source(tmp_path, rows_of_kinds()).in_context
    assert source is not None
    told: dict[str, Any] = {"query": "q", "prompt": None, "pos": ["p"], "label": "x"}
    assert [source._example(0, 0, type=kind, **told).query for kind in (CLASS, None)] == ["q", "Find. q"]
