"""Where jobs write: a local folder, or one on any filesystem of pyarrow.fs."""

import os
from urllib.parse import unquote

from rayembed.config.uris import PLAIN_OPTIONS, public_name, split_options, without_keys

WITH_BUCKETS = ("s3", "gs", "gcs")


def written_folder(value: str) -> str:
    """The folder as an absolute path, because workers have working directories of their own, or as a URI.

    Raises:
        ValueError: the URI has keys, which would go into what is written, or names no folder.
    """
    if "://" not in value:
        return os.path.abspath(os.path.expanduser(value))
    written, options = split_options(value)
    scheme, _, rest = written.partition("://")
    if scheme == "file":
        return os.path.abspath(unquote(rest))
    if without_keys(value) != value:
        allowed = ", ".join(sorted(PLAIN_OPTIONS))
        raise ValueError(
            f"{public_name(value)} comes with keys or with an option that may be one; allowed after ? are {allowed}. "
            "Give keys to the driver and the workers by their environment (for S3 AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY) or by the role of their machines"
        )
    folders = [part for part in rest.split("/") if part]
    if len(folders) < 1 + (scheme in WITH_BUCKETS) or {".", ".."} & set(folders):
        raise ValueError(f"{public_name(value)} names no folder in a bucket; write {scheme}://BUCKET/FOLDER")
    if folders[-1].startswith((".", "_")) or folders[-1].endswith(".partial"):
        raise ValueError(f"{public_name(value)} ends in a name for unfinished folders; choose another")
    return f"{scheme}://{'/'.join(folders)}{options}"
