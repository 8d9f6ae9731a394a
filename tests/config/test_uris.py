"""Keys of URIs are in nothing that is shown or written, and what is written still names the same place."""

import pytest

from rayembed.config.uris import public_name, without_keys


@pytest.mark.parametrize(
    ("uri", "shown", "written"),
    [
        ("s3://key:se/cret@bucket/a.jsonl?region=x", "s3://bucket/a.jsonl", "s3://bucket/a.jsonl?region=x"),
        ("s3://key@bucket/a", "s3://bucket/a", "s3://bucket/a"),
        ("s3://bucket/a:b@c.jsonl", "s3://bucket/a:b@c.jsonl", "s3://bucket/a:b@c.jsonl"),
        ("s3://b/a?token=t&scheme=http&sas=u", "s3://b/a", "s3://b/a?scheme=http"),
        ("abfs://box:word@account.net/a", "abfs://account.net/a", "abfs://box@account.net/a"),
        ("gs://anonymous@bucket/a@b", "gs://bucket/a@b", "gs://anonymous@bucket/a@b"),
        ("data/a?.jsonl", "data/a?.jsonl", "data/a?.jsonl"),
        ("", "", ""),
    ],
)
def test_keys_are_left_out(uri: str, shown: str, written: str) -> None:
    assert public_name(uri) == shown
    assert without_keys(uri) == written


def test_a_text_that_mentions_a_uri_stays() -> None:
    text = "As in http://a:b@c/d?e=f, answer: "
    assert without_keys(text) == text
