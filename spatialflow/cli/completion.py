# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow completion`."""

from __future__ import annotations

import argparse

from spatialflow.cli.common import CommandError

SUMMARY = "print a script that completes the command line in bash, zsh or fish"
DESCRIPTION = (
    "Print a script for the shell. With it, the Tab key completes commands, options, files, and the names of\n"
    "configurations and packaged weights. It needs the package argcomplete. Write the script to one of these files:\n\n"
    "  bash  ~/.local/share/bash-completion/completions/spatialflow\n"
    "  zsh   _spatialflow in a folder of $fpath\n"
    "  fish  ~/.config/fish/completions/spatialflow.fish"
)
EXAMPLES = ("completion bash",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")


def run(options: argparse.Namespace) -> int:
    """Print the script; return the exit code."""
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError:
        raise CommandError("completion needs the package argcomplete: pip install argcomplete") from None
    print(shellcode(["spatialflow"], shell=options.shell))
    return 0
