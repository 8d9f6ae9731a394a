"""Attention over texts that lie one after the other in one row, so that no padding is computed.

transformers calls it by name. Texts reach it as a keyword that models pass through to their attention, so that a layer
that gradient checkpointing computes again gets them too. Padded texts go the way they would have gone without it. On
a CPU, texts of equal length are read together: padding near lengths into one call took half as long again forward and
twice as long backward, and a run costs 0.1 ms. Shapes: t tokens, h heads, d dimensions of a head.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayembed.models.bf16_attention import attention_in_bf16
from rayembed.models.decoders import plain, takes_positions
from rayembed.models.dropout import attention_with_dropout

COUNTED_FROM_PADDING = ("camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl")  # positions begin after it
NAMES = {"sdpa": "rayembed_packed", "eager": "rayembed_packed_eager"}  # by what they do with padded texts


@dataclass(frozen=True)
class Segments:
    """Where each text lies in the row."""

    starts: Tensor
    """[n + 1] int32, the last is t."""

    lengths: tuple[int, ...]
    """[n], those that are equal beside each other; on the host, so that no device is waited for."""

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Texts of equal length beside each other: how many, and how long."""
        return [(len(list(run)), length) for length, run in groupby(self.lengths)]


@dataclass(frozen=True)
class _How:
    """What one layer's attention does beside its softmax."""

    scaling: float
    causal: bool
    reach: int | None
    """A token sees those at most this far away. None: all."""

    softcap: float | None
    dropout: float

    @property
    def plain(self) -> bool:
        """Whether all tokens of a text see each other, and nothing else is done."""
        return not (self.causal or self.reach is not None or self.softcap is not None or self.dropout)


def packed_inputs(backbone: Any, ids: Tensor, places: Tensor, segments: Segments) -> dict[str, Any]:  # noqa: ANN401
    """What a model that `let_pack` has prepared is called with.

    Args:
        backbone: of transformers.
        ids: [t] token ids.
        places: [t] position of each token in its text, from 0.
        segments: the texts.
    """
    return {
        "input_ids": ids[None],
        "position_ids": places[None] + first_position(backbone.config),
        # Models make no mask where they are given one of four dimensions, and `_attend` does not look at this one.
        "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ids.device),
        "segments": segments,
    }


def first_position(settings: Any) -> int:  # noqa: ANN401 - one class an architecture
    """The position of a text's first token, by the model's configuration."""
    return int(settings.pad_token_id) + 1 if settings.model_type in COUNTED_FROM_PADDING else 0


def let_pack(backbone: nn.Module) -> None:
    """Puts this attention into a model, which goes on reading padded texts as before.

    Raises:
        ValueError: the architecture takes no attention from outside, or no positions.
    """
    model = plain(backbone)
    name, before = type(model).__name__, model.config._attn_implementation
    if before in NAMES.values():
        return
    if not model._can_set_attn_implementation() or before not in NAMES:
        raise ValueError(f"{name} takes no attention function from outside (its own is {before})")
    if not takes_positions(model):
        raise ValueError(f"{name} cannot be told the positions of tokens")
    _register()
    model.set_attn_implementation(NAMES[before])


def attention_dropout(backbone: nn.Module) -> float:
    """The probability of dropping a weight of the attention in training, the highest of the configuration's."""
    settings = plain(backbone).config.to_dict()
    found = [value for key, value in settings.items() if "att" in key and "drop" in key]
    return max((float(value) for value in found if isinstance(value, int | float)), default=0.0)


