"""Benchmarks that nobody runs every day still run, and their own checks can fail."""

import io
import math
import random
import string
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayembed.models import packable, packing
from rayembed.models.loading import load_tokenizer
from rayembed.training.loop import batch_source
from tests.benchmarks import gpu, gpu_models, train_step, train_step_rows
from tests.benchmarks.medquad_subset import Beir
from tests.training.processes import in_workers

SMALL = ["--device", "cpu", "--small"]


def run_gpu(*words: str) -> tuple[int, str]:
    output = io.StringIO()
    with redirect_stdout(output):
        status = gpu.main([*SMALL, *words])
    return status, output.getvalue()


def run_gpu_with_texts_that_see_each_other() -> tuple[int, str]:
    def all_at_once(query: Tensor, key: Tensor, value: Tensor, segments: Any, how: Any) -> Tensor:  # noqa: ANN401
        together = packing._together(query[None], key[None], value[None], how=how)
        return together[0].transpose(0, 1)

    packing._in_runs, packable.APART = all_at_once, math.inf  # else it would be refused before anything is compared
    return run_gpu("--parts", "equal")


@pytest.mark.slow
@pytest.mark.parity
def test_all_that_is_measured_on_a_gpu_runs_small_on_a_cpu() -> None:
    ((status, output),) = in_workers(1, run_gpu)
    assert status == 0, output
    assert all(f"## {part}" in output for part in gpu.PARTS)
    rows = [line.split(" | ") for line in output.splitlines()]
    for first in [*((name, lengths) for name in gpu_models.KINDS for lengths in gpu.FIXED)]:
        losses = {row[2]: float(row[-1]) for row in rows if tuple(row[:2]) == first and row[2] != gpu.PADDED}
        ours, theirs = losses[gpu.OURS], losses[gpu.PEER]
        assert ours == pytest.approx(theirs, rel=0.05, abs=0.05), f"{first}: not the same work"
    assert "GradCache, float32: gradient apart by" in output


def test_texts_that_see_each_other_fail_the_gpu_benchmark() -> None:
    ((status, output),) = in_workers(1, run_gpu_with_texts_that_see_each_other)
    assert status == 1
    assert output.count("FAILED") == 2 * len(gpu_models.ARCHITECTURES) + 1, output


def test_without_a_gpu_the_benchmark_says_so_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["medquad", "mixed"])
def test_rows_of_the_step_benchmark_are_the_same_work_for_all(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model), padding_side="right")
    batches = train_step_rows.chosen(made_beir(), tokenizer, kind, batches=2, queries=16)
    rows = [row for batch in batches for row in batch]
    every = [text for row in rows for text in (row["query"], *row["pos"], *row["neg"])]
    assert len(set(every)) == len(every) == 3 * 2 * 16
    train_step_rows.write(tmp_path / "rows", batches, tokenizer)
    setup = train_step_rows.experiment(tiny_model, queries=16, steps=2, learning_rate=1e-5, bf16=False)
    source = batch_source(setup, train_step_rows.worker(tmp_path / "rows"))
    for number, batch in enumerate(batches):
        texts = [row["query"] for row in batch], [text for row in batch for text in (*row["pos"], *row["neg"])]
        for own, expected in zip(source.batch(number).inputs, texts, strict=True):
            assert own.num_tokens == sum(min(len(tokenizer(text)["input_ids"]), 256) for text in expected)
        for place, row in enumerate(batch):
            least, most = train_step_rows.band(kind, place)
            for text in (*row["pos"], *row["neg"]):
                assert least <= len(tokenizer(text)["input_ids"]) <= most
        if kind == "mixed":  # as its docstring says
            lengths = [len(tokenizer(text)["input_ids"]) for text in texts[1]]
            assert [sum(length <= 48 for length in lengths), sum(length >= 200 for length in lengths)] == [16, 2]


def test_the_batch_of_most_tokens_comes_first(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model), padding_side="right")
    batches = [[{"query": "a", "pos": [text], "neg": ["b"]}] for text in ("abc", "abcd", "abcdefg", "ab")]
    first = train_step_rows.longest_first(batches, tokenizer)
    assert [batch[0]["pos"][0] for batch in first] == ["abcdefg", "abc", "abcd", "ab"]


def made_beir() -> Beir:
    """400 queries with a positive each, of 5 to 300 characters, which are tokens."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(string.ascii_lowercase, k=8)) for _ in range(800)]
    lengths = [30 + 8 * (i % 4) if i % 2 else 60 + i % 60 if i % 4 else 220 + i % 80 for i in range(400)]
    passages = {f"p{i}": {"text": " ".join(texts[i : i + 50])[:length]} for i, length in enumerate(lengths)}
    return Beir(
        passages,
        {f"q{i}": texts[400 + i] for i in range(400)},
        {"train": {f"q{i}": [f"p{i}"] for i in range(400)}, "test": {}},
    )


def test_losses_that_differ_are_found() -> None:
    def of(name: str, losses: list[float]) -> train_step.Figures:
        return train_step.Figures(name, [1.0], losses, 1.0, 1.0, 1, 0.5, None)

    same = [of("ours fp32", [1.0, 0.5]), of("FlagEmbedding fp32", [1.0, 0.5]), of("ours bf16", [1.1, 0.6])]
    assert train_step.apart(same) == 0
    assert train_step.apart([*same, of("sentence-transformers fp32", [1.0, 0.6])]) == pytest.approx(0.1)
