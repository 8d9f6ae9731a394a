"""The loss of one worker's batch: which passages compete for each query, and which loss judges the scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rayembed.config import Experiment
from rayembed.config.families import M3Config
from rayembed.config.train import TrainConfig
from rayembed.data.datasets import Dataset
from rayembed.data.tasks import STS
from rayembed.losses import (
    KD_LOSSES,
    FourWays,
    angle,
    beginnings,
    by_margin,
    cosent,
    flops,
    improved_info_nce,
    info_nce,
    m3_loss,
    pointwise_bce,
    symmetric_info_nce,
)
from rayembed.models.embedder import Embedder
from rayembed.models.families import FAMILIES
from rayembed.models.similarity import SIMILARITIES, compacted_sparse
from rayembed.training.batches import Batch
from rayembed.training.candidates import Candidates, Texts, of_all_workers
from rayembed.training.gather import gather_with_grad

DENSE = SIMILARITIES["dense"]


class Objective:
    """The loss of a batch, by the experiment's family and settings."""

    def __init__(self, experiment: Experiment, *, guide: Embedder | None = None) -> None:
        """Takes the settings.

        Args:
            experiment: family, section train and those of families.
            guide: judges which passages are false negatives. None: the trained model's own scores do.
        """
        assert experiment.train is not None
        self._train, self._temperature = experiment.train, experiment.temperature()
        self._pairs = FAMILIES[experiment.model.family].reads == "pairs"
        self._m3 = experiment.m3 or M3Config()
        self._normalize = experiment.model.normalize_embeddings
        self._guide = guide

    def __call__(self, outputs: Sequence[Any], batch: Batch, *, step: int = 0) -> Tensor:
        """Mean loss over this worker's queries; the mean over workers is the loss of the global batch.

        Args:
            outputs: what the model gives for `batch.inputs`.
            batch: this worker's part.
            step: steps of the optimiser done.
        """
        if self._pairs:
            return self._of_pairs(outputs[0], batch)
        queries, passages = ({"dense": out} if isinstance(out, Tensor) else out for out in outputs)
        if batch.dataset.type == STS:
            return self._of_scored_pairs(queries["dense"], passages["dense"], batch)
        candidates = Candidates(
            num_queries=batch.num_queries,
            group_size=batch.dataset.group_size,
            own_group_alone=batch.dataset.no_in_batch_neg,
            across=self._train.negatives_cross_device,
            device=queries["dense"].device,
        )
        gathered = candidates.gather(passages)
        compared = _Compared(batch, candidates, queries, passages, gathered, allowed=None)
        compared = replace(compared, allowed=self._allowed(compared))
        dense = self._dense(compared)
        return self._of_heads(compared, dense, step) if "sparse" in queries else dense

    def _of_pairs(self, output: Tensor, batch: Batch) -> Tensor:
        scores = output.view(batch.num_queries, batch.dataset.group_size)
        positives = torch.zeros(batch.num_queries, dtype=torch.long, device=scores.device)
        if batch.dataset.loss == "pointwise_bce":
            return pointwise_bce(
                scores,
                positives,
                batch.teacher,
                temperature=self._temperature,
                teacher_temperature=self._train.teacher_temperature,
            )
        return selected_loss(scores, positives, batch.teacher, self._train, temperature=self._temperature)

    def _of_scored_pairs(self, firsts: Tensor, seconds: Tensor, batch: Batch) -> Tensor:
        """Pairs of pairs of all workers, whose order is to be that of the people's scores; the same on every worker."""
        assert batch.teacher is not None
        labels = gather_with_grad(batch.teacher[:, 0])
        sides = [gather_with_grad(side) for side in (firsts, seconds)]
        dims = self._train.mrl_dims
        cut = [beginnings(side, dims, normalize=self._normalize) if dims else [side] for side in sides]
        temperature = self._train.scored_pairs_temperature
        losses = []
        for first, second in zip(*cut, strict=True):
            if batch.dataset.loss == "angle":
                losses.append(angle(first, second, labels, temperature=temperature))
            else:
                scores = torch.cosine_similarity(first, second, dim=-1)
                losses.append(cosent(scores, labels, temperature=temperature))
        return torch.stack(losses).mean()

    def _allowed(self, compared: "_Compared") -> Tensor | None:
        """[B, P] bool, False where a passage is no negative of the query. None: all are."""
        train, candidates = self._train, compared.candidates
        if candidates.own_group_alone:
            return None
        allowed = candidates.passages(compared.batch.keys) if train.mask_same_texts else None
        if train.false_negative_margin is None:
            return allowed
        judged = compared.queries, compared.gathered
        if self._guide is not None:
            with torch.no_grad():
                own = [{"dense": self._guide.embed(texts)} for texts in compared.batch.inputs]
            judged = own[0], candidates.gather(own[1])
        scores = candidates.scores(DENSE, *judged)
        near = by_margin(scores, candidates.positives, candidates.group_size, train.false_negative_margin)
        return near if allowed is None else allowed & near

    def _dense(self, compared: "_Compared") -> Tensor:
        """The loss of the dense vectors, the mean over Matryoshka's lengths."""
        dims = self._train.mrl_dims
        if not dims:
            return self._of_vectors(compared)
        cut = [
            beginnings(side["dense"], dims, normalize=self._normalize)
            for side in (compared.queries, compared.passages, compared.gathered)
        ]
        losses = [
            self._of_vectors(
                replace(compared, queries={"dense": query}, passages={"dense": own}, gathered={"dense": every})
            )
            for query, own, every in zip(*cut, strict=True)
        ]
        return torch.stack(losses).mean()

    def _of_vectors(self, compared: "_Compared") -> Tensor:
        candidates, allowed, loss = compared.candidates, compared.allowed, compared.batch.dataset.loss
        scores = candidates.scores(DENSE, compared.queries, compared.gathered)
        if loss == "info_nce":
            return self._select(compared)(scores)
        queries, positives = compared.queries["dense"], compared.passages["dense"][:: candidates.group_size]
        every_query = candidates.gather_rows(queries)
        of_query, of_positive = (
            candidates.other_queries(compared.batch.keys) if self._train.mask_same_texts else (None, None)
        )
        reverse = positives @ every_query.T
        if loss == "symmetric_info_nce":
            return symmetric_info_nce(
                scores,
                candidates.positives,
                reverse,
                candidates.queries,
                temperature=self._temperature,
                allowed=allowed,
                reverse_allowed=of_positive,
            )
        assert loss == "improved_info_nce", loss
        return improved_info_nce(
            FourWays(scores, queries @ every_query.T, reverse, positives @ compared.gathered["dense"].T),
            candidates.positives,
            candidates.queries,
            temperature=self._temperature,
            group_size=candidates.group_size,
            allowed=FourWays(allowed, of_query, of_positive, allowed),
        )

    def _of_heads(self, compared: "_Compared", dense: Tensor, step: int) -> Tensor:
        """BGE-M3's loss."""
        m3, candidates = self._m3, compared.candidates
        scores = {
            name: candidates.scores(kind, compared.queries, compared.gathered) for name, kind in SIMILARITIES.items()
        }
        loss = m3_loss(
            scores,
            self._select(compared),
            temperature=self._temperature,
            sparse_score_weight=m3.sparse_score_weight,
            sparse_loss_weight=m3.sparse_loss_weight,
            self_distill=m3.use_self_distill and step >= m3.self_distill_start_step,
            allowed=compared.allowed,
            dense_loss=dense,
        )
        if not m3.flops_weight:
            return loss
        own = [{name: side[name] for name in ("ids", "sparse")} for side in (compared.queries, compared.passages)]
        sides = [of_all_workers(side) for side in own]
        return loss + m3.flops_weight * sum(flops(compacted_sparse(side)) for side in sides)

    def _select(self, compared: "_Compared") -> Callable[[Tensor], Tensor]:
        return partial(
            selected_loss,
            positives=compared.candidates.positives,
            teacher=compared.batch.teacher,
            train=self._train,
            temperature=self._temperature,
            allowed=compared.allowed,
        )


