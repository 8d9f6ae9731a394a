"""Keys in URIs: `s3://KEY:SECRET@bucket/...` opens a bucket, and must not go into what is written or shown."""

import logging
import re

# What pyarrow.fs takes after `?` and is no key; any other option may be one (account_key, sas_token, ...).
PLAIN_OPTIONS = frozenset({"region", "scheme", "endpoint_override", "allow_bucket_creation", "allow_bucket_deletion"})

_BEGIN = r"[A-Za-z][\w+.-]*://"
_URI = re.compile(rf"{_BEGIN}(?:(?!{_BEGIN})[^\s'\"<>])+")
_SCHEME = re.compile(r"[A-Za-z][\w+.-]*://")
# A secret of S3 may hold a slash that its owner forgot to write as %2F.
_S3_KEYS = re.compile(r"^(s3://)(?:[^/@]+:[^@]*|[^/@]*)@")
_PASSWORD = re.compile(r"^([\w+.-]+://[^/@:]*):[^/@]*@")


def split_options(path: str) -> tuple[str, str]:
    """A URI and its options with their question mark; local paths have none."""
    written, mark, options = path.partition("?") if "://" in path else (path, "", "")
    return written, mark + options


def public_name(path: str) -> str:
    """The path without keys and options of a URI: what messages, reports and logs may show."""
    return re.sub(r"(://)[^/]*@", r"\1", _S3_KEYS.sub(r"\1", split_options(path)[0]), count=1)


def without_keys(text: str) -> str:
    """A URI without its keys, that still names the same place; any other text as it is.

    The user of a URI stays (in Azure's it is the container), and of the options those that are known to be no keys.
    """
    if not _SCHEME.match(text):
        return text
    written, options = split_options(text)
    kept = [option for option in options[1:].split("&") if option.partition("=")[0] in PLAIN_OPTIONS]
    return _PASSWORD.sub(r"\1@", _S3_KEYS.sub(r"\1", written)) + ("?" + "&".join(kept) if kept else "")


def public_text(text: str) -> str:
    """A message with the keys of all URIs in it left out, also of those that a library put there."""
    return _URI.sub(lambda found: without_keys(found[0]), text)


def without_keys_within(value: object) -> object:
    """A JSON value with the keys of its URIs left out."""
    if isinstance(value, dict):
        return {key: without_keys_within(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_keys_within(item) for item in value]
    return without_keys(value) if isinstance(value, str) else value


class PublicFormatter(logging.Formatter):
    """Log lines, tracebacks among them, without the keys of URIs."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return public_text(super().format(record))
