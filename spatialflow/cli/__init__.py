# SPDX-License-Identifier: Apache-2.0
"""The command line, `spatialflow COMMAND`: one file per command."""
