"""BGE-M3's three representations of a text out of one pass of its encoder.

A dense vector, a weight for each token (sparse), and a vector for each token (ColBERT).
`rayembed.models.similarity` compares them. Shapes: N texts, T tokens, D and C dimensions, H of the encoder.

Source: arXiv:2402.03216.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rayembed.models.chunks import Chunk, Packed, TokenBatch
from rayembed.models.embedder import Embedder
from rayembed.models.loading import resolve
from rayembed.models.pickles import tensors_alone

logger = logging.getLogger(__name__)

SPARSE_FILE, COLBERT_FILE = "sparse_linear.pt", "colbert_linear.pt"
OF_TOKENS = ("ids", "sparse", "colbert", "mask")  # representations with a row for each token


class M3Embedder(Embedder):
    """An encoder with a head for token weights and a head for token vectors beside the dense vector."""

    def __init__(
        self,
        backbone: nn.Module,
        *,
        pooling: str,
        normalize: bool,
        sparse_linear: nn.Linear,
        colbert_linear: nn.Linear,
        special_tokens: Sequence[int],
        unified: bool = True,
    ) -> None:
        """Puts the heads on the backbone.

        Args:
            backbone: an encoder.
            pooling: of the dense vector.
            normalize: scale dense and ColBERT vectors to length 1; sparse weights stay as they are.
            sparse_linear: H to 1.
            colbert_linear: H to C.
            special_tokens: ids that have no sparse weight; see `unweighted_tokens`.
            unified: compute all three. False: the dense vector alone; the heads are kept, but not trained.
        """
        super().__init__(backbone, pooling=pooling, normalize=normalize)
        self.sparse_linear = sparse_linear.requires_grad_(unified)
        self.colbert_linear = colbert_linear.requires_grad_(unified)
        self.special_tokens = tuple(special_tokens)
        self.unified = unified
        self.gives_rows = not unified  # else those of queries would be padded to the longest passage
        self._unweighted: Tensor
        ids = torch.tensor(self.special_tokens, dtype=torch.long)
        self.register_buffer("_unweighted", ids, persistent=False)  # goes to the device with the model

    def represent(self, batch: TokenBatch) -> dict[str, Tensor]:
        """The representations of N texts, in their order; T is the longest chunk's length.

        Returns:
            dense: [N, D] float32.
            ids: [N, T] int64.
            sparse: [N, T] float32, 0 or more; 0 at padding and special tokens.
            colbert: [N, T, C] float32; 0 where `mask` is.
            mask: [N, T] int64: 1 where a ColBERT vector counts, at every token but a text's first (CLS).
            Only dense, if the model is not unified.
        """
        representations: dict[str, Tensor] = self.of_batch(batch)
        return representations

    def of_chunk(self, chunk: Chunk | Packed) -> dict[str, Tensor]:
        """The representations of one chunk; see `represent`."""
        hidden = self.hidden(chunk)
        outputs = {"dense": self.pool(hidden, chunk)}
        if not self.unified:
            return outputs
        ids, mask = chunk.ids, chunk.mask
        if isinstance(chunk, Packed):  # after the encoder, whose arithmetic is nearly all there is
            ids, hidden = chunk.padded(ids), chunk.padded(hidden)
        present = mask.bool()
        weights = torch.relu(self.sparse_linear(hidden)).squeeze(-1).float()
        weighted = present & ~torch.isin(ids, self._unweighted)
        counted = present & (mask.cumsum(dim=1) > 1)  # the first token is not column 0 where padding is left
        vectors = self.colbert_linear(hidden).float()
        vectors = F.normalize(vectors, dim=-1) if self.normalize else vectors
        return outputs | {
            "ids": ids,
            "sparse": weights.masked_fill(~weighted, 0),
            "colbert": vectors.masked_fill(~counted.unsqueeze(-1), 0),
            "mask": counted.long(),
        }

    def joined(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Those of several chunks, padded to the longest."""
        return concatenate(parts)


