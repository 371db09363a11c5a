# SPDX-License-Identifier: Apache-2.0
"""The images and videos that arguments of the command line name: files, folders, patterns, URLs, standard input."""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import re
import sys
import tempfile
import urllib.parse
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from spatialflow.cli.arguments import is_field
from spatialflow.cli.common import IMAGE_SUFFIXES, counted, nonempty, print_error
from spatialflow.cli.downloads import SIZE_LIMIT, DownloadError, download, is_url
from spatialflow.cli.label_folders import is_cityscapes_label, label_folder
from spatialflow.files import is_special_file
from spatialflow.image_formats import UNREADABLE_SUFFIXES, image_suffix

VIDEO_SUFFIXES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".avi",
    ".mkv",
    ".webm",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".3gp",
    ".mts",
    ".m2ts",
    ".ogv",
)

_STANDARD_INPUT = "standard input"
_SPECIAL = "pipe or device"


class InputImage(NamedTuple):
    """An input image of a command, a frame of a video, or a whole video."""

    path: Path  # the file that is read
    name: str  # path relative to the folder argument, with "/", or name of the file argument; `file_name` in the JSON
    output: str = ""  # path of the output files without suffix; "": `name` without suffix
    source: str = ""  # what the user named, such as a URL, where no file of a photograph stays; "": `path`

    @property
    def stem(self) -> str:
        """Path of the output files without suffix."""
        return self.output or without_suffix(self.name)

    def named(self, message: str) -> str:
        """Put what the user named in the place of a temporary file in a message."""
        return message.replace(str(self.path), self.source) if self.source and self.path.name else message

    def with_longer_name(self) -> InputImage:
        """Put one more parent folder in front of the name; "other" where there is none."""
        parts, length = _parts(self), self.name.count("/") + 2
        return self._replace(name="/".join(parts[-length:]) if length <= len(parts) else f"other/{self.name}")

    def frame(self, number: int) -> InputImage:
        """Return a frame of this video; frames are numbered from 0."""
        return InputImage(
            self.path, f"{self.stem}/{number:06d}.png", source=f"{self.source or self.path}: frame {number}"
        )


class Inputs(NamedTuple):
    """What the arguments of a command name."""

    images: list[InputImage]
    videos: list[InputImage]
    failed: list[str]  # messages about arguments that name no image, which were also printed


def add_images(parser: argparse.ArgumentParser, help: str, nargs: str = "+") -> None:
    """Add the argument `images`, for `resolve_images`."""
    parser.add_argument(
        "images",
        type=nonempty,
        metavar="IMAGE",
        nargs=nargs,
        help=f"{help}: files, folders, URLs (http, https), quoted patterns such as 'photos/**/*.jpg', or - for an "
        "image or a list of these, one a line, from standard input",
    )


@contextlib.contextmanager
def resolve_images(
    arguments: Sequence[str | Path], recursive: bool = False, results: Collection[Path] = ()
) -> Iterator[Inputs]:
    """List the images and videos that arguments name.

    A folder contributes its images. It also contributes those in its sub-folders if `recursive` is set or if it has no
    image itself, such as Cityscapes' folder of cities. In both cases symbolic links to folders are followed. Hidden
    files, files of other kinds, and folders of annotations are skipped, and one message counts them.

    Names that coincide get as many parent folders in front as make them differ. Images whose names differ only in the
    suffix keep the suffix in the names of their output files.

    Args:
        arguments: files, folders, patterns, URLs, and "-" for standard input.
        recursive: include sub-folders.
        results: files and folders that the command writes, which are not inputs.

    Yields:
        The inputs. Files of URLs and of standard input exist until the block ends.
    """
    with tempfile.TemporaryDirectory(prefix="spatialflow-") as workspace:
        search = _Search(recursive, {os.path.realpath(result) for result in results}, Path(workspace))
        for argument in arguments:
            search.add(os.fspath(argument))
        found = search.files()
        for text in search.failed:
            print_error(text)
        videos = [file for file in found if _is_video(file.path.name)]
        images = _with_outputs(_with_unique_names([file for file in found if not _is_video(file.path.name)]))
        yield Inputs(images, _with_free_stems(_with_outputs(_with_unique_names(videos)), images), search.failed)


