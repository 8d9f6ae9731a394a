"""The model that is trained, by its family: built from the experiment, and saved for those who load it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AddedToken, AutoModel, PreTrainedTokenizerBase

from rayembed.config import Experiment
from rayembed.config.train import TrainConfig
from rayembed.models.adapters import add_tokens, merged, save_adapter, with_adapter
from rayembed.models.chunks import Chunk, pad_chunks
from rayembed.models.embedder import Embedder
from rayembed.models.encoding import tokenize
from rayembed.models.export import save_embedder, save_reranker
from rayembed.models.families import FAMILIES
from rayembed.models.loading import as_embedder, load_backbone, load_embedder, pooling_of, tokenizer_of
from rayembed.models.m3 import M3Embedder, has_m3_heads, load_m3_heads, save_m3_heads, unweighted_tokens
from rayembed.models.pair_scorer import PairScorer
from rayembed.models.rerankers import KINDS, answer_token

ADAPTER = "adapter"
"""Folder beside the model."""


@dataclass(frozen=True)
class Making:
    """How a family's model comes and goes."""

    build: Callable[[Experiment], nn.Module]
    save: Callable[[Any, PreTrainedTokenizerBase, Experiment, Path], None]


def _embedder(experiment: Experiment) -> nn.Module:
    return load_embedder(experiment.model)


def _m3(experiment: Experiment) -> nn.Module:
    model, config = experiment.model, experiment.family_sections()["m3"]
    backbone = load_backbone(model, AutoModel)
    settings: Any = backbone.config
    sparse, colbert = load_m3_heads(
        model.name_or_path, int(settings.hidden_size), config.colbert_dim, seed=experiment.seed
    )
    return M3Embedder(
        backbone,
        pooling=pooling_of(model),
        normalize=model.normalize_embeddings,
        sparse_linear=sparse,
        colbert_linear=colbert,
        special_tokens=unweighted_tokens(tokenizer_of(model)),
        unified=config.unified_finetuning,
    ).eval()


def _save_m3(model: M3Embedder, tokenizer: PreTrainedTokenizerBase, experiment: Experiment, folder: Path) -> None:
    trained = model.unified or has_m3_heads(experiment.model.name_or_path)  # others would pass for trained ones
    further = partial(save_m3_heads, model) if trained else None
    save_embedder(model, tokenizer, experiment, folder, further=further)


def _decoder(experiment: Experiment) -> nn.Module:
    model = experiment.model
    backbone = _adapted(experiment, load_backbone(model, AutoModel, in_4bit=_type_in_4bit(experiment)))
    return as_embedder(model, backbone, pooling=pooling_of(model))


def _type_in_4bit(experiment: Experiment) -> torch.dtype | None:
    """The type that a base in 4 bits computes in, that of the training. None: the base is held in full."""
    if experiment.lora is None or not experiment.lora.load_in_4bit:
        return None
    train = experiment.train or TrainConfig()
    return torch.bfloat16 if train.bf16 else torch.float16 if train.fp16 else torch.float32


def _adapted(experiment: Experiment, backbone: nn.Module) -> nn.Module:
    """With new tokens, and with an adapter where section lora asks for one."""
    new = add_tokens(tokenizer_of(experiment.model), backbone, experiment.model.additional_special_tokens)
    return backbone if experiment.lora is None else with_adapter(backbone, experiment.lora, new_tokens=new)


def _reranker(experiment: Experiment) -> nn.Module:
    family = FAMILIES[experiment.model.family]
    facts = KINDS["decoder-reranker" if family.causal else "reranker"]
    settings = {} if facts.answers else {"num_labels": 1}
    backbone = load_backbone(
        experiment.model,
        getattr(transformers, family.backbone),
        settings=settings,
        in_4bit=_type_in_4bit(experiment),
    )
    facts.check(experiment.model.name_or_path, backbone)
    answer = answer_token(tokenizer_of(experiment.model)) if facts.answers else None
    return PairScorer(_adapted(experiment, backbone) if facts.answers else backbone, answer=answer).eval()


def _save_adapted(model: Any, tokenizer: PreTrainedTokenizerBase, experiment: Experiment, folder: Path) -> None:  # noqa: ANN401
    """A decoder, its adapter merged into it; the adapter by itself beside it, which is there first and whole."""
    if experiment.lora is not None:
        final = folder.with_name(ADAPTER)
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        base = experiment.model.name_or_path
        save_adapter(model.backbone, partial, base=base, raw_peft=experiment.lora.raw_peft)
        tokenizer.save_pretrained(partial)  # it knows the new tokens
        partial.replace(final)
        model.backbone = merged(model.backbone, _few_texts(tokenizer))
    plain = model.backbone
    if FAMILIES[experiment.model.family].reads == "pairs":
        save_reranker(PairScorer(plain, answer=model.answer), tokenizer, experiment, folder)
    else:
        save_embedder(Embedder(plain, pooling=model.pooling, normalize=model.normalize), tokenizer, experiment, folder)


def _few_texts(tokenizer: PreTrainedTokenizerBase) -> Chunk:
    texts = [
        "what a text is",
        "a longer text than the one before it, which has some more words",
        *tokenizer.all_special_tokens,
    ]
    found = pad_chunks(tokenize(tokenizer, texts, 64), pad_token=int(tokenizer.pad_token_id), padding_side="right")
    (chunk,) = found.chunks
    assert isinstance(chunk, Chunk)
    return chunk


MAKING = {
    "encoder": Making(_embedder, save_embedder),
    "m3": Making(_m3, _save_m3),
    "decoder": Making(_decoder, _save_adapted),
    "icl": Making(_decoder, _save_adapted),
    "reranker-encoder": Making(_reranker, save_reranker),
    "reranker-decoder": Making(_reranker, _save_adapted),
}


def build_model(experiment: Experiment) -> nn.Module:
    """The experiment's model, in evaluation mode; weights that the checkpoint lacks are drawn.

    Weights are float32 but those of a base that section lora holds in 4 bits; see `in_full`.
    """
    return MAKING[experiment.model.family].build(experiment)


def in_full(experiment: Experiment) -> Experiment:
    """The same experiment with its base as the checkpoint has it: a trained adapter is merged into no other."""
    lora = experiment.lora
    return experiment if lora is None else replace(experiment, lora=replace(lora, load_in_4bit=False))


def build_tokenizer(experiment: Experiment) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with its new tokens."""
    tokenizer = tokenizer_of(experiment.model)
    new = [token for token in experiment.model.additional_special_tokens if token not in tokenizer.get_vocab()]
    if new:
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
    return tokenizer


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, experiment: Experiment, folder: Path) -> None:
    """Writes the model for transformers, sentence-transformers and FlagEmbedding; the folder appears whole.

    Args:
        model: from `build_model`, its base not in 4 bits; an adapter is merged into it.
        tokenizer: of the model.
        experiment: it was made from.
        folder: is replaced if it is there, and the adapter beside it.
    """
    shutil.rmtree(folder.with_name(ADAPTER), ignore_errors=True)  # of an earlier training: not this model's
    MAKING[experiment.model.family].save(model, tokenizer, experiment, folder)
