# SPDX-License-Identifier: Apache-2.0
"""Images, categories and data sets."""
