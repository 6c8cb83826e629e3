"""`python -m jacobiflow`."""

import sys

from jacobiflow.cli import main

sys.exit(main())
