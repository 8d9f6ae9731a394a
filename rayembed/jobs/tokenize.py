"""Training rows to token ids, ahead of training and outside its processes, one unit a part of the rows.

With train.eval_steps the texts of the dev split too, by the same workers.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rayembed.config import Experiment
from rayembed.data.storage import fingerprint
from rayembed.data.store import Store
from rayembed.data.tokens import write_texts, write_tokens
from rayembed.jobs.dev_split import DevSplit
from rayembed.jobs.shipping import received, shipped
from rayembed.jobs.units import Unit, Work, run_units
from rayembed.jobs.vectors import TextReader
from rayembed.models.encoding import tokenize
from rayembed.models.families import FAMILIES
from rayembed.models.in_context import icl_section, reader_of
from rayembed.models.loading import check_length, tokenizer_fingerprint
from rayembed.models.pairs import pair_layout
from rayembed.models.trained import build_tokenizer

VERSION = 2  # raise it when the same rows and settings give other tokens


@dataclass(frozen=True)
class Tokenized:
    """Where the token files are, and what was counted on the way."""

    folder: Path
    parts: tuple[str, ...]
    counts: dict[str, int]


def tokenize_rows(experiment: Experiment, rows: Store, dev: DevSplit | None = None) -> Tokenized:
    """Tokenises what is not in the cache.

    Args:
        experiment: model, prompts, lengths, resources.
        rows: training rows.
        dev: texts whose tokens are to be in its folder. None: no others.
    """
    model, data = experiment.model, experiment.data
    for setting, length in longest_texts(experiment).items():
        check_length(model.name_or_path, length, setting, trust_remote_code=model.trust_remote_code)
    query_reader = reader_of(experiment, build_tokenizer(experiment))
    depends_on = {
        "version": VERSION,
        "rows": [rows.fingerprint, rows.layout],
        "tokenizer": tokenizer_fingerprint(model.name_or_path),
        "prompts": [
            model.query_instruction_for_retrieval,
            model.query_instruction_format,
            model.passage_instruction_for_retrieval,
            model.passage_instruction_format,
        ],
        "max_len": [data.query_max_len, data.passage_max_len],
        "family": model.family,
        "new_tokens": model.additional_special_tokens,
        **({"suffix": query_reader.suffix} if query_reader is not None else {}),
    }
    folder = Path(experiment.cache()) / f"tokens-{fingerprint(depends_on)}"
    units = [Unit(f"{i:05d}", part.num_rows, {"part": i}) for i, part in enumerate(rows.parts)]
    of_dev = [] if dev is None else [*dev.units()]
    stores = {} if dev is None else {side: str(dev.store(side).folder) for side in dev.rows}
    work = Work(
        what="tokenize",
        counted="rows" if dev is None else "rows and dev texts",
        worker="rayembed.jobs.tokenize:TokenizeWorker",
        arguments={"experiment": shipped(experiment), "rows": str(rows.folder), "dev": stores},
        folder=folder,
    )
    counts = run_units([*units, *of_dev], work, experiment.ray, use_gpu=False)[: len(units)]
    if dev is not None:
        dev.write_facts(experiment)
    sums = {key: sum(count[key] for count in counts) for key in counts[0]}
    return Tokenized(folder, tuple(unit.name for unit in units), sums)


def longest_texts(experiment: Experiment) -> dict[str, int]:
    """Tokens of the longest texts that the model is trained on, by the settings that say so."""
    query, passage = experiment.data.query_max_len, experiment.data.passage_max_len
    icl = icl_section(experiment)
    if icl is not None and icl.max_examples:
        return {
            "data.query_max_len + icl.examples_max_len": query + icl.examples_max_len,
            "data.passage_max_len": passage,
        }
    if experiment.trains_reranker():
        return {"data.query_max_len + data.passage_max_len": query + passage}
    return {"data.query_max_len": query, "data.passage_max_len": passage}


class TokenizeWorker:
    """Holds the tokenizer."""

    def __init__(self, *, experiment: str, rows: str, dev: dict[str, str], threads: int, use_gpu: bool) -> None:
        self._experiment = received(experiment)
        model = self._experiment.model
        self._rows = Store.open(Path(rows))
        self._tokenizer = build_tokenizer(self._experiment)
        data = self._experiment.data
        self._lengths, self._special = (data.query_max_len, data.passage_max_len), True
        reader = reader_of(self._experiment, self._tokenizer)
        self._tokenize_query = None if reader is None else reader.tokens
        if FAMILIES[model.family].reads == "pairs":
            layout = pair_layout(self._tokenizer, self._experiment)
            self._lengths, self._special = (layout.query_max_len, layout.passage_max_len), False
        self._dev = {side: Store.open(Path(folder)) for side, folder in dev.items()}

    def __call__(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, int]:
        """Writes one part."""
        if "side" in spec:
            return self._of_dev(spec, name, folder)
        return write_tokens(
            self._rows.read_part(spec["part"]),
            folder,
            name,
            model=self._experiment.model,
            tokenize=partial(tokenize, self._tokenizer, special_tokens=self._special),
            tokenize_query=self._tokenize_query,
            query_max_len=self._lengths[0],
            passage_max_len=self._lengths[1],
        )

    def _of_dev(self, spec: dict[str, Any], name: str, folder: Path) -> dict[str, int]:
        side = spec["side"]
        store, rows = self._dev[side], np.array(spec["rows"]) if "rows" in spec else np.arange(*spec["range"])
        tokens = TextReader(self._experiment, self._tokenizer)(store, side, rows, self._experiment.max_len(side))
        return write_texts(store.take(rows, ["id"]).column("id").to_pylist(), tokens, folder, name)
