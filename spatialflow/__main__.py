# SPDX-License-Identifier: Apache-2.0
"""`python -m spatialflow`."""

import sys

from spatialflow.cli.start import main

if __name__ == "__main__":
    sys.exit(main())
