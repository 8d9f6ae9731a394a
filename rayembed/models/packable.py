"""Whether a model gives for packed texts what it gives for padded ones: it is tried, not looked up."""

from typing import Any

import torch
from torch import Tensor, nn

from rayembed.models.chunks import TokenBatch, pack_chunks, pad_chunks
from rayembed.models.decoders import plain
from rayembed.models.embedder import ChunkModel
from rayembed.models.encoding import autocast
from rayembed.models.packing import attention_dropout, let_pack

LENGTHS = (9, 5, 5, 1, 12)  # tokens of the texts that are tried
APART = 1e-4  # as a share of the outputs' length; rounding leaves 1e-6
APART_IN_16_BITS = 3e-2


def why_not_packed(model: ChunkModel, *, training: bool) -> str | None:
    """Makes the model read packed texts, or says why it cannot; it goes on reading padded ones.

    Args:
        model: on the device it will run on; not under ZeRO 3, which spreads its weights.
        training: it is going to be trained, with its dropout.

    Returns:
        None: it does. Else the reason, in words.
    """
    backbone: Any = model.backbone
    dropout = attention_dropout(backbone)
    if training and dropout and next(model.parameters()).is_cuda:
        return f"the GPU's kernel knows no dropout in attention, and it is {dropout}: set model.dropout: 0"
    before = plain(backbone).config._attn_implementation
    reason = _tried(model)
    if reason is not None and plain(backbone).config._attn_implementation != before:
        plain(backbone).set_attn_implementation(before)
    return reason


def _tried(model: ChunkModel) -> str | None:
    backbone: Any = model.backbone
    device, name = next(model.parameters()).device, type(plain(backbone)).__name__
    texts = _texts(plain(backbone).config)
    alone = pad_chunks(texts, pad_token=0, padding_side="right", texts_per_chunk=1).to(device)  # and nothing is padded
    types = [torch.float32, *([torch.bfloat16] if device.type == "cuda" else [])]  # there they go different ways
    training = model.training
    model.eval()
    try:
        expected = [_outputs(model, alone, dtype) for dtype in types]
        let_pack(backbone)
        found = [_outputs(model, pack_chunks(texts).to(device), dtype) for dtype in types]
    except Exception as error:  # whatever an architecture makes of it, padded texts can be read
        return f"{name}: {error}" if isinstance(error, ValueError) else f"{name}: {type(error).__name__}: {error}"
    finally:
        model.train(training)
    for dtype, one, other in zip(types, found, expected, strict=True):
        apart = float((one - other).norm() / other.norm())
        rounded = dtype != torch.float32 or _computes_in_16_bits(backbone)
        if not apart <= (APART_IN_16_BITS if rounded else APART):  # also where it is no number
            return f"{name} gives other outputs for packed texts (apart by {apart:.1g} of their length)"
    return None


def _texts(settings: Any) -> list[list[int]]:  # noqa: ANN401 - one class an architecture
    """Random tokens, none of which is padding."""
    generator, pad = torch.Generator().manual_seed(0), settings.pad_token_id
    ids = [torch.randint(settings.vocab_size - 1, (length,), generator=generator) for length in LENGTHS]
    return [(own if pad is None else own + (own >= pad)).tolist() for own in ids]


@torch.no_grad()
def _outputs(model: ChunkModel, batch: TokenBatch, dtype: torch.dtype) -> Tensor:
    """All that the model gives, as one vector in float64."""
    with autocast(dtype, batch.order.device):
        outputs = model.of_batch(batch)
    rows = [outputs] if isinstance(outputs, Tensor) else [outputs[name] for name in sorted(outputs)]
    return torch.cat([own.double().flatten() for own in rows])


def _computes_in_16_bits(backbone: nn.Module) -> bool:
    """Whether weights in 4 bits are multiplied in a type of 16."""
    types = {getattr(module, "compute_dtype", None) for module in backbone.modules()}
    return bool(types & {torch.bfloat16, torch.float16})
