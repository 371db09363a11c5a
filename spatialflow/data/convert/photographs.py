# SPDX-License-Identifier: Apache-2.0
"""The photographs of a source: found by the names that the source gives, and their sizes."""

import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from spatialflow.data.convert.shapes import ShapeError
from spatialflow.files import is_special_file
from spatialflow.image_formats import IMAGE_SUFFIXES
from spatialflow.images import ImageError, image_size
from spatialflow.panoptic.photographs import image_id_of, photograph_key


class Photographs:
    """The image files below a folder.

    Args:
        folder: with sub-folders, also links to them; hidden ones are skipped.
        excluded: folders that hold no photographs.
        kind: what the files are, for messages.

    Attributes:
        names: paths relative to the folder, with "/".
    """

    def __init__(self, folder: Path, excluded: Collection[Path] = (), kind: str = "photograph") -> None:
        self.folder, self._kind = folder, kind
        skipped = {os.path.realpath(path) for path in excluded}
        self.names: list[str] = []
        for root, folders, files in os.walk(folder, followlinks=True):
            real_path = os.path.realpath(root)
            if real_path in skipped:
                folders.clear()
                continue
            skipped.add(real_path)  # links may lead to it again
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for file in files:
                if not file.lower().endswith(IMAGE_SUFFIXES) or file.startswith("."):
                    continue
                if not is_special_file(os.path.join(root, file)):
                    self.names.append(Path(os.path.relpath(os.path.join(root, file), folder)).as_posix())
        self.names.sort()
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        self._by_beginning: dict[str, list[str]] = defaultdict(list)  # of masks, which may have endings such as _mask
        for name in self.names:
            self._by_name[PurePosixPath(name).name.lower()].append(name)
            stem = photograph_key(name).lower()
            self._by_stem[stem].append(name)
            while kind == "mask" and (stem := _without_ending(stem)):
                self._by_beginning[stem].append(name)

    def find(self, name: str, with_ending: bool = False) -> str:
        """Find the photograph that a source names.

        The file name must match, or else the name without suffix, as annotated images may have been converted. Upper
        and lower case count as equal. Among several, the one that shares most folders with `name` is taken.

        Args:
            name: as in the source, with "/".
            with_ending: `name` is that of a mask, and may have endings such as `_mask` after the photograph's name.

        Raises:
            ShapeError: no photograph matches, or several match equally.
        """
        stem = photograph_key(name).lower()
        found = self._by_name.get(PurePosixPath(name).name.lower()) or self._by_stem.get(stem)
        found = found or self._by_beginning.get(stem)
        while with_ending and not found and (stem := _without_ending(stem)):
            found = self._by_stem.get(stem)
        if not found:
            raise ShapeError(f"has no {self._kind} {name!r:.120} in {self.folder}")
        parts = PurePosixPath(name).parent.parts
        shared = [_common_end(parts, PurePosixPath(path).parent.parts) for path in found]
        best = [path for path, count in zip(found, shared, strict=True) if count == max(shared)]
        exact = [path for path in best if path == name or len(best) == 1]
        if not exact:
            examples = f"{best[0]!r:.80}, {best[1]!r:.80}"
            raise ShapeError(f"{name!r:.120} may be several files in {self.folder}: {examples}")
        return exact[0]


def _without_ending(stem: str) -> str:
    """Remove the last part after "_", "-" or "."; an empty text if there is none."""
    return re.sub(r"[._-][^._-]*$", "", stem) if re.search("[._-]", stem) else ""


def _common_end(first: Sequence[str], second: Sequence[str]) -> int:
    pairs = zip(reversed(first), reversed(second), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def photograph_size(path: Path) -> tuple[int, int]:
    """Read (height, width) of a photograph as it is shown; ShapeError if the file cannot be read, or is no image."""
    try:
        return image_size(path)
    except ImageError as error:
        raise ShapeError(str(error)) from None


def image_ids(names: Collection[str]) -> dict[str, int | str]:
    """Choose ids for photographs as `spatialflow predict` does: the name without suffix, or the number that it is."""
    ids = {name: image_id_of(name) for name in names}
    counts = Counter(ids.values())
    ids = {name: i if counts[i] == 1 else str(PurePosixPath(name).with_suffix("")) for name, i in ids.items()}
    counts = Counter(ids.values())
    return {name: i if counts[i] == 1 else name for name, i in ids.items()}
