# SPDX-License-Identifier: Apache-2.0
"""The command line. Each command imports what it needs, so that `evaluate` starts without torch."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import spatialflow
from spatialflow.cli.common import (
    check_count,
    complain,
    ground_truth_json,
    keep_inputs,
    list_images,
    load_models,
    named,
    package_configs,
    panoptic_json,
    png_folder,
    sentence,
    show_log,
    to_path,
    with_examples,
)
from spatialflow.cli.prediction_folder import RESULTS, PredictionFolder, writers
from spatialflow.cli.train import add_train
from spatialflow.cli.validate import add_validate
from spatialflow.cli.visualize import add_visualize
from spatialflow.errors import CommandError, DataWarning, Terminated
from spatialflow.threads import leave_cores_to_others

DEFAULT_CONFIG = "spatialflow_r50_coco"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        Exit code: 0 everything done, 1 some inputs failed and are named on standard error, 2 the command could not be
        carried out, 130 interrupted (SIGINT), 141 the output pipe was closed, 143 terminated (SIGTERM).
    """
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names need not be text
    show_log()
    try:
        with _signals_raise() as received, _warnings_as_sentences():
            try:
                code = options.run(options)
            except Exception as error:
                if received and not _follows_interrupt(error):  # a library has turned the exception into its own
                    raise _EXCEPTION_OF[received[0]] from None
                raise
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (CommandError, ImportError) as error:
        complain(str(error))
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        complain(f"out of memory: {str(error).strip().splitlines()[0] if str(error).strip() else 'Python has no more'}")
        return 2
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        complain(": ".join(("terminated" if terminated else "interrupted", *map(str, error.args))))
        return 143 if terminated else 130


def _follows_interrupt(error: BaseException | None) -> bool:
    """True for an error of what was done because of an interrupt, such as saving results on a full disk."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory was asked for that is not there; torch has a type of its own for that on GPUs alone."""
    text = str(error)
    return isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text


_EXCEPTION_OF = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@contextlib.contextmanager
def _signals_raise() -> Iterator[list[int]]:
    """In the block SIGTERM ends a command as Ctrl-C does, through its `with` and `finally` blocks.

    Yields:
        The signals that have come so far.
    """
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        if _is_being_imported("torch"):  # its C++ aborts at an exception, and nothing is to be saved yet
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        raise _EXCEPTION_OF[number]

    if threading.current_thread() is not threading.main_thread():  # others cannot set handlers
        yield received
        return
    before = {number: signal.getsignal(number) for number in _EXCEPTION_OF}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as SIGINT in a background job of a shell
            signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_being_imported(name: str) -> bool:
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)


