"""A text's vector does not depend on its padding, texts end with one token, and attention goes both ways on wish."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from rayembed.config.model import ModelConfig
from rayembed.models.chunks import pad_chunks
from rayembed.models.decoders import append_eos, positions, sees_later_tokens, set_bidirectional, takes_positions
from rayembed.models.loading import load_embedder
from rayembed.models.pooling import last_token
from tests.models.tiny_decoders import (
    ARCHITECTURES,
    ENDING,
    TOKENIZERS,
    bare_tokenizer,
    byte_tokenizer,
    llama3_tokenizer,
    mistral_tokenizer,
    qwen_tokenizer,
    save_decoder,
    tiny_decoder,
    tiny_gpt2,
)

TEXT, LENGTH = [5, 17, 99, 3, 42], 8
ENDS = {"bare": "</s>", "Llama 3": "<|eot_id|>", "Mistral": "</s>", "Qwen": "<|im_end|>", "Qwen embedding": ENDING}
FIRST = {"Llama 3": ["<|begin_of_text|>"], "Mistral": ["<s>"]}
PADDING = {"bare": "</s>", "Llama 3": "<|eot_id|>", "Mistral": "<unk>", "Qwen": ENDING, "Qwen embedding": ENDING}


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The text in a batch with a longer one, in a row of its own."""
    ids, mask = torch.full((2, LENGTH), 7), torch.zeros(2, LENGTH, dtype=torch.long)
    ids[1], mask[1] = torch.arange(20, 20 + LENGTH), 1
    place = slice(-len(TEXT), None) if side == "left" else slice(len(TEXT))
    ids[0, place], mask[0, place] = torch.tensor(TEXT), 1
    return ids, mask


def vector(model: Any, ids: Tensor, mask: Tensor, **settings: Tensor) -> Tensor:  # noqa: ANN401
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask, **settings).last_hidden_state
    return last_token(hidden, mask)[0]


def alone(model: Any) -> Tensor:  # noqa: ANN401
    return vector(model, torch.tensor([TEXT]), torch.ones(1, len(TEXT), dtype=torch.long))


def test_positions_count_each_texts_own_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_text_has_the_same_vector_alone_and_padded_on_either_side(
    architecture: str, attention: str, bidirectional: bool
) -> None:
    if architecture == "Gemma2" and attention == "sdpa":
        attention = "eager"  # what transformers takes for it: sdpa cannot cap its scores
    model = tiny_decoder(architecture, attn_implementation=attention)
    if bidirectional:
        set_bidirectional(model)
    expected = alone(model)
    assert takes_positions(model)
    for side in ("left", "right"):
        ids, mask = padded(side)
        found = vector(model, ids, mask, position_ids=positions(mask))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        by_itself = vector(model, ids, mask)  # rotary positions are differences: others may leave them out
        torch.testing.assert_close(by_itself, expected, atol=1e-5, rtol=1e-5)


def test_learned_positions_need_to_be_told_under_left_padding() -> None:
    model = tiny_gpt2()
    ids, mask = padded("left")
    torch.testing.assert_close(vector(model, ids, mask, position_ids=positions(mask)), alone(model))
    assert (vector(model, ids, mask) - alone(model)).abs().max() > 0.1


