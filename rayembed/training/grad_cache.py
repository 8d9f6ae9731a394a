"""GradCache: the gradient of a batch of any size, with the activations of one chunk at a time.

A pass without gradient gives what the model says of every chunk; the loss on that gives the gradient there; a second
pass, with gradient, carries it on to the weights, chunk by chunk. Dropout is drawn the same in both.

Source: arXiv:2101.06983.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rayembed.models.chunks import Chunk, Packed, TokenBatch, in_order
from rayembed.models.embedder import ChunkModel
from rayembed.training.engine import Engine
from rayembed.training.gather import largest_of_workers

WHOLE = ""  # name of an output that is one tensor, not a dict of some


def cached_backward(engine: Engine, inputs: Sequence[TokenBatch], loss_of: Callable[[Sequence[Any]], Tensor]) -> Tensor:
    """Does what `engine.backward(loss_of(engine(inputs)))` does, chunk by chunk.

    Args:
        engine: around a ChunkModel.
        inputs: what the model reads (queries, passages), in as many chunks as there are.
        loss_of: the loss of what the model gives for `inputs`; of float32 tensors.

    Returns:
        The loss, without its graph.
    """
    model = engine.module
    assert isinstance(model, ChunkModel)
    chunks = [chunk for batch in inputs for chunk in batch.chunks]
    if engine.stage == 3:  # all workers gather the weights in every pass, also those that have fewer chunks
        passes = largest_of_workers(len(chunks), chunks[0].ids.device)
        chunks += chunks[:1] * (passes - len(chunks))
    seen = [_Seen.of(engine, chunk) for chunk in chunks]

    ends = [0]
    for batch in inputs:
        ends.append(ends[-1] + len(batch.chunks))
    outputs = tuple(
        in_order(model.joined([one.output() for one in seen[first:last]]), batch.order)
        for (first, last), batch in zip(pairwise(ends), inputs, strict=True)
    )
    loss = loss_of(outputs)
    loss.backward()  # type: ignore[no-untyped-call] # torch types no backward
    del outputs

    engine.hold()
    for number, (chunk, one) in enumerate(zip(chunks, seen, strict=True)):
        gradients = one.gradients()
        if number >= ends[-1]:  # a further pass adds nothing
            gradients = {name: torch.zeros_like(gradient) for name, gradient in seen[0].gradients().items()}
        one.replay_dropout()
        output = _named(_of_chunk(engine, chunk))
        products = [(output[name] * gradient).sum() for name, gradient in gradients.items()]
        engine.backward(torch.stack(products).sum())
    return loss.detach()


@dataclass(frozen=True)
class _Seen:
    """What the first pass leaves of a chunk."""

    leaves: dict[str, Tensor]
    """The output; where it is of floating point, a gradient is gathered there."""

    random: tuple[Tensor, Tensor | None]
    """The state that dropout was drawn from: of the CPU and of the GPU, if that is where the chunk lies."""

    @classmethod
    def of(cls, engine: Engine, chunk: Chunk | Packed) -> "_Seen":
        device = chunk.ids.device
        random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        with torch.no_grad():
            output = _named(_of_chunk(engine, chunk))
        leaves = {name: rows.detach() for name, rows in output.items()}
        for rows in leaves.values():
            rows.requires_grad_(rows.is_floating_point())
        return cls(leaves, random)

    def output(self) -> Any:  # noqa: ANN401 - what the model gives
        return self.leaves.get(WHOLE, self.leaves)

    def gradients(self) -> dict[str, Tensor]:
        """Of the outputs that the loss looked at."""
        return {name: rows.grad for name, rows in self.leaves.items() if rows.grad is not None}

    def replay_dropout(self) -> None:
        cpu, gpu = self.random
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, next(iter(self.leaves.values())).device)


def _of_chunk(engine: Engine, chunk: Chunk | Packed) -> Any:  # noqa: ANN401 - what the model gives
    return engine([TokenBatch((chunk,), torch.arange(chunk.num_texts, device=chunk.ids.device))])[0]


def _named(output: Any) -> dict[str, Tensor]:  # noqa: ANN401 - what the model gives
    return {WHOLE: output} if isinstance(output, Tensor) else dict(output)
