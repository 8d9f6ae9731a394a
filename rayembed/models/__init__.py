"""Tokens to vectors or scores.

To add a backbone: a row in families.py. To add a pooling: a function and a row in pooling.py.
"""

import logging

# Where peft finds bitsandbytes, each process would be told of a faster kernel of another package, 4 bits or not.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
