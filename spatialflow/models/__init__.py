# SPDX-License-Identifier: Apache-2.0
"""The SpatialFlow network, its training criterion and its postprocessing."""
