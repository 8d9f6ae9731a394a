"""A reranker as it is trained: token batches of (query, passage) pairs in, one score a pair out."""

from typing import Any

from torch import Tensor, nn

from rayembed.models.chunks import Chunk, Packed, TokenBatch
from rayembed.models.decoders import plain, positions, takes_positions
from rayembed.models.embedder import ChunkModel


class PairScorer(ChunkModel):
    """A cross-encoder with one logit, or a decoder whose logit of one answer is the score."""

    def __init__(self, backbone: nn.Module, *, answer: int | None) -> None:
        """Wraps the backbone.

        Args:
            backbone: with a classifier of one label, or a causal language model.
            answer: id of the token whose logit a decoder's score is. None: the backbone has a classifier.
        """
        super().__init__()
        self.backbone = backbone
        self.answer = answer
        self._told_positions = takes_positions(backbone)

    def score(self, batch: TokenBatch) -> Tensor:
        """Logits [N] in float32, in the order of the pairs."""
        logits: Tensor = self.of_batch(batch)
        return logits

    def of_chunk(self, chunk: Chunk | Packed) -> Tensor:
        """Logits [n] in float32."""
        if isinstance(chunk, Packed):
            return (self._classified(chunk) if self.answer is None else self._answered(chunk)).float()
        inputs: dict[str, Any] = {"input_ids": chunk.ids, "attention_mask": chunk.mask}
        if self.answer is None:
            if chunk.types is not None:
                inputs["token_type_ids"] = chunk.types
            logits: Tensor = self.backbone(**inputs).logits[:, 0]
            return logits.float()
        if self._told_positions:  # padded on the left
            inputs["position_ids"] = positions(chunk.mask)
        answers: Tensor = self.backbone(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, self.answer]
        return answers.float()

    def _answered(self, chunk: Packed) -> Tensor:
        last = chunk.starts[1:].long() - 1
        inputs = chunk.inputs(self.backbone)
        logits: Tensor = self.backbone(**inputs, logits_to_keep=last, use_cache=False).logits[0, :, self.answer]
        return logits

    def _classified(self, chunk: Packed) -> Tensor:
        """The head reads the first token of each row, so it is given a row for each text, of that token alone."""
        first = chunk.starts[:-1].long()

        def rows(_encoder: nn.Module, _inputs: Any, outputs: Any) -> Any:  # noqa: ANN401 - of transformers
            outputs.last_hidden_state = outputs.last_hidden_state[0, first, None]
            return outputs

        model = plain(self.backbone)
        whole = getattr(model, model.base_model_prefix)
        hook = getattr(whole, "encoder", whole).register_forward_hook(rows)  # BERT has its pooler after its encoder
        try:
            logits: Tensor = self.backbone(**chunk.inputs(self.backbone)).logits[:, 0]
        finally:
            hook.remove()
        return logits
