# SPDX-License-Identifier: Apache-2.0
"""The SpatialFlow network, its configuration and its inference."""
