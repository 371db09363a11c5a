# SPDX-License-Identifier: Apache-2.0
"""Viewer of panoptic results in a browser: a local server, or one page with everything in it."""
