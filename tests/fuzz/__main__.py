# SPDX-License-Identifier: Apache-2.0
"""Entry point of `python tests/fuzz`: run `fuzz.command.main`."""

import sys
from pathlib import Path

# Replace the package's folder by its parent, so that `fuzz` can be imported.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from fuzz.command import main

sys.exit(main())
