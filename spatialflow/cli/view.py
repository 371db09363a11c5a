# SPDX-License-Identifier: Apache-2.0
"""The command `spatialflow view`: results in the browser."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from spatialflow.cli.common import (
    CommandError,
    add_path,
    as_command_errors,
    check_output,
    counted,
    panoptic_json,
    path_in_oserror,
    png_folder,
    print_error,
)

if TYPE_CHECKING:
    from spatialflow.viewer.catalog import Catalog, Side
    from spatialflow.viewer.scan import Scan

PRINTED_NOTES = 5
"""Largest number of notes on the files that are printed; the page shows more."""

SUMMARY = "look at results in the browser"
DESCRIPTION = (
    "Show photographs, ground truth and predictions in the browser: a grid with search, filters and sorting, images\n"
    "with a slider between their maps, errors in color, and a table of classes. Ctrl-C ends the server."
)
EXAMPLES = (
    "view out",
    "view out --ground-truth truth.json --images photos",
    "view out --ground-truth truth.json --compare other_out",
    "view truth.json --images photos",
    "view out --export page.html",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    source = "the output of `predict`, the folder of a training run, or a panoptic JSON with PNGs"
    add_path(parser, "results", "OUT", f"{source} beside it")
    add_path(parser, "--ground-truth", "JSON", "ground truth: a panoptic JSON, or a folder that holds one")
    add_path(parser, "--images", "FOLDER", "photographs (default: where the JSON says, or a folder or list beside it)")
    add_path(parser, "--compare", "OUT", "other predictions for the same images, shown side by side")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine alone)")
    add("--port", type=int, metavar="N", help="port to listen on (default: 8470, or a free one)")
    add("--no-browser", action="store_true", help="print the address and open no browser")
    add_path(
        parser,
        "--export",
        "FILE",
        "write one HTML page with everything in it, for up to 200 images, and start no server",
    )


def run(options: argparse.Namespace) -> int:
    """Serve or export the page; return the exit code."""
    from spatialflow.panoptic.rules import PanopticFormatError
    from spatialflow.viewer.scan import Scan

    if options.port is not None and not 1 <= options.port <= 65535:
        raise CommandError(f"--port must be from 1 to 65535, got {options.port}")
    if options.images is not None and not os.path.isdir(options.images):
        raise CommandError(f"{options.images}: no such folder")
    with as_command_errors(PanopticFormatError):
        catalog = _catalog(options)
    if not catalog.images:
        raise CommandError(f"{catalog.main.path}: lists no images")
    for note in (*catalog.warnings, *catalog.missing, *catalog.notes[:PRINTED_NOTES]):
        print_error(note)
    if len(catalog.notes) > PRINTED_NOTES:
        print_error(f"and {len(catalog.notes) - PRINTED_NOTES} more notes, on the page")
    scan = Scan(catalog)
    return _serve(options, catalog, scan) if options.export is None else _export(options, catalog, scan)


def _catalog(options: argparse.Namespace) -> Catalog:
    """Read all JSONs; OUT without scores and without a ground truth is shown as a ground truth."""
    from spatialflow.viewer.catalog import OTHER_SIDE, PREDICTION_SIDE, TRUTH_SIDE, Catalog, read_side

    def read(key: str, path: Path, title: str) -> Side:
        json_path = panoptic_json(path)
        return read_side(key, title, json_path, png_folder(json_path))

    main = read(PREDICTION_SIDE, options.results, "Prediction")
    sides = [main]
    if options.ground_truth is not None:
        sides.insert(0, read(TRUTH_SIDE, options.ground_truth, "Ground truth"))
    if options.compare is not None:
        sides.append(read(OTHER_SIDE, options.compare, "Compared"))
        main.title, sides[-1].title = _titles(options.results, options.compare)
    if len(sides) == 1 and not main.has_scores:
        main = read(TRUTH_SIDE, options.results, "Ground truth")
        sides = [main]
    return Catalog(sides, options.images)


def _titles(first: Path, second: Path) -> tuple[str, str]:
    """Name two runs by their folders, with as many parents as tell them apart."""
    parts = [Path(os.path.abspath(path)).parts for path in (first, second)]
    for count in range(1, max(map(len, parts)) + 1):
        names = tuple("/".join(part[-count:]) for part in parts)
        if names[0] != names[1]:
            return names[0], names[1]
    return "Prediction", "Compared"


def _serve(options: argparse.Namespace, catalog: Catalog, scan: Scan) -> int:
    from spatialflow.viewer.server import Server, Site

    try:
        server = Server(Site(catalog, scan), options.host, options.port)
    except socket.gaierror:
        raise CommandError(f"--host {options.host}: is not an address of this machine") from None
    except OSError as error:
        place = f"--host {options.host}" if options.port is None else f"--port {options.port} on {options.host}"
        reason = error.strerror or str(error)
        raise CommandError(f"{place}: cannot be used: {reason.lower()}; leave --port out for a free one") from None
    with server:
        scan.start()
        print(f"{counted(len(catalog.images), 'image')} at {server.url} (Ctrl-C ends the server)", flush=True)
        if not server.is_loopback:
            print_error(f"--host {options.host}: everyone who reaches this machine can see these images")
        if not options.no_browser:
            threading.Thread(target=_open_browser, args=(server.url,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt as stop:
            if type(stop) is not KeyboardInterrupt:  # SIGTERM
                raise
        finally:
            scan.stop()
    return 0


def _open_browser(url: str) -> None:
    """Open the page where there is a desktop; a browser in the terminal would take it over."""
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)


def _export(options: argparse.Namespace, catalog: Catalog, scan: Scan) -> int:
    from spatialflow.viewer import export
    from spatialflow.viewer.catalog import TRUTH_SIDE

    check_output(options.export, *(part for side in catalog.sides.values() for part in (side.path, side.folder)))
    scan.run()
    with as_command_errors(), path_in_oserror(options.export):
        count = export.export_page(options.export, catalog, scan, export.MAX_IMAGES)
    total = len(catalog.images)
    print(f"{counted(count, 'image')}: {options.export} ({os.path.getsize(options.export) / 1e6:.1f} MB)")
    if count < total:
        which = "of lowest PQ" if catalog.main.key != TRUTH_SIDE and TRUTH_SIDE in catalog.sides else "listed first"
        print(f"the page has the {count} images {which} of {total}; without --export all are shown")
    return 0
