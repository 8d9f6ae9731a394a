"""Made-up data of any size for mining: texts, training rows, unit vectors, a small model; the same at every call."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

VECTORS_PER_FILE = 50_000
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[M]"}
SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES]
QUERY_WORDS = 6
TEXTS_AT_A_TIME = 10_000
NOISE = 2.0  # length of what is added to a positive's vector for its query's: the positive is near the best, not it
Floats = NDArray[np.float32]


def passage_id(row: int) -> str:
    """Ids sort as rows do."""
    return f"p{row:08d}"


def query_id(number: int) -> str:
    """Ids sort as queries do."""
    return f"q{number:06d}"


def positive_rows(passages: int, queries: int) -> list[int]:
    """The passage that each query has as its positive: all different, in any order."""
    rows: list[int] = np.random.default_rng([1, passages]).choice(passages, queries, replace=False).tolist()
    return rows


def numbered_texts(passages: int) -> Iterator[str]:
    """Texts for given vectors: short, and no two alike."""
    return (f"passage {row} of {passages}" for row in range(passages))


def worded_texts(passages: int) -> Iterator[str]:
    """Texts of 10 to 20 words; a few of them may be the same words in another order, none the same text."""
    for start in range(0, passages, TEXTS_AT_A_TIME):
        rng = np.random.default_rng([2, start])
        count = min(TEXTS_AT_A_TIME, passages - start)
        lengths = rng.integers(10, 21, size=count)
        words = rng.integers(len(WORDS), size=(count, 20))
        yield from (" ".join(WORDS[word] for word in own[:length]) for own, length in zip(words, lengths, strict=True))


def write_texts(folder: Path, texts: Iterator[str], positives: list[int], *, worded: bool) -> None:
    """Writes corpus.jsonl and rows.jsonl; a query is words of its positive, or a number where `worded` is false."""
    query_of = {row: number for number, row in enumerate(positives)}
    rows: list[dict[str, object]] = [{}] * len(positives)
    rng = np.random.default_rng(3)
    with (folder / "corpus.jsonl").open("w") as corpus:
        for row, text in enumerate(texts):
            corpus.write(json.dumps({"_id": passage_id(row), "text": text}) + "\n")
            if row in query_of:
                number = query_of[row]
                some = rng.choice(text.split(), QUERY_WORDS, replace=False) if worded else ["query", str(number)]
                rows[number] = {
                    "query_id": query_id(number),
                    "query": " ".join(some),
                    "pos": [text],
                    "pos_ids": [passage_id(row)],
                }
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_vectors(folder: Path, passages: int, dimension: int, positives: list[int]) -> None:
    """Writes vectors/*.npy in the order of the corpus, and queries.npy with its ids beside."""
    (folder / "vectors").mkdir(exist_ok=True)
    near = np.empty((len(positives), dimension), np.float32)
    asked = np.array(positives)
    for index, start in enumerate(range(0, passages, VECTORS_PER_FILE)):
        rng = np.random.default_rng([4, index])
        vectors = _unit(rng.standard_normal((min(VECTORS_PER_FILE, passages - start), dimension), np.float32))
        np.save(folder / "vectors" / f"shard-{index:05d}.npy", vectors)
        here = (asked >= start) & (asked < start + len(vectors))
        near[here] = vectors[asked[here] - start]
    noise = _unit(np.random.default_rng(5).standard_normal(near.shape, np.float32))
    np.save(folder / "queries.npy", _unit(near + NOISE * noise))
    (folder / "queries.ids.json").write_text(json.dumps([query_id(number) for number in range(len(positives))]))


def write_model(folder: Path, dimension: int) -> None:
    """Writes a 2-layer BERT whose tokenizer knows every word, so that a word is a token."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    whole: Any = PreTrainedTokenizerFast
    whole(tokenizer_object=tokenizer, model_max_length=128, **SPECIAL).save_pretrained(folder)
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=dimension,
            num_hidden_layers=2,
            num_attention_heads=12,
            intermediate_size=4 * dimension,
            max_position_embeddings=128,
        )
    )
    for parameter in model.parameters():  # BERT starts so small that all texts look alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


def _unit(vectors: Floats) -> Floats:
    scaled: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled
