"""Two-layer random checkpoints of every architecture that is known to work, each with a tokenizer of its own kind."""

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from tests.models import tiny_decoders

LONGEST = 64  # tokens of a text
CHARACTERS = [*string.ascii_lowercase, ".", "?"]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": LONGEST,
}
AFTER_PADDING = {"max_position_embeddings": LONGEST + 2, "pad_token_id": 1}  # the first position is that after padding
POSITIONS = frozenset({"embeddings.position_embeddings.weight"})
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def bert_tokenizer() -> PreTrainedTokenizerBase:
    """Pieces of words; a text is [CLS] text [SEP]."""
    return transformers.BertTokenizer(vocab=_wordpiece(BERT))


def distilbert_tokenizer() -> PreTrainedTokenizerBase:
    """As BERT's, without types of tokens."""
    return transformers.DistilBertTokenizer(vocab=_wordpiece(BERT))


def mpnet_tokenizer() -> PreTrainedTokenizerBase:
    """BERT's pieces between RoBERTa's special tokens."""
    return transformers.MPNetTokenizer(vocab=_wordpiece(["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"]))


def roberta_tokenizer() -> PreTrainedTokenizerBase:
    """Bytes; a text is <s> text </s>."""
    return transformers.RobertaTokenizer(vocab=_numbered([*ROBERTA, *CHARACTERS, "Ġ"]), merges=[])


def xlm_roberta_tokenizer() -> PreTrainedTokenizerBase:
    """Pieces of a language model of characters."""
    pieces = [*ROBERTA[:-1], "▁", *CHARACTERS, ROBERTA[-1]]
    return transformers.XLMRobertaTokenizer(vocab=[(piece, -1.0) for piece in pieces])


def modernbert_tokenizer() -> PreTrainedTokenizerBase:
    """Bytes between BERT's special tokens, which come last in the vocabulary."""
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = tiny_decoders.byte_tokenizer(special=BERT, **names)
    tokenizer.padding_side = "right"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def gemma_tokenizer() -> PreTrainedTokenizerBase:
    """Puts a token before every text and none after it; its padding is a token of its own."""
    vocabulary = _numbered(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *CHARACTERS])
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=[], padding_side="left")


def _wordpiece(special: list[str]) -> dict[str, int]:
    return _numbered([*special, *CHARACTERS, *(f"##{character}" for character in CHARACTERS)])


def _numbered(words: list[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


@dataclass(frozen=True)
class Architecture:
    """How a small one is made, and what is expected of it."""

    tokenizer: Callable[[], PreTrainedTokenizerBase]
    config: str
    settings: dict[str, Any]
    family: str = "encoder"
    poolings: tuple[str, ...] = ("cls", "mean", "last_token")
    positions: frozenset[str] = field(default_factory=frozenset)
    """Parameters that are a vector a position; none where positions are rotations."""


def _decoder(name: str, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> Architecture:
    settings = {**tiny_decoders.SIZES, **tiny_decoders.ARCHITECTURES[name], "max_position_embeddings": LONGEST}
    poolings = ("mean", "last_token")  # the first token sees no other
    return Architecture(tokenizer, f"{name}Config", settings, family="decoder", poolings=poolings)


ARCHITECTURES = {
    "BERT": Architecture(bert_tokenizer, "BertConfig", SIZES, positions=POSITIONS),
    "RoBERTa": Architecture(roberta_tokenizer, "RobertaConfig", {**SIZES, **AFTER_PADDING}, positions=POSITIONS),
    "XLM-R": Architecture(xlm_roberta_tokenizer, "XLMRobertaConfig", {**SIZES, **AFTER_PADDING}, positions=POSITIONS),
    "MPNet": Architecture(mpnet_tokenizer, "MPNetConfig", {**SIZES, **AFTER_PADDING}, positions=POSITIONS),
    "DistilBERT": Architecture(
        distilbert_tokenizer,
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": LONGEST},
        positions=POSITIONS,
    ),
    "ModernBERT": Architecture(
        modernbert_tokenizer,
        "ModernBertConfig",
        {
            **SIZES,
            "local_attention": 8,
            "layer_types": ["full_attention", "sliding_attention"],
            **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
        },
    ),
    "Qwen2": _decoder("Qwen2", tiny_decoders.qwen_tokenizer),
    "Qwen3": _decoder("Qwen3", tiny_decoders.qwen_embedding_tokenizer),
    "Llama": _decoder("Llama", tiny_decoders.llama3_tokenizer),
    "Mistral": _decoder("Mistral", tiny_decoders.mistral_tokenizer),
    "Gemma2": _decoder("Gemma2", gemma_tokenizer),
}


def save_tiny(
    name: str,
    folder: Path,
    *,
    head: str = "AutoModel",
    **settings: Any,  # noqa: ANN401 - any of the configuration
) -> Path:
    """A checkpoint whose vectors differ from text to text, as those of weights as initialised hardly do."""
    made = ARCHITECTURES[name]
    tokenizer = made.tokenizer()
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, made.config)(**{**made.settings, **tokens, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, head).from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
