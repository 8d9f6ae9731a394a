"""`python -m rayembed` is the command `rayembed`."""

import sys

from rayembed.cli import main

sys.exit(main())
