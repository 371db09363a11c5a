# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a network on a data set: panoptic quality, and average precision of boxes and masks."""

import warnings
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from spatialflow.engine.distributed import ProcessGroup
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
"""Largest number of results that are in memory and not yet scored and written."""


class ScoredData(Protocol):
    """The interface of a data set for scoring."""

    names: list[str]
    image_ids: list[Any]

    def __len__(self) -> int: ...

    def image_path(self, index: int) -> Path:
        """Path of the photograph."""
        ...

    def panoptic_truth(self, folder: Path) -> tuple[Path, Path]:
        """Paths of the ground truth's JSON and folder of PNGs, written to `folder` if need be."""
        ...


class _Truth(NamedTuple):
    """The ground truth of a data set."""

    content: dict[str, Any]  # of the JSON
    json_path: Path
    png_folder: Path
    problems: list[str]  # messages about images without ground truth


class _Part(NamedTuple):
    """The results of one process."""

    rows: list[dict[str, Any]]  # of `PanopticWriter.rows`
    counts: dict[Any, Any]  # of `PanopticQuality.count`, by image id
    problems: list[str]  # messages about images that cannot be scored
    notes: list[Problem]  # where annotations contradict their pixels; the pixels were used


def evaluate_network(
    predictor: Predictor, data: ScoredData, folder: Path, process_group: ProcessGroup, progress: bool = False
) -> dict[str, Any]:
    """Predict every image of a data set and score the results; several processes share the images.

    Args:
        predictor: the network.
        data: images with ground truth.
        folder: for `panoptic.json`, `panoptic/` (PNGs), `detections.json` (COCO results) and `scores.json`.
        process_group: the processes.
        progress: show a progress bar.

    Returns:
        The scores of `panoptic.evaluate`, the same on every process. "detection" has those of
        `average_precision`. "problems" has messages about images and annotations that cannot be read and are left out.

    Raises:
        PanopticFormatError: the ground truth breaks the format, or no image can be scored.
    """
    truth = _read_truth(data, folder, process_group)
    content = truth.content
    writer = PanopticWriter(
        folder / "panoptic",
        folder / f"panoptic{process_group.rank or ''}.json",  # the file of the first process is the result
        predictor.categories.as_coco(),
        detections_path=folder / "detections.json",
        colors=True,
    )
    quality = PanopticQuality(content["categories"])
    annotations = content["annotations"][process_group.rank :: process_group.size]
    show_progress = progress and process_group.is_first
    parts = process_group.gather(_evaluate_part(predictor, data, truth, annotations, writer, quality, show_progress))
    counts = {image_id: image_counts for part in parts for image_id, image_counts in part.counts.items()}
    problems = [message for part in parts for message in part.problems]
    if not counts:
        last = f"; the last: {problems[-1]}" if problems else ""
        raise PanopticFormatError(f"none of {len(data)} images to evaluate on can be used{last}")
    scores = None
    if process_group.is_first:
        notes = [note for part in parts for note in part.notes]
        if notes:
            warnings.warn(summary(notes, str(truth.json_path)), AnnotationWarning, stacklevel=2)
        for part in parts[1:]:
            writer.extend(part.rows)
        writer.write_json()
        detections = [detection for part in parts for row in part.rows for detection in row["detections"]]
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] in counts]
        for annotation in content["annotations"]:
            quality.add(counts[annotation["image_id"]])
        scores = quality.compute()
        scores["detection"] = average_precision(content, truth.png_folder, detections)
        scores["problems"] = problems
        write_json(folder / "scores.json", scores, indent=1)
    writer.close()
    return process_group.gather(scores)[0]


def _evaluate_part(
    predictor: Predictor,
    data: ScoredData,
    truth: _Truth,
    annotations: Sequence[dict[str, Any]],
    writer: PanopticWriter,
    quality: PanopticQuality,
    show_progress: bool,
) -> _Part:
    """Predict, score and write the images of one process, given by their annotations."""
    index_by_id = {image_id: index for index, image_id in enumerate(data.image_ids)}
    part = _Part([], {}, truth.problems, [])

    def score(pair: tuple[dict[str, Any], Outcome]) -> tuple[Any, Any, list[Problem]]:
        """Score one prediction and write it; returns the image id, the counts, and problems of the annotation."""
        annotation, (result, _, error) = pair
        image_id, segments = annotation["image_id"], annotation["segments_info"]
        id_map = read_id_map(truth.png_folder / annotation["file_name"])
        if error is not None or result is None:
            raise error or RuntimeError("an outcome without a result must have an error")
        counts, notes = quality.count(id_map, segments, result.id_map, result.segments, image_id)
        detections = detection_rows(result, image_id)
        writer.add(image_id, data.names[index_by_id[image_id]], result.id_map, result.segments, detections=detections)
        return image_id, counts, notes

    paths = [data.image_path(index_by_id[annotation["image_id"]]) for annotation in annotations]
    with (
        closing(predictor.outcomes(paths)) as outcomes,
        closing(map_ahead(score, zip(annotations, outcomes, strict=True), threads=1, ahead=SCORED_AHEAD)) as scored,
    ):
        for row in _with_progress(scored, len(annotations)) if show_progress else scored:
            try:
                image_id, counts, notes = row.result()
            except (ImageError, PanopticFormatError) as error:
                part.problems.append(str(error))
                continue
            part.counts[image_id] = counts
            part.notes.extend(notes)
    return part._replace(rows=list(writer.rows()))


def _with_progress(rows: Iterable[Any], count: int) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(rows, desc="evaluate", total=count, leave=False)


def _read_truth(data: ScoredData, folder: Path, process_group: ProcessGroup) -> _Truth:
    """Read the ground truth. Only the first process has the messages about images without ground truth."""
    if process_group.is_first:
        data.panoptic_truth(folder)  # writes the files, if needed, once, before the other processes read them
    process_group.wait()
    json_path, png_folder = data.panoptic_truth(folder)
    content = read_panoptic_json(json_path, with_categories=True, use=TRUTH)
    listed = {annotation["image_id"] for annotation in content["annotations"]}
    problems = [
        f"{name}: has no ground truth that can be read"
        for name, image_id in zip(data.names, data.image_ids, strict=True)
        if image_id not in listed
    ]
    return _Truth(content, json_path, png_folder, problems if process_group.is_first else [])
