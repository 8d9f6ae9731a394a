"""Whether texts are packed in training, and as many forward passes on every worker where that is needed."""

import logging
from dataclasses import replace

from torch import nn

from rayembed.config.train import TrainConfig
from rayembed.models.chunks import TokenBatch
from rayembed.models.embedder import ChunkModel, Embedder
from rayembed.models.packable import why_not_packed
from rayembed.training.batches import Batch
from rayembed.training.gather import largest_of_workers

logger = logging.getLogger(__name__)


def reads_packed(train: TrainConfig, model: nn.Module, guide: Embedder | None) -> bool:
    """Whether batches are packed, by train.packed; the models that read them are prepared for it.

    Args:
        train: its field packed says whether they must be, may be or must not be.
        model: that is trained, on its device.
        guide: reads the same batches, on its device. None: there is none.

    Raises:
        ValueError: they must be, and a model cannot read them.
    """
    if train.packed is False:
        return False
    assert isinstance(model, ChunkModel)
    reason = why_not_packed(model, training=True)
    if reason is None and guide is not None:
        of_guide = why_not_packed(guide, training=False)
        reason = None if of_guide is None else f"train.guide_model: {of_guide}"
    alike = largest_of_workers(int(reason is not None), next(model.parameters()).device)
    if alike == 0:
        return True
    reason = reason or "another worker's machine cannot"
    if train.packed:
        raise ValueError(f"train.packed is true, but texts cannot be packed; set it to null or false. {reason}")
    logger.info("train: texts are padded; they cannot be packed: %s", reason)
    return False


def equal_chunks(batch: Batch) -> Batch:
    """The same batch in as many chunks as the worker with the most of them has.

    ZeRO 3 gathers weights in each forward pass, so that all workers must make as many. A further chunk repeats the
    last, the one of the shortest texts, and no text's row in `order` is its: what the model gives for it is dropped.
    """
    return replace(batch, inputs=tuple(_equal(texts) for texts in batch.inputs))


def _equal(texts: TokenBatch) -> TokenBatch:
    most = largest_of_workers(len(texts.chunks), texts.order.device)
    return replace(texts, chunks=texts.chunks + texts.chunks[-1:] * (most - len(texts.chunks)))
