# SPDX-License-Identifier: Apache-2.0
"""Operators with hand-written CPU and CUDA kernels; `spatialflow.ops.reference` holds their plain-PyTorch twins."""
