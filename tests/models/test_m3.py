"""A text's three representations depend on it alone, equal loops over its tokens, and are FlagEmbedding's."""

import logging
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizer

from rayembed.models.chunks import TokenBatch, pad_chunks
from rayembed.models.m3 import (
    COLBERT_FILE,
    SPARSE_FILE,
    M3Embedder,
    concatenate,
    load_m3_heads,
    pad_tokens,
    save_m3_heads,
    token_weights,
    unweighted_tokens,
)
from rayembed.models.similarity import SIMILARITIES, colbert_matrix
from tests.conftest import tiny_tokenizer

TEXTS = [
    "abba abba",
    "x",
    "what is a glaucoma",
    "",
    "lift the lid 7 times",
    "banana, a nab",
]  # 7 and the comma: unknown
WIDTH, COLBERT_DIM = 32, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer XLM-R and its tokenizer over letters; end and separator are the same token, as in BGE-M3."""
    place = tmp_path_factory.mktemp("xlm-r")
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase, "<mask>"]
    tokenizer = XLMRobertaTokenizer(vocab=[(piece, -1.0) for piece in pieces], model_max_length=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = XLMRobertaModel(
            XLMRobertaConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=80,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def build(folder: Path, *, normalize: bool = True, colbert_dim: int = COLBERT_DIM, unified: bool = True) -> M3Embedder:
    sparse, colbert = load_m3_heads(str(folder), WIDTH, colbert_dim, seed=11)  # some weights are 0
    return M3Embedder(
        AutoModel.from_pretrained(folder),
        pooling="cls",
        normalize=normalize,
        sparse_linear=sparse,
        colbert_linear=colbert,
        special_tokens=unweighted_tokens(AutoTokenizer.from_pretrained(folder)),
        unified=unified,
    ).eval()


def batch_of(folder: Path, texts: list[str], *, side: str = "right", **layout: Any) -> TokenBatch:  # noqa: ANN401
    ids = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    return pad_chunks(ids, pad_token=1, padding_side=side, **layout)


@torch.no_grad()
def by_hand(model: M3Embedder, ids: list[int]) -> tuple[Tensor, list[float], list[list[float]]]:
    """Dense vector, weight of each token, vector of each token but the first, of one text alone."""
    hidden = model.backbone(input_ids=torch.tensor([ids])).last_hidden_state[0]
    dense = hidden[0] / (hidden[0].norm() if model.normalize else 1)
    weights, vectors = [], []
    for place, (token, vector) in enumerate(zip(ids, hidden, strict=True)):
        weight = float(model.sparse_linear.weight[0] @ vector + model.sparse_linear.bias[0])
        weights.append(0.0 if token in (0, 1, 2, 3) else max(weight, 0.0))
        if place > 0:
            row = model.colbert_linear.weight @ vector + model.colbert_linear.bias
            vectors.append((row / (row.norm() if model.normalize else 1)).tolist())
    return dense, weights, vectors


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layout", [{}, {"texts_per_chunk": 1}, {"tokens_per_chunk": 40, "pad_to_multiple_of": 8}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_representations_equal_loops_over_tokens(
    folder: Path, side: str, layout: dict[str, int], normalize: bool
) -> None:
    model, batch = build(folder, normalize=normalize), batch_of(folder, TEXTS, side=side, **layout)
    outputs = model.represent(batch)
    longest = max(chunk.ids.shape[1] for chunk in batch.chunks)
    shapes = {"dense": (6, WIDTH), "colbert": (6, longest, COLBERT_DIM)} | dict.fromkeys(
        ("ids", "sparse", "mask"), (6, longest)
    )
    assert {name: tuple(rows.shape) for name, rows in outputs.items()} == shapes
    everything = []
    for i, ids in enumerate(AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]):
        dense, weights, vectors = by_hand(model, ids)
        everything += [weight for token, weight in zip(ids, weights, strict=True) if token > 3]
        torch.testing.assert_close(outputs["dense"][i], dense, atol=1e-6, rtol=0)
        counted = outputs["mask"][i] == 1
        torch.testing.assert_close(outputs["colbert"][i][counted], torch.tensor(vectors), atol=1e-6, rtol=1e-6)
        assert bool((outputs["colbert"][i][~counted] == 0).all())
        weighted = outputs["sparse"][i] > 0
        assert outputs["ids"][i][weighted].tolist() == [t for t, w in zip(ids, weights, strict=True) if w > 0]
        expected = torch.tensor([weight for weight in weights if weight > 0])
        torch.testing.assert_close(outputs["sparse"][i][weighted], expected, atol=1e-6, rtol=1e-6)
        highest = dict(sorted(zip(ids, weights, strict=True), key=lambda pair: pair[1]))  # the last of a token stays
        assert token_weights(outputs, i) == pytest.approx({t: w for t, w in highest.items() if w > 0}, abs=1e-6)
    assert min(everything) == 0 < max(everything)


def test_token_weights_keep_the_highest_and_no_zero() -> None:
    outputs = {"ids": torch.tensor([[0, 9, 8, 9, 7, 9]]), "sparse": torch.tensor([[0, 0.25, 2.0, 0.75, 0, 0.5]])}
    assert token_weights(outputs, 0) == {9: 0.75, 8: 2.0}


def test_padding_has_no_weight_whatever_its_token(folder: Path) -> None:
    model = build(folder)
    model._unweighted = model._unweighted[:0]
    outputs = model.represent(batch_of(folder, TEXTS))
    assert bool((outputs["sparse"][:, 0] > 0).any())  # nothing is special
    assert bool((outputs["sparse"][outputs["ids"] == 1] == 0).all())


def test_forward_gives_each_batch_and_gradients_to_all_parts(folder: Path) -> None:
    model = build(folder)
    batches = [batch_of(folder, TEXTS[:2]), batch_of(folder, TEXTS)]
    results = model(batches)
    for result, batch in zip(results, batches, strict=True):
        torch.testing.assert_close(result, model.represent(batch), atol=0, rtol=0)
        torch.testing.assert_close(result["dense"], model.embed(batch), atol=0, rtol=0)
    scores: list[Any] = [similarity.matrix(*results).sum() for similarity in SIMILARITIES.values()]
    heads: list[list[Any]] = [[], [model.sparse_linear], [model.colbert_linear]]
    for score, parts in zip(scores, heads, strict=True):
        model.zero_grad()
        score.backward(retain_graph=True)
        for part in (model.backbone.get_submodule("encoder"), *parts):
            assert max(float(p.grad.abs().max()) for p in part.parameters() if p.grad is not None) > 0


def test_without_unified_training_there_is_the_dense_vector_alone(folder: Path) -> None:
    model, batch = build(folder, unified=False), batch_of(folder, TEXTS, texts_per_chunk=4)
    (outputs,) = model([batch])
    assert set(outputs) == {"dense"}
    torch.testing.assert_close(outputs["dense"], build(folder).represent(batch)["dense"], atol=0, rtol=0)
    heads = [*model.sparse_linear.parameters(), *model.colbert_linear.parameters()]
    assert not any(parameter.requires_grad for parameter in heads)


def test_representations_are_float32_under_mixed_precision(folder: Path) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = build(folder).represent(batch_of(folder, TEXTS))
    assert {outputs[name].dtype for name in ("dense", "sparse", "colbert")} == {torch.float32}
    lengths = outputs["colbert"].norm(dim=-1)[outputs["mask"] == 1]
    torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-6, rtol=0)


def test_lots_of_other_lengths_become_one(folder: Path) -> None:
    model = build(folder)
    parts = [model.represent(batch_of(folder, texts)) for texts in (TEXTS[1:2], TEXTS[2:], TEXTS[:1])]
    joined = concatenate(parts)
    together = model.represent(batch_of(folder, [*TEXTS[1:], TEXTS[0]]))
    assert set(joined) == set(together)
    for name in ("dense", "sparse", "colbert", "mask"):
        torch.testing.assert_close(joined[name], together[name], atol=1e-6, rtol=0)
    assert [token_weights(joined, i).keys() for i in range(6)] == [token_weights(together, i).keys() for i in range(6)]
    wider = pad_tokens(parts[0], 50)
    assert wider["colbert"].shape == (1, 50, COLBERT_DIM)
    torch.testing.assert_close(colbert_matrix(wider, wider), colbert_matrix(parts[0], parts[0]), atol=1e-6, rtol=0)


def test_the_state_is_that_of_backbone_and_heads(folder: Path) -> None:
    heads = {f"{head}_linear.{part}" for head in ("sparse", "colbert") for part in ("weight", "bias")}
    assert {name for name in build(folder).state_dict() if not name.startswith("backbone.")} == heads


def test_tokens_without_weight_are_those_that_the_tokenizer_has(folder: Path) -> None:
    assert unweighted_tokens(AutoTokenizer.from_pretrained(folder)) == (0, 1, 2, 3)
    assert unweighted_tokens(tiny_tokenizer()) == (0, 1, 2, 3)  # padding, unknown, CLS, and the separator at the end


@pytest.mark.parametrize("colbert_dim", [None, 7])
def test_new_heads_are_drawn_from_the_seed_alone(
    folder: Path, caplog: pytest.LogCaptureFixture, colbert_dim: int | None
) -> None:
    state = torch.random.get_rng_state()
    with caplog.at_level(logging.INFO, "rayembed.models.m3"):
        heads = load_m3_heads(str(folder), WIDTH, colbert_dim, seed=1)
    assert f"no sparse and no ColBERT head: new ones, with {colbert_dim or WIDTH} dimensions" in caplog.text
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    again, other = (load_m3_heads(str(folder), WIDTH, colbert_dim, seed=seed) for seed in (1, 2))
    for head, same, different, outputs in zip(heads, again, other, (1, colbert_dim or WIDTH), strict=True):
        assert head.weight.shape == (outputs, WIDTH)
        assert head.bias.shape == (outputs,)
        for name, value in head.state_dict().items():
            assert torch.equal(value, same.state_dict()[name])
            assert not torch.equal(value, different.state_dict()[name])
            assert float(value.abs().max()) <= WIDTH**-0.5  # as nn.Linear draws
        assert float(head.weight.detach().abs().max()) > 0.8 * WIDTH**-0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_heads_come_back_in_float32(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = build(folder)
    model.sparse_linear.to(dtype)
    model.colbert_linear.to(dtype)
    save_m3_heads(model, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for colbert_dim in (None, COLBERT_DIM):
        heads = load_m3_heads(str(tmp_path), WIDTH, colbert_dim, seed=9)
        for head, saved in zip(heads, (model.sparse_linear, model.colbert_linear), strict=True):
            assert isinstance(head, nn.Linear)
            assert head.weight.dtype == torch.float32
            assert head.weight.requires_grad
            assert torch.equal(head.weight, saved.weight.float())
            assert torch.equal(head.bias, saved.bias.float())
    with pytest.raises(ValueError, match=r"m3\.colbert_dim is 5, but .*colbert_linear\.pt gives 12 dimensions"):
        load_m3_heads(str(tmp_path), WIDTH, 5, seed=9)
    with pytest.raises(ValueError, match=r"must be weight \(n, 33\) and bias \(n,\)"):
        load_m3_heads(str(tmp_path), WIDTH + 1, None, seed=9)


@pytest.mark.parametrize(("there", "missing"), [(SPARSE_FILE, COLBERT_FILE), (COLBERT_FILE, SPARSE_FILE)])
def test_one_head_alone_is_refused(folder: Path, tmp_path: Path, there: str, missing: str) -> None:
    save_m3_heads(build(folder), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"has {there}, but no {missing}"):
        load_m3_heads(str(tmp_path), WIDTH, None, seed=9)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (SPARSE_FILE, {"weight": torch.zeros(2, WIDTH), "bias": torch.zeros(2)}, "gives 2 numbers a token"),
        (SPARSE_FILE, {"weight": torch.zeros(1, WIDTH)}, "must be weight"),
        (COLBERT_FILE, {"weight": torch.zeros(4, WIDTH), "bias": torch.zeros(5)}, "must be weight"),
        (COLBERT_FILE, {"weight": torch.zeros(4, 3), "bias": torch.zeros(4)}, r"weight \(n, 32\)"),
    ],
)
def test_heads_of_another_shape_are_refused(
    folder: Path, tmp_path: Path, file: str, content: dict[str, Tensor], message: str
) -> None:
    save_m3_heads(build(folder), tmp_path)
    torch.save(content, tmp_path / file)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        load_m3_heads(str(tmp_path), WIDTH, None, seed=9)


def test_heads_of_the_hub_are_new_only_where_it_has_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an answer from the hub, new heads in place of trained ones would not be noticed."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cache, commit = tmp_path / "models--some--model", "c" * 40
    for place in ("refs", f"snapshots/{commit}", f".no_exist/{commit}"):
        (cache / place).mkdir(parents=True)
    (cache / "refs/main").write_text(commit)

    def found() -> tuple[nn.Linear, nn.Linear]:
        return load_m3_heads("some/model", WIDTH, COLBERT_DIM, seed=5)

    with pytest.raises(
        FileNotFoundError, match=r"some/model: whether it has sparse_linear\.pt cannot be known without"
    ):
        found()
    for file in (SPARSE_FILE, COLBERT_FILE):
        (cache / f".no_exist/{commit}/{file}").touch()
    new = load_m3_heads(str(folder), WIDTH, COLBERT_DIM, seed=5)
    assert [torch.equal(head.weight, same.weight) for head, same in zip(found(), new, strict=True)] == [True, True]
    trained = load_m3_heads(str(folder), WIDTH, COLBERT_DIM, seed=6)
    for file, head in zip((SPARSE_FILE, COLBERT_FILE), trained, strict=True):
        torch.save(head.state_dict(), cache / f"snapshots/{commit}/{file}")
    assert [torch.equal(head.weight, same.weight) for head, same in zip(found(), trained, strict=True)] == [True, True]


def theirs_of(model: M3Embedder, folder: Path) -> Any:  # noqa: ANN401
    """FlagEmbedding's model for training, with our weights; in training mode, so that it makes its big tensor."""
    from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model

    parts = {"model": model.backbone, "colbert_linear": model.colbert_linear, "sparse_linear": model.sparse_linear}
    settings = {"sentence_pooling_method": "cls", "normalize_embeddings": model.normalize}
    return EncoderOnlyEmbedderM3Model(parts, tokenizer=AutoTokenizer.from_pretrained(folder), **settings).train()