def _attend(
    otherwise: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    **how: Any,  # noqa: ANN401 - what an architecture tells its attention
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: [1, t, h, d] and no weights, from query, key and value [1, h, t, d]."""
    if segments is None:
        outputs: tuple[Tensor, Tensor | None] = _unpacked(otherwise, module)(
            module, query, key, value, attention_mask, **how
        )
        return outputs
    layer = _how(module, query.shape[3], **how)
    rows = (query[0], key[0], value[0])
    by_kernel = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    if by_kernel and layer.softcap is None and not layer.dropout:  # what the kernel can do
        return _by_kernel(*rows, segments, layer)[None], None
    return _in_runs(*rows, segments, layer)[None], None


def _unpacked(otherwise: str, module: nn.Module) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if otherwise in ALL_ATTENTION_FUNCTIONS:
        function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[otherwise]
        return function
    own: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return own


def _how(
    module: nn.Module,
    dimensions: int,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unread: Any,  # noqa: ANN401 - as above
) -> _How:
    if unread.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a bias by position")
    own = bool(getattr(module, "is_causal", False))
    causal = own if is_causal is None else is_causal
    reach = None
    if sliding_window is not None:
        # The window counts the token itself; that of a decoder made to look both ways does not, in transformers' masks.
        reach = sliding_window - (0 if own and not causal else 1)
    return _How(scaling or dimensions**-0.5, causal, reach, softcap, dropout)


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, segments: Segments, how: _How) -> Tensor:
    """[t, h, d] by torch's kernel for texts of any lengths; not run where there is no GPU."""
    from torch.nn.attention.varlen import varlen_attn

    longest = max(segments.lengths)
    reach = -1 if how.reach is None else how.reach
    outputs: Any = varlen_attn(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        segments.starts,
        segments.starts,
        longest,
        longest,
        scale=how.scaling,
        window_size=(reach, 0 if how.causal else reach),
        enable_gqa=key.shape[0] != query.shape[0],
    )
    assert isinstance(outputs, Tensor)
    return outputs


def _in_runs(query: Tensor, key: Tensor, value: Tensor, segments: Segments, how: _How) -> Tensor:
    """[t, h, d], texts of equal length at a time."""
    alike = query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype == torch.bfloat16
    if query.device.type == "cpu" and alike and how.plain:
        return attention_in_bf16(query, key, value, segments.runs, scale=how.scaling)
    # A CPU's kernel takes 2 to 8 times as long backward in bfloat16 as in float32.
    dtype = torch.float32 if query.device.type == "cpu" else query.dtype
    layout = torch.contiguous_format if dtype != query.dtype else torch.preserve_format  # where they are copied anyway
    runs = segments.runs
    tokens = [count * length for count, length in runs]
    attended = []
    # Split, not sliced: the gradient of a slice is as large as the whole row.
    for (count, length), *parts in zip(
        runs, *(torch.split(rows, tokens, dim=1) for rows in (query, key, value)), strict=True
    ):
        folded = [part.unflatten(1, (count, length)).transpose(0, 1) for part in parts]  # [count, h, length, d]
        texts = [part.to(dtype, memory_format=layout) for part in folded]
        with torch.autocast("cpu", enabled=False):  # it would turn them back
            rows = _together(*texts, how=how).transpose(1, 2)
        attended.append(rows.to(query.dtype, memory_format=torch.contiguous_format).flatten(0, 1))
    return torch.cat(attended)


def _together(query: Tensor, key: Tensor, value: Tensor, *, how: _How) -> Tensor:
    """[n, h, length, d] of n texts of equal length."""
    mask, grouped = _mask(query.shape[2], how, query.device), key.shape[1] != query.shape[1]
    if how.softcap is None and how.dropout and query.device.type == "cpu":
        if grouped:
            key, value = _repeated(query, key, value)
        seen = _causal(query.shape[2], query.device) if mask is None and how.causal else mask
        return attention_with_dropout(query, key, value, scale=how.scaling, seen=seen, dropout=how.dropout)
    if how.softcap is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=how.dropout,
            is_causal=how.causal and mask is None,
            scale=how.scaling,
            enable_gqa=grouped,
        )
    if grouped:
        key, value = _repeated(query, key, value)
    scores = torch.tanh(query @ key.transpose(2, 3) * how.scaling / how.softcap) * how.softcap
    if mask is None and how.causal:
        mask = _causal(query.shape[2], query.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype), how.dropout) @ value


def _repeated(query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Keys and values with a head for each of the query's."""
    return tuple(rows.repeat_interleave(query.shape[1] // rows.shape[1], dim=1) for rows in others)


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones((length, length), dtype=torch.bool, device=device).tril()


def _mask(length: int, how: _How, device: torch.device) -> Tensor | None:
    """[length, length] bool, True where a token is seen. None: the window holds the whole text."""
    if how.reach is None or length <= how.reach + 1:
        return None
    places = torch.arange(length, device=device)
    behind = places[:, None] - places
    near = behind.abs() <= how.reach
    return near & (behind >= 0) if how.causal else near


@cache
def _register() -> None:
    """Makes the attention functions known to transformers, whose part for that takes seconds to import."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    attend = torch.compiler.disable(_attend)  # type: ignore[no-untyped-call] # lengths on the host would be compiled in
    for otherwise, name in NAMES.items():
        AttentionInterface.register(name, partial(attend, otherwise))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[otherwise])
