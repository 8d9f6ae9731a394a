"""Packed texts: every architecture gives the outputs and the gradients that it gives for padded ones."""

import random
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from rayembed.config import Experiment
from rayembed.config.families import LoraConfig
from rayembed.config.model import ModelConfig
from rayembed.models import packing
from rayembed.models.chunks import TokenBatch, pack_chunks, pad_chunks
from rayembed.models.decoders import set_bidirectional
from rayembed.models.embedder import ChunkModel, Embedder
from rayembed.models.encoding import autocast
from rayembed.models.loading import load_embedder, prepare_for_training, tokenizer_of
from rayembed.models.packable import why_not_packed
from rayembed.models.packing import attention_dropout
from rayembed.models.trained import build_model
from tests.models.tiny_architectures import ARCHITECTURES, save_tiny
from tests.models.tiny_decoders import tiny_decoder, tiny_gpt2

LENGTHS = (3, 17, 17, 40, 9, 1, 17, 33, 2)  # longer than the windows below; 139 in all, which a CPU reads as 140
PADDED_ALONE = {"MPNet": "takes no attention function from outside"}
WINDOWS: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 6},
    "Gemma2": {"sliding_window": 6},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0, "layer_types": None},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny(name, tmp_path_factory.mktemp(name), **WINDOWS.get(name, {})) for name in ARCHITECTURES}


def settings_of(name: str, folders: dict[str, Path], **settings: Any) -> ModelConfig:  # noqa: ANN401
    told: dict[str, Any] = {"name_or_path": str(folders[name]), "family": ARCHITECTURES[name].family, "dropout": 0.0}
    return ModelConfig(**told | settings)


def texts_of(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(6, 30, (length,), generator=generator).tolist() for length in lengths]


def both(config: ModelConfig, texts: list[list[int]], **limits: int) -> tuple[TokenBatch, TokenBatch]:
    tokenizer = tokenizer_of(config)
    side = tokenizer.padding_side
    return pad_chunks(texts, pad_token=int(tokenizer.pad_token_id), padding_side=side), pack_chunks(texts, **limits)


