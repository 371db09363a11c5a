# SPDX-License-Identifier: Apache-2.0
"""Images, categories and data sets."""

from spatialflow.requirements import require_packages

require_packages()
