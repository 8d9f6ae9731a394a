"""Training rows to token ids, ahead of training and outside its processes, one unit a part of the rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayembed.config import Experiment
from rayembed.data.storage import fingerprint
from rayembed.data.store import Store
from rayembed.data.tokens import write_tokens
from rayembed.jobs.shipping import received, shipped
from rayembed.jobs.units import Unit, Work, run_units
from rayembed.models.encoding import tokenize
from rayembed.models.families import FAMILIES
from rayembed.models.loading import check_length, load_tokenizer, tokenizer_fingerprint


@dataclass(frozen=True)
class Tokenized:
    """Where the token files are, and what was counted on the way."""

    folder: Path
    parts: tuple[str, ...]
    counts: dict[str, int]


def tokenize_rows(experiment: Experiment, rows: Store) -> Tokenized:
    """Tokenises what is not in the cache."""
    model, data = experiment.model, experiment.data
    for side, length in (("query", data.query_max_len), ("passage", data.passage_max_len)):
        check_length(model.name_or_path, length, f"data.{side}_max_len", trust_remote_code=model.trust_remote_code)
    depends_on = {
        "rows": [rows.fingerprint, rows.layout],
        "tokenizer": tokenizer_fingerprint(model.name_or_path),
        "prompts": [
            model.query_instruction_for_retrieval,
            model.query_instruction_format,
            model.passage_instruction_for_retrieval,
            model.passage_instruction_format,
        ],
        "max_len": [data.query_max_len, data.passage_max_len],
    }
    folder = Path(experiment.cache()) / f"tokens-{fingerprint(depends_on)}"
    units = [Unit(f"{i:05d}", part.num_rows, {"part": i}) for i, part in enumerate(rows.parts)]
    work = Work(
        what="tokenize",
        counted="rows",
        worker="rayembed.jobs.tokenize:TokenizeWorker",
        arguments={"experiment": shipped(experiment), "rows": str(rows.folder)},
        folder=folder,
    )
    counts = run_units(units, work, experiment.ray, use_gpu=False)
    sums = {key: sum(count[key] for count in counts) for key in counts[0]}
    return Tokenized(folder, tuple(unit.name for unit in units), sums)


class TokenizeWorker:
    """Holds the tokenizer."""

    def __init__(self, *, experiment: str, rows: str, threads: int, use_gpu: bool) -> None:
        self._experiment = received(experiment)
        model = self._experiment.model
        self._rows = Store.open(Path(rows))
        self._tokenizer = load_tokenizer(
            model.name_or_path,
            padding_side=FAMILIES[model.family].padding_side,
            trust_remote_code=model.trust_remote_code,
        )

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, int]:
        """Writes one part."""
        return write_tokens(
            self._rows.read_part(spec["part"]),
            folder,
            name,
            model=self._experiment.model,
            tokenize=lambda texts, max_len: tokenize(self._tokenizer, texts, max_len),
            query_max_len=self._experiment.data.query_max_len,
            passage_max_len=self._experiment.data.passage_max_len,
        )
