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
from rayembed.training.batches import Batch, Keys
from rayembed.training.blocks import mean_in_blocks
from rayembed.training.candidates import Candidates, Texts, of_all_workers
from rayembed.training.gather import gather_with_grad

DENSE = SIMILARITIES["dense"]
BLOCK_SCORES = 2**22  # scores in memory at once, of each matrix that a loss is made of: 16 MiB in float32


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
        candidates = Candidates.of(
            num_queries=batch.num_queries,
            group_size=batch.dataset.group_size,
            own_group_alone=batch.dataset.no_in_batch_neg,
            across=self._train.negatives_cross_device,
            device=queries["dense"].device,
        )
        loss = self._of_compared(self._compared(batch, candidates, queries, passages), step)
        if "sparse" not in queries or not self._m3.flops_weight:
            return loss
        own = [{name: side[name] for name in ("ids", "sparse")} for side in (queries, passages)]
        sides = [of_all_workers(side) for side in own]
        return loss + self._m3.flops_weight * sum(flops(compacted_sparse(side)) for side in sides)

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

    def _compared(self, batch: Batch, candidates: Candidates, queries: Texts, passages: Texts) -> "_Compared":
        """All that comes from other workers or from the guide: what follows is of each query by itself."""
        gathered, guided = candidates.gather(passages), None
        if self._guide is not None and self._train.false_negative_margin is not None and not candidates.own_group_alone:
            with torch.no_grad():
                own = [{"dense": self._guide.embed(texts)} for texts in batch.inputs]
            guided = own[0], candidates.gather(own[1])
        compares_queries = batch.dataset.loss in ("symmetric_info_nce", "improved_info_nce")
        return _Compared(
            dataset=batch.dataset,
            candidates=candidates,
            queries=queries,
            positives=passages["dense"][:: candidates.group_size],
            gathered=gathered,
            every_query=candidates.gather_rows(queries["dense"]) if compares_queries else None,
            guided=guided,
            keys=batch.keys,
            every_key=candidates.gather_keys(batch.keys) if self._train.mask_same_texts else None,
            teacher=batch.teacher,
        )

    def _of_compared(self, compared: "_Compared", step: int) -> Tensor:
        """The mean over queries, of so many at a time that no large matrix of scores is held."""
        rows = max(1, BLOCK_SCORES // len(compared.gathered["dense"]))
        total = len(compared.candidates.queries)
        if rows >= total or compared.candidates.own_group_alone:
            return self._of_block(compared, step)

        def mean_of(place: slice, by_row: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
            return self._of_block(compared.some(place, by_row, shared), step)

        return mean_in_blocks(mean_of, *compared.vectors(), rows=rows)

    def _of_block(self, compared: "_Compared", step: int) -> Tensor:
        compared = replace(compared, allowed=self._allowed(compared))
        dense = self._dense(compared)
        return self._of_heads(compared, dense, step) if "sparse" in compared.queries else dense

    def _allowed(self, compared: "_Compared") -> Tensor | None:
        """[B, P] bool, False where a passage is no negative of the query. None: all are."""
        train, candidates = self._train, compared.candidates
        if candidates.own_group_alone:
            return None
        every = compared.every_key
        allowed = None if every is None else candidates.passages(compared.keys, every)
        if train.false_negative_margin is None:
            return allowed
        scores = candidates.scores(DENSE, *(compared.guided or (compared.queries, compared.gathered)))
        near = by_margin(scores, candidates.positives, candidates.group_size, train.false_negative_margin)
        return near if allowed is None else allowed & near

    def _dense(self, compared: "_Compared") -> Tensor:
        """The loss of the dense vectors, the mean over Matryoshka's lengths."""
        dims = self._train.mrl_dims
        sides = compared.queries["dense"], compared.gathered["dense"], compared.positives, compared.every_query
        if not dims:
            return self._of_vectors(compared, *sides)
        cut = [
            [None] * len(dims) if side is None else beginnings(side, dims, normalize=self._normalize) for side in sides
        ]
        return torch.stack([self._of_vectors(compared, *parts) for parts in zip(*cut, strict=True)]).mean()

    def _of_vectors(
        self, compared: "_Compared", queries: Tensor, passages: Tensor, positives: Tensor, every_query: Tensor | None
    ) -> Tensor:
        candidates, allowed, loss = compared.candidates, compared.allowed, compared.dataset.loss
        scores = candidates.scores(DENSE, {"dense": queries}, {"dense": passages})
        if every_query is None:
            assert loss == "info_nce", loss
            return self._select(compared)(scores)
        of_query, of_positive = None, None
        if compared.every_key is not None:
            of_query, of_positive = candidates.other_queries(compared.keys, compared.every_key)
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
            FourWays(scores, queries @ every_query.T, reverse, positives @ passages.T),
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
        return m3_loss(
            scores,
            self._select(compared),
            temperature=self._temperature,
            sparse_score_weight=m3.sparse_score_weight,
            sparse_loss_weight=m3.sparse_loss_weight,
            self_distill=m3.use_self_distill and step >= m3.self_distill_start_step,
            allowed=compared.allowed,
            dense_loss=dense,
        )

    def _select(self, compared: "_Compared") -> Callable[[Tensor], Tensor]:
        return partial(
            selected_loss,
            positives=compared.candidates.positives,
            teacher=compared.teacher,
            train=self._train,
            temperature=self._temperature,
            allowed=compared.allowed,
        )


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """What the loss of B queries is made of: what is theirs, and the R queries and P passages that compete."""

    dataset: Dataset
    candidates: Candidates
    queries: Texts
    """[B, ...]"""

    positives: Tensor
    """[B, D]: each query's."""

    gathered: Texts
    """[P, ...]: the passages."""

    every_query: Tensor | None
    """[R, D]. None: queries do not compete."""

    guided: tuple[Texts, Texts] | None
    """Queries [B, D] and passages [P, D] as the guide sees them. None: there is no guide."""

    keys: Keys
    """Of the B queries and their groups."""

    every_key: Keys | None
    """Of all that compete. None: same texts are not masked."""

    teacher: Tensor | None
    """[B, G]"""

    allowed: Tensor | None = None
    """[B, P] bool, False where a passage is no negative of the query. None: all are."""

    def vectors(self) -> tuple[list[Tensor], list[Tensor]]:
        """What a gradient goes to, and what lies beside it: of the B queries, and of all that compete."""
        every = [] if self.every_query is None else [self.every_query]
        return [*self.queries.values(), self.positives], [*self.gathered.values(), *every]

    def some(self, rows: slice, by_row: Sequence[Tensor], shared: Sequence[Tensor]) -> "_Compared":
        """The same of some of the queries, with these parts of `vectors`."""
        group = self.dataset.group_size
        keys, guided = self.keys, self.guided
        passages = slice(rows.start * group, rows.stop * group)
        return replace(
            self,
            candidates=self.candidates.some(rows),
            queries=dict(zip(self.queries, by_row, strict=False)),
            positives=by_row[-1],
            gathered=dict(zip(self.gathered, shared, strict=False)),
            every_query=None if self.every_query is None else shared[-1],
            guided=None if guided is None else (_rows(guided[0], rows), guided[1]),
            keys=Keys(keys.queries[rows], keys.positives[rows], keys.passages[passages]),
            teacher=None if self.teacher is None else self.teacher[rows],
        )


def _rows(texts: Texts, rows: slice) -> Texts:
    return {name: every[rows] for name, every in texts.items()}


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
    workers = 1 if train.negatives_cross_device else experiment.ray.most_workers  # one number then, see Experiment
    return dataset.batch_size // workers * dataset.group_size - 1
