"""What is put before a query or passage."""

import pytest

from rayembed.config.model import ModelConfig
from rayembed.data.prompts import passage_of_row, passage_text, query_of_row, query_text

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


@pytest.mark.parametrize("kind", ["symmetric_sts", "symmetric_clustering", "sts"])
@pytest.mark.parametrize("prompt", [None, "", "other"])
def test_both_sides_of_symmetric_types_are_put_as_queries(kind: str, prompt: str | None) -> None:
    told = {"row_type": kind, "prompt": prompt}
    for model in (INSTRUCTED, PLAIN):
        assert passage_of_row(model, "a", **told) == query_of_row(model, "a", **told)
    if kind != "sts":
        assert passage_of_row(INSTRUCTED, "a", row_type=kind, prompt=None) == "Instruct: find\nQuery: a"


@pytest.mark.parametrize("none", [None, ""])
def test_the_instruction_for_retrieval_is_for_no_texts_of_other_kinds(none: str | None) -> None:
    for kind in ("sts", "class"):
        assert query_of_row(INSTRUCTED, "a", row_type=kind, prompt=none) == "a"
        assert query_of_row(INSTRUCTED, "a", row_type=kind, prompt="other") == "Instruct: other\nQuery: a"
    assert passage_of_row(INSTRUCTED, "a", row_type="sts", prompt=none) == "a"
    for kind in (None, "normal", "only_1neg", "symmetric_sts", "symmetric_clustering", "symmetric_class"):
        for prompt in (none, "other"):
            assert query_of_row(INSTRUCTED, "a", row_type=kind, prompt=prompt) == query_text(INSTRUCTED, "a", prompt)


@pytest.mark.parametrize("kind", [None, "normal", "only_1neg", "symmetric_class", "class"])
def test_passages_of_other_types_are_put_as_passages(kind: str | None) -> None:
    assert passage_of_row(INSTRUCTED, "a", row_type=kind, prompt="other") == "passage: a"
    assert passage_of_row(PLAIN, "a", row_type=kind, prompt="other") == "a"


@pytest.mark.parametrize("kind", [None, "symmetric_sts"])
def test_the_text_none_is_never_written(kind: str | None) -> None:
    for prompt in (None, ""):
        assert query_text(PLAIN, "a", prompt) == "a"
        assert passage_of_row(PLAIN, "a", row_type=kind, prompt=prompt) == "a"
