# SPDX-License-Identifier: Apache-2.0
"""Scoring a network on a data set: panoptic quality, and average precision of boxes and masks."""

import warnings
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from spatialflow.engine.distributed import World
from spatialflow.engine.predict import Outcome, Predictor
from spatialflow.files import write_json
from spatialflow.images import ImageError
from spatialflow.panoptic.detection import average_precision, detection_rows
from spatialflow.panoptic.formats import read_id_map, read_panoptic_json
from spatialflow.panoptic.quality import PanopticQuality
from spatialflow.panoptic.rules import TRUTH, AnnotationWarning, PanopticFormatError, Problem, summary
from spatialflow.panoptic.writer import PanopticWriter
from spatialflow.threads import map_ahead

SCORED_AHEAD = 4
"""Results that are held while the one before is compared with its ground truth and written."""


class ScoredData(Protocol):
    """What scoring needs of a data set."""

    names: list[str]
    image_ids: list

    def __len__(self) -> int: ...

    def image_path(self, index: int) -> Path: ...

    def panoptic_truth(self, folder: Path) -> tuple[Path, Path]: ...


def evaluate_network(
    predictor: Predictor, data: ScoredData, folder: Path, world: World, progress: bool = False
) -> dict[str, Any]:
    """Predicts every image of a data set and scores the results; several processes share the images.

    Args:
        predictor: the network.
        data: images with ground truth.
        folder: gets `panoptic.json`, `panoptic/` (PNGs), `detections.json` (COCO results) and `scores.json`.
        world: the processes.
        progress: show a bar.

    Returns:
        As `panoptic.evaluate`, and under "detection" as `average_precision` (None where pycocotools is missing); under
        "problems" messages about images and annotations that cannot be read, which are left out. The same on every
        process.

    Raises:
        PanopticFormatError: the ground truth breaks the format, or not one image can be scored.
    """
    truth, truth_path, truth_folder, problems = _read_truth(data, folder, world)
    by_id = {image_id: index for index, image_id in enumerate(data.image_ids)}
    wanted = truth["annotations"][world.rank :: world.size]
    writer = PanopticWriter(
        folder / "panoptic",
        folder / f"panoptic{world.rank or ''}.json",  # the first process's name is that of the result
        predictor.categories.as_coco(),
        detections_path=folder / "detections.json",
    )
    quality, counts = PanopticQuality(truth["categories"]), {}
    reported: list[Problem] = []

    def score(found: tuple[dict[str, Any], Outcome]) -> tuple[Any, Any, list[Problem]]:
        """Compares one prediction with its ground truth, and writes it."""
        annotation, (result, _, error) = found
        image_id, segments = annotation["image_id"], annotation["segments_info"]
        annotated = read_id_map(truth_folder / annotation["file_name"])
        if error is not None:
            raise error
        counted, met = quality.count(annotated, segments, result.id_map, result.segments, image_id)
        detections = detection_rows(result, image_id)
        writer.add(image_id, data.names[by_id[image_id]], result.id_map, result.segments, detections=detections)
        return image_id, counted, met

    paths = [data.image_path(by_id[annotation["image_id"]]) for annotation in wanted]
    with (
        closing(predictor.outcomes(paths)) as outcomes,
        closing(map_ahead(score, zip(wanted, outcomes), threads=1, ahead=SCORED_AHEAD)) as scored,
    ):
        for row in _with_progress(scored, len(wanted)) if progress and world.is_first else scored:
            try:
                image_id, counted, met = row.result()
            except (ImageError, PanopticFormatError) as error:
                problems.append(str(error))
                continue
            counts[image_id] = counted
            reported += met
    parts = world.gather((list(writer.rows()), counts, problems, reported))
    counts = {image_id: counted for part in parts for image_id, counted in part[1].items()}
    problems = [message for part in parts for message in part[2]]
    if not counts:
        last = f"; the last: {problems[-1]}" if problems else ""
        raise PanopticFormatError(f"none of {len(data)} images to evaluate on can be used{last}")
    reported = [problem for part in parts for problem in part[3]]
    if world.is_first and reported:
        warnings.warn(summary(reported, str(truth_path)), AnnotationWarning, stacklevel=2)
    if world.is_first:
        for rows, *_ in parts[1:]:
            writer.extend(rows)
        writer.write_json()
        results = [result for rows, *_ in parts for row in rows for result in row["detections"]]
        truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in counts]
        for annotation in truth["annotations"]:
            quality.add(counts[annotation["image_id"]])
        scores = quality.compute()
        scores["detection"] = average_precision(truth, truth_folder, results)
        scores["problems"] = problems
        write_json(folder / "scores.json", scores, indent=1)
    writer.close()
    return world.gather(scores if world.is_first else None)[0]


def _with_progress(rows: Iterable[Any], count: int) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(rows, desc="evaluate", total=count, leave=False)


def _read_truth(data: ScoredData, folder: Path, world: World) -> tuple[dict[str, Any], Path, Path, list[str]]:
    """The ground truth, its JSON, the folder of its PNGs, and (in the first process) messages about images that it
    lacks.
    """
    if world.is_first:
        data.panoptic_truth(folder)  # data sets that must write it do so once, before the others look for it
    world.wait()
    json_path, png_folder = data.panoptic_truth(folder)
    content = read_panoptic_json(json_path, with_categories=True, use=TRUTH)
    listed = {annotation["image_id"] for annotation in content["annotations"]}
    problems = [
        f"{name}: has no ground truth that can be read"
        for name, image_id in zip(data.names, data.image_ids)
        if image_id not in listed
    ]
    return content, json_path, png_folder, problems if world.is_first else []