def features(batch: TokenBatch) -> dict[str, Tensor]:
    (chunk,) = batch.chunks
    return {"input_ids": chunk.ids, "attention_mask": chunk.mask}


@pytest.mark.parity
@pytest.mark.parametrize("normalize", [True, False])
def test_scores_equal_flagembeddings_where_nothing_is_padded(folder: Path, normalize: bool) -> None:
    model = build(folder, normalize=normalize)
    theirs = theirs_of(model, folder)
    generator = torch.Generator().manual_seed(3)
    queries, passages = (
        pad_chunks(
            [[0, *row, 2] for row in torch.randint(3, 14, shape, generator=generator).tolist()],  # some unknown
            pad_token=1,
            padding_side="right",
        )
        for shape in ((4, 7), (3, 12))
    )
    sides, masks = [], []
    for batch in (queries, passages):
        with torch.no_grad():
            sides.append([rows[batch.order] for rows in theirs.encode(features(batch))])
        masks.append(batch.chunks[0].mask)
        assert bool(masks[-1].all())
    (dense_q, sparse_q, colbert_q), (dense_p, sparse_p, colbert_p) = sides
    expected = {
        "dense": theirs.compute_dense_score(dense_q, dense_p),
        "sparse": theirs.compute_sparse_score(sparse_q, sparse_p),
        "colbert": theirs.compute_colbert_score(colbert_q, colbert_p, q_mask=masks[0]),
    }
    with torch.no_grad():
        ours = model([queries, passages])
        for name, similarity in SIMILARITIES.items():
            scale = float(expected[name].abs().max())
            assert float((expected[name] - expected[name].mean()).abs().max()) > 1e-3 * scale
            torch.testing.assert_close(similarity.matrix(*ours) / scale, expected[name] / scale, atol=1e-6, rtol=0)