def pad_tokens(outputs: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """The same representations with `length` tokens a text, at least as many as there are; added ones count nowhere."""
    padded = dict(outputs)
    for name in OF_TOKENS:
        if name in outputs:
            rows = outputs[name]
            padded[name] = F.pad(rows, (*(0, 0) * (rows.ndim - 2), 0, length - rows.shape[1]))
    return padded


def concatenate(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Representations of several lots of texts as one lot, padded to the longest."""
    length = max(part["ids"].shape[1] if "ids" in part else 0 for part in parts)
    padded = [pad_tokens(part, length) for part in parts]
    return {name: torch.cat([part[name] for part in padded]) for name in padded[0]}


def token_weights(outputs: Mapping[str, Tensor], i: int) -> dict[int, float]:
    """Text i's sparse vector: the highest weight of each token id, without those of weight 0."""
    found: dict[int, float] = {}
    for token, weight in zip(outputs["ids"][i].tolist(), outputs["sparse"][i].tolist(), strict=True):
        if weight > found.get(token, 0):
            found[token] = weight
    return found


def unweighted_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that are in no sparse vector: of beginning, end, padding and unknown tokens, where the tokenizer has them.

    BERT's separator too, which ends every text; FlagEmbedding gives it a weight.
    """
    names = ("cls_token_id", "eos_token_id", "sep_token_id", "pad_token_id", "unk_token_id")
    ids = [getattr(tokenizer, name) for name in names]
    return tuple(sorted({int(token) for token in ids if token is not None}))


def load_m3_heads(
    name_or_path: str, hidden_size: int, colbert_dim: int | None, *, seed: int
) -> tuple[nn.Linear, nn.Linear]:
    """The sparse and the ColBERT head beside a checkpoint's weights, in float32; new ones where it has none.

    Args:
        name_or_path: hub id, local folder, or package://installed_package/folder.
        hidden_size: H.
        colbert_dim: C. None: the checkpoint's, else H.
        seed: of new heads.

    Raises:
        ValueError: only one of the two files is there, or a head is of another size.
        FileNotFoundError: a hub id of which neither the cache nor the hub says whether it has heads.
    """
    sparse_file, colbert_file = (_find(name_or_path, name) for name in (SPARSE_FILE, COLBERT_FILE))
    if sparse_file is None and colbert_file is None:
        colbert_dim = colbert_dim or hidden_size
        logger.info("%s has no sparse and no ColBERT head: new ones, with %d dimensions", name_or_path, colbert_dim)
        generator = torch.Generator().manual_seed(seed)
        return _new_linear(hidden_size, 1, generator), _new_linear(hidden_size, colbert_dim, generator)
    if sparse_file is None or colbert_file is None:
        there, missing = (SPARSE_FILE, COLBERT_FILE) if colbert_file is None else (COLBERT_FILE, SPARSE_FILE)
        raise ValueError(
            f"{name_or_path} has {there}, but no {missing}; BGE-M3's heads come together: put {missing} there, or "
            f"remove {there} to begin with new heads, or change model.name_or_path"
        )
    colbert = _stored_linear(colbert_file, hidden_size)
    if colbert_dim not in (None, colbert.out_features):
        raise ValueError(
            f"m3.colbert_dim is {colbert_dim}, but {colbert_file} gives {colbert.out_features} dimensions; set it to "
            "null, or remove both heads' files to begin with new ones"
        )
    sparse = _stored_linear(sparse_file, hidden_size)
    if sparse.out_features != 1:
        raise ValueError(f"{sparse_file} gives {sparse.out_features} numbers a token; a sparse head gives one")
    return sparse, colbert


def _find(name_or_path: str, file: str) -> Path | None:
    """A file of the checkpoint. None: certainly not there; a failed look-up must not put new heads for trained ones."""
    folder = Path(resolve(name_or_path))
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    try:
        return Path(hf_hub_download(name_or_path, file))
    except LocalEntryNotFoundError as error:  # no answer from the hub, and no such file in its cache
        if try_to_load_from_cache(name_or_path, file) is _CACHED_NO_EXIST:  # an earlier answer
            return None
        raise FileNotFoundError(
            f"{name_or_path}: whether it has {file} cannot be known without the hub; set model.name_or_path to a folder"
        ) from error
    except EntryNotFoundError:
        return None


def _new_linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """As torch draws it, but from a generator of its own."""
    linear = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    for parameter in (linear.weight, linear.bias):
        nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return linear


def _stored_linear(file: Path, inputs: int) -> nn.Linear:
    with tensors_alone(str(file)):
        stored = torch.load(file, map_location="cpu", weights_only=True)
    shapes = {name: tuple(value.shape) for name, value in stored.items()}
    outputs = shapes.get("bias", (0,))[0]
    if shapes != {"weight": (outputs, inputs), "bias": (outputs,)}:
        raise ValueError(
            f"{file} holds {shapes}; for this encoder it must be weight (n, {inputs}) and bias (n,): it is another "
            "model's, so change model.name_or_path, or remove both heads' files to begin with new ones"
        )
    linear = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")  # nothing is drawn
    linear.load_state_dict(stored)  # BGE-M3's are float16; copied into float32
    return linear


def save_m3_heads(model: M3Embedder, folder: Path) -> None:
    """Writes both heads where FlagEmbedding's BGEM3FlagModel and `load_m3_heads` look for them."""
    for name, head in ((SPARSE_FILE, model.sparse_linear), (COLBERT_FILE, model.colbert_linear)):
        torch.save({key: value.detach().cpu().clone() for key, value in head.state_dict().items()}, folder / name)


def has_m3_heads(name_or_path: str) -> bool:
    """Whether the sparse and the ColBERT head lie beside a checkpoint's weights."""
    return all(_find(name_or_path, name) is not None for name in (SPARSE_FILE, COLBERT_FILE))
