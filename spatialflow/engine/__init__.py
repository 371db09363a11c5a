# SPDX-License-Identifier: Apache-2.0
"""What is done with a model: checkpoints, prediction, training, evaluation."""
