"""The same vectors as FlagEmbedding and sentence-transformers give for the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.model import ModelConfig
from rayembed.models.chunks import pad_chunks
from rayembed.models.encoding import encode, tokenize
from rayembed.models.export import save_embedder
from rayembed.models.loading import load_embedder, load_tokenizer
from rayembed.models.pooling import POOLINGS

pytestmark = pytest.mark.parity

TEXTS = [
    "What are the symptoms of diabetes?",
    "Return a new array of given shape and type, filled with zeros.",
    "z",
    "Glaucoma is a group of diseases that damage the eye's optic nerve. " * 20,
    "naïve café, 東京; C++ & <html>",
]


def ours(model: str, **settings: Any) -> NDArray[np.float32]:  # noqa: ANN401
    return encode(
        load_embedder(ModelConfig(name_or_path=model, **settings)),
        load_tokenizer(model, padding_side="right"),
        TEXTS,
        max_len=128,
        tokens_per_batch=300,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
def test_training_time_vectors_equal_flagembeddings(minilm: str, pooling: str, normalize: bool) -> None:
    from FlagEmbedding.finetune.embedder.encoder_only.base.modeling import BiEncoderOnlyEmbedderModel

    backbone = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    theirs = BiEncoderOnlyEmbedderModel(backbone, sentence_pooling_method=pooling, normalize_embeddings=normalize)
    tokenizer = load_tokenizer(minilm, padding_side="right")
    with torch.inference_mode():
        expected = theirs.encode(tokenizer(TEXTS, padding=True, truncation=True, max_length=128, return_tensors="pt"))
    found = ours(minilm, pooling=pooling, normalize_embeddings=normalize)
    length = 1 if normalize else float(expected.norm(dim=1).max())
    np.testing.assert_allclose(found / length, expected.numpy() / length, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "last_token"])  # its cls takes a padding token on the left
def test_pooling_of_left_padded_texts_equals_flagembeddings(minilm: str, pooling: str) -> None:
    from FlagEmbedding.finetune.embedder.encoder_only.base.modeling import BiEncoderOnlyEmbedderModel

    theirs = BiEncoderOnlyEmbedderModel(AutoModel.from_pretrained(minilm), sentence_pooling_method=pooling)
    torch.manual_seed(0)
    hidden, mask = torch.randn(3, 6, 8), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 0, 1]])
    expected = theirs._sentence_embedding(hidden, mask)
    torch.testing.assert_close(POOLINGS[pooling](hidden, mask), expected, atol=1e-6, rtol=0)


def test_vectors_equal_sentence_transformers(minilm: str) -> None:
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(minilm, device="cpu", local_files_only=True)
    theirs.max_seq_length = 128
    np.testing.assert_allclose(ours(minilm), theirs.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["cls", "mean"])  # FlagAutoModel knows no last_token for encoders
def test_flagembedding_loads_an_exported_folder(minilm: str, tmp_path: Path, pooling: str, normalize: bool) -> None:
    from FlagEmbedding import FlagAutoModel

    settings: dict[str, Any] = {"pooling": pooling, "normalize_embeddings": normalize}
    experiment = Experiment(
        output_dir="unused",
        model=ModelConfig(
            name_or_path=minilm,
            query_instruction_for_retrieval="Find the answer",
            query_instruction_format="Instruct: {}\nQuery: {}",
            **settings,
        ),
        data=DataConfig(query_max_len=32, passage_max_len=128),
    )
    model = load_embedder(experiment.model)
    tokenizer = load_tokenizer(minilm, padding_side="right")
    save_embedder(model, tokenizer, experiment, tmp_path / "model")
    loaded = FlagAutoModel.from_finetuned(
        str(tmp_path / "model"),
        model_class="encoder-only-base",
        pooling_method=pooling,
        normalize_embeddings=normalize,
        query_instruction_for_retrieval="Find the answer",
        query_instruction_format="Instruct: {}\nQuery: {}",
        use_fp16=False,
        devices="cpu",
    )
    expected = ours(minilm, **settings)
    np.testing.assert_allclose(loaded.encode_corpus(TEXTS, max_length=128), expected, atol=1e-5)
    queries = encode(
        model,
        tokenizer,
        [f"Instruct: Find the answer\nQuery: {text}" for text in TEXTS],
        max_len=128,
        tokens_per_batch=4096,
        dtype=torch.float32,
    )
    np.testing.assert_allclose(loaded.encode_queries(TEXTS, max_length=128), queries, atol=1e-5)


@pytest.mark.parametrize("multiple", [None, 8])
def test_padded_tensors_are_those_of_flagembeddings_collator(minilm: str, multiple: int | None) -> None:
    """Also in chunks, where ours go by length, and it takes texts as they come."""
    from FlagEmbedding.abc.finetune.embedder.AbsDataset import AbsEmbedderCollator

    tokenizer = load_tokenizer(minilm, padding_side="right")
    how: dict[str, Any] = {"query_max_len": 16, "passage_max_len": 64, "pad_to_multiple_of": multiple}
    rows = [(query, [query, *TEXTS[:2]], None) for query in TEXTS]
    texts = {
        "queries": tokenize(tokenizer, [row[0] for row in rows], 16),
        "passages": tokenize(tokenizer, [text for row in rows for text in row[1]], 64),
    }
    for size in (None, 4):
        theirs = AbsEmbedderCollator(tokenizer, sub_batch_size=size, **how)(rows)
        for side, ids in texts.items():
            batch = pad_chunks(
                ids,
                pad_token=int(tokenizer.pad_token_id),  # type: ignore[arg-type]
                padding_side="right",
                pad_to_multiple_of=multiple,
                texts_per_chunk=size,
            )
            expected = theirs[side] if size else [theirs[side]]
            if size is None:
                (chunk,) = batch.chunks
                assert torch.equal(chunk.ids[batch.order], expected[0]["input_ids"])
                assert torch.equal(chunk.mask[batch.order], expected[0]["attention_mask"])
            read = [
                row[kept == 1].tolist() for own in batch.chunks for row, kept in zip(own.ids, own.mask, strict=True)
            ]
            their_rows = [
                row[kept == 1].tolist()
                for own in expected
                for row, kept in zip(own["input_ids"], own["attention_mask"], strict=True)
            ]
            assert [read[place] for place in batch.order.tolist()] == their_rows
            assert [len(own.ids) for own in batch.chunks] == [len(own["input_ids"]) for own in expected]
