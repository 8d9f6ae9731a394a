"""Evaluation by the training workers: the figures of a slow reference, and a training that is the same without it."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import BertModel

from rayembed.config import Experiment
from rayembed.config.deepspeed import deepspeed_settings
from rayembed.config.jobs import EncodeConfig
from rayembed.data.tokens import write_texts
from rayembed.models.loading import load_tokenizer
from rayembed.training import validation as module
from rayembed.training.engine import Engine
from rayembed.training.loop import trainable
from rayembed.training.packed import reads_packed
from rayembed.training.validation import FACTS, Place, Validation, held_bytes
from tests.training.processes import in_workers
from tests.training.small_training import Run, experiment, random_rows, train_one, write_row_tokens

K = 5
ZERO_3 = pytest.param(2, 3, marks=pytest.mark.long)
Judgements = dict[str, dict[str, int]]


def made_texts(count: int, words: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join("".join(draw.choices("abcdefgh", k=3)) for _ in range(draw.randint(1, words))) for _ in range(count)
    ]


QUERIES, PASSAGES = made_texts(11, 3, seed=1), made_texts(37, 8, seed=2)


def drawn(draw: random.Random) -> dict[int, int]:
    return dict(zip(draw.sample(range(37), 4), (2, 1, 1, 0), strict=True))


def made_judgements() -> Judgements:
    """Graded, some of it 0, several a query; the last query has none."""
    draw = random.Random(3)
    return {
        f"q{query:02d}": {f"p{passage:02d}": grade for passage, grade in drawn(draw).items()} for query in range(10)
    }


def write_dev(model: Path, folder: Path) -> Path:
    """The folder as the job lays it down: two parts of passages, small blocks."""
    tokenizer = load_tokenizer(str(model), padding_side="right")
    parts = {"query": [(0, 11)], "passage": [(0, 20), (20, 37)]}
    for side, texts, letter in (("query", QUERIES, "q"), ("passage", PASSAGES, "p")):
        (folder / side).mkdir(parents=True)
        tokens = tokenizer(texts)["input_ids"]
        for first, last in parts[side]:
            ids = [f"{letter}{i:02d}" for i in range(first, last)]
            write_texts(ids, tokens[first:last], folder / side, f"{first:012d}")
    facts = {"judgements": made_judgements(), "words": "some", "queries": 10, "passages": 37, "corpus": 37}
    (folder / FACTS).write_text(json.dumps({**facts, "block_rows": {"query": 8, "passage": 16}}))
    return folder


@torch.no_grad()
def reference(folder: Path) -> dict[str, float]:
    """Each text by itself, every pair, sorted; the definitions of the metrics."""
    model, tokenizer = BertModel.from_pretrained(folder).eval(), load_tokenizer(str(folder), padding_side="right")

    def vector(text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        mean = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(dim=0)
        return mean / mean.norm()

    passages = {f"p{i:02d}": vector(text) for i, text in enumerate(PASSAGES)}
    sums = dict.fromkeys(("ndcg", "map", "recall", "precision", "mrr"), 0.0)
    judgements = made_judgements()
    for query, judged in judgements.items():
        asked = vector(QUERIES[int(query[1:])])
        ranking = sorted(passages, key=lambda name: (-float(asked @ passages[name]), name))[:K]
        gains = [judged.get(name, 0) for name in ranking]
        best = sorted(judged.values(), reverse=True)[:K]
        hits = [place for place, gain in enumerate(gains, 1) if gain > 0]
        relevant = sum(grade > 0 for grade in judged.values())
        sums["ndcg"] += discounted(gains) / discounted(best)
        sums["map"] += sum(number / place for number, place in enumerate(hits, 1)) / relevant
        sums["recall"] += len(hits) / relevant
        sums["precision"] += len(hits) / K
        sums["mrr"] += 1 / hits[0] if hits else 0
    return {f"{name}@{K}": total / len(judgements) for name, total in sums.items()}


def discounted(gains: list[int]) -> float:
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, 1))


def setup_of(model: Path, *, workers: int, stage: int, **train: Any) -> Experiment:  # noqa: ANN401 - of the section
    settings = {"eval_steps": 2, "metric_for_best_model": f"ndcg@{K}", "global_batch_size": 4, **train}
    made = experiment(model, workers=workers, stage=stage, pooling="mean", **settings)
    assert made.train is not None
    zero = {
        "stage": stage,
        **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
    }  # or weights stay whole
    own = replace(made.train, deepspeed={"zero_optimization": zero})
    return replace(made, train=own, encode=EncodeConfig(dtype="float32", tokens_per_batch=256))


def evaluated(setup: Experiment, dev: Path, piece: int) -> dict[str, float]:
    """In a worker, with the model as the loop prepares it."""
    module.PIECE = piece
    config = setup.train
    assert config is not None
    model = trainable(setup)
    assert reads_packed(config, model, None), "padded and packed texts go different ways"
    settings = deepspeed_settings(setup, workers=dist.get_world_size())
    engine = Engine(model, config, settings, total_steps=1, device=torch.device("cpu"))
    place = Place(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    torch.manual_seed(dist.get_rank())
    before, modes = torch.get_rng_state(), [own.training for own in model.modules()]
    found = Validation.of(setup, engine, dev, place).figures()
    assert torch.equal(before, torch.get_rng_state()), "dropout would be drawn otherwise"
    assert modes == [own.training for own in model.modules()]
    assert all(modes), "it is trained"
    return found


@pytest.mark.parametrize(
    ("workers", "stage", "piece", "tokens"),
    [(1, 0, 7, 64), (2, 0, 65536, 64), pytest.param(3, 3, 7, 128, marks=pytest.mark.long)],
)
def test_figures_are_those_of_a_slow_reference_on_any_number_of_workers(
    tiny_model: Path, tmp_path: Path, workers: int, stage: int, piece: int, tokens: int
) -> None:
    dev = write_dev(tiny_model, tmp_path / "dev")
    setup = setup_of(tiny_model, workers=workers, stage=stage, global_batch_size=6)
    setup = replace(setup, encode=replace(setup.encode, tokens_per_batch=tokens))
    found = in_workers(workers, evaluated, setup, dev, piece)
    assert found == [found[0]] * workers
    assert found[0] == pytest.approx(reference(tiny_model), abs=1e-6)
    assert 0.02 < found[0][f"ndcg@{K}"] < 0.9, "some of it can be found"


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), ZERO_3])
def test_training_is_bit_by_bit_the_same_with_and_without_evaluations(
    tiny_model: Path, tmp_path: Path, workers: int, stage: int
) -> None:
    write_row_tokens(random_rows(16), tiny_model, tmp_path / "tokens")
    write_dev(tiny_model, tmp_path / "tokens" / "dev")
    runs = {}
    for every in (None, 2):
        settings: dict[str, Any] = {
            "max_steps": 3,
            "learning_rate": 1e-3,
            "grad_cache": stage == 3,
            "eval_steps": every,
        }
        runs[every] = Run(tmp_path / f"run-{every}", tmp_path / "tokens")
        in_workers(workers, train_one, setup_of(tiny_model, workers=workers, stage=stage, **settings), runs[every])
    weights, others = runs[None].weights(), runs[2].weights()
    assert [name for name, value in weights.items() if not torch.equal(value, others[name])] == []
    assert runs[None].losses() == runs[2].losses()
    lines = runs[2].evaluations()
    assert [line["step"] for line in lines] == [0, 2, 3]
    assert lines[0]["eval"] == pytest.approx(reference(tiny_model), abs=1e-6)
    assert lines[2]["eval"] == pytest.approx(reference(tmp_path / "run-2" / "model"), abs=1e-6), (
        "of the model as written"
    )
    assert lines[0]["eval"] != lines[2]["eval"]


def test_a_killed_run_goes_on_with_its_evaluations(tiny_model: Path, tmp_path: Path) -> None:
    write_row_tokens(random_rows(16), tiny_model, tmp_path / "tokens")
    write_dev(tiny_model, tmp_path / "tokens" / "dev")
    setup = setup_of(tiny_model, workers=1, stage=0, max_steps=6, save_steps=3, learning_rate=1e-3)
    unbroken, broken = (Run(tmp_path / name, tmp_path / "tokens") for name in ("unbroken", "broken"))
    in_workers(1, train_one, setup, unbroken)
    in_workers(1, train_one, setup, broken, 3)
    in_workers(1, train_one, setup, broken, None, 3)
    expected, found = ([{**line, "seconds": 0} for line in run.evaluations()] for run in (unbroken, broken))
    assert found == expected
    assert [line["step"] for line in found] == [0, 2, 4, 6]
    in_workers(1, train_one, setup, broken)  # without a checkpoint, from the base model again
    assert [line["step"] for line in broken.evaluations()] == [0, 2, 4, 6]


def train_scripted(setup: Experiment, run: Run, figures: list[float]) -> list[int]:
    """The loop in this worker, where evaluations find what they are told."""
    script: Iterator[float] = iter(figures)

    def scripted(_: Validation) -> dict[str, float]:
        return {f"ndcg@{K}": next(script)}

    Validation.figures = scripted  # type: ignore[method-assign] # the process ends with the test
    return train_one(setup, run)


@pytest.mark.parametrize(("workers", "stage"), [(1, 0), ZERO_3])
def test_the_model_that_is_written_is_that_of_the_best_evaluation(
    tiny_model: Path, tmp_path: Path, workers: int, stage: int
) -> None:
    write_row_tokens(random_rows(16), tiny_model, tmp_path / "tokens")
    write_dev(tiny_model, tmp_path / "tokens" / "dev")
    settings: dict[str, Any] = {"max_steps": 20, "learning_rate": 1e-3, "eval_steps": 1, "early_stopping_patience": 2}
    scripts = {True: [0.5, 0.4, 0.7, 0.7, 0.6, 1.0], False: [0.9, 0.8, 0.8]}  # the second one ends after step 2
    runs = {}
    for load, script in scripts.items():
        setup = setup_of(tiny_model, workers=workers, stage=stage, load_best_model_at_end=load, **settings)
        runs[load] = Run(tmp_path / f"run-{load}", tmp_path / "tokens")
        saved = in_workers(workers, train_scripted, setup, runs[load], script)
        assert saved == [[2] if load else []] * workers
    assert [line["step"] for line in runs[True].metrics()] == [1, 2, 3, 4], "it stopped early"
    assert [line["step"] for line in runs[False].metrics()] == [1, 2]
    assert [run.evaluations()[-1]["model_step"] for run in runs.values()] == [2, 2]
    weights, others = runs[True].weights(), runs[False].weights()
    assert [name for name, value in weights.items() if not torch.equal(value, others[name])] == []


def test_where_no_step_is_better_the_base_model_is_written(tiny_model: Path, tmp_path: Path) -> None:
    write_row_tokens(random_rows(16), tiny_model, tmp_path / "tokens")
    write_dev(tiny_model, tmp_path / "tokens" / "dev")
    setup = setup_of(tiny_model, workers=1, stage=0, max_steps=4, learning_rate=1e-3, load_best_model_at_end=True)
    run = Run(tmp_path / "run", tmp_path / "tokens")
    assert in_workers(1, train_scripted, setup, run, [0.5, 0.4, 0.5]) == [[]]
    base = load_file(tiny_model / "model.safetensors")
    assert [name for name, value in run.weights().items() if not torch.equal(value, base[name])] == []


def test_passages_that_score_alike_go_by_their_ids() -> None:
    names = np.array(["h", "g", "f", "e", "d", "c", "b", "a"], np.object_)
    split: Any = SimpleNamespace(passages=SimpleNamespace(ids=lambda rows: names[rows]))
    engine: Any = None
    place = Place(0, 1, torch.device("cpu"))
    one = Validation(
        engine=engine, split=split, k=3, tokens_per_batch=64, pad_token=0, padding_side="right", place=place
    )
    vectors = np.array([[1, 0], [1, 0], [0, 1], [1, 0], [1, 0]], np.float32)
    scores, rows = one._of_piece(vectors[:1], np.array([2, 6, 7, 5, 1]), vectors)
    assert rows.tolist() == [[6, 5, 2]], "b, c, f"
    assert scores.tolist() == [[1, 1, 1]]


def test_what_an_evaluation_holds() -> None:
    few = held_bytes(100, 1000, dimension=8, k=10, workers=2)
    assert few == 4 * 8 * (100 + 500) + 12 * 10 * 100 * 11
    assert held_bytes(100, 10**9, dimension=8, k=10, workers=2) - few == 4 * 8 * (65536 - 500), "a piece at a time"
