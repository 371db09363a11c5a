# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow convert`."""

from __future__ import annotations

import argparse

from spatialflow.cli.arguments import add_completed
from spatialflow.cli.common import add_path, as_command_errors, check_output, path_in_oserror
from spatialflow.cli.networks import add_ema_option, complete_configs, complete_models

SUMMARY = "rewrite weights as a file that needs no configuration beside it"
DESCRIPTION = (
    "Rewrite a released checkpoint, or weights of this package, with the parameter names of this package. The new\n"
    "file holds the configuration and the categories of the network, so that every command needs the file alone."
)
EXAMPLES = (
    "convert released.pth weights.safetensors --config spatialflow_r50_coco",
    "convert runs/mine weights.safetensors --half",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_completed(
        parser,
        "source",
        completer=complete_models,
        metavar="SOURCE",
        help="released checkpoint, weights file, or folder of a training run",
    )
    text = "configuration to write into the file, if SOURCE has none: configuration of the package, or YAML file"
    add_completed(parser, "--config", completer=complete_configs, metavar="NAME", help=text)
    parser.add_argument("--half", action="store_true", help="store float16: half the size, for inference only")
    add_ema_option(parser, "SOURCE")
    add_path(parser, "destination", "DESTINATION", "file that ends in .safetensors, .pt or .pth")


def run(options: argparse.Namespace) -> int:
    """Convert one checkpoint; return the exit code."""
    import torch

    from spatialflow.engine.checkpoints import CheckpointError
    from spatialflow.engine.model_files import convert, locate_weights

    with as_command_errors(CheckpointError, ValueError), path_in_oserror(options.destination):
        source = locate_weights(options.source)
        check_output(options.destination, source)
        dtype = torch.float16 if options.half else None
        count = convert(source, options.destination, dtype, options.ema, options.config)
    print(f"{count} tensors: {options.destination}")
    return 0