@pytest.mark.parity
def test_vectors_equal_flagembeddings_among_padding(folder: Path) -> None:
    model, batch = build(folder), batch_of(folder, TEXTS)
    theirs = theirs_of(model, folder)
    with torch.no_grad():
        dense, sparse, colbert = (rows[batch.order] for rows in theirs.encode(features(batch)))
        ours = model.represent(batch)
    torch.testing.assert_close(ours["dense"], dense, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours["colbert"][:, 1:], colbert, atol=1e-6, rtol=0)
    for i in range(len(TEXTS)):
        expected = {token: weight for token, weight in enumerate(sparse[i].tolist()) if weight > 0}
        assert token_weights(ours, i) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parity
def test_flagembeddings_padding_is_a_token_of_similarity_0_and_ours_is_none(folder: Path) -> None:
    """Its score of a passage rises with a longer passage in the batch; ours is what both give without padding."""
    theirs = theirs_of(build(folder), folder)
    query, passage = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[-0.5, 0.0]]])
    query_mask = torch.tensor([[1, 1]])  # FlagEmbedding's, with CLS
    assert theirs.compute_colbert_score(query, passage, q_mask=query_mask).tolist() == [[-0.5]]
    padded = F.pad(passage, (0, 0, 0, 1))
    assert theirs.compute_colbert_score(query, padded, q_mask=query_mask).tolist() == [[0.0]]
    ours_query = {"colbert": query, "mask": torch.tensor([[1]])}
    assert colbert_matrix(ours_query, {"colbert": passage, "mask": torch.tensor([[1]])}).tolist() == [[-0.5]]
    assert colbert_matrix(ours_query, {"colbert": padded, "mask": torch.tensor([[1, 0]])}).tolist() == [[-0.5]]


