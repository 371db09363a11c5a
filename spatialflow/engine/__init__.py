# SPDX-License-Identifier: Apache-2.0
"""Training, evaluation, prediction and checkpoints."""

from spatialflow.requirements import require_packages

require_packages()