class _Search:
    """Collects the files that arguments name.

    Args:
        recursive: include sub-folders.
        outputs: real paths of files and folders that are not inputs.
        workspace: an existing folder for downloads.
    """

    def __init__(self, recursive: bool, outputs: set[str], workspace: Path) -> None:
        self._recursive, self._outputs, self._workspace = recursive, outputs, workspace
        self._found: list[InputImage] = []  # a URL has the path "" until it is downloaded
        self._reasons: dict[Path, str | None] = {}  # why the files of a folder are refused
        self.failed: list[str] = []

    def add(self, argument: str, in_list: bool = False) -> None:
        """Add the files of an argument, or of a line of standard input."""
        if argument == "-" and not in_list:
            self._add_standard_input()
        elif is_url(argument):
            self._found.append(InputImage(Path(), "", source=argument))
        elif not os.path.lexists(argument) and glob.has_magic(argument):
            self._add_pattern(argument)
        elif os.path.isdir(argument):
            self._add_folder(Path(argument))
        elif argument.isdecimal() and not os.path.lexists(argument):
            self.failed.append(f"{argument}: no such file; the option for a camera is --camera {argument}")
        elif not os.path.lexists(argument) and is_field(argument):
            self.failed.append(f"{argument}: no such file; a setting has the form {argument}=VALUE")
        else:
            self._add_file(Path(argument), Path(argument).name)

    def files(self) -> list[InputImage]:
        """Download the files of URLs; return all files, each once."""
        from spatialflow.threads import map_ahead

        urls = list(dict.fromkeys(file.source for file in self._found if not file.name))
        paths: dict[str, Path] = {}
        numbered = [(url, self._workspace / str(number)) for number, url in enumerate(urls)]
        for url, future in zip(urls, map_ahead(lambda pair: download(*pair), numbered, 8, 16), strict=True):
            try:
                paths[url] = future.result()
            except DownloadError as error:
                self.failed.append(str(error))
        unique: dict[str, InputImage] = {}
        for file in self._found:
            if not file.name:
                path = paths.get(file.source)
                if path is None:
                    continue
                file = InputImage(path, path.name, source=file.source)
            unique.setdefault(os.path.abspath(file.path), file)
        return list(unique.values())

    def _add_file(self, path: Path, name: str) -> None:
        folder = path.parent
        if folder not in self._reasons:
            may_be_label = path.suffix.lower() in (".png", ".jpg") and os.path.exists(path)
            reason = label_folder(folder) if may_be_label else None
            self._reasons[folder] = reason
            if reason is not None:
                self.failed.append(f"{folder}: {reason}")
        if self._reasons[folder] is None:
            self._found.append(InputImage(path, name))

    def _add_standard_input(self) -> None:
        if sys.stdin.isatty():
            print_error("reading paths from standard input, one a line; Ctrl-D ends the list")
        content = sys.stdin.buffer.read(SIZE_LIMIT + 1)
        suffix = image_suffix(content)
        if len(content) > SIZE_LIMIT:
            self.failed.append(f"{_STANDARD_INPUT}: has more than {SIZE_LIMIT >> 20} MiB")
        elif suffix is not None:
            path = self._workspace / f"stdin{suffix}"
            path.write_bytes(content)
            os.utime(path, (0, 0))  # an interrupted run compares size and time of the photographs
            self._found.append(InputImage(path, path.name, source=_STANDARD_INPUT))
        else:
            separator = b"\0" if content.endswith(b"\0") else b"\n"  # `find -print0` ends names with a zero
            lines = [line.removesuffix(b"\r") for line in content.split(separator)]
            if any(len(line) > 4096 or re.search(rb"[\x00-\x08\x0e-\x1f]", line) for line in lines):
                self.failed.append(f"{_STANDARD_INPUT}: is neither an image of a known format nor a list of paths")
                return
            names = [os.fsdecode(line) for line in lines if line]
            if not names:
                self.failed.append(f"{_STANDARD_INPUT}: lists no path")
            for name in names:
                self.add(name, in_list=True)

    def _add_pattern(self, pattern: str) -> None:
        """Add the files that a pattern matches, and the contents of folders unless its "**" matches their files."""
        matches = sorted(glob.glob(pattern, recursive=True))
        files = [match for match in matches if not os.path.isdir(match)]
        folders = [match for match in matches if os.path.isdir(match)] if "**" not in pattern or not files else []
        fixed = re.split(r"[*?\[]", pattern)[0].rpartition("/")[0] or ("/" if pattern.startswith("/") else ".")
        skipped = Counter[str]()
        for match in files:
            kind = _kind_of_file(match)
            if kind is None or (kind in VIDEO_SUFFIXES and _is_video(match)):
                self._add_file(Path(match), Path(os.path.relpath(match, fixed)).as_posix())
            else:
                skipped[kind] += 1
        _print_skipped(pattern, skipped)
        for match in folders:
            prefix = Path(os.path.relpath(match, fixed)).as_posix()
            self._add_folder(Path(match), "" if prefix == "." else f"{prefix}/")
        if not matches:
            self.failed.append(f"{pattern}: no file matches this pattern")
        elif not folders and sum(skipped.values()) == len(files):
            self.failed.append(f"{pattern}: matches no image")

    def _add_folder(self, folder: Path, prefix: str = "") -> None:
        """Add the images of one folder, and print what is left out and how sub-folders are treated."""
        reason = label_folder(folder)
        if reason is not None:
            self.failed.append(f"{folder}: {reason}")
            return
        scan = _Scan(self._outputs, follow_links=self._recursive)
        images = list(scan.images(folder))
        direct = [image for image in images if "/" not in image.name]
        if not self._recursive and direct:
            if len(direct) < len(images):
                below = len(images) - len(direct)
                verb, pronoun = ("is", "it") if below == 1 else ("are", "them")
                text = f"{counted(below, 'image')} in its sub-folders {verb} left out; --recursive includes {pronoun}"
                print_error(f"{folder}: {text}")
            images, skipped = direct, scan.skipped_directly
        else:
            if not self._recursive:
                scan = _Scan(self._outputs, follow_links=True)
                images = list(scan.images(folder))
            self.failed += scan.failed
            for text in scan.label_folders:
                print_error(text)
            skipped = scan.skipped_directly + scan.skipped_below
        if images and not self._recursive and not direct:
            counts = Counter(image.name.split("/")[0] for image in images)
            largest = ", ".join(f"{name}: {count}" for name, count in counts.most_common(3))
            print_error(
                f"{folder}: holds no image itself; its sub-folders hold {len(images)} ({largest}"
                f"{', ...' * (len(counts) > 3)})"
            )
        _print_skipped(folder, skipped)
        if not images:
            self.failed.append(f"{folder}: holds no image file")
        self._found += [image._replace(name=f"{prefix}{image.name}") for image in images]


