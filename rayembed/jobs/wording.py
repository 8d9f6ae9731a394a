"""Texts of training rows as the teacher reads them: prompts and types of rows are of models that are trained here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rayembed.config.model import ModelConfig
from rayembed.data.prompts import passage_of_row, query_of_row
from rayembed.data.store import Row


@dataclass(frozen=True, kw_only=True)
class Wording:
    """What a teacher that was trained here wants before texts."""

    query_instruction: str | None
    query_instruction_format: str
    passage_instruction: str | None
    passage_instruction_format: str

    prompt_format: str
    """How a row's own prompt is joined: as in the teacher's training, also where section score has an instruction."""


class RowTexts:
    """Pairs of training rows as the teacher reads them."""

    def __init__(self, wording: Mapping[str, Any] | None) -> None:
        """Takes fields of Wording; None: a foreign teacher, for which pairs are the bare texts."""
        self._models: tuple[ModelConfig, ModelConfig] | None = None
        if wording is None:
            return
        own = Wording(**wording)
        model = ModelConfig(
            name_or_path="teacher",
            query_instruction_for_retrieval=own.query_instruction,
            query_instruction_format=own.query_instruction_format,
            passage_instruction_for_retrieval=own.passage_instruction,
            passage_instruction_format=own.passage_instruction_format,
        )
        self._models = model, replace(model, query_instruction_format=own.prompt_format)

    def pairs(self, row: Row, passages: Sequence[str]) -> list[tuple[str, str]]:
        """The row's query with each of the passages.

        Args:
            row: its query, prompt and type.
            passages: bare texts: its positives or negatives, or others of the corpus.
        """
        if self._models is None:
            return [(row["query"], text) for text in passages]
        prompt, row_type = row["prompt"], row["type"]
        model = self._models[1 if prompt else 0]
        query = query_of_row(model, row["query"], row_type=row_type, prompt=prompt)
        return [(query, passage_of_row(model, text, row_type=row_type, prompt=prompt)) for text in passages]
