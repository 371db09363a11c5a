# SPDX-License-Identifier: Apache-2.0
"""Plain-PyTorch twins of every operator: the specification that kernels are tested and timed against."""
