"""What is put before a query or a passage: one place, so that mining, training, evaluation and export agree."""

from rayembed.config.model import ModelConfig
from rayembed.data.tasks import CLUSTERING, OF_OWN_KIND, STS

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
    return _asked(model, query, prompt or model.query_instruction_for_retrieval)


def query_of_row(model: ModelConfig, query: str, *, row_type: str | None, prompt: str | None) -> str:
    """The query of a training row, or a text of a task, as the model reads it.

    Args:
        model: holds the instruction and its format.
        query: the bare text.
        row_type: the row's; before texts of types sts and class, which are not of retrieval, stands no instruction but
            the row's own.
        prompt: the row's own instruction, or that of its dataset or task.
    """
    return _asked(model, query, prompt) if row_type in OF_OWN_KIND else query_text(model, query, prompt)


def _asked(model: ModelConfig, query: str, instruction: str | None) -> str:
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
    if row_type in ALIKE:
        return query_of_row(model, passage, row_type=row_type, prompt=prompt)
    return passage_text(model, passage)
