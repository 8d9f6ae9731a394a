"""What is put before a query or a passage: one place, so that mining, training, evaluation and export agree."""

from rayembed.config.model import ModelConfig
from rayembed.data.tasks import CLUSTERING, STS

ALIKE = ("symmetric_sts", CLUSTERING, STS)  # types whose passages are texts of the kind of the queries


def _join(form: str, instruction: str, text: str) -> str:
    return form.replace("\\n", "\n").format(instruction, text)


def query_text(model: ModelConfig, query: str, prompt: str | None = None) -> str:
    """The query as the model reads it.

    Args:
        model: holds the instruction and its format.
        query: the bare query.
        prompt: the row's own instruction, which replaces the model's. None or empty: the model's, if it has one.
            (FlagEmbedding writes the text "None" before such queries when another file of the mix has prompts.)
    """
    instruction = prompt or model.query_instruction_for_retrieval
    return _join(model.query_instruction_format, instruction, query) if instruction else query


def passage_text(model: ModelConfig, passage: str) -> str:
    """The passage as the model reads it."""
    instruction = model.passage_instruction_for_retrieval
    return _join(model.passage_instruction_format, instruction, passage) if instruction else passage


def passage_of_row(model: ModelConfig, passage: str, *, row_type: str | None, prompt: str | None) -> str:
    """A passage of a training row as the model reads it.

    Args:
        model: holds instructions and formats.
        passage: the bare passage.
        row_type: the row's; both sides of symmetric types are put as queries are.
        prompt: the row's own instruction.
    """
    return query_text(model, passage, prompt) if row_type in ALIKE else passage_text(model, passage)