class _Scan:
    """Lists the images in a folder and its sub-folders in the order of their paths, and counts other files by kind.

    Args:
        outputs: real paths of files and folders that are not inputs.
        follow_links: follow links to folders.
    """

    def __init__(self, outputs: set[str], follow_links: bool) -> None:
        self._outputs, self._follow_links = outputs, follow_links
        self.skipped_directly, self.skipped_below = Counter[str](), Counter[str]()
        self.failed: list[str] = []  # messages about folders that cannot be read
        self.label_folders: list[str] = []  # messages about sub-folders of annotations

    def images(self, folder: Path, prefix: str = "", parents: tuple[str, ...] = ()) -> Iterator[InputImage]:
        """List the images.

        Args:
            folder: the folder.
            prefix: start of the images' names.
            parents: real paths of the folders above, to which a link may lead back.
        """
        real_path = os.path.realpath(folder)
        if real_path in self._outputs or real_path in parents:
            return
        if parents and (reason := label_folder(folder)) is not None:
            self.label_folders.append(f"{folder}: is left out: {reason}")
            return
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            self.failed.append(f"{folder}: cannot be read: {error.strerror}")
            return
        skipped = self.skipped_below if parents else self.skipped_directly
        for path in paths:
            name, is_link = f"{prefix}{path.name}", os.path.islink(path)
            if path.name.startswith("."):
                if not os.path.isdir(path):
                    skipped["hidden"] += 1
            elif os.path.isdir(path):
                if self._follow_links or not is_link:
                    yield from self.images(path, f"{name}/", (*parents, real_path))
            elif (os.path.realpath(path) if is_link else f"{real_path}/{path.name}") in self._outputs:
                continue
            elif (kind := _kind_of_file(path)) is None:
                yield InputImage(path, name)
            else:
                skipped[kind] += 1


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_SUFFIXES)


