"""Distributed training of text-embedding models and rerankers on Ray.

`rayembed.tune` runs a sweep from a script; it is loaded when it is first used, so that importing the package is quick.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayembed.jobs.tune_call import Sweep as Sweep
    from rayembed.jobs.tune_call import tune as tune

__version__ = "0.1.0"
__all__ = ["Sweep", "__version__", "tune"]


def __getattr__(name: str) -> object:
    """What needs torch and ray, when it is asked for."""
    if name not in ("Sweep", "tune"):
        raise AttributeError(f"module 'rayembed' has no attribute {name!r}")
    from rayembed.jobs import tune_call

    return getattr(tune_call, name)
