# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow convert`."""

from __future__ import annotations

import argparse

from spatialflow.cli.common import (
    CommandError,
    Subparsers,
    check_output,
    format_error,
    path_argument,
    path_in_oserror,
    with_examples,
)


def add_parser(commands: Subparsers) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "convert",
        help="rewrite a released checkpoint with the parameter names of this package",
        description="Rewrite a released checkpoint with the parameter names of this package.",
        **with_examples("convert released.pth weights.safetensors --half"),
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "source", type=path_argument, metavar="SOURCE", help="released checkpoint, or a checkpoint of this package"
    )
    parser.add_argument("--half", action="store_true", help="store float16: half the size, for inference only")
    parser.add_argument("--ema", action="store_true", help="use the moving average (EMA) of the weights in SOURCE")
    parser.add_argument(
        "destination", type=path_argument, metavar="DESTINATION", help="file that ends in .safetensors, .pt or .pth"
    )


def run(options: argparse.Namespace) -> int:
    """Convert one checkpoint; return the exit code."""
    import torch

    from spatialflow.engine.checkpoints import CheckpointError, convert

    check_output(options.destination, options.source)
    try:
        with path_in_oserror(options.destination):
            dtype = torch.float16 if options.half else None
            count = convert(options.source, options.destination, dtype, options.ema)
    except (CheckpointError, ValueError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(format_error(error)) from None
    print(f"{count} tensors: {options.destination}")
    return 0
