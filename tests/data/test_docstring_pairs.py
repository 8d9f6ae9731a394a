"""A docstring becomes query and passage, or the name of the reason why not."""

import pytest

from rayembed.data.docstring_pairs import Pair, make_pair
from rayembed.data.docstring_sources import Docstring

BODY = "The array is copied first, so that the caller keeps what was passed, whatever the dtype and order of it."


def made(text: str, name: str = "pack.mod.sort_rows") -> Pair | str:
    return make_pair(Docstring(name, "pack.mod", "pack", text), min_query_words=3, min_passage_words=12)


def pair(text: str, name: str = "pack.mod.sort_rows") -> Pair:
    result = made(text, name)
    assert isinstance(result, Pair), result
    return result


def test_summary_is_the_query_and_the_rest_the_passage() -> None:
    result = pair(f"\n    Sort the rows of\n    an array.\n\n    {BODY}\n\n\n\n    Args:\n        x: the array.\n    ")
    assert result.query == "Sort the rows of an array."
    assert result.passage == f"{BODY}\n\nArgs:\n    x: the array."


def test_only_the_first_sentence_asks() -> None:
    result = pair(f"Sort the rows, e.g. of an array (i.e. A or B). It is stable. {BODY}")
    assert result.query == "Sort the rows, e.g. of an array (i.e. A or B)."
    assert result.passage == f"It is stable. {BODY}"


@pytest.mark.parametrize(
    "title", ["sort_rows(x, *, axis=0)", "sort_rows(x) -> Tensor", "sort_rows\n=========", "``sort_rows``"]
)
def test_a_title_that_repeats_the_name_is_no_summary(title: str) -> None:
    assert pair(f"{title}\n\nSort the rows of an array.\n\n{BODY}").query == "Sort the rows of an array."


def test_the_passage_holds_neither_its_name_nor_the_query() -> None:
    text = f"Sort the rows of an array.\n\nsort_rows\n\npack.mod.sort_rows\n\nSort the rows of an array.\n\n{BODY}"
    assert pair(text).passage == BODY


def test_a_section_ends_the_summary_without_a_blank_line() -> None:
    result = pair(f"Sort the rows of an array\n:param x: {BODY}")
    assert (result.query, result.passage) == ("Sort the rows of an array", f":param x: {BODY}")


def test_markup_is_taken_off_the_query_alone() -> None:
    result = pair(f"Sort a :class:`~torch.Tensor` or [`Dataset`] by ``key`` in **place**.\n\n{BODY} See :func:`f`.")
    assert result.query == "Sort a torch.Tensor or Dataset by key in place."
    assert result.passage.endswith("See :func:`f`.")


def test_template_lines_are_taken_off_the_passage() -> None:
    assert pair(f"Sort the rows of an array.\n\n{BODY}\n\n%(params)s\n{{klass}}").passage == BODY


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"Args:\n    x: {BODY}", "no summary line"),
        (f"labels (`torch.Tensor` of shape `(a, b)`, *optional*):\n    {BODY}", "no summary line"),
        ("", "no summary line"),
        (f"Sort rows.\n\n{BODY}", "short query"),
        (f"{'word ' * 41}.\n\n{BODY}", "long query"),
        (f"See also the other function.\n\n{BODY}", "query says nothing of its own"),
        (f"Deprecated since version 2, use another.\n\n{BODY}", "query says nothing of its own"),
        (f"Sort the %(klass)s by its values.\n\n{BODY}", "query says nothing of its own"),
        ("Sort the rows of an array.\n\nToo short.", "short passage"),
        (f"Sort the rows of an array.\n\n{BODY}\n\n>>> sort_rows(x)\nx\ny", "passage is code"),
        (f"Sort the rows of an array.\n\n{BODY}\n\n```\nx\ny\n```", "passage is code"),
        (f"Sort the rows of an array.\n\n{BODY}::\n\n    x\n    y", "passage is code"),
    ],
)
def test_reasons(text: str, reason: str) -> None:
    assert made(text) == reason


def test_exactly_as_many_words_as_asked_for_is_enough() -> None:
    words = "one two three four five six seven eight nine ten eleven twelve"
    assert pair(f"Sort the rows\n\n{words}").passage == words
    assert made(f"Sort the rows\n\n{words.removesuffix(' twelve')} 12 -") == "short passage"


@pytest.mark.parametrize("code", [">>> sort_rows(x)\nx", "As here::\n\n    sort_rows(x)", "```\nsort_rows(x)\n```"])
def test_text_after_an_example_is_no_code(code: str) -> None:
    after = "\n".join(BODY.split(", "))
    assert pair(f"Sort the rows of an array.\n\n{code}\n\n{after}").passage == f"{code}\n\n{after}"
