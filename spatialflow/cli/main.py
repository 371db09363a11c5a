# SPDX-License-Identifier: Apache-2.0
"""Entry point of the command line: parse the arguments, run a command, and turn exceptions into exit codes.

Each command imports the modules that it needs when it runs, so that `evaluate` starts without torch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from spatialflow.cli import (
    benchmark,
    completion,
    convert,
    dataset,
    evaluate,
    info,
    predict,
    synthesize,
    train,
    validate,
    view,
    visualize,
)
from spatialflow.cli.arguments import CommandParser, Parser
from spatialflow.cli.common import CommandError, add_command, print_error, show_log
from spatialflow.errors import DataWarning, did_you_mean
from spatialflow.threads import leave_cores_to_others

_COMMANDS: tuple[Any, ...] = (
    predict,
    evaluate,
    view,
    validate,
    dataset,
    train,
    visualize,
    synthesize,
    convert,
    benchmark,
    info,
    completion,
)
"""Modules with SUMMARY (in the list of commands), DESCRIPTION and EXAMPLES (in the command's help), `add_arguments` and
`run`, which returns the exit code."""

EXAMPLES = (
    "synthesize scenes --count 20 --size 256x384",
    "predict scenes/images --model demo --output out",
    "evaluate scenes out",
)


class Terminated(KeyboardInterrupt):
    """Ends a command at SIGTERM, as KeyboardInterrupt does at SIGINT (Ctrl-C)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the arguments without the program's name; None: those of the process.

    Returns:
        Exit code. 0: success. 1: some inputs failed and are named on standard error, or `validate` found problems. 2:
        the command could not run. 130: interrupted (SIGINT). 141: standard output was closed (broken pipe). 143:
        terminated (SIGTERM).
    """
    _open_closed_streams()
    try:
        parser = _parser()
        _complete(parser)
        options = parser.parse_args(_checked(parser, sys.argv[1:] if arguments is None else list(arguments)))
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
            sys.stdout.reconfigure(errors="backslashreplace")  # file names may contain bytes that are not text
        _check_current_folder()
        show_log()
        leave_cores_to_others()
        with _signals_raise() as received, _data_warnings_as_messages():
            try:
                code: int = options.run(options)
            except Exception as error:
                if received and not _follows_interrupt(error):  # a library replaced the exception of the signal
                    raise _EXCEPTION_BY_SIGNAL[received[0]] from None
                raise
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # for example `| head`; the rest of the buffer is discarded
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (CommandError, ImportError) as error:
        print_error(str(error))
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines()
        print_error(f"out of memory: {lines[0] if lines else 'Python could not allocate more'}")
        return 2
    except KeyboardInterrupt as error:
        is_terminated = isinstance(error, Terminated)
        print_error(": ".join(("terminated" if is_terminated else "interrupted", *map(str, error.args))))
        return 143 if is_terminated else 130


def _open_closed_streams() -> None:
    """Open those of the three standard streams that the parent process closed, as empty ones.

    A file of results would otherwise get the number of the closed stream, and messages of libraries would be written
    into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def _check_current_folder() -> None:
    """Raise CommandError if the current folder was deleted; libraries such as torch end the process then."""
    try:
        os.getcwd()
    except OSError as error:
        raise CommandError(f"the current folder cannot be used: {error.strerror}; change to another one") from None


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions, and end the process; see the command `completion`."""
    if "_ARGCOMPLETE" in os.environ:
        with contextlib.suppress(ImportError):
            import argcomplete

            argcomplete.autocomplete(parser)


def _checked(parser: Parser, words: list[str]) -> list[str]:
    """Return the words of the command line; end the process if the first one is no command."""
    names = [command.__name__.rpartition(".")[2] for command in _COMMANDS]
    if words and not words[0].startswith("-") and words[0] not in names:
        parser.error(f"no such command: {words[0]:.80}{did_you_mean(words[0], names)}")
    return words


def _parser() -> Parser:
    parser = Parser(
        prog="spatialflow",
        description="Panoptic segmentation and its operators.",
        epilog="\n".join(("examples, the first ones to try:", *(f"  spatialflow {line}" for line in EXAMPLES))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        title="commands",
        required=True,
        metavar="COMMAND",
        parser_class=CommandParser,
        description="`spatialflow COMMAND --help` describes a command",
    )
    for command in _COMMANDS:
        name = command.__name__.rpartition(".")[2]
        command_parser = add_command(commands, name, command.SUMMARY, command.DESCRIPTION, command.EXAMPLES)
        command_parser.set_defaults(run=command.run)
        command.add_arguments(command_parser)
    return parser


def _follows_interrupt(error: BaseException | None) -> bool:
    """Tell whether an error was raised while an interrupt was handled, e.g. a full disk when results are saved."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether an allocation failed; torch raises a plain RuntimeError for that on the CPU."""
    text = str(error)
    return isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text


_EXCEPTION_BY_SIGNAL = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@contextlib.contextmanager
def _signals_raise() -> Iterator[list[signal.Signals]]:
    """Within the block, let SIGTERM and SIGINT raise exceptions, so that `with` and `finally` blocks run.

    Yields:
        The signals received so far.
    """
    received: list[signal.Signals] = []

    def stop(number: int, _: object) -> None:
        received.append(signal.Signals(number))
        if _is_being_imported("torch"):  # an exception would abort torch's C++ code; no results exist yet
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        raise _EXCEPTION_BY_SIGNAL[received[-1]]

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield received
        return

    def repeat(unraisable: Any) -> None:
        """Send a signal again whose exception Python could not raise, as in `__del__`, instead of printing it."""
        if received and isinstance(unraisable.exc_value, KeyboardInterrupt):
            threading.Timer(0.02, os.kill, (os.getpid(), received[-1])).start()
        else:
            hook(unraisable)

    hook = sys.unraisablehook
    handlers = {number: signal.getsignal(number) for number in _EXCEPTION_BY_SIGNAL}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:  # signals that are ignored stay so: shells ignore SIGINT in background jobs
            signal.signal(number, stop)
    sys.unraisablehook = repeat
    try:
        yield received
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _is_being_imported(name: str) -> bool:
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)


@contextlib.contextmanager
def _data_warnings_as_messages() -> Iterator[None]:
    """Within the block, print each `DataWarning` as a message, whatever warning filters Python has.

    Pillow's warning about large images is hidden; such images are read like others.
    """

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if issubclass(category, DataWarning):
            print_error(str(message))
        else:
            show_warning(message, category, *place, **options)

    with warnings.catch_warnings():
        show_warning, warnings.showwarning = warnings.showwarning, show
        warnings.simplefilter("always", DataWarning)
        warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")
        yield