def trained(model: ChunkModel, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs, and the gradient of a loss that looks at all of them alike."""
    model.zero_grad()
    outputs = model([batch])[0]
    rows = [outputs] if isinstance(outputs, Tensor) else [outputs[name] for name in ("dense", "sparse", "colbert")]
    flat = torch.cat([own.flatten() for own in rows])
    weights = torch.linspace(-1, 1, flat.numel()).sin()
    (flat * weights).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}
    return flat.detach(), gradients


def check(model: ChunkModel, padded: TokenBatch, packed: TokenBatch) -> None:
    expected, wanted = trained(model, padded)
    assert why_not_packed(model, training=True) is None
    again, _ = trained(model, padded)
    torch.testing.assert_close(again, expected, atol=0, rtol=0)  # padded texts are read as before
    found, gradients = trained(model, packed)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == wanted.keys()
    longest = max(float(own.norm()) for own in wanted.values())
    for name, gradient in gradients.items():
        assert float((gradient - wanted[name]).norm()) < 1e-5 * longest, name
    assert longest > 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - PADDED_ALONE.keys()))
def test_vectors_and_gradients_are_those_of_padded_texts(
    folders: dict[str, Path], name: str, checkpointing: bool
) -> None:
    for pooling in ARCHITECTURES[name].poolings if not checkpointing else ("mean",):
        config = settings_of(name, folders, pooling=pooling)
        model = load_embedder(config)
        prepare_for_training(
            model, family=config.family, fix_position_embedding=False, gradient_checkpointing=checkpointing
        )
        check(model, *both(config, texts_of()))


@pytest.mark.parametrize("name", ["BERT", "ModernBERT", "Qwen2"])
def test_a_text_of_many_tokens_that_a_cpu_adds_changes_nothing(folders: dict[str, Path], name: str) -> None:
    config = settings_of(name, folders)
    lengths = (40,) * 50 + (1,)
    model = load_embedder(config)
    assert read_sizes(model, [lengths]) == [2016]
    check(model, *both(config, texts_of(lengths)))


def test_rows_that_a_cpu_reads_have_few_sizes(folders: dict[str, Path]) -> None:
    """So that oneDNN and the tensors of a step meet what they have met before."""
    totals = [*range(1, 300), *range(8192, 16384)]
    sizes = read_sizes(load_embedder(settings_of("BERT", folders)), [(total,) for total in totals])
    assert sizes[:127] == totals[:127]  # short ones as they are
    assert all(total <= size < total * 65 / 64 for total, size in zip(totals, sizes, strict=True))
    assert len(set(sizes[299:])) == 65
    assert all(size % 128 == 0 for size in sizes[299:])


def read_sizes(model: ChunkModel, all_lengths: Sequence[tuple[int, ...]]) -> list[int]:
    """Tokens that the backbone is given for the texts of each row."""
    found = []
    for lengths in all_lengths:
        told = pack_chunks(texts_of(lengths)).chunks[0].inputs(model.backbone)  # type: ignore[union-attr] # packed
        assert told["position_ids"].shape == told["input_ids"].shape
        assert sum(told["segments"].lengths) == told["segments"].starts[-1] == told["input_ids"].numel()
        found.append(told["input_ids"].numel())
    return found


@pytest.mark.parametrize("architecture", ["Mistral", "Qwen3", "Gemma2"])
def test_decoders_that_look_both_ways_within_a_window(architecture: str) -> None:
    window = {"Qwen3": {"use_sliding_window": True, "max_window_layers": 0}}.get(architecture, {})
    model = Embedder(
        set_bidirectional(tiny_decoder(architecture, sliding_window=6, **window)),
        pooling="mean",
        normalize=True,
        told_positions=True,
    )
    check(model, pad_chunks(texts_of(), pad_token=0, padding_side="left"), pack_chunks(texts_of()))


def test_all_three_representations_of_m3(folders: dict[str, Path]) -> None:
    config = settings_of("XLM-R", folders, family="m3")
    model: Any = build_model(Experiment(output_dir="unused", model=config))
    check(model, *both(config, texts_of()))
    padded, packed = (model.represent(batch) for batch in both(config, texts_of(), texts_per_chunk=4))
    assert padded.keys() == packed.keys() == {"dense", "ids", "sparse", "colbert", "mask"}
    for i in range(len(LENGTHS)):  # of other lengths after the texts' ends
        for name in ("ids", "mask"):
            counted = slice(LENGTHS[i])
            assert packed[name][i][counted].tolist() == padded[name][i][counted].tolist()
        assert packed["mask"][i].sum() == padded["mask"][i].sum() == LENGTHS[i] - 1


@pytest.mark.parametrize(
    ("name", "family", "passes"), [("XLM-R", "m3", 2), ("BERT", "encoder", 1), ("Qwen3", "decoder", 1)]
)
def test_queries_and_passages_are_read_in_one_pass(
    folders: dict[str, Path], name: str, family: str, passes: int
) -> None:
    config = settings_of(name, folders, family=family)
    model: Any = build_model(Experiment(output_dir="unused", model=config))
    assert why_not_packed(model, training=True) is None
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    sides = [pack_chunks(texts_of((3, 9, 3))), pack_chunks(texts_of())]
    together = model(sides)
    assert len(calls) == passes, "BGE-M3 would pad queries to the longest passage"
    for found, expected in zip(together, (model.of_batch(side) for side in sides), strict=True):
        found, expected = (own if isinstance(own, dict) else {"dense": own} for own in (found, expected))
        assert {key: own.shape for key, own in found.items()} == {key: own.shape for key, own in expected.items()}
        for key, own in found.items():
            torch.testing.assert_close(own, expected[key], atol=1e-6, rtol=1e-5)
    calls.clear()
    in_chunks = [sides[0], pack_chunks(texts_of(), tokens_per_chunk=1000)]
    assert len(model(in_chunks)) == 2
    assert len(calls) == 2, "together they might be more than the limit"
    assert in_chunks[1].to(torch.device("cpu")).limited


def test_chunks_are_as_few_as_can_be_and_about_as_large() -> None:
    """Against all ways to cut texts, in their order, into chunks."""
    draw = random.Random(0)
    for _ in range(40):
        lengths = tuple(draw.choices(range(1, 40), k=10))
        limit, descending = draw.randint(max(lengths), 120), sorted(lengths, reverse=True)
        batch = pack_chunks(texts_of(lengths), tokens_per_chunk=limit)
        sizes = [chunk.num_tokens for chunk in batch.chunks]

        def largest(ends: tuple[int, ...], own: Sequence[int] = descending) -> int:
            return max(sum(own[first:last]) for first, last in pairwise((0, *ends, len(own))))

        assert max(sizes) == min(map(largest, combinations(range(1, 10), len(sizes) - 1))) <= limit
        if len(sizes) > 1:
            assert min(map(largest, combinations(range(1, 10), len(sizes) - 2))) > limit
        assert sorted(batch.order.tolist()) == [*range(10)]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - PADDED_ALONE.keys()))
def test_scores_of_rerankers(folders: dict[str, Path], name: str) -> None:
    config = settings_of(name, folders, family=f"reranker-{ARCHITECTURES[name].family}")
    model: Any = build_model(Experiment(output_dir="unused", model=config))
    check(model, *both(config, texts_of()))


def test_types_of_tokens_reach_a_reranker(folders: dict[str, Path]) -> None:
    config = settings_of("BERT", folders, family="reranker-encoder")
    model: Any = build_model(Experiment(output_dir="unused", model=config))
    texts = texts_of()
    types = [[int(i > len(text) // 2) for i in range(len(text))] for text in texts]
    padded = pad_chunks(texts, types=types, pad_token=0, padding_side="right")
    check(model, padded, pack_chunks(texts, types=types))
    assert (model.score(pack_chunks(texts)) - model.score(padded)).abs().max() > 1e-3, "they are not read at all"


def test_under_an_adapter(folders: dict[str, Path]) -> None:
    config = settings_of("Qwen3", folders)
    experiment = Experiment(output_dir="unused", model=config, lora=LoraConfig(lora_rank=2, lora_dropout=0.0))
    torch.manual_seed(0)
    model: Any = build_model(experiment)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    check(model, *both(config, texts_of()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_of_chunks_and_a_text_alone(folders: dict[str, Path], dtype: torch.dtype) -> None:
    config = settings_of("BERT", folders, pooling="mean")
    model = load_embedder(config)
    assert why_not_packed(model, training=True) is None
    texts = texts_of()
    padded, whole = both(config, texts)
    with torch.no_grad(), autocast(dtype, torch.device("cpu")):
        expected, atol = model.embed(padded), 1e-5 if dtype == torch.float32 else 2e-2
        for limits, chunks in (({}, 1), ({"texts_per_chunk": 2}, 5), ({"tokens_per_chunk": 20}, 6)):
            batch = pack_chunks(texts, **limits)  # type: ignore[arg-type]
            assert len(batch.chunks) == chunks
            torch.testing.assert_close(model.embed(batch), expected, atol=atol, rtol=0)
        for i, text in enumerate(texts):
            torch.testing.assert_close(model.embed(pack_chunks([text]))[0], expected[i], atol=atol, rtol=0)
    assert [sum(chunk.lengths) for chunk in pack_chunks(texts, tokens_per_chunk=20).chunks] == [40, 33, 17, 17, 17, 15]
    assert whole.num_tokens == whole.num_slots == sum(LENGTHS) == padded.num_tokens < padded.num_slots
    assert {tensor.device.type for chunk in whole.to(torch.device("meta")).chunks for tensor in chunk[:3]} == {"meta"}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reach", [None, 5])
@pytest.mark.parametrize("heads", [2, 4])
def test_attention_that_drops_next_to_nothing_is_attention(causal: bool, reach: int | None, heads: int) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(h, sum(LENGTHS), 8, generator=draw) for h in (4, heads, heads))
    segments = packing.Segments(torch.tensor([0, *LENGTHS]).cumsum(0).int(), LENGTHS)
    found, expected = (
        packing._in_runs(query, key, value, segments, packing._How(0.3, causal, reach, None, dropout))
        for dropout in (1e-9, 0.0)
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_layer_that_drops_attention_weights_drops_them_in_packed_texts(folders: dict[str, Path]) -> None:
    settings = {
        "BERT": {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0},
        "Gemma2": {"attention_dropout": 0.5},  # caps its scores
    }
    for name, dropped in settings.items():
        backbone = AutoModel.from_pretrained(folders[name], **dropped)
        assert attention_dropout(backbone) == 0.5
        model = Embedder(backbone, pooling="mean", normalize=True, told_positions=True)
        assert why_not_packed(model, training=True) is None
        batch = pack_chunks(texts_of())
        with torch.no_grad():
            kept = model.eval().embed(batch)
            assert (model.train().embed(batch) - kept).abs().max() > 1e-2


def test_the_reason_is_said_where_texts_stay_padded(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_embedder(settings_of("MPNet", folders))
    assert why_not_packed(model, training=True) == (
        "MPNetModel: MPNetModel takes no attention function from outside (its own is eager)"
    )
    gpt = Embedder(tiny_gpt2(), pooling="mean", normalize=True, told_positions=True)
    assert why_not_packed(gpt, training=True) is None

    model = load_embedder(settings_of("RoBERTa", folders))
    monkeypatch.setattr(packing, "COUNTED_FROM_PADDING", ())
    batch = both(settings_of("RoBERTa", folders), texts_of())[0]
    expected = model.embed(batch)
    reason = why_not_packed(model, training=True)
    assert reason is not None
    assert reason.startswith("RobertaModel gives other outputs for packed texts (apart by ")
    assert model.backbone.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model.embed(batch), expected, atol=0, rtol=0)
