# SPDX-License-Identifier: Apache-2.0
"""Print the saved results as Markdown tables, grouped by device: `python benchmarks/harness`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the folder that contains this package
from harness import RESULTS, markdown  # noqa: E402

devices = sorted(path for path in RESULTS.iterdir() if path.is_dir())
print("\n\n".join(filter(None, (markdown(sorted(device.glob("*.json"))) for device in devices))))
