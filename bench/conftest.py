"""Lets pytest import `harness` as the suites do when they run as scripts, from the folder they lie in."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