def test_a_model_that_counts_the_mask_is_not_told_positions() -> None:
    bloom = transformers.BloomModel(transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    assert not takes_positions(bloom)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_text_ends_with_one_token_also_when_loaded_again(kind: str, tmp_path: Path) -> None:
    tokenizer = append_eos(TOKENIZERS[kind]())
    append_eos(tokenizer).save_pretrained(tmp_path)  # the second time changes nothing
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert (loaded.pad_token, loaded.padding_side) == (PADDING[kind], "left")
        for text in ("a word", "b " * 50):
            plain = loaded.tokenize(text)
            for length in (4, 9):
                room = length - 1 - len(FIRST.get(kind, []))
                expected = [*FIRST.get(kind, []), *plain[:room], ENDS[kind]]
                found = loaded(text, truncation=True, max_length=length)["input_ids"]
                assert loaded.convert_ids_to_tokens(found) == expected
        pair = loaded.convert_ids_to_tokens(loaded("a", "b")["input_ids"])
        assert [token for token in pair if token in {"a", "b", ENDS[kind]}] == ["a", ENDS[kind], "b", ENDS[kind]]


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3"])
def test_the_end_token_survives_the_class_that_the_config_names(architecture: str, tmp_path: Path) -> None:
    save_decoder(tmp_path, append_eos(qwen_tokenizer()), architecture)
    path = tmp_path / "tokenizer_config.json"  # as published: with the architecture's own class
    path.write_text(path.read_text().replace("TokenizersBackend", "Qwen2Tokenizer"))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "Qwen2Tokenizer"
    found = loaded("ab", truncation=True, max_length=2)["input_ids"]
    assert loaded.convert_ids_to_tokens(found) == ["a", "<|im_end|>"]


def test_sentence_transformers_ends_texts_with_the_token(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    save_decoder(tmp_path, append_eos(bare_tokenizer()))
    loaded = SentenceTransformer(modules=[modules.Transformer(str(tmp_path), max_seq_length=6)], device="cpu")
    ids = loaded.tokenize(["a", "b" * 20])["input_ids"]
    assert ids.shape == (2, 6)
    assert (ids[:, -1] == append_eos(bare_tokenizer()).eos_token_id).all()


TEXTS = ["what is it", "a", "some longer text, which is cut " * 4, "ab"]


@pytest.mark.parity
@pytest.mark.parametrize("architecture", ["Qwen2", "Gemma2"])
def test_vectors_equal_flagembeddings(architecture: str, tmp_path: Path) -> None:
    from FlagEmbedding import FlagAutoModel
    from FlagEmbedding.finetune.embedder.decoder_only.base.modeling import BiDecoderOnlyEmbedderModel

    tokenizer = append_eos(llama3_tokenizer())
    base = save_decoder(tmp_path / "base", tokenizer, architecture)
    embedder = load_embedder(ModelConfig(name_or_path=str(base), family="decoder"))
    texts = [tokenizer(text, truncation=True, max_length=20)["input_ids"] for text in TEXTS]
    batch = pad_chunks(texts, pad_token=7, padding_side="left", texts_per_chunk=3)
    with torch.no_grad():
        found = embedder.embed(batch)
    assert embedder.pooling == "last_token"

    theirs = BiDecoderOnlyEmbedderModel(AutoModel.from_pretrained(base).eval(), normalize_embeddings=True)
    collated = tokenizer(TEXTS, padding=True, truncation=True, max_length=20, return_tensors="pt")
    collated.pop("token_type_ids", None)
    with torch.no_grad():
        torch.testing.assert_close(found, theirs.encode(collated), atol=1e-5, rtol=0)
    model_class = "decoder-only-base"
    loaded = FlagAutoModel.from_finetuned(str(base), model_class=model_class, use_fp16=False, devices="cpu")
    expected = torch.from_numpy(loaded.encode_corpus(TEXTS, max_length=20))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parity
def test_sentence_transformers_gives_the_same_vectors(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    tokenizer = append_eos(mistral_tokenizer())
    base = str(save_decoder(tmp_path, tokenizer, "Qwen3"))
    embedder = load_embedder(ModelConfig(name_or_path=base, family="decoder"))
    batch = pad_chunks([tokenizer(text)["input_ids"] for text in TEXTS[:2]], pad_token=0, padding_side="left")
    parts = [modules.Transformer(base), modules.Pooling(32, pooling_mode="lasttoken"), modules.Normalize()]
    with torch.no_grad():
        expected = SentenceTransformer(modules=parts, device="cpu").encode(TEXTS[:2], convert_to_tensor=True)
        torch.testing.assert_close(embedder.embed(batch), expected, atol=1e-5, rtol=0)


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(ValueError, match="no eos token"):
        append_eos(byte_tokenizer(special=["<unk>"], unk_token="<unk>"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bidirectional_attention_is_full_and_is_saved(architecture: str, attention: str, tmp_path: Path) -> None:
    if architecture == "Gemma2" and attention == "sdpa":
        attention = "eager"
    model = tiny_decoder(architecture, attn_implementation=attention)
    assert not sees_later_tokens(model)
    set_bidirectional(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=attention).eval()
    ids, mask = padded("right")
    embeddings = loaded.get_input_embeddings()(ids).detach().requires_grad_(True)
    for rows in (slice(1, 2), slice(2)):  # without padding there is no mask, but a flag
        hidden = loaded(inputs_embeds=embeddings[rows], attention_mask=mask[rows]).last_hidden_state
        for place in range(len(TEXT)):
            (gradient,) = torch.autograd.grad(hidden[0, place].square().sum(), embeddings, retain_graph=True)
            reached = gradient[rows][0].abs().sum(dim=1) > 0
            assert reached.tolist() == mask[rows][0].bool().tolist()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, mask)[0], model(ids, mask)[0])


def test_a_model_in_training_stays_so_and_one_that_sees_all_is_left_alone() -> None:
    model = tiny_decoder().train()
    set_bidirectional(model)
    assert model.training
    assert model.config.is_causal is False
    encoder = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    )
    set_bidirectional(encoder)
    assert "is_causal" not in encoder.config.to_diff_dict()


class Stubborn(nn.Module):
    """Stays causal for batches with padding, without, or with and without."""

    def __init__(self, causal: set[bool]) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig()
        self.embedding = nn.Embedding(9, 4)
        self.causal = causal

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        tokens = self.embedding(input_ids)
        full = getattr(self.config, "is_causal", True) is False and bool((attention_mask == 0).any()) not in self.causal
        return (tokens.sum(dim=1, keepdim=True).expand_as(tokens) if full else tokens.cumsum(dim=1),)


@pytest.mark.parametrize("causal", [{True}, {False}, {True, False}])
def test_an_architecture_that_stays_causal_is_refused(causal: set[bool]) -> None:
    model = Stubborn(causal)
    with pytest.raises(ValueError, match=r"model\.bidirectional: the attention of Stubborn stays causal"):
        set_bidirectional(model)
    assert not hasattr(model.config, "is_causal")
    set_bidirectional(Stubborn(set()))
