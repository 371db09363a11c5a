# SPDX-License-Identifier: Apache-2.0
"""Execution of one case of the file fuzzer: read an edited file in the worker, as a user's command would.

The supervisor calls `execute`. A reader may return a correct result or raise the exception that its docstring names. A
command may exit with 0, or with another code and a message of one line. Anything else is a difference: another
exception, a traceback, a Python warning, more than a gigabyte of memory, or execution of code from the file.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml

from fuzz.mutate import SPECIAL, mutate_bytes, mutate_picture, mutate_tree
from spatialflow.cli import main as cli
from spatialflow.config import SECTIONS, Config, ConfigError, load_config, parse_settings
from spatialflow.data.categories import CategoryError, load_categories
from spatialflow.data.cityscapes import Cityscapes, CityscapesError
from spatialflow.data.samples import SampleError
from spatialflow.data.synthetic import CATEGORIES, make_scene, synthesize
from spatialflow.engine.checkpoints import CheckpointError, load_checkpoint
from spatialflow.images import ImageError, read_image
from spatialflow.models.build import build_model
from spatialflow.panoptic import PanopticFormatError, read_id_map
from spatialflow.panoptic.detection import detection_truth

SIZE = (48, 64)
MEGABYTES = 1000
LINE = 1000  # largest number of characters of a message

SMALL = dict(
    backbone_base_channels=4,
    fpn_channels=4,
    head_channels=4,
    thing_head_channels=4,
    stuff_head_channels=4,
    norm_groups=2,
    num_things=6,
    num_stuff=6,
    categories="synthetic",
    images_per_step=1,
)


class Wrong(Exception):
    """Error of a reader: a wrong result, or a forbidden message or exit code."""


def execute(case: dict) -> dict:
    """Execute a case and return its report, in the format of `fuzz.execute`."""
    report = {"status": "right", "differences": [], "compared": 0, "excluded": 0, "skipped": []}
    base, changes = case["arguments"]["base"], case["arguments"]["edits"]
    _forget_peak()
    folder = Path(tempfile.mkdtemp(dir=_materials()))
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            report["compared"] = READERS[case["op"]](folder, base, changes)
    except Wrong as error:
        report["differences"].append(str(error))
    except ACCEPTED as error:
        report["status"] = "refused"
        if case["valid"] and base not in REFUSED_AS_THEY_ARE.get(case["op"], ()):
            report["differences"].append(f"a valid file is refused: {error}")
        if problem := _message_difference(str(error)):
            report["differences"].append(problem)
    finally:
        shutil.rmtree(folder)
    loud = [w for w in warned if issubclass(w.category, RuntimeWarning | ResourceWarning)]
    report["differences"] += [f"{w.category.__name__}: {w.message} in {w.filename}:{w.lineno}" for w in loud]
    if _canary().exists():
        _canary().unlink()
        report["differences"].append("code of the file was run")
    if (peak := _peak()) > MEGABYTES:
        report["differences"].append(f"took {peak} megabytes")
    if report["differences"]:
        report["status"] = "wrong"
    return report


ACCEPTED = (ImageError, PanopticFormatError, SampleError, CityscapesError, CategoryError, CheckpointError, ConfigError)


def _message_difference(text: str) -> str | None:
    """Return a difference if a message is not a single line of at most LINE characters, else None."""
    if "\n" in text.strip() or len(text) > LINE or not text.strip():
        return f"a message of {len(text)} characters that is not one line: {text[:300]!r}"
    return None


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    _Start.megabytes = _peak(since_start=False)


class _Start:
    megabytes = 0


def _peak(since_start: bool = True) -> int:
    """Return by how many megabytes the peak resident memory has grown since `_forget_peak`.

    With `since_start=False`, return the peak itself.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024 - (_Start.megabytes if since_start else 0)
    return 0


@functools.cache
def _materials() -> Path:
    """Return a folder with valid scenes, predictions and a Cityscapes tree, created once per worker."""
    root = Path(tempfile.mkdtemp(prefix="fuzz_files_"))
    import atexit

    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for _ in synthesize(root / "scenes", 2, SIZE, 0):
        pass
    return root


def _canary() -> Path:
    return _materials() / "canary"


def _scenes() -> Path:
    return _materials() / "scenes"


# ------------------------------------------------------------------------------------------------- writing and running


