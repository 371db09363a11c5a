# SPDX-License-Identifier: Apache-2.0
"""Scores and problems of every image, computed in the background, and the table of classes."""

import math
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spatialflow.panoptic.extents import Extent, extents
from spatialflow.panoptic.quality import ClassCounts, PanopticQuality, image_quality
from spatialflow.panoptic.rules import RULES, PanopticFormatError, pixel_problems
from spatialflow.threads import available_cores, map_ahead
from spatialflow.viewer.catalog import OTHER_SIDE, PREDICTION_SIDE, TRUTH_SIDE, Catalog, Image, Side, ViewError

BINS = 10
"""Bins of a histogram: of the PQ of a class in an image, or of the area of its segments."""

SMALLEST_SHARE = 1e-5
"""Upper bound of the first bin of areas, as a share of the image; each bin is sqrt(10) times as large as the last."""

MAX_PAUSE = 1.0
"""Longest time in seconds for which reading waits for requests of the page."""


@dataclass(slots=True)
class Score:
    """What reading one image found."""

    index: int
    pq: dict[str, float | None] = field(default_factory=dict)  # by side; None: not a segment is counted
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _ClassTotal:
    """Sums of one class over the images read so far."""

    images: int = 0
    segments: int = 0
    pixels: int = 0
    counts: ClassCounts = field(default_factory=ClassCounts)
    areas: list[int] = field(default_factory=lambda: [0] * BINS)
    qualities: list[int] = field(default_factory=lambda: [0] * BINS)


@dataclass(slots=True)
class _Reading:
    """One image: the score, and for each side the counts, and pixels of segments with their share of the image."""

    score: Score
    counts: dict[str, dict[int, ClassCounts]] = field(default_factory=dict)
    areas: dict[str, list[tuple[int, int, float]]] = field(default_factory=dict)  # category id, pixels, share