@contextlib.contextmanager
def _warnings_as_sentences() -> Iterator[None]:
    """In the block a `DataWarning` is printed as a sentence, whatever Python's settings for warnings are. Pillow's
    warning about large pictures, which are read like others, is not shown.
    """

    def show(message: Warning, category: type[Warning], *place: Any) -> None:
        if issubclass(category, DataWarning):
            complain(str(message))
        else:
            shown(message, category, *place)

    with warnings.catch_warnings():
        shown, warnings.showwarning = warnings.showwarning, show
        warnings.simplefilter("always", DataWarning)
        warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spatialflow", description="Panoptic segmentation and its operators.")
    parser.add_argument("--version", action="version", version=f"spatialflow {spatialflow.__version__}")
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", description="`spatialflow COMMAND --help` says more"
    )

    predict = commands.add_parser(
        "predict",
        help="images in, panoptic maps and overlay pictures out",
        description="Writes a panoptic map and an overlay picture for every image. A file that is no image is named "
        "and left out. The same\ncommand, given again, goes on from a run that was interrupted. Threads "
        "decode the next images and write the previous\nones while the network works.\n\n" + package_configs(),
        **with_examples(
            "predict photos --config demo --output out",
            "predict photos --config spatialflow_r50_coco --checkpoint weights.pth --output out",
            "predict photos --recursive --config demo --output out",
            "predict a.jpg b.jpg --config demo --size 256 384 --flip --score 0.5 --output out",
        ),
    )
    predict.set_defaults(run=_predict)
    predict.add_argument("images", nargs="+", type=to_path, metavar="IMAGE", help="image files, or folders of them")
    predict.add_argument(
        "--output",
        required=True,
        type=to_path,
        metavar="FOLDER",
        help="receives panoptic.json, panoptic/*.png (COCO panoptic format) and overlays/*.jpg",
    )
    predict.add_argument(
        "--config",
        action="append",
        metavar="NAME",
        help=f"configuration of the package or YAML file (default: {DEFAULT_CONFIG})",
    )
    predict.add_argument(
        "--checkpoint",
        action="append",
        type=to_path,
        metavar="FILE",
        help="weights: safetensors, torch, or a released checkpoint (default: those that come with "
        "the package, as for demo; else random ones). Given several times: an ensemble, with one "
        "--config for all or one for each",
    )
    predict.add_argument("--ema", action="store_true", help="use the moving average (EMA) of --checkpoint's weights")
    predict.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    predict.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="arithmetic of the network (default: %(default)s)",
    )
    predict.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="replay a CUDA graph per padded size of the network's input, the first image of which "
        "takes longer (default: on a GPU)",
    )
    predict.add_argument(
        "--size",
        nargs="+",
        type=int,
        metavar=("SHORT", "LONG"),
        help="pixels that the short and the long edge are fitted to, whichever is reached first; the "
        "long one may be left out (default: the configuration's)",
    )
    predict.add_argument(
        "--short-edges",
        nargs="+",
        type=int,
        metavar="SHORT",
        help="test-time augmentation: every image with its short edge at each of these pixels, "
        "results joined (default: the configuration's)",
    )
    predict.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="test-time augmentation: mirrored images too (default: the configuration's)",
    )
    predict.add_argument(
        "--score",
        type=float,
        metavar="S",
        help="least score of an instance in the panoptic map, 0 to 1 (default: the configuration's)",
    )
    predict.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        dest="settings",
        help="other fields of the configuration, e.g. stuff_area_threshold=2000",
    )
    predict.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of the network, beside those that decode and write (default: torch's)",
    )
    predict.add_argument("--detections", action="store_true", help="write detections.json too (COCO results)")
    predict.add_argument("--no-overlay", action="store_true", help="write no overlay pictures")
    predict.add_argument("--recursive", action="store_true", help="images in sub-folders too; outputs keep the folders")
    predict.add_argument(
        "--restart", action="store_true", help="start over instead of going on with an interrupted run"
    )

    evaluate = commands.add_parser(
        "evaluate",
        help="panoptic quality of a folder of predictions",
        description="Prints panoptic quality (PQ), segmentation quality (SQ) and recognition quality (RQ) in percent, "
        "and N, the classes\nthat count. Images are joined by id, or by the photograph's name "
        "(docs/prediction.md). Annotations that\ncontradict themselves stop it or are reported "
        "(docs/annotations.md).",
        **with_examples(
            "evaluate panoptic_val2017.json out",
            "evaluate panoptic_val2017.json out --detections out/detections.json --per-class --output scores.json",
        ),
    )
    evaluate.set_defaults(run=_evaluate)
    for name, what in (
        ("ground_truth", "ground truth: a Cityscapes tree (its split val), or"),
        ("prediction", "predictions:"),
    ):
        evaluate.add_argument(
            name,
            type=to_path,
            metavar=name.upper(),
            help=f"{what} the panoptic JSON, the folder of PNGs beside it, or what `predict` wrote",
        )
    evaluate.add_argument("--ground-truth-folder", type=to_path, metavar="FOLDER", help="PNGs, if not beside the JSON")
    evaluate.add_argument("--prediction-folder", type=to_path, metavar="FOLDER", help="PNGs, if not beside the JSON")
    evaluate.add_argument("--output", type=to_path, metavar="FILE", help="write all numbers as JSON")
    evaluate.add_argument(
        "--detections",
        type=to_path,
        metavar="FILE",
        help="COCO results, as `predict --detections` writes them: box and mask AP too",
    )
    evaluate.add_argument("--per-class", action="store_true", help="a line for every class in the table")
    evaluate.add_argument("--workers", type=int, metavar="N", help="threads (default: one per core)")

    add_validate(commands)
    add_train(commands)
    add_visualize(commands)

    synthesize = commands.add_parser(
        "synthesize",
        help="draw landscapes with exact panoptic ground truth",
        **with_examples("synthesize scenes --count 20 --size 256 384"),
    )
    synthesize.set_defaults(run=_synthesize)
    synthesize.add_argument(
        "output", type=to_path, metavar="FOLDER", help="receives images/, panoptic/ and panoptic.json"
    )
    synthesize.add_argument("--count", type=int, default=8, metavar="N", help="scenes (default: %(default)s)")
    synthesize.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(480, 640),
        metavar=("HEIGHT", "WIDTH"),
        help="pixels of every scene (default: 480 640)",
    )
    synthesize.add_argument(
        "--seed", type=int, default=0, metavar="S", help="other seeds draw other scenes (default: %(default)s)"
    )

    convert = commands.add_parser(
        "convert",
        help="rewrite a released checkpoint with the names of this package",
        **with_examples("convert released.pth weights.safetensors --half"),
    )
    convert.set_defaults(run=_convert)
    convert.add_argument("source", type=to_path, metavar="SOURCE", help="released checkpoint, or one of this package")
    convert.add_argument("--half", action="store_true", help="store float16: half the size, for inference")
    convert.add_argument("--ema", action="store_true", help="take the moving average (EMA) of the weights in SOURCE")
    convert.add_argument("destination", type=to_path, metavar="DESTINATION", help="ends in .safetensors, .pt or .pth")

    benchmark = commands.add_parser(
        "benchmark",
        help="time operators against their peers",
        description="Checks every result in float64, then times it. Peers that are not installed are left out; "
        "`pip install torchvision`\nbrings most. Without it nms is checked by its reference, which takes "
        "minutes.",
        **with_examples("benchmark --list", "benchmark roi_align nms --seconds 2 --output results"),
    )
    benchmark.set_defaults(run=_benchmark)
    benchmark.add_argument("ops", nargs="*", metavar="OP", help="operators (default: all)")
    benchmark.add_argument("--list", action="store_true", help="name the operators and end")
    for name, metavar, what in (
        ("device", "DEVICE", "cpu or cuda (default: cpu)"),
        ("threads", "N", "CPU threads (default: torch's)"),
        ("seconds", "S", "time per provider, case and mode (default: 1)"),
        ("output", "FOLDER", "receives <device>/<op>.json and .png (default: benchmarks/results)"),
    ):
        benchmark.add_argument(f"--{name}", metavar=metavar, help=what)

    info = commands.add_parser("info", help="versions, libraries, instruction set, CUDA architectures")
    info.set_defaults(run=_info)
    return parser