def _text(tree: Any) -> bytes:
    """Encode as JSON; non-finite numbers become NaN and Infinity, as Python's json writes them."""
    return json.dumps(tree, ensure_ascii=True, default=str).encode()


def _json(tree: Any, changes: list) -> bytes:
    return mutate_bytes(_text(mutate_tree(tree, changes)), changes)


def _command(*arguments: Any, silent: bool = False) -> tuple[int, str]:
    """Run a command; return its exit code and standard error. Raise Wrong if it does not end as a command should.

    Args:
        arguments: command line.
        silent: with an exit code of 1 the message is on standard output.
    """
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8"),
        io.StringIO(),
    )  # a name may hold characters that cannot be encoded
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(record=True) as shown,
        ):
            warnings.simplefilter("default")
            code = cli.main(list(map(str, arguments)))
    except SystemExit as error:
        code = error.code
    for warning in shown:  # the command prints its own warnings; others reach this list
        if not issubclass(warning.category, DeprecationWarning | PendingDeprecationWarning | ImportWarning):
            raise Wrong(f"a warning with a line of source: {warning.category.__name__}: {warning.message}")
    lines = [line for line in err.getvalue().splitlines() if line.strip()]
    for line in lines:
        if not line.startswith(("spatialflow: ", "usage: ", "skipped: ")) or len(line) > LINE:
            raise Wrong(f"standard error has a line that is not a message: {line[:500]!r}")
    if code not in (0, 1, 2) or (code > silent and not lines):
        raise Wrong(f"exit code {code} with {len(lines)} sentences")
    return code, "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- the readers


def _read_png(folder: Path, base: int, changes: list) -> int:
    """Check that an id map equals that of OpenCV for the same file, if both read it."""
    rng = np.random.default_rng(base)
    size = ((1, 1), (48, 64), (7, 300), (40, 5))[base]
    pixels = np.repeat(rng.integers(0, 256, (*size, 3), np.uint8)[:, ::4], 4, axis=1)[:, : size[1]]
    _, encoded = cv2.imencode(".png", np.ascontiguousarray(pixels))
    path = folder / "ids.png"
    path.write_bytes(mutate_picture(encoded.tobytes(), changes))
    ids = read_id_map(path)
    if not changes and not np.array_equal(ids, pixels[..., ::-1].astype(np.int32) @ [1, 256, 65536]):
        raise Wrong("other ids than were written")
    seen = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    if seen is not None and not np.array_equal(ids, seen[..., ::-1].astype(np.int32) @ [1, 256, 65536]):
        raise Wrong("other ids than OpenCV reads")
    return ids.size


