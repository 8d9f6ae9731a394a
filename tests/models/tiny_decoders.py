"""Two-layer decoders of several architectures with random weights, and tokenizers for them, all built in code."""

import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ENDING = "<|endoftext|>"
SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Qwen3": {},
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 64},
    "Gemma3Text": {"query_pre_attn_scalar": 8, "sliding_window": 64},
}


def tiny_decoder(
    architecture: str = "Qwen2",
    *,
    head: str = "Model",
    **settings: Any,  # noqa: ANN401 - any of the configuration
) -> Any:  # noqa: ANN401 - one class an architecture
    """A model whose attention is not uniform, as it is with weights as initialised; the same in every session."""
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **ARCHITECTURES[architecture], **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, architecture + head)(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tiny_gpt2() -> nn.Module:
    """A decoder that learns a vector a position: it cannot do with positions counted from the padding."""
    config = transformers.GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2Model(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def byte_tokenizer(*, special: list[str], **names: str) -> PreTrainedTokenizerFast:
    """Characters by byte-level BPE without merges, as in Qwen2 and Llama 3; adds nothing to a text."""
    characters = [*string.ascii_letters, *string.digits, "Ġ", "Ċ", ".", ","]
    vocabulary = {token: index for index, token in enumerate([*characters, *special])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, padding_side="left", **names)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Only a post-processor that trims offsets, and a padding token that is not the eos token."""
    tokenizer = byte_tokenizer(special=[ENDING, "<|im_end|>"], eos_token="<|im_end|>", pad_token=ENDING)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def qwen_embedding_tokenizer() -> PreTrainedTokenizerFast:
    """Ends texts by itself, and not with its eos token."""
    tokenizer = qwen_tokenizer()
    template = processors.TemplateProcessing(
        single=f"$A {ENDING}",
        pair=f"$A {ENDING} $B:1 {ENDING}:1",
        special_tokens=[(ENDING, tokenizer.convert_tokens_to_ids(ENDING))],
    )
    steps = [processors.ByteLevel(trim_offsets=False), template]
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(steps)  # type: ignore[arg-type]
    return tokenizer


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Begins texts with a token, in a sequence of post-processors; no padding and no unknown token."""
    first = "<|begin_of_text|>"
    tokenizer = byte_tokenizer(special=[first, "<|eot_id|>"], bos_token=first, eos_token="<|eot_id|>")
    template = processors.TemplateProcessing(
        single=f"{first} $A",
        pair=f"{first} $A {first}:1 $B:1",
        special_tokens=[(first, tokenizer.convert_tokens_to_ids(first))],
    )
    steps = [processors.ByteLevel(trim_offsets=True), template]
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(steps)  # type: ignore[arg-type]
    return tokenizer


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Begins texts with a token by one template; no padding token, but an unknown one."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = byte_tokenizer(special=special, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )
    return tokenizer


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """No post-processor at all."""
    return byte_tokenizer(special=["</s>"], eos_token="</s>")


TOKENIZERS = {
    "bare": bare_tokenizer,
    "Llama 3": llama3_tokenizer,
    "Mistral": mistral_tokenizer,
    "Qwen": qwen_tokenizer,
    "Qwen embedding": qwen_embedding_tokenizer,
}


def save_decoder(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    architecture: str = "Qwen2",
    **settings: Any,  # noqa: ANN401 - any of the configuration
) -> Path:
    """A checkpoint as it is published: without an end token where the tokenizer adds none."""
    tiny_decoder(architecture, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
