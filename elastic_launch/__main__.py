"""Floor 5: ``python -m elastic_launch`` is ``elastic-run``."""

import sys

from elastic_launch.cli import main

sys.exit(main())
