# SPDX-License-Identifier: Apache-2.0
"""The network's modules replaced by fused ones, for inference and for training."""