# ------------------------------------------------------------------------------------------------------------ predict


def _predict(options: argparse.Namespace) -> int:
    """Decodes, predicts and writes several images at once, each step in their order; a bad one is named and skipped."""
    leave_cores_to_others()
    from tqdm import tqdm

    from spatialflow.images import ImageError
    from spatialflow.panoptic import PanopticFormatError
    from spatialflow.panoptic.detection import has_pycocotools

    results = [options.output / name for name in RESULTS]
    images, failed = list_images(options.images, options.recursive, results)
    if not images:
        complain("no image to predict")
        return 1
    if options.detections and not has_pycocotools():
        complain("--detections: the package pycocotools is missing, so detections.json has boxes without masks")
    predictor, settings = _make_predictor(options)
    output = PredictionFolder(
        options.output,
        images,
        predictor.categories.as_coco(),
        settings,
        overlays=not options.no_overlay,
        detections=options.detections,
        resume=not options.restart,
    )
    before = set(output.done)
    if output.replaces:
        complain(f"{options.output}: holds the results of an earlier run, which this one replaces")
    if before:
        complain(
            f"{options.output}: {len(before)} of {len(images)} images were done by a run that was interrupted; "
            f"this one goes on"
        )
    todo = [image for image in images if image.name not in before]
    times: dict[str, float] = {}
    begin = time.perf_counter()
    try:
        with (
            output,
            contextlib.closing(predictor.outcomes([image.path for image in todo])) as outcomes,
            tqdm(desc="predict", unit="image", total=len(images), initial=len(before), disable=None) as bar,
            contextlib.closing(output.add_all(todo, outcomes, writers(predictor.device.type))) as files,
        ):
            for written in files:
                try:
                    for stage, seconds in written.result().items():
                        times[stage] = times.get(stage, 0.0) + seconds
                except (ImageError, PanopticFormatError, OSError) as error:
                    failed.append(sentence(error))
                    with bar.external_write_mode(file=sys.stderr):
                        complain(failed[-1])
                bar.update()
    except KeyboardInterrupt as stop:
        stop.args = (f"{len(output.done)} of {len(images)} images are done; the same command goes on with the others",)
        raise
    seconds_of_all = time.perf_counter() - begin
    done = len(output.done)
    new = done - len(before)
    if new:
        stages = ", ".join(f"{stage} {seconds / new * 1e3:.1f} ms" for stage, seconds in times.items())
        print(
            f"mean time per image: {stages}, together {sum(times.values()) / new * 1e3:.1f} ms; "
            f"overlapped {seconds_of_all / new * 1e3:.1f} ms"
        )
    if done:
        print(
            f"{done} of {done + len(failed)} images done: {options.output / 'panoptic.json'}, {output.folder}/"
            + ("" if options.no_overlay else f", {output.overlay_folder}/")
        )
    else:
        complain("no image could be predicted")
    if output.left_out:
        complain(
            f"{options.output}: {output.left_out} more images were done by the run that was interrupted; "
            f"panoptic.json does not list them, and the journal keeps them"
        )
    return 1 if failed else 0