def _kind(name: str) -> str | None:
    """Return the kind of a file that is no image by its name, for a message; None for an image."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "Cityscapes label picture" if is_cityscapes_label(name) else None
    return suffix or "without suffix"


def _kind_of_file(path: str | Path) -> str | None:
    """Return the kind of a file found in a folder as `_kind` does, also for a pipe, which would never be read whole."""
    return _SPECIAL if is_special_file(path) else _kind(Path(path).name)


def _print_skipped(place: str | Path, skipped: Counter[str]) -> None:
    """Print how many files of each kind were skipped."""
    if not skipped:
        return
    parts = [f"{count} {kind}" for kind, count in skipped.most_common(8)]
    rest = sum(skipped.values()) - sum(count for _, count in skipped.most_common(8))
    parts += [f"{rest} of other kinds"] if rest else []
    notes = {UNREADABLE_SUFFIXES[kind]: None for kind in sorted(skipped) if kind in UNREADABLE_SUFFIXES}
    if any(kind in VIDEO_SUFFIXES for kind in skipped):
        notes["a video is read if its own path is given"] = None
    print_error("; ".join((f"{place}: skipped {', '.join(parts)}", *notes)))


def without_suffix(name: str) -> str:
    """Remove the suffix of an image's path; the result has "/" as separator."""
    path = PurePosixPath(name)
    return path.as_posix().removesuffix(path.suffix)


def _with_unique_names(files: Sequence[InputImage]) -> list[InputImage]:
    """Put parent folders in front of names that coincide, as many as make them differ."""
    files = list(files)
    while repeated := {name for name, count in Counter(file.name for file in files).items() if count > 1}:
        files = [file.with_longer_name() if file.name in repeated else file for file in files]
    return files


def _parts(file: InputImage) -> tuple[str, ...]:
    """Return the folders of a file, the outermost first, and its name."""
    if not is_url(file.source):
        return tuple(part for part in Path(os.path.abspath(file.path)).parts if part != "/")
    url = urllib.parse.urlsplit(file.source)
    folders = urllib.parse.unquote(url.path).split("/")[1:-1]
    return (*(part for part in (url.netloc, *folders) if part not in ("", ".", "..")), file.name)


def _with_outputs(files: Sequence[InputImage]) -> list[InputImage]:
    """Keep the suffix in the output files of images whose names differ only in it."""
    files = list(files)
    while repeated := {stem for stem, count in Counter(file.stem for file in files).items() if count > 1}:
        files = [file._replace(output=file.name) if file.stem in repeated else file for file in files]
    return files


def _with_free_stems(videos: Sequence[InputImage], images: Sequence[InputImage]) -> list[InputImage]:
    """Keep the suffix in the folder of a video's frames if images have output files in a folder of that name."""
    folders = {parent.as_posix() for image in images for parent in PurePosixPath(image.stem).parents}
    return [video._replace(output=video.name) if video.stem in folders else video for video in videos]
