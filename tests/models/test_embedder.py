"""A text's vector depends on the text alone; chunks hold every text once and keep their limits."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from rayembed.models.chunks import TokenBatch, pad_chunks
from rayembed.models.embedder import Embedder

PAD = 1


def random_texts(number: int, *, seed: int, longest: int = 40, vocabulary: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, vocabulary) for _ in range(rng.randint(1, longest))] for _ in range(number)]


def unpadded(batch: TokenBatch) -> list[list[int]]:
    """The texts back in their order."""
    rows = [row[keep.bool()].tolist() for ids, mask, _ in batch.chunks for row, keep in zip(ids, mask, strict=True)]
    return [rows[place] for place in batch.order.tolist()]


@pytest.fixture(scope="module")
def model(tiny_roberta: Path) -> Embedder:
    return Embedder(AutoModel.from_pretrained(tiny_roberta), pooling="mean", normalize=True).eval()


def layouts() -> Iterator[dict[str, int | None]]:
    for multiple in (None, 8):
        for texts in (None, 1, 3):
            for tokens in (None, 50, 7):
                yield {"pad_to_multiple_of": multiple, "texts_per_chunk": texts, "tokens_per_chunk": tokens}


@pytest.mark.parametrize("layout", list(layouts()), ids=lambda layout: "-".join(str(v) for v in layout.values()))
@pytest.mark.parametrize("side", ["left", "right"])
def test_chunks_hold_every_text_once_within_their_limits(layout: dict[str, int | None], side: str) -> None:
    texts = random_texts(23, seed=3)
    batch = pad_chunks(texts, pad_token=PAD, padding_side=side, **layout)
    assert unpadded(batch) == texts
    multiple, most_texts, most_tokens = layout.values()
    for ids, mask, _ in batch.chunks:
        longest = int(mask.sum(1).max())
        assert ids.shape == mask.shape == (len(ids), -(-longest // (multiple or 1)) * (multiple or 1))
        assert bool((ids[mask == 0] == PAD).all())
        padding_last = mask[:, 0] if side == "left" else mask[:, -1]
        assert bool((mask.sum(1)[padding_last == 1] == ids.shape[1]).all())  # padding is on its side alone
        assert len(ids) <= (most_texts or len(texts))
        assert most_tokens is None or len(ids) == 1 or ids.numel() <= most_tokens
    lengths = [int(length) for _, mask, _ in batch.chunks for length in mask.sum(1)]
    assert lengths == sorted(lengths, reverse=True)
    assert batch.num_tokens == sum(map(len, texts))
    assert batch.num_slots == sum(ids.numel() for ids, *_ in batch.chunks)


def test_chunks_are_no_smaller_than_the_limits_ask() -> None:
    batch = pad_chunks([[5] * 10] * 9, pad_token=PAD, padding_side="right", tokens_per_chunk=40)
    assert [len(ids) for ids, *_ in batch.chunks] == [4, 4, 1]
    batch = pad_chunks([[5] * 10] * 9, pad_token=PAD, padding_side="right", texts_per_chunk=4)
    assert [len(ids) for ids, *_ in batch.chunks] == [4, 4, 1]


@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_vectors_do_not_depend_on_the_layout(model: Embedder, pooling: str, side: str) -> None:
    texts = random_texts(11, seed=4)
    one = Embedder(model.backbone, pooling=pooling, normalize=True)
    alone = torch.cat([one.embed(pad_chunks([text], pad_token=PAD, padding_side="right")) for text in texts])
    assert torch.cdist(alone, alone).fill_diagonal_(1).min() > 1e-3  # or a wrong order would pass
    for layout in layouts():
        together = one.embed(pad_chunks(texts, pad_token=PAD, padding_side=side, **layout))
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_vectors_do_not_depend_on_the_other_texts(model: Embedder) -> None:
    texts, others = random_texts(5, seed=5), random_texts(9, seed=6)
    among = model.embed(pad_chunks([*others, *texts], pad_token=PAD, padding_side="right"))[len(others) :]
    torch.testing.assert_close(
        among, model.embed(pad_chunks(texts, pad_token=PAD, padding_side="right")), atol=1e-6, rtol=0
    )


def test_normalize_scales_and_nothing_else(model: Embedder) -> None:
    batch = pad_chunks(random_texts(4, seed=7), pad_token=PAD, padding_side="right")
    raw = Embedder(model.backbone, pooling="mean", normalize=False).embed(batch)
    assert (raw.norm(dim=1) - 1).abs().min() > 0.01
    torch.testing.assert_close(model.embed(batch), raw / raw.norm(dim=1, keepdim=True), atol=1e-6, rtol=0)


def test_forward_gives_the_vectors_of_each_batch(model: Embedder) -> None:
    batches = [pad_chunks(random_texts(n, seed=n), pad_token=PAD, padding_side="right") for n in (2, 5)]
    results: tuple[Tensor, ...] = model(batches)
    assert [len(vectors) for vectors in results] == [2, 5]
    for vectors, batch in zip(results, batches, strict=True):
        torch.testing.assert_close(vectors, model.embed(batch), atol=0, rtol=0)


def test_a_batch_moves_with_its_order() -> None:
    batch = pad_chunks(random_texts(4, seed=8), pad_token=PAD, padding_side="right").to(torch.device("meta"))
    assert {tensor.device.type for chunk in batch.chunks for tensor in chunk if tensor is not None} == {"meta"}
    assert batch.order.device.type == "meta"