class Scan:
    """Reads every id map once, in threads, and scores predictions if there is a ground truth.

    Args:
        catalog: the images.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._lock = threading.Lock()
        self._scores: list[Score] = []
        self._totals: dict[str, dict[int, _ClassTotal]] = {key: {} for key in catalog.sides}
        self._stop = threading.Event()
        self._requests = 0
        self._is_quiet = threading.Condition()
        self._thread: threading.Thread | None = None
        truth = catalog.sides.get(TRUTH_SIDE)
        self._quality: dict[str, PanopticQuality] = {}
        if truth is not None:
            rows = {row["id"]: row.get("isthing") == 1 for row in truth.categories}
            self._quality = {
                key: PanopticQuality(rows) for key in (PREDICTION_SIDE, OTHER_SIDE) if key in catalog.sides
            }

    def start(self) -> None:
        """Start to read in the background."""
        self._thread = threading.Thread(target=self.run, name="scan", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop reading, and wait for the images that are being read."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def run(self, threads: int | None = None) -> None:
        """Read all images; return when they are read or after `stop`."""
        threads = threads or max(1, available_cores() - 1)  # one core for the pictures of the page
        indices = iter(range(len(self._catalog.images)))
        with closing(map_ahead(self._read, indices, threads, ahead=4 * threads)) as readings:
            for future in readings:
                if self._stop.is_set():
                    return
                self._add(future.result())

    @contextmanager
    def giving_way(self) -> Iterator[None]:
        """Read no further image during the block, so that a request of the page is answered first."""
        with self._is_quiet:
            self._requests += 1
        try:
            yield
        finally:
            with self._is_quiet:
                self._requests -= 1
                self._is_quiet.notify_all()

    def since(self, position: int) -> list[Score]:
        """Return the scores from a position on, in the order in which they were computed."""
        with self._lock:
            return self._scores[position:]

    def _read(self, index: int) -> _Reading:
        with self._is_quiet:  # the time-out lets reading go on beside endless requests
            self._is_quiet.wait_for(lambda: self._requests == 0, timeout=MAX_PAUSE)
        image = self._catalog.images[index]
        reading = _Reading(Score(index))
        maps: dict[str, np.ndarray] = {}
        for key, side in self._catalog.sides.items():
            annotation = self._catalog.annotation(image, key)
            if annotation is None:
                continue
            try:
                maps[key] = self._catalog.read_map(index, key)
            except (PanopticFormatError, ViewError) as error:
                reading.score.problems.append(str(error))
                continue
            extent_of = extents(maps[key])
            reading.score.problems += map_problems(side, annotation, extent_of)
            reading.areas[key] = _areas(annotation["segments_info"], extent_of, maps[key].size)
        reading.counts, problems_of_scores = self.counts(image, maps)
        reading.score.problems += [text for text in problems_of_scores if text not in reading.score.problems]
        reading.score.pq = {key: image_quality(counts) for key, counts in reading.counts.items()}
        return reading

    def counts(
        self, image: Image, maps: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, dict[int, ClassCounts]], list[str]]:
        """Count the matches of an image by side and category; also return messages about images without counts."""
        counts, problems = {}, []
        truth = self._catalog.annotation(image, TRUTH_SIDE)
        for key, quality in self._quality.items():
            annotation = self._catalog.annotation(image, key)
            if truth is None or annotation is None or TRUTH_SIDE not in maps or key not in maps:
                continue
            segments = truth["segments_info"], annotation["segments_info"]
            try:
                counts[key], _ = quality.count(maps[TRUTH_SIDE], segments[0], maps[key], segments[1], image.name)
            except PanopticFormatError as error:
                problems.append(f"not scored: {error}")
        return counts, problems

    def _add(self, reading: _Reading) -> None:
        with self._lock:
            self._scores.append(reading.score)
            for key, counts in reading.counts.items():
                self._quality[key].add(counts)
                for category, row in counts.items():
                    total = self._totals[key].setdefault(category, _ClassTotal())
                    total.counts.add(row)
                    quality = row.quality()
                    if quality["n"]:
                        total.qualities[min(int(quality["pq"] * BINS), BINS - 1)] += 1
            for key, areas in reading.areas.items():
                seen = set()
                for category, pixels, share in areas:
                    total = self._totals[key].setdefault(category, _ClassTotal())
                    total.images += category not in seen
                    seen.add(category)
                    total.segments += 1
                    total.pixels += pixels
                    total.areas[area_bin(share)] += 1

    def classes(self) -> dict[str, Any]:
        """Make the table of classes of the images read so far, by side: totals of groups, and a row for each class."""
        with self._lock:
            result: dict[str, Any] = {}
            for key, totals in self._totals.items():
                rows = []
                for category in self._catalog.categories:
                    total = totals.get(category)
                    if total is None:
                        continue
                    row: dict[str, Any] = {
                        "id": category,
                        "images": total.images,
                        "segments": total.segments,
                        "pixels": total.pixels,
                        "areas": total.areas,
                    }
                    if key in self._quality:
                        row |= total.counts.quality() | {"qualities": total.qualities}
                    rows.append(row)
                result[key] = {"rows": rows}
                if key in self._quality and len(self._scores):
                    result[key]["groups"] = self._groups(self._quality[key])
            return result

    def _groups(self, quality: PanopticQuality) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="no segment of any category")
            result = quality.compute()
        return {group: result[group] for group in ("All", "Things", "Stuff")}


def map_problems(side: Side, annotation: Mapping[str, Any], extent_of: Mapping[int, Extent]) -> list[str]:
    """List contradictions between the segments of an annotation and its map that matter for the use of the side."""
    problems = pixel_problems(annotation["segments_info"], annotation["image_id"], extent_of)
    return [
        f"{side.title}: {problem.text}"
        for problem in problems
        if RULES[problem.rule].effect(side.use) in ("stops", "reported")
    ]


def _areas(segments: list[dict[str, Any]], extent_of: Mapping[int, Extent], size: int) -> list[tuple[int, int, float]]:
    """List category, pixels and share of the image for every segment with pixels."""
    found = ((segment["category_id"], extent_of.get(segment["id"])) for segment in segments)
    return [(category, extent.pixels, extent.pixels / size) for category, extent in found if extent is not None]


def area_bin(share: float) -> int:
    """Return the bin of an area, given as a share of the image above 0."""
    return max(0, min(math.ceil(2 * math.log10(share / SMALLEST_SHARE)), BINS - 1))
