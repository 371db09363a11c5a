# SPDX-License-Identifier: Apache-2.0
"""The warning category of messages about input files, which the command line prints."""


class DataWarning(UserWarning):
    """A defect of an input file that does not prevent its use."""
