# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow convert`."""

from __future__ import annotations

import argparse

from spatialflow.cli.common import add_path, as_command_errors, check_output, path_in_oserror
from spatialflow.cli.networks import add_ema_option

SUMMARY = "rewrite a released checkpoint with the parameter names of this package"
DESCRIPTION = "Rewrite a released checkpoint with the parameter names of this package."
EXAMPLES = ("convert released.pth weights.safetensors --half",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_path(parser, "source", "SOURCE", "released checkpoint, or a checkpoint of this package")
    parser.add_argument("--half", action="store_true", help="store float16: half the size, for inference only")
    add_ema_option(parser, "SOURCE")
    add_path(parser, "destination", "DESTINATION", "file that ends in .safetensors, .pt or .pth")


def run(options: argparse.Namespace) -> int:
    """Convert one checkpoint; return the exit code."""
    import torch

    from spatialflow.engine.checkpoints import CheckpointError, convert

    check_output(options.destination, options.source)
    with as_command_errors(CheckpointError, ValueError), path_in_oserror(options.destination):
        dtype = torch.float16 if options.half else None
        count = convert(options.source, options.destination, dtype, options.ema)
    print(f"{count} tensors: {options.destination}")
    return 0
