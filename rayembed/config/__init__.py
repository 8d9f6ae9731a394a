"""Every setting and its default; imports neither torch nor Ray.

To add one: a field with its bounds and a line of help.
"""

from rayembed.config.experiment import Experiment

__all__ = ["Experiment"]
