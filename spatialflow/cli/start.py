# SPDX-License-Identifier: Apache-2.0
"""Start of the program `spatialflow`: an interrupt ends it silently until the command line has been imported."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # with a traceback wherever the interrupt comes
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from spatialflow.cli.main import main as main
