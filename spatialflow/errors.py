# SPDX-License-Identifier: Apache-2.0
"""The exceptions by which a command ends."""


class CommandError(Exception):
    """Ends a command with one sentence for the user and exit code 2."""


class Terminated(KeyboardInterrupt):
    """Ends a command at SIGTERM, as Ctrl-C does, with exit code 143."""
