# SPDX-License-Identifier: Apache-2.0
"""The exceptions by which a command ends, and the warnings that it prints as sentences."""


class CommandError(Exception):
    """Ends a command with one sentence for the user and exit code 2."""


class Terminated(KeyboardInterrupt):
    """Ends a command at SIGTERM, as Ctrl-C does, with exit code 143."""


class DataWarning(UserWarning):
    """Tells the user about one of the files that were given."""
