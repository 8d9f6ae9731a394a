"""Which passages compete for each query of this worker: its own group's, this worker's, or those of all workers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from rayembed.losses import by_keys, share_keys
from rayembed.models.m3 import pad_tokens
from rayembed.models.similarity import Similarity
from rayembed.training.batches import Keys
from rayembed.training.gather import first_row, gather_with_grad, largest_of_workers

Texts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Candidates:
    """The passages that compete. Shapes: B queries of this worker, R of those compared, P passages, G in a group."""

    group_size: int
    """G."""

    own_group_alone: bool
    """A query competes within its own group."""

    across: bool
    """And else with the passages of all workers, not with those of its own alone."""

    queries: Tensor
    """[B] int64: each query's place among those compared."""

    positives: Tensor
    """[B] int64: the column where each query's group begins."""

    @classmethod
    def of(
        cls, *, num_queries: int, group_size: int, own_group_alone: bool, across: bool, device: torch.device
    ) -> "Candidates":
        """Places this worker's queries.

        Args:
            num_queries: B.
            group_size: G.
            own_group_alone: a query competes within its own group.
            across: and else with the passages of all workers, not of its own alone.
            device: of the vectors.
        """
        across = across and not own_group_alone
        rows = torch.arange(num_queries, device=device)
        queries = rows + (first_row(num_queries) if across else 0)
        positives = torch.zeros_like(rows) if own_group_alone else queries * group_size
        return cls(group_size, own_group_alone, across, queries, positives)

    def some(self, rows: slice) -> "Candidates":
        """Of some of the queries; their passages are the same."""
        return replace(self, queries=self.queries[rows], positives=self.positives[rows])

    def gather(self, texts: Texts) -> Texts:
        """The same representations of all workers' texts where they compete, else this worker's; with gradient."""
        return of_all_workers(texts) if self.across else texts

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows of all workers where they compete, else this worker's; with gradient."""
        return gather_with_grad(rows) if self.across else rows

    def gather_keys(self, keys: Keys) -> Keys:
        """Keys of all workers' texts where they compete, else this worker's."""
        if not self.across:
            return keys
        return Keys(*map(gather_with_grad, (keys.queries, _equally_wide(keys.positives), keys.passages)))

    def scores(self, similarity: Similarity, queries: Texts, passages: Texts) -> Tensor:
        """Scores [B, P] of these queries and the gathered passages; [B, G] of each query's own group alone."""
        if not self.own_group_alone:
            return similarity.matrix(queries, passages)
        repeated = {name: rows.repeat_interleave(self.group_size, dim=0) for name, rows in queries.items()}
        return similarity.paired(repeated, passages).view(len(self.queries), self.group_size)

    def other_queries(self, keys: Keys, every: Keys) -> tuple[Tensor, Tensor]:
        """Which queries may be negatives, of a query and of its positive: both [B, R] bool.

        A query of the same text is a negative of neither, nor is one that has the same positive.

        Args:
            keys: of these queries and their groups.
            every: of all that compete.
        """
        same = share_keys(keys.queries.unsqueeze(1), every.queries.unsqueeze(1))
        known = share_keys(keys.passages[:: self.group_size].unsqueeze(1), every.positives)
        return ~same, ~(same | known)

    def passages(self, keys: Keys, every: Keys) -> Tensor | None:
        """[B, P] bool, False where a passage is a positive of the query by its text, in whichever row. None: no mask.

        Positives of the query's row, drawn or not, and those of other rows with the same query.

        Args:
            keys: of these queries and their groups.
            every: of all that compete.
        """
        if self.own_group_alone:
            return None
        allowed = by_keys(keys.positives, every.passages, self.positives, self.group_size)
        same = share_keys(keys.queries.unsqueeze(1), every.queries.unsqueeze(1))
        same = same.scatter(1, self.queries.unsqueeze(1), False)
        allowed[:, :: self.group_size] &= ~same
        return allowed


def of_all_workers(texts: Texts) -> Texts:
    """The same representations of all workers' texts, in rank order, with gradient."""
    return {name: gather_with_grad(rows) for name, rows in _equally_long(texts).items()}


def _equally_long(texts: Texts) -> Texts:
    """With as many tokens a text as the longest of all workers has."""
    if "ids" not in texts or not dist.is_initialized():
        return texts
    return pad_tokens(texts, largest_of_workers(texts["ids"].shape[1], texts["ids"].device))


def _equally_wide(keys: Tensor) -> Tensor:
    width = largest_of_workers(keys.shape[1], keys.device)
    return torch.nn.functional.pad(keys, (0, width - keys.shape[1]))
