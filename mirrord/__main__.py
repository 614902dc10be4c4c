"""`python -m mirrord` is the same as `mirrord`."""

import sys

from mirrord.cli import main

sys.exit(main())
