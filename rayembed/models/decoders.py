"""What a decoder needs to be an embedder: an end token, positions under left padding, full attention on wish."""

import inspect
import json
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

VISIBLE = 1e-6  # a change of a token vector larger than rounding, as a share of its length


def append_eos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Makes the tokenizer end every text with one token, after truncation too, and pad.

    A tokenizer that ends texts with a token of its own choice (Qwen3-Embedding) keeps it; any other gets its eos token.
    The rule becomes a part of tokenizer.json, so that whoever loads the saved tokenizer follows it. Where there is no
    padding token, it is the unknown token, else the eos token, as in FlagEmbedding.

    Returns:
        The same tokenizer, changed in place.

    Raises:
        ValueError: it is a slow one, or has no eos token.
    """
    name = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise ValueError(
            f"{name}: its tokenizer is a slow one ({type(tokenizer).__name__}), which cannot be told to end texts with "
            "a token; use a checkpoint with tokenizer.json"
        )
    if tokenizer.eos_token is None:
        raise ValueError(f"{name}: its tokenizer has no eos token, whose vector a text's would be; add one to it")
    if not _end_tokens(tokenizer):
        backend: Any = tokenizer.backend_tokenizer
        before = json.loads(backend.post_processor.__getstate__()) if backend.post_processor is not None else None
        backend.post_processor = _processor(_ending(before, tokenizer.eos_token, int(tokenizer.eos_token_id)))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the tokenizer puts after a text by itself."""
    special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return [*special[::-1], 0].index(0)


def _ending(processor: dict[str, Any] | None, token: str, number: int) -> dict[str, Any]:
    """The tokenizer.json form of a post-processor that does what the given one does and ends each text with a token.

    Not a sequence of two templates: the second would take the first one's special tokens for texts.
    """
    if processor is None:
        processor = {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {},
        }
    if processor["type"] == "TemplateProcessing":
        special = {**processor["special_tokens"], token: {"id": token, "ids": [number], "tokens": [token]}}
        forms = {key: _with_end(processor[key], token) for key in ("single", "pair")}
        return {**processor, **forms, "special_tokens": special}
    steps = processor["processors"] if processor["type"] == "Sequence" else [processor]
    place = next((i for i, step in enumerate(steps) if step["type"] == "TemplateProcessing"), None)
    if place is None:
        steps = [*steps, _ending(None, token, number)]
    else:
        steps = [*steps[:place], _ending(steps[place], token, number), *steps[place + 1 :]]
    return {"type": "Sequence", "processors": steps}


def _with_end(template: list[dict[str, Any]], token: str) -> list[dict[str, Any]]:
    pieces = []
    for piece in template:
        pieces.append(piece)
        if "Sequence" in piece:
            pieces.append({"SpecialToken": {"id": token, "type_id": piece["Sequence"]["type_id"]}})
    return pieces


def _processor(form: dict[str, Any]) -> Any:  # noqa: ANN401 - a class of tokenizers that has no name
    """A post-processor out of its tokenizer.json form, which only a whole tokenizer can be read from."""
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "decoder"))
    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    whole: dict[str, Any] = {"version": "1.0", "added_tokens": [], **parts, "post_processor": form, "model": model}
    return Tokenizer.from_str(json.dumps(whole)).post_processor


def positions(mask: Tensor) -> Tensor:
    """Position of each token in its text [n, t] int64, from the mask [n, t] (1 token, 0 padding), on either side.

    Padding has the position 0 before the text, and that of the last token after it.
    """
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def takes_positions(backbone: nn.Module) -> bool:
    """Whether the model can be told positions; Bloom and MPT cannot, they count the mask by themselves."""
    return "position_ids" in inspect.signature(plain(backbone).forward).parameters


def plain(backbone: Any) -> Any:  # noqa: ANN401 - one class an architecture
    """The model of transformers, also under an adapter."""
    return backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone


def set_bidirectional(backbone: nn.Module) -> nn.Module:
    """Lets tokens see those after them: attention of all layers is full, or goes both ways within a sliding window.

    It is noted in the configuration (`is_causal`), where transformers finds it when the saved model is loaded.

    Returns:
        The same model, changed in place.

    Raises:
        ValueError: the architecture does not follow that configuration.
    """
    model = plain(backbone)
    if not sees_later_tokens(model):
        model.config.is_causal = False
        if not sees_later_tokens(model):
            del model.config.is_causal
            raise ValueError(
                f"model.bidirectional: the attention of {type(model).__name__} stays causal, whatever its "
                "configuration says (is_causal: false); set model.bidirectional: false"
            )
    return backbone


def sees_later_tokens(backbone: nn.Module) -> bool:
    """Whether the first token's vector depends on the last token, tried on texts with and without padding."""
    device = next(backbone.parameters()).device
    ids = torch.tensor([[1, 2, 3, 0], [1, 2, 0, 0]], device=device)
    training = backbone.training
    backbone.eval()
    seen = []
    with torch.no_grad():
        for length in (3, 4):  # without padding, a mask is not made but told to the attention by a flag
            mask = (torch.arange(length, device=device) < 3).long().expand(2, -1)
            first = backbone(input_ids=ids[:, :length], attention_mask=mask)[0][:, 0].float()
            seen.append(bool((first[0] - first[1]).norm() > VISIBLE * first[0].norm()))
    backbone.train(training)
    return all(seen)