def _make_predictor(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The predictor, and the settings that decide its results."""
    import torch

    from spatialflow.engine.predict import Predictor, usable_device

    check_count("--threads", options.threads)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        device = usable_device(options.device)
    except ValueError as error:
        raise CommandError(f"--{error}") from None
    if options.cuda_graph and device.type != "cuda":
        raise CommandError(f"--cuda-graph needs a CUDA device, got --device {device}")
    try:
        models = load_models(
            options.config or [DEFAULT_CONFIG], options.checkpoint or [], _overrides(options), options.ema
        )
        dtype = getattr(torch, options.dtype)
        predictor = Predictor(models, device, dtype, options.cuda_graph, detection_masks=options.detections)
    except ValueError as error:  # settings, categories, or networks that are no ensemble
        raise CommandError(str(error)) from None
    return predictor, _settings(options, models)


def _settings(options: argparse.Namespace, models: list[Any]) -> dict[str, Any]:
    """What decides the results of `predict`. Devices differ in roundings alone, so that a run may go on elsewhere."""
    from spatialflow.engine.checkpoints import weights_digest

    settings = {
        "version": spatialflow.__version__,
        "dtype": options.dtype,
        "detections": options.detections,
        "overlays": not options.no_overlay,
        "models": len(models),
    }
    for number, model in enumerate(models, 1):
        prefix = f"model {number}: " if len(models) > 1 else ""
        for section in (model.config.model, model.config.test, model.config.data):
            settings |= {f"{prefix}{field}": value for field, value in vars(section).items()}
        settings[f"{prefix}weights"] = weights_digest(model)
    return settings


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    from spatialflow.config import parse_settings

    overrides = parse_settings(options.settings)
    overrides |= _sizes(options)
    if options.flip is not None:
        overrides["test_flip"] = options.flip
    if options.score is not None:
        overrides["instance_score_threshold"] = options.score
    return overrides


def _sizes(options: argparse.Namespace) -> dict[str, Any]:
    if options.size is not None and options.short_edges is not None:
        raise CommandError("--size and --short-edges exclude each other")
    if options.size is not None and len(options.size) > 2:
        raise CommandError(f"--size takes the short edge and the long one, got {len(options.size)} numbers")
    name, edges = ("--size", options.size) if options.short_edges is None else ("--short-edges", options.short_edges)
    if edges is None:
        return {}
    if min(edges) < 1:
        raise CommandError(f"{name} must be positive, got {min(edges)}")
    if name == "--size" and len(edges) == 2:
        return {"test_short_edges": edges[:1], "test_long_edge": edges[1]}
    return {"test_short_edges": edges, "test_long_edge": max(round(max(edges) * 1333 / 800), max(edges))}


# ----------------------------------------------------------------------------------------------------------- evaluate


def _evaluate(options: argparse.Namespace) -> int:
    from spatialflow.panoptic import PanopticFormatError
    from spatialflow.panoptic.report import evaluate_and_report

    check_count("--workers", options.workers)
    prediction = panoptic_json(options.prediction)
    try:
        truth, failed = ground_truth_json(options.ground_truth, prediction.parent)
        truth_folder = png_folder(truth, options.ground_truth_folder, "--ground-truth-folder")
        prediction_folder = png_folder(prediction, options.prediction_folder, "--prediction-folder")
        keep_inputs(options.output, truth, truth_folder, prediction, prediction_folder, options.detections)
        with named(options.output):
            evaluate_and_report(
                truth,
                truth_folder,
                prediction,
                prediction_folder,
                output=options.output,
                detections=options.detections,
                per_class=options.per_class,
                workers=options.workers,
                progress=sys.stderr.isatty(),
            )
    except PanopticFormatError as error:
        raise CommandError(str(error)) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandError(sentence(error)) from None
    return 1 if failed else 0


# --------------------------------------------------------------------------------- synthesize, convert, benchmark, info


def _synthesize(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from spatialflow.data.synthetic import synthesize

    if options.seed < 0:
        raise CommandError(f"--seed must not be negative, got {options.seed}")
    if min(options.size) < 32:
        raise CommandError(f"--size must be at least 32 x 32, got {options.size[0]} x {options.size[1]}")
    try:
        with named(options.output):
            scenes = synthesize(options.output, options.count, tuple(options.size), options.seed)
            count = sum(1 for _ in tqdm(scenes, desc="synthesize", unit="scene", total=options.count, disable=None))
    except ValueError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(sentence(error)) from None
    print(f"{count} scenes: {options.output / 'images'}/, {options.output / 'panoptic.json'}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    import torch

    from spatialflow.engine.checkpoints import CheckpointError, convert

    keep_inputs(options.destination, options.source)
    try:
        with named(options.destination):
            dtype = torch.float16 if options.half else None
            count = convert(options.source, options.destination, dtype, options.ema)
    except (CheckpointError, ValueError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(sentence(error)) from None
    print(f"{count} tensors: {options.destination}")
    return 0


def _benchmark_folder() -> Path:
    """`benchmarks` of the source tree, else the copy that is installed with the package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "benchmarks", package / "benchmarks"):
        if os.path.isdir(folder / "harness"):
            return folder
    raise CommandError(f"the benchmark scripts are missing in {package / 'benchmarks'}")


