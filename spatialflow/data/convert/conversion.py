# SPDX-License-Identifier: Apache-2.0
"""Conversion of a source to the files of the COCO panoptic format."""

import contextlib
import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from spatialflow.data.convert import coco, masks
from spatialflow.data.convert.classes import category_rows, decide_kinds, likely_stuff, read_classes
from spatialflow.data.convert.composing import compose
from spatialflow.data.convert.formats import open_source
from spatialflow.data.convert.photographs import Photographs, image_ids, photograph_size
from spatialflow.data.convert.shapes import ShapeError
from spatialflow.data.convert.sources import Class, Context, ConversionError, Item, Options, Problem, Report
from spatialflow.files import atomic_write
from spatialflow.panoptic.photographs import list_path, read_list
from spatialflow.panoptic.rules import PanopticFormatError
from spatialflow.panoptic.writer import PanopticWriter, earlier_files
from spatialflow.threads import available_cores, map_ahead

_INFO = {"description": "written by spatialflow dataset convert"}
_NAMES = ("panoptic", "train", "val")
_SHOWN_LABELS = 30
_ON_TOP = ("auto", "later", "smaller")


class Conversion(NamedTuple):
    """The result of `to_panoptic`."""

    format: str
    images: Path  # folder of the photographs
    json_paths: list[Path]  # panoptic.json, or train.json and val.json
    image_counts: list[int]  # images in each of the files
    categories: list[dict[str, Any]]  # id, name, isthing, color
    segments: Counter[str]  # number of "things", "stuff" and "crowds"
    problems: list[Problem]  # images and regions that were left out because of a defect
    notes: list[str]  # what else the user should know, as sentences


class _Job(NamedTuple):
    """One image to convert."""

    item: Item
    name: str  # of the photograph, relative to its folder
    image_id: int | str
    png_name: str
    set: int  # index of the file that lists it