def _read_photograph(folder: Path, base: int, changes: list) -> int:
    scene = make_scene(SIZE, 0, 0).image
    kind, pixels, options = (
        (".jpg", scene, []),
        (".jpg", scene, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
        (".jpg", scene[..., 0], []),
        (".png", scene, []),
        (".png", scene[..., 0], []),
        (".png", scene.astype(np.uint16) * 257, []),
        (".jpg", scene, [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]),
        (".bmp", scene, []),
    )[base]
    _, encoded = cv2.imencode(kind, pixels, options)
    path = folder / f"photograph{kind}"
    path.write_bytes(mutate_picture(encoded.tobytes(), changes))
    image = read_image(path)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise Wrong(f"read_image gave {image.shape} {image.dtype}")
    return image.size


def _read_panoptic(folder: Path, base: int, changes: list) -> int:
    """Read the file as ground truth, as prediction, for drawing, and as training data."""
    truth = _scenes() / "panoptic.json"
    (folder / "edited.json").write_bytes(_json(json.loads(truth.read_text()), changes))
    (folder / "edited").symlink_to(_scenes() / "panoptic")
    edited = folder / "edited.json"
    if base == 0:
        code, _ = _command("evaluate", edited, truth, "--output", folder / "scores.json")
    elif base == 1:
        code, _ = _command("evaluate", truth, edited, "--per-class")
    elif base == 2:
        maps = ("--ground-truth", edited, "--prediction", truth)
        code, _ = _command("visualize", _scenes() / "images", *maps, "--output", folder / "out")
    elif base == 3:
        code, _ = _command("validate", edited, "--images", _scenes() / "images", silent=True)
    else:
        from helpers.scenes import scene_categories

        from spatialflow.data.coco import CocoPanoptic

        data = CocoPanoptic(edited, _scenes() / "images", None, scene_categories())
        return sum(data[index].image.size for index in range(min(len(data), 2)))
    if code != 0 and not changes:
        raise Wrong(f"exit code {code} for a valid file")
    return 1 - min(code, 1)


@functools.cache
def _detections() -> list[dict]:
    """Return the things of the ground truth as perfect detections, so that every mask overlaps one in scoring."""
    path = _scenes() / "panoptic.json"
    truth = detection_truth(json.loads(path.read_text()), path.with_suffix(""))["annotations"]
    fields = ("image_id", "category_id", "bbox", "segmentation")
    return [{name: row[name] for name in fields} | {"score": 0.5} for row in truth[:4]]


def _read_detections(folder: Path, base: int, changes: list) -> int:
    rows = [dict(row) for row in _detections()]
    for _, place, value in (
        change for change in changes if change[0] == "counts"
    ):  # characters of the run-length code of a mask
        row = rows[value % len(rows)]
        code = dict(row["segmentation"])
        at = place % len(code["counts"])
        code["counts"] = code["counts"][:at] + chr(33 + value % 94) + code["counts"][at + 1 :]
        row["segmentation"] = code
    if base == 1:
        for row in rows:
            row.pop("segmentation")
    (folder / "detections.json").write_bytes(_json(rows, changes))
    truth = _scenes() / "panoptic.json"
    code, _ = _command("evaluate", truth, truth, "--detections", folder / "detections.json")
    if code != 0 and not changes:
        raise Wrong(f"exit code {code} for a valid file")
    return 1 - min(code, 1)


def _read_categories(folder: Path, base: int, changes: list) -> int:
    rows = [dict(row) for row in CATEGORIES]
    (folder / "table.json").write_bytes(_json(rows if base == 0 else {"categories": rows}, changes))
    categories = load_categories(folder / "table.json", 6, 6)
    return len(categories.as_coco())


@functools.cache
def _cityscapes() -> Path:
    from helpers.scenes import write_cityscapes

    return write_cityscapes(_materials() / "cityscapes", 2, SIZE, split="val")


def _read_cityscapes(folder: Path, base: int, changes: list) -> int:
    """Read a Cityscapes tree with an edited label map, photograph, or JSON of an earlier evaluation."""
    root = folder / "tree"
    shutil.copytree(_cityscapes(), root)
    categories = load_categories("cityscapes", 8, 11)
    data = Cityscapes(root, "val", categories)
    if base == 2:
        path, _ = data.panoptic_truth(folder)
        path.write_bytes(_json(json.loads(path.read_text()), changes))
    else:
        path = next((root / ("gtFine" if base == 0 else "leftImg8bit")).rglob("*.png"))
        path.write_bytes(mutate_picture(path.read_bytes(), changes))
        data = Cityscapes(root, "val", categories)
    done = 0
    for index in range(len(data)):
        try:
            done += data[index].image.size
        except SampleError as error:
            if problem := _message_difference(str(error)):
                raise Wrong(problem) from None
    data.panoptic_truth(folder)
    return done


# -------------------------------------------------------------------------------------------------------- checkpoints


@functools.cache
def _model() -> torch.nn.Module:
    """Return a part of a network with few tensors, so that each of them is edited often."""
    torch.manual_seed(0)
    network = build_model("tiny", **SMALL)
    return torch.nn.ModuleDict({"fpn": network.fpn, "stuff_head": network.stuff_head})


def _torch_bytes(content: Any, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


class _Evil:
    """Object that pickles to a call which creates the canary file."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call

    def __deepcopy__(self, _: dict) -> _Evil:
        return self  # a copy by `__reduce__` would make the call


def _checkpoint(base: int) -> Any:
    """Return the content of a valid or hostile checkpoint, and whether it is saved in the legacy format."""
    state = dict(list(_model().state_dict().items()))
    writes = f"open({str(_canary())!r}, 'w')"
    evil = {"w": torch.zeros(2), "x": _Evil(open, str(_canary()), "w"), "y": _Evil(exec, writes)}
    return (
        (state, False),
        (state, True),
        ({"state_dict": state, "meta": {"epoch": 3, "lr": 0.1}}, False),
        ({"module." + name: value for name, value in state.items()}, False),
        (evil, False),
        (evil, True),
        ({"state_dict": state | evil}, False),
        ({"model": {}}, False),
        ({name: value.half() for name, value in state.items()}, False),
        ([1, "a", {"b": None}], False),
    )[base]


REFUSED_AS_THEY_ARE = {"checkpoint": (4, 5, 6, 7, 9), "setting": range(1 << 16)}
"""Indices of files that a reader must refuse: they hold calls, or no network."""

TENSORS = (
    lambda: torch.zeros(0),
    lambda: torch.full((3,), float("nan")),
    lambda: torch.zeros(4, 4, dtype=torch.int64),
    lambda: torch.zeros(2, 2).to_sparse(),
    lambda: torch.zeros(1).expand(1 << 20, 1 << 20),
    lambda: torch.zeros(3, 3).t(),
    lambda: torch.zeros(2, dtype=torch.complex64),
    lambda: torch.empty(2, 3, device="meta"),
    lambda: torch.zeros(()),
    lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    lambda: np.float64(3),
    lambda: b"abc",
)


def _with_edited_pickle(data: bytes, changes: list) -> bytes:
    """Edit the pickle within the archive of a torch file; edit a file without archive as bytes."""
    inner = [[("set", "flip", "drop", "repeat", "number")[value % 5], place, value] for _, place, value in changes]
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return mutate_bytes(data, inner)
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, mutate_bytes(content, inner) if entry.filename.endswith(".pkl") else content)
    return stream.getvalue()


def _edited_torch_file(tree: Any, legacy: bool, changes: list) -> bytes:
    tree = mutate_tree(
        tree, changes, SPECIAL[:-2] + TENSORS
    )  # without the deeply nested values, which torch cannot save
    data = _torch_bytes(tree, legacy)
    if any(kind == "inner" for kind, _, _ in changes):
        return _with_edited_pickle(data, changes)
    return mutate_bytes(data, changes)


def _read_checkpoint(folder: Path, base: int, changes: list) -> int:
    path = folder / "weights.pth"
    path.write_bytes(_edited_torch_file(*_checkpoint(base), changes))
    return _fill(path)


def _fill(path: Path) -> int:
    """Load a file into a network and check that either all of its values were loaded or none."""
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        load_checkpoint(model, path)
    except CheckpointError:
        for name, value in model.state_dict().items():
            if not torch.equal(value, before[name]):
                raise Wrong(f"{name} changed though the file was refused") from None
        raise
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(before[name])
    return len(before)


def _read_safetensors(folder: Path, base: int, changes: list) -> int:
    from safetensors.torch import save

    state = {name: value.contiguous() for name, value in _model().state_dict().items()}
    data = save(state if base == 0 else {name: value.half() for name, value in state.items()})
    length = int.from_bytes(data[:8], "little")
    header = mutate_tree(json.loads(data[8 : 8 + length]), changes)
    written = _text(header)
    path = folder / "weights.safetensors"
    path.write_bytes(mutate_bytes(len(written).to_bytes(8, "little") + written + data[8 + length :], changes))
    return _fill(path)


@functools.cache
def _run_of() -> tuple[Any, Any]:
    """Return a trainer after one step, and the content of its checkpoint."""
    from helpers.scenes import scene_categories

    from spatialflow.data.coco import CocoPanoptic
    from spatialflow.engine.distributed import ProcessGroup
    from spatialflow.engine.trainer import Trainer

    config = load_config("tiny", **SMALL, epochs=2)
    data = CocoPanoptic(_scenes() / "panoptic.json", _scenes() / "images", None, scene_categories())
    folder = _materials() / "run"
    trainer = Trainer(config, data, folder, ProcessGroup(0, 1, torch.device("cpu")))
    for parameter in trainer.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.step = 1
    trainer.save_checkpoint()
    trainer.log.close()
    return trainer, torch.load(trainer.store.path, weights_only=True)


def _read_run(folder: Path, base: int, changes: list) -> int:
    from spatialflow.engine.trainer import TrainingError

    trainer, content = _run_of()
    trainer.store.folder = folder
    trainer.store.path.write_bytes(_edited_torch_file(content, base == 1, changes))
    try:
        # A run in this folder does nothing else with the file; building a trainer would take ten times as long.
        trainer.step = trainer.store.restore()
    except TrainingError as error:
        raise CheckpointError(str(error)) from None
    for parameter in trainer.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    if type(trainer.step) is not int or trainer.step < 0:
        raise Wrong(f"the run goes on from step {trainer.step!r} of {trainer.total_steps}")
    return 1


# ------------------------------------------------------------------------------------------------------- configurations


def _read_configuration(folder: Path, base: int, changes: list) -> int:
    path = folder / "own.yaml"
    name = ("tiny", "demo", "spatialflow_r50_cityscapes", "retinanet_r50_coco")[base]
    config = load_config(name)
    tree = {section: _lists(vars(getattr(config, section))) for section in SECTIONS}
    if base == 1:
        tree = {"base": "demo", "model": {"num_things": 6}}
    if any(kind in ("set", "flip", "cut", "drop", "repeat", "insert", "number") for kind, _, _ in changes):
        path.write_bytes(mutate_bytes(yaml.safe_dump(tree).encode(), changes))
    else:
        path.write_bytes(_text(mutate_tree(tree, changes)))
    return _check_config(load_config(path))


def _lists(section: Any) -> dict:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in section.items()}


def _check_config(config: Config) -> int:
    hash(config)  # frozen at every level
    if load_config(config) != config:
        raise Wrong("a configuration that was accepted is refused, or another, when it is read again")
    return len(SECTIONS)


TEXTS = (
    "",
    "=",
    "epochs",
    "epochs=",
    "epochs=5",
    "epochs=0x10",
    "epochs=1_000",
    "epochs=[",
    "epochs={",
    "epochs=1e3",
    "epochs=5.0",
    "seed=99999999999999999999999",
    "learning_rate=.inf",
    "learning_rate=1e400",
    "learning_rate=-0",
    "learning_rate=1e-400",
    "anchor_ratios=[1e-300]",
    "anchor_ratios=[]",
    "anchor_ratios=!!python/object/apply:os.system [x]",
    "categories=!!binary aGk=",
    "categories=2020-01-01",
    "categories=[a]",
    "model={}",
    "model=5",
    "model={fpn_channels: 8}",
    "model.fpn_channels=8",
    "model.=8",
    ".=8",
    "model={1: 2}",
    "model={null: 2}",
    "test_short_edges=[[[[1]]]]",
    "test_short_edges=[1,true]",
    "a" * 5000,
    "epochs=" + "9" * 5000,
    "epochs=" + "[" * 3000,
    "epochs=&a [*a]",
    "epochs=&a {b: *a}",
    "name=x",
    "\0=\0",
    "epochs=\0",
    "\ud800=1",
    "epochs=\ud800",
    "test_short_edges=" + "&a [1,1,1,1,1,1,1,1,1]",
    "base=tiny",
    "training={epochs: 3}",
    "learning_rate_epochs=" + json.dumps([5] * 3000),
    "flow_source=null",
    "flow_source=",
    "flow_source=reg",
    "image_std=[1,1,0]",
    "epochs=" + ", ".join(["&a0 [x]", *(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]).join("[]"),
    "? [a, b]: c",
    "epochs=? {a: b}\n: c",
    "epochs=- 1",
    "epochs=<<: 1",
    "epochs=!!set {a}",
    "epochs=!!omap [a: 1]",
    "epochs=%YAML 1.1",
)


def _read_setting(folder: Path, base: int, changes: list) -> int:
    """Parse FIELD=VALUE as on a command line: arbitrary text, and every field with special values."""
    fields = [name for section in SECTIONS.values() for name in section.__dataclass_fields__]
    chosen = [TEXTS[base % len(TEXTS)]] if base & 1 else [f"{fields[base % len(fields)]}={SPECIAL[base // 7 % 50]}"]
    for _, place, value in changes:
        special = SPECIAL[value % (len(SPECIAL) - 2)]
        chosen.append(f"{fields[place % len(fields)]}={json.dumps(special)}")
    return _check_config(load_config("tiny", **parse_settings(chosen)))


READERS: dict[str, Callable[[Path, int, list], int]] = {
    "png_id_map": _read_png,
    "photograph": _read_photograph,
    "panoptic_json": _read_panoptic,
    "detections_json": _read_detections,
    "categories_json": _read_categories,
    "cityscapes": _read_cityscapes,
    "checkpoint": _read_checkpoint,
    "safetensors": _read_safetensors,
    "run_checkpoint": _read_run,
    "configuration": _read_configuration,
    "setting": _read_setting,
}