@dataclass(frozen=True)
class _Compared:
    """What one batch's loss is made of."""

    batch: Batch
    candidates: Candidates
    queries: Texts
    passages: Texts
    """Of this worker."""

    gathered: Texts
    """The passages that compete."""

    allowed: Tensor | None
    """[B, P] bool, False where a passage is no negative of the query. None: all are."""


def selected_loss(
    scores: Tensor,
    positives: Tensor,
    teacher: Tensor | None,
    train: TrainConfig,
    *,
    temperature: float,
    allowed: Tensor | None = None,
) -> Tensor:
    """InfoNCE, or the loss of the settings that learns from a teacher, over one matrix of scores.

    Args:
        scores: [B, P] before the temperature.
        positives: [B] int64, the column where each query's group begins.
        teacher: [B, G] the teacher's scores. None: no distillation.
        train: which loss.
        temperature: divides the scores.
        allowed: [B, P] bool, False where a passage is no negative. None: all are.
    """
    if teacher is None:
        return info_nce(scores, positives, temperature=temperature, allowed=allowed)
    return KD_LOSSES[train.kd_loss_type](
        scores,
        positives,
        teacher,
        temperature=temperature,
        teacher_temperature=train.teacher_temperature,
        allowed=allowed,
    )


def negatives_per_query(experiment: Experiment, dataset: Dataset) -> int:
    """Passages that compete with each query's positive in a dataset's batches of its longest texts."""
    train = experiment.train
    assert train is not None
    if dataset.no_in_batch_neg or experiment.trains_reranker() or dataset.type == STS:
        return dataset.group_size - 1
    workers = 1 if train.negatives_cross_device else experiment.ray.num_workers
    return dataset.batch_size // workers * dataset.group_size - 1
