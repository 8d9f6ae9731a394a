"""What is put before a query or passage."""

import pytest

from rayembed.config.model import ModelConfig
from rayembed.data.prompts import passage_text, query_text

INSTRUCTED = ModelConfig(
    name_or_path="x",
    query_instruction_for_retrieval="find",
    query_instruction_format="Instruct: {}\nQuery: {}",
    passage_instruction_for_retrieval="passage: ",
    passage_instruction_format="{}{}",
)
PLAIN = ModelConfig(name_or_path="x", query_instruction_format="<{}> {}", passage_instruction_format="[{}] {}")


def test_instruction_and_text_are_joined_by_the_format() -> None:
    assert query_text(INSTRUCTED, "a {} b") == "Instruct: find\nQuery: a {} b"
    assert passage_text(INSTRUCTED, "a\\nb") == "passage: a\\nb"


def test_without_an_instruction_the_text_stays_as_it_is() -> None:
    assert query_text(PLAIN, "a") == "a"
    assert passage_text(PLAIN, "a") == "a"


@pytest.mark.parametrize("none", [None, ""])
def test_a_rows_prompt_replaces_the_models(none: str | None) -> None:
    assert query_text(INSTRUCTED, "a", "other") == "Instruct: other\nQuery: a"
    assert query_text(PLAIN, "a", "other") == "<other> a"
    assert query_text(INSTRUCTED, "a", none) == "Instruct: find\nQuery: a"
    assert query_text(PLAIN, "a", none) == "a"


def test_a_written_line_break_is_one_in_the_format_alone() -> None:
    model = ModelConfig(
        name_or_path="x", query_instruction_for_retrieval=r"say \n", query_instruction_format=r"{}\nQuery: {}"
    )
    assert query_text(model, r"a \n b") == "say \\n\nQuery: a \\n b"
