"""Models of further architectures, small enough to train in a test, built in code."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from tests.conftest import tiny_tokenizer

DECODERS = {
    "llama": LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=512,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=512),  # its positions are absolute
}


def decoder_folder(folder: Path, kind: str, bos: str | None) -> Path:
    """A 2-layer decoder whose scores differ from pair to pair, with a tokenizer of single characters."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # type: ignore[assignment] # decoders' bring no ids at the end
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.padding_side = bos, "[SEP]", "left"
    config = DECODERS[kind]
    config.vocab_size = len(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
