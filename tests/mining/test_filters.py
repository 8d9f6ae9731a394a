"""Each filter drops what its name says and nothing else; what is dropped is said."""

import pytest

from rayembed.mining.filters import FILTERS, Candidate, Query, Seen, drop_reason, same_text

QUERY = Query("what is  rain", frozenset({"p1"}), frozenset({"water that falls"}))


def candidate(id: str = "c1", text: str = "a cloud") -> Candidate:
    return Candidate(id, text, 3, 0.5)


@pytest.mark.parametrize(
    ("name", "dropped", "kept"),
    [
        ("positive_id", candidate(id="p1"), candidate(id="p11")),
        ("positive_text", candidate(text=" water\tthat\n falls "), candidate(text="water that fell")),
        (
            "positive_after_title",
            candidate(text="Rain:\ta title  water that\nfalls"),
            candidate(text="rainwater that falls"),
        ),
        ("query_text", candidate(text="what is rain"), candidate(text="what is rain?")),
        ("repeated_text", candidate(text="met  before"), candidate(text="not met before")),
    ],
)
def test_each_filter_drops_its_own(name: str, dropped: Candidate, kept: Candidate) -> None:
    seen = Seen(texts={"met before"})
    verdicts = {other: drops(QUERY, dropped, seen) for other, drops in FILTERS.items()}
    assert verdicts == {other: other == name for other in FILTERS}
    assert not any(drops(QUERY, kept, seen) for drops in FILTERS.values())
    assert drop_reason(QUERY, dropped, seen) == name


def test_what_is_kept_is_remembered_and_what_is_dropped_is_not() -> None:
    seen = Seen()
    assert drop_reason(QUERY, candidate(text="a  cloud"), seen) is None
    assert drop_reason(QUERY, candidate(id="p1", text="a positive"), seen) == "positive_id"
    assert seen.texts == {"a cloud"}
    assert drop_reason(QUERY, candidate(id="c2", text="a cloud "), seen) == "repeated_text"


def test_case_and_marks_make_a_text_another() -> None:
    assert same_text(" a \n b ") == "a b"
    assert len({same_text(text) for text in ("A b", "a b", "a b.")}) == 3
