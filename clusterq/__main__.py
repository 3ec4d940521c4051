"""`python -m clusterq` is the command line; without arguments it is `clusterq doctor`."""

import sys

from clusterq.cli import main

sys.exit(main())