def to_panoptic(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    format: str = "auto",
    classes: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None = None,
    stuff_classes: Sequence[str] | None = None,
    stuff: str | os.PathLike[str] | None = None,
    instances: str | os.PathLike[str] | None = None,
    background: str | None = None,
    on_top: str = "auto",
    fill_boxes: bool = False,
    split: float | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Convert annotations of another format to the COCO panoptic format.

    `docs/datasets.md` describes the formats and how overlaps are resolved. Sources are never changed. A repeated call
    replaces the files of the earlier one.

    Args:
        source: file or folder of annotations.
        output: folder for `panoptic.json` and `panoptic/`, or with `split` for `train.json`, `train/`, `val.json` and
            `val/`. `train.txt` and `val.txt` then list the paths of the photographs, one a line.
        images: folder of the photographs, with sub-folders; None: the place where the format has them.
        format: "coco-instances", "labelme", "cvat", "masks", "yolo", or "auto" to recognize it.
        classes: class list, see `docs/datasets.md`; None: the classes of the source.
        stuff_classes: names of the stuff classes; all others are things, unless the source says otherwise.
        stuff: folder of PNGs with ids of stuff classes, below COCO instances.
        instances: folder of PNGs that number the objects of masks.
        background: name of a stuff class for all pixels without annotation, which are void otherwise.
        on_top: "later" or "smaller" for the region that is on top of others; "auto": as usual for the format.
        fill_boxes: convert boxes as if they were masks; otherwise they are left out and counted.
        split: share of the images in `train.json`, between 0 and 1; the others are in `val.json`.
        seed: of the split.
        workers: number of threads; default: one per core. The result does not depend on it.
        progress: called with the number of images done and of all images.

    Raises:
        ConversionError: the source cannot be read at all; an argument is wrong; or the output would replace files that
            an earlier conversion did not write.
        InUseError: another process writes to the output.
        OSError: a file cannot be written.

    Example:
        >>> from spatialflow.data.convert import to_panoptic
        >>> result = to_panoptic("labelme", "mydata", "photos", stuff_classes=["sky"], split=0.9)  # doctest: +SKIP
        >>> result.json_paths, result.problems                                                    # doctest: +SKIP
    """
    source, output = Path(source), Path(output)
    folders = {"images": images, "stuff": stuff, "instances": instances}
    _check_arguments(on_top, split, workers, folders)
    listed, by_color = (None, False) if classes is None else read_classes(classes)
    masks_of = [None if folder is None else Path(folder) for folder in (stuff, instances)]
    opened = open_source(source, format, Options(listed, by_color, *masks_of))
    for name, needed in (("stuff", coco.FORMAT), ("instances", masks.FORMAT)):
        if folders[name] is not None and opened.format != needed:
            raise ConversionError(f"{name}: is for the format {needed}; {source} has the format {opened.format}")
    table = decide_kinds(opened.classes, stuff_classes)
    background_class = None if background is None else _background_class(table, background)
    if not table:
        raise ConversionError(f"{source}: has no class")
    image_folder = opened.images if images is None else Path(images)
    json_paths = [output / f"{name}.json" for name in (_NAMES[:1] if split is None else _NAMES[1:])]
    png_folders = [path.with_suffix("") for path in json_paths]
    mask_folders = [path for path in masks_of if path is not None]
    _check_output(json_paths, png_folders, [source, image_folder, *mask_folders])
    no_photographs = [*png_folders, *mask_folders]
    no_photographs += [output / name for name in _NAMES if earlier_files(output / f"{name}.json", _INFO)[0]]
    no_photographs += [source] if opened.format == masks.FORMAT else []
    photographs = Photographs(image_folder, [path for path in no_photographs if not _is_same(path, image_folder)])
    problems = [*opened.problems]
    jobs = _jobs(opened.items, photographs, problems, split, seed)
    if not jobs:
        example = f"; the first problem: {problems[0].text}" if problems else ""
        hint = "; name the folder of the photographs by --images" if problems and images is None else ""
        raise ConversionError(f"{source}: no image can be converted{example}{hint}")
    lookup: dict[Any, Class] = {row.name: row for row in table} | {row.id: row for row in table}
    rows = category_rows(table)
    smaller_on_top = opened.smaller_on_top if on_top == "auto" else on_top == "smaller"
    segments: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    unlisted: Counter[str] = Counter()
    isthing = {row.id: row.isthing for row in table}
    written: list[list[str]] = [[] for _ in json_paths]
    threads = workers or available_cores()
    lists = None if split is None else image_folder
    with _writers(png_folders, json_paths, rows, written, lists) as writers:
        converter = _Converter(
            image_folder, lookup, fill_boxes, listed is not None, smaller_on_top, background_class, writers
        )
        with contextlib.closing(map_ahead(converter.convert, jobs, threads, ahead=2 * threads)) as futures:
            for done, (job, future) in enumerate(zip(jobs, futures, strict=True), start=1):
                found, report = future.result()
                if found is not None:
                    written[job.set].append(job.name)
                segments.update(
                    "crowds" if row["iscrowd"] else "things" if isthing[row["category_id"]] else "stuff"
                    for row in found or ()
                )
                problems += report.problems
                counts += report.counts
                unlisted += report.unlisted
                if progress is not None:
                    progress(done, len(jobs))
    without_annotation = len(photographs.names) - len({job.name for job in jobs})
    counts[f"photographs in {image_folder} without annotation"] += without_annotation
    notes = _notes(counts, opened.classes, stuff_classes or ())
    if unlisted and segments:
        notes.append(f"left out, as --classes does not name them: {_numbers(unlisted)}")
    elif unlisted:
        text = f"{source}: there is no segment, and --classes does not name {_numbers(unlisted)}"
        problems.append(Problem("class", text))
    if opened.found_classes:
        notes.append(
            f"classes are numbered in the order of the labels found; --classes {json_paths[0]} gives those of a "
            "further source the same numbers"
        )
    return Conversion(opened.format, image_folder, json_paths, list(map(len, written)), rows, segments, problems, notes)


def _check_arguments(
    on_top: str, split: float | None, workers: int | None, folders: Mapping[str, str | os.PathLike[str] | None]
) -> None:
    """Raise ConversionError for an argument of `to_panoptic` that is wrong by itself."""
    if on_top not in _ON_TOP:
        raise ConversionError(f"on_top must be one of {', '.join(_ON_TOP)}, got {on_top!r:.60}")
    if split is not None and not 0 < split < 1:
        raise ConversionError(f"split must be between 0 and 1, got {split:g}")
    if workers is not None and workers < 1:
        raise ConversionError(f"workers must be at least 1, got {workers}")
    for name, folder in folders.items():
        if folder is not None and not os.path.isdir(folder):
            raise ConversionError(f"{name}: {folder}: no such folder")


def _background_class(table: list[Class], name: str) -> Class:
    """Find the stuff class of a name, or add one to the table; ConversionError if the class is a thing."""
    found = next((row for row in table if row.name == name), None)
    if found is None:
        found = Class(max((row.id for row in table), default=0) + 1, name, isthing=False)
        table.append(found)
    if found.isthing:
        raise ConversionError(f"background: {name!r:.60} is a thing; name a stuff class, or a new one")
    return found


def _notes(counts: Mapping[str, int], classes: Sequence[Class], stuff: Sequence[str]) -> list[str]:
    """Make sentences of counts, and of the things that are likely to be stuff.

    Args:
        counts: number of cases by text.
        classes: of the source, or of the user's list.
        stuff: names of the stuff classes that the user gave.
    """
    notes = [f"{text}: {count}" for text, count in sorted(counts.items()) if count]
    if likely := likely_stuff(classes, stuff):
        option = shlex.quote(",".join([*stuff, *likely]))
        notes.append(f"the classes {','.join(likely)} are taken as things; --stuff-classes {option} makes them stuff")
    return notes


def _numbers(labels: Counter[str]) -> str:
    """List labels with their numbers of regions, the most frequent ones first."""
    ordered = sorted(labels.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{label:.60} ({count})" for label, count in ordered[:_SHOWN_LABELS])
    return shown + (f", and {len(ordered) - _SHOWN_LABELS} more" if len(ordered) > _SHOWN_LABELS else "")


class _Converter(NamedTuple):
    """Converts images, in any threads."""

    images: Path
    classes: Mapping[Any, Class]  # by name and by id
    fill_boxes: bool
    chosen: bool  # as in `Context`
    smaller_on_top: bool
    background: Class | None
    writers: Sequence[PanopticWriter]  # by `_Job.set`

    def convert(self, job: _Job) -> tuple[list[dict[str, Any]] | None, Report]:
        """Convert one image; return its segments, or None if it was not written, and what happened."""
        report = Report()
        try:
            size = photograph_size(self.images / job.name)
            _check_size(job, size)
            regions = job.item.read(
                Context(size, job.name, job.item.place, report, self.classes, self.fill_boxes, self.chosen)
            )
        except ShapeError as error:
            begin = "" if str(error).startswith(job.item.place) else f"{job.item.place}: "
            report.add("image", f"{begin}{error}")
            return None, report
        id_map, found, hidden = compose(regions, size, self.smaller_on_top, self.background)
        report.counts["segments hidden by others"] += hidden
        report.counts["images without a segment"] += not found
        try:
            self.writers[job.set].add(job.image_id, job.name, id_map, found, png_name=job.png_name)
        except PanopticFormatError as error:
            report.add("image", f"{job.item.place}: {error}")
            return None, report
        return found, report


def _jobs(
    items: Sequence[Item], photographs: Photographs, problems: list[Problem], split: float | None, seed: int
) -> list[_Job]:
    """Find the photograph, the id and the PNG of every image; images without photograph become problems."""
    found: dict[str, Item] = {}
    for item in items:
        try:
            name = photographs.find(item.name, item.with_ending)
        except ShapeError as error:
            problems.append(Problem("photograph", f"{item.place}: {error}"))
            continue
        if name in found:
            text = f"{item.place}: the photograph {name!r:.120} is annotated twice; the first is {found[name].place}"
            problems.append(Problem("photograph", text))
        else:
            found[name] = item
    ids = image_ids(found)
    if all(item.image_id is not None for item in found.values()):
        ids = {name: item.image_id for name, item in found.items() if item.image_id is not None}
    pngs = {name: str(PurePosixPath(name).with_suffix(".png")) for name in found}
    shared = Counter(pngs.values())
    training = set(found)
    if split is not None and found:
        # Ranks by hash: the set of an image does not depend on the order of the source.
        order = sorted(found, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode(errors="replace")).digest())
        training = set(order[: min(max(round(len(order) * split), 1), max(len(order) - 1, 1))])
    return [
        _Job(item, name, ids[name], pngs[name] if shared[pngs[name]] == 1 else f"{name}.png", int(name not in training))
        for name, item in found.items()
    ]


def _check_size(job: _Job, size: tuple[int, int]) -> None:
    stated = job.item.size
    if stated not in (None, size):
        assert stated is not None
        reason = ""
        if stated == size[::-1]:
            reason = "; it may have been annotated without its EXIF orientation, or been turned since"
        text = f"the source has {stated[1]}x{stated[0]} pixels, the photograph {job.name} has {size[1]}x{size[0]}"
        raise ShapeError(text + reason)


def _is_same(first: Path, second: Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


def _check_output(json_paths: Sequence[Path], png_folders: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Raise ConversionError if an output would replace a file that no earlier conversion wrote."""
    for json_path, folder in zip(json_paths, png_folders, strict=True):
        for path in inputs:
            if _is_same(path, folder) or _is_same(path, json_path):
                raise ConversionError(f"{path}: is an input and would be replaced; choose another output")
        matching, unrelated = earlier_files(json_path, _INFO)
        if unrelated:
            raise ConversionError(f"{unrelated[0]}: would be replaced, and was not written by `dataset convert`")
        if not matching and os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
            raise ConversionError(f"{folder}: exists, and was not written by `dataset convert`; choose another output")
        listed = list_path(json_path)
        if os.path.lexists(listed) and json_path.stem in _NAMES[1:] and not _is_list_of(json_path):
            raise ConversionError(f"{listed}: would be replaced, and was not written by `dataset convert`")


@contextlib.contextmanager
def _writers(
    folders: Sequence[Path],
    json_paths: Sequence[Path],
    rows: list[dict[str, Any]],
    written: list[list[str]],
    listed_folder: Path | None,
) -> Iterator[list[PanopticWriter]]:
    """Open a writer per file; write the files at the end of the block, and remove PNGs of earlier conversions.

    The JSON of an earlier conversion is removed at the start, as it would not describe the PNGs that replace others.
    After an exception, the files list the images done so far.

    Args:
        folders: of the PNGs.
        json_paths: the files.
        rows: the categories.
        written: names of the photographs in each file, in order; read at the end of the block.
        listed_folder: folder of the photographs, whose paths are also written as a list; None: write no lists.
    """
    writers = [PanopticWriter(folder, path, rows, info=_INFO) for folder, path in zip(folders, json_paths, strict=True)]
    earlier = [_listed_pngs(path) for path in json_paths]
    opened: list[PanopticWriter] = []
    try:
        for writer, path in zip(writers, json_paths, strict=True):
            writer.folder.mkdir(parents=True, exist_ok=True)
            opened.append(writer.__enter__())
            path.unlink(missing_ok=True)
            if listed_folder is not None:
                list_path(path).unlink(missing_ok=True)
        yield writers
    finally:
        for writer, names in zip(opened, written, strict=False):
            writer.write_json(names)
            writer.close()
            if listed_folder is not None:
                _write_list(list_path(writer.json_path), [os.path.abspath(listed_folder / name) for name in names])
    for writer, pngs in zip(writers, earlier, strict=True):
        current = {row["annotation"]["file_name"] for row in writer.rows()}
        for name in pngs - current:
            with contextlib.suppress(OSError):
                os.unlink(writer.folder / name)


def _write_list(path: Path, lines: Sequence[str]) -> None:
    """Write a list as `predict -` reads it: a line per path, or as `find -print0` if a path has a line break."""
    end = b"\0" if any("\n" in line for line in lines) else b"\n"
    with atomic_write(path) as file:
        file.write(b"".join(os.fsencode(line) + end for line in lines))


def _is_list_of(json_path: Path) -> bool:
    """Tell whether the list beside a panoptic JSON names exactly its photographs."""
    try:
        names = [row["file_name"] for row in json.loads(json_path.read_bytes())["images"]]
        lines = read_list(json_path)
        return len(lines) == len(names) and all(map(str.endswith, lines, names))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _listed_pngs(json_path: Path) -> set[str]:
    """List the PNGs of an earlier conversion; none if its file is absent or damaged."""
    try:
        names = {row["file_name"] for row in json.loads(json_path.read_bytes())["annotations"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {n for n in names if isinstance(n, str) and n.endswith(".png") and ".." not in n and not os.path.isabs(n)}
