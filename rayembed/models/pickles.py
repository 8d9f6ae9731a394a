"""Weights that are pickles: tensors alone are read from them, because a pickle can run any program while it is read."""

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def tensors_alone(name: str) -> Iterator[None]:
    """Says in plain words what torch refuses in this block: a file with more than tensors in it.

    Args:
        name: of what is read, for the message.

    Raises:
        ValueError: names what the file holds, and what to do.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise ValueError(
            f"{name}: its weights are a pickle that holds more than tensors{what}, which could run any program and is "
            "not read; take them from a source that has them as safetensors"
        ) from error
