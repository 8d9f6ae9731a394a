"""Which passages compete for each query of this worker: its own group's, this worker's, or those of all workers."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from rayembed.losses import by_keys, share_keys
from rayembed.models.m3 import pad_tokens
from rayembed.models.similarity import Similarity
from rayembed.training.batches import Keys
from rayembed.training.gather import first_row, gather_with_grad

Texts = Mapping[str, Tensor]


class Candidates:
    """The passages that compete. Shapes: B queries of this worker, R of those compared, P passages, G in a group."""

    def __init__(
        self, *, num_queries: int, group_size: int, own_group_alone: bool, across: bool, device: torch.device
    ) -> None:
        """Places this worker's queries.

        Args:
            num_queries: B.
            group_size: G.
            own_group_alone: a query competes within its own group.
            across: and else with the passages of all workers, not of its own alone.
            device: of the vectors.
        """
        self.own_group_alone = own_group_alone
        self._across = across and not own_group_alone
        self._num_queries, self.group_size = num_queries, group_size
        first = first_row(num_queries) if self._across else 0
        rows = torch.arange(num_queries, device=device)
        self.queries = rows + first
        """[B] int64: each query's place among those compared."""

        self.positives = torch.zeros_like(rows) if self.own_group_alone else self.queries * group_size
        """[B] int64: the column where each query's group begins."""

    def gather(self, texts: Texts) -> Texts:
        """The same representations of all workers' texts where they compete, else this worker's; with gradient."""
        return of_all_workers(texts) if self._across else texts

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows of all workers where they compete, else this worker's; with gradient."""
        return gather_with_grad(rows) if self._across else rows

    def scores(self, similarity: Similarity, queries: Texts, passages: Texts) -> Tensor:
        """Scores [B, P] of this worker's queries and the gathered passages; [B, G] of each query's own group alone."""
        if not self.own_group_alone:
            return similarity.matrix(queries, passages)
        repeated = {name: rows.repeat_interleave(self.group_size, dim=0) for name, rows in queries.items()}
        return similarity.paired(repeated, passages).view(self._num_queries, self.group_size)

    def other_queries(self, keys: Keys) -> tuple[Tensor, Tensor]:
        """Which queries may be negatives, of a query and of its positive: both [B, R] bool.

        A query of the same text is a negative of neither, nor is one that has the same positive.
        """
        same = share_keys(keys.queries.unsqueeze(1), self.gather_rows(keys.queries).unsqueeze(1))
        drawn = keys.passages[:: self.group_size].unsqueeze(1)
        known = share_keys(drawn, self.gather_rows(_equally_wide(keys.positives, across=self._across)))
        return ~same, ~(same | known)

    def passages(self, keys: Keys) -> Tensor | None:
        """[B, P] bool, False where a passage is a positive of the query by its text, in whichever row. None: no mask.

        Positives of the query's row, drawn or not, and those of other rows with the same query.
        """
        if self.own_group_alone:
            return None
        allowed = by_keys(keys.positives, self.gather_rows(keys.passages), self.positives, self.group_size)
        same = share_keys(keys.queries.unsqueeze(1), self.gather_rows(keys.queries).unsqueeze(1))
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
    return pad_tokens(texts, _largest(texts["ids"].shape[1], texts["ids"].device))


def _equally_wide(keys: Tensor, *, across: bool) -> Tensor:
    if not across or not dist.is_initialized():
        return keys
    width = _largest(keys.shape[1], keys.device)
    return torch.nn.functional.pad(keys, (0, width - keys.shape[1]))


def _largest(number: int, device: torch.device) -> int:
    """The largest of all workers' numbers."""
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)
