# SPDX-License-Identifier: Apache-2.0
"""The exception by which a command ends."""


class CommandError(Exception):
    """Ends a command with one sentence for the user and exit code 2."""
