# SPDX-License-Identifier: Apache-2.0
"""`python tests/fuzz`: see command.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder of this package, not the package itself

from fuzz.command import main

sys.exit(main())