def _benchmark(options: argparse.Namespace) -> int:
    folder = _benchmark_folder()
    scripts = [path for path in folder.glob("*.py") ]
    known = sorted(path.stem for path in scripts if '__name__ == "__main__"' in path.read_text(encoding="utf-8"))
    if options.list:
        print("\n".join(known))
        return 0
    unknown = [op for op in options.ops if op not in known]
    if unknown:
        raise CommandError(f"no benchmark named {', '.join(unknown)}; there are {', '.join(known)}")
    passed_on = [
        f"--{name}={getattr(options, name)}"
        for name in ("device", "threads", "seconds", "output")
        if getattr(options, name) is not None
    ]
    if options.output is None and folder.parent == Path(__file__).resolve().parents[1]:
        passed_on.append(f"--output={Path('benchmarks', 'results')}")  # not into the installed package
    failed = [
        op
        for op in options.ops or known
        if subprocess.run([sys.executable, "-u", str(folder / f"{op}.py"), *passed_on]).returncode != 0
    ]
    if failed:
        complain(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _info(options: argparse.Namespace) -> int:
    import importlib.metadata
    import platform

    from spatialflow import _library

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    built = _library.build_description()
    code, devices = 0, "unknown"
    try:
        import torch

        running = torch.__version__
        count = torch.cuda.device_count()
        devices = ", ".join(torch.cuda.get_device_name(index) for index in range(count)) or "none"
    except ImportError as error:
        running, code = f"nothing ({error})", 2
    rows = [
        ("spatialflow", f"{spatialflow.__version__} in {Path(__file__).resolve().parents[1]}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"runs on {running}, built for {built.get('torch', 'unknown')} (any from 2.11 on)"),
        ("numpy, opencv", f"{version('numpy')}, {version('opencv-python-headless')}"),
        ("torchvision", version("torchvision")),
        ("libraries", ", ".join(_library.built_libraries()) or "none"),
        ("compiler", built.get("compiler", "unknown")),
    ]
    try:
        rows.append(("CPU level", f"{_library.cpu_level()} in use"))
        _library.load()
    except (ImportError, OSError) as error:
        rows.append(("CPU level", f"none: {error}"))
        code = 2
    rows += [
        (
            "CUDA library",
            f"for {built['cuda_architectures']}, by {built['cuda_compiler']}"
            if "cuda" in _library.built_libraries() and built.get("cuda_architectures")
            else "not built",
        ),
        ("CUDA devices", devices),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows))
    return code