@pytest.mark.parity
def test_flagembedding_loads_the_saved_heads(folder: Path, tmp_path: Path) -> None:
    from FlagEmbedding import BGEM3FlagModel

    model = build(folder, colbert_dim=WIDTH)
    model.backbone.save_pretrained(tmp_path)  # type: ignore[operator] # of transformers
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    save_m3_heads(model, tmp_path)
    loaded = BGEM3FlagModel(str(tmp_path), use_fp16=False, devices="cpu")
    found = loaded.encode(TEXTS, max_length=64, return_dense=True, return_sparse=True, return_colbert_vecs=True)
    with torch.no_grad():
        ours = model.represent(batch_of(folder, TEXTS, texts_per_chunk=2))
    np.testing.assert_allclose(found["dense_vecs"], ours["dense"].numpy(), atol=1e-6)
    for i in range(len(TEXTS)):
        weights = {int(token): float(weight) for token, weight in found["lexical_weights"][i].items()}
        assert token_weights(ours, i) == pytest.approx(weights, abs=1e-6)
        np.testing.assert_allclose(
            found["colbert_vecs"][i], ours["colbert"][i][ours["mask"][i] == 1].numpy(), atol=1e-6
        )
    for pair in ((TEXTS[0], TEXTS[2]), (TEXTS[4], TEXTS[5])):  # one at a time: nothing padded
        expected = loaded.compute_score([pair], weights_for_different_modes=[1.0, 0.3, 1.0])
        with torch.no_grad():
            sides = model([batch_of(folder, [text]) for text in pair])
        for name, similarity in SIMILARITIES.items():
            assert float(similarity.paired(*sides)) == pytest.approx(expected[name][0], abs=1e-6)
