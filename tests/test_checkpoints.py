# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: names and shapes of released weights, detection of file formats, and all-or-nothing loading."""

import contextlib
import json
import logging
import os
import pickle

import numpy as np
import pytest
import torch
from helpers.small_models import SMALL
from torch.optim.swa_utils import AveragedModel

from spatialflow.cli.main import main
from spatialflow.engine.checkpoints import (
    CheckpointError,
    convert,
    load_backbone,
    load_checkpoint,
    name_from_released,
    read_state,
    save_checkpoint,
)
from spatialflow.models.build import build_model

RELEASED = {
    "r50": "spatialflow_r50_coco",
    "r101": "spatialflow_r101_coco",
    "r101_dcn": "spatialflow_r101_dcn_coco",
    "tiny": "tiny",
    "tiny_dcn": "tiny_dcn",
}


def small_model():
    return build_model("tiny", **SMALL)


def released_name(name):
    """Invert `name_from_released` by tables of the names in the released code."""
    table = {
        "fpn.lateral.{}": "neck.lateral_convs.{}.conv",
        "fpn.output.{}": "neck.fpn_convs.{}.conv",
        "subnets.cls.{}": "bbox_head.cls_convs.{}.conv",
        "subnets.reg.{}": "bbox_head.reg_convs.{}.conv",
        "subnets.stuff.{}": "bbox_head.stuff_convs.{}.conv",
        "subnets.thing.{}": "bbox_head.mask_convs.{}.conv",
        "subnets.flow_cls.{}": "bbox_head.cls_spatial_flow_convs.{}.conv",
        "subnets.flow_stuff.{}": "bbox_head.stuff_spatial_flow_convs.{}.conv",
        "subnets.flow_thing.{}": "bbox_head.mask_spatial_flow_convs.{}.conv",
        "subnets.semantic_flow.{}": "bbox_head.stuff_mask_flow_convs.{}.conv",
        "thing_head.convs.{}": "mask_head.convs.{}.conv",
    }
    fixed = {
        "fpn.p6": "neck.fpn_convs.3.conv",
        "fpn.p7": "neck.fpn_convs.4.conv",
        "box_head.class_logits": "bbox_head.retina_cls",
        "box_head.box_deltas": "bbox_head.retina_reg",
        "thing_head.upsample": "mask_head.upsample",
        "thing_head.logits": "mask_head.conv_logits",
        "stuff_head.logits": "stuff_head.conv",
    }
    stem, leaf = name.rsplit(".", 1)
    if stem.startswith("stuff_head.blocks."):
        _, _, level, block, part = stem.split(".")
        return f"stuff_head.lateral_convs.{level}.{2 * int(block)}.{'gn' if part == 'norm' else 'conv'}.{leaf}"
    if stem in fixed:
        return f"{fixed[stem]}.{leaf}"
    head, _, index = stem.rpartition(".")
    return f"{table[head + '.{}'].format(index)}.{leaf}" if head + ".{}" in table else name


def assert_equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("variant", RELEASED)
def test_released_names_and_shapes_fit(goldens, variant):
    """Every released state dict fits the model of its configuration: keys and shapes are equal."""
    released = {
        k["name"]: tuple(k["shape"])
        for k in json.loads((goldens / "keys" / f"{variant}_keys.json").read_text())["keys"]
    }
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in build_model(RELEASED[variant]).state_dict().items()}
    assert {name_from_released(name): shape for name, shape in released.items()} == shapes


def test_released_file_loads_wrapped_bare_and_parallel(tmp_path):
    """Files load whether bare, wrapped in "state_dict" (mmdetection), or with the prefix "module." (data-parallel)."""
    source, path = small_model(), tmp_path / "weights.pth"
    state = {released_name(name): value for name, value in source.state_dict().items()}
    assert not any(name.startswith("subnets") for name in state)
    for content in (
        state,
        {"meta": {"epoch": 20, "CLASSES": ("a", "b")}, "state_dict": state, "optimizer": {"state": {}}},
        {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    ):
        torch.save(content, path)
        assert_equal_states(load_checkpoint(small_model(), path), source)


def small_model_of(state):
    model = small_model()
    model.load_state_dict(state)
    return model


def named(before, state, after=""):
    return {f"{before}{name}{after}": value for name, value in state.items()}


def plus_one(state):
    return {name: value + 1 for name, value in state.items()}


class TestWrappers:
    """Prefixes and containers that trainers add to weights are removed by rule and reported."""

    WRAPPED = {
        "compiled": (lambda s: named("_orig_mod.", s), "removed '_orig_mod.' from the names"),
        "parallel and compiled": (lambda s: named("module._orig_mod.", s), "removed '_orig_mod.', 'module.' from"),
        "twice parallel": (
            lambda s: {"model_state_dict": named("module.module.", s)},
            "took the weights under 'model_state_dict'; removed 'module.' from the names",
        ),
        "a part compiled": (
            lambda s: {name.replace("backbone.", "backbone._orig_mod."): value for name, value in s.items()},
            "removed '_orig_mod.' from the names",
        ),
        "Lightning": (lambda s: {"state_dict": named("model.", s), "epoch": 3}, "removed 'model.' from the names"),
        "nested": (
            lambda s: {"net": {"state_dict": named("net.model.", s)}},
            "removed 'net.', 'model.' from the names",
        ),
        "averaged": (
            lambda s: named("module.", s) | {"n_averaged": torch.tensor(9)},
            "removed 'module.' from the names; left out n_averaged",
        ),
        "attribute averaged": (
            lambda s: named("ema_model.", named("module.", s) | {"n_averaged": torch.tensor(9)}),
            "removed 'module.', 'ema_model.' from the names; left out ema_model.n_averaged",
        ),
        "timm": (lambda s: {"state_dict_ema": named("module.", s)}, "took the moving average under 'state_dict_ema'"),
        "both": (
            lambda s: {"ema": plus_one(s), "model": s, "optimizer": {}},
            "took the weights under 'model'; left out the moving average under 'ema'",
        ),
        "EMAHook": (
            lambda s: {"state_dict": s | {f"ema_{n.replace('.', '_')}": v + 1 for n, v in s.items()}},
            "left out 416 averages beside the weights (ema_*)",
        ),
        "one object": (lambda s: dict.fromkeys(("model", "state_dict"), s), "took the weights under 'state_dict'"),
        "equal": (
            lambda s: {"model": s, "net": {name: value.clone() for name, value in s.items()}},
            "took the weights under 'model'",
        ),
        "configuration": (lambda s: {"model": {"type": "x"}, "net": s, "params": {}}, "took the weights under 'net'"),
        "numpy": (
            lambda s: {"model": s, "best": np.float64(0.4), "seen": np.arange(3), "flag": np.bool_(True)},
            "took the weights under 'model'",
        ),
    }

    @pytest.mark.parametrize("case", WRAPPED)
    @pytest.mark.parametrize("released", [False, True])
    def test_removed_and_reported(self, tmp_path, caplog, case, released):
        source, path = small_model(), tmp_path / "weights.pth"
        wrap, words = self.WRAPPED[case]
        state = source.state_dict()
        torch.save(wrap({released_name(n): v for n, v in state.items()} if released else state), path)
        caplog.set_level(logging.INFO)
        assert_equal_states(load_checkpoint(small_model(), path), source)
        assert words in caplog.text and "weights.pth" in caplog.text

    AVERAGES = {
        "timm": lambda s: {"state_dict": plus_one(s), "state_dict_ema": s},
        "wrapped": lambda s: {"model": plus_one(s), "ema": {"module": s, "updates": 7}},
        "alone": lambda s: {"ema_state_dict": named("module.", s) | {"steps": torch.tensor(9)}},
        "EMAHook": lambda s: plus_one(s) | {f"ema_{n.replace('.', '_')}": v for n, v in s.items()},
        "parallel EMAHook": lambda s: named("module.", plus_one(s) | {f"ema_{n.replace('.', '_')}": s[n] for n in s}),
        "AveragedModel": lambda s: named("module.", s) | {"n_averaged": torch.tensor(9)},
        "AveragedModel of torch": lambda s: AveragedModel(small_model_of(s)).state_dict(),
        "AveragedModel, under a key": lambda s: {"model": named("module.", s) | {"n_averaged": torch.tensor(9)}},
        "AveragedModel, compiled": lambda s: named("_orig_mod.", named("module.", s) | {"n_averaged": torch.tensor(9)}),
        "AveragedModel of a parallel network": lambda s: named("module.module.", s) | {"n_averaged": torch.tensor(9)},
        "AveragedModel of mmengine": lambda s: named("module.", s) | {"steps": torch.tensor(9)},
        "attribute": lambda s: named("ema_model.", named("module.", s) | {"n_averaged": torch.tensor(9)}),
        "attribute without a counter": lambda s: named("ema.", s),
    }

    @pytest.mark.parametrize("case", AVERAGES)
    def test_average_by_choice(self, tmp_path, case):
        source, path = small_model(), tmp_path / "weights.pth"
        torch.save(self.AVERAGES[case](source.state_dict()), path)
        assert_equal_states(load_checkpoint(small_model(), path, ema=True), source)
        assert convert(path, tmp_path / "average.safetensors", ema=True) == len(source.state_dict())
        assert_equal_states(load_checkpoint(small_model(), tmp_path / "average.safetensors"), source)
        with pytest.raises(CheckpointError, match=r"average.safetensors: holds no moving average \(EMA\)"):
            load_checkpoint(small_model(), tmp_path / "average.safetensors", ema=True)

    def test_weights_beside_a_counter_are_no_average(self, tmp_path):
        """A counter marks an averaging wrapper only if it is in the same container as the wrapped network."""
        state, path = small_model().state_dict(), tmp_path / "weights.pth"
        for content in (state | {"steps": torch.tensor(9)}, named("module.", state | {"steps": torch.tensor(9)})):
            torch.save(content, path)
            assert_equal_states(load_checkpoint(small_model(), path), small_model_of(state))
            with pytest.raises(CheckpointError, match=r"weights.pth: holds no moving average \(EMA\)"):
                load_checkpoint(small_model(), path, ema=True)

    def test_average_of_parameters_alone(self, tmp_path):
        """If an average has no batch statistics, those of the weights are used."""
        model = small_model()
        averages = {f"ema_{name.replace('.', '_')}": value + 1 for name, value in model.named_parameters()}
        torch.save(model.state_dict() | averages, tmp_path / "weights.pth")
        loaded = load_checkpoint(small_model(), tmp_path / "weights.pth", ema=True).state_dict()
        trained = dict(model.named_parameters())
        for name, value in model.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(loaded[name], value + 1 if name in trained else value), name

    def test_ambiguity_is_refused(self, tmp_path):
        state, path = small_model().state_dict(), tmp_path / "weights.pth"
        for content, ema, choices in (
            ({"model": state, "net": plus_one(state)}, False, "'model', 'net'"),
            ({"ema": state, "model_ema": plus_one(state), "model": state}, True, "'model_ema', 'ema'"),
        ):
            torch.save(content, path)
            with pytest.raises(CheckpointError, match=f"weights.pth: holds several sets of weights: {choices}; store"):
                load_checkpoint(small_model(), path, ema)
        torch.save(named("module.", state) | plus_one(state), path)
        with pytest.raises(CheckpointError, match="occurs twice, under names of several wrappers"):
            load_checkpoint(small_model(), path)

    def test_commands_report_it(self, tmp_path, capsys):
        """`convert` reports removed names once; other commands refuse `--ema` without weights."""
        state, files = small_model().state_dict(), (str(tmp_path / "weights.pth"), str(tmp_path / "ours.safetensors"))
        torch.save({"state_dict": named("_orig_mod.", plus_one(state)), "ema": named("module.", state)}, files[0])
        assert main(["convert", *files]) == 0
        message = (
            "weights.pth: took the weights under 'state_dict'; left out the moving average under 'ema'; removed '_orig_"
        )
        assert capsys.readouterr().err.count(message) == 1
        assert main(["convert", "--ema", *files]) == 0
        assert_equal_states(load_checkpoint(small_model(), files[1]), small_model_of(state))
        nothing = str(tmp_path / "out")
        for command in (
            ["predict", "a.jpg", "--ema", "--output", nothing],
            ["train", "tiny", "--ema", "--output", nothing],
            ["visualize", "photos", "--config", "demo", "--ema", "--output", nothing],
        ):
            assert main(command) == 2
            assert "spatialflow: --ema needs --model" in capsys.readouterr().err

    def test_a_file_that_holds_itself(self, tmp_path):
        loop = {}
        loop["model"] = {"net": loop}
        torch.save(loop, tmp_path / "weights.pth")
        with pytest.raises(CheckpointError, match="holds no state dict"):
            load_checkpoint(small_model(), tmp_path / "weights.pth")

    def test_numpy_runs_nothing(self, tmp_path):
        """For a pickle with NumPy object arrays, NumPy is never called, and other functions are refused."""
        path = tmp_path / "weights.pth"
        torch.save({"model": {"a": torch.ones(2)}, "seen": np.array([print, {}], dtype=object)}, path)
        with pytest.raises(CheckpointError, match=r"holds Python objects beside tensors: print$"):
            read_state(path)
        torch.save({"model": {"a": torch.ones(2)}, "seen": np.array([{}, 3], dtype=object)}, path)
        assert list(read_state(path)) == ["a"]
        with pytest.raises(pickle.UnpicklingError):  # only `read_state` makes an exception for NumPy
            torch.load(path, weights_only=True)


class TestFinite:
    """Non-finite weights are neither written nor read."""

    def test_not_written(self, tmp_path):
        path = save_checkpoint(small_model(), tmp_path / "model.safetensors")
        before = path.read_bytes()
        for value in (float("nan"), float("inf"), -float("inf")):
            model = small_model()
            model.backbone.bn1.running_var[1] = value
            with pytest.raises(CheckpointError, match="model.safetensors: not written, .* backbone.bn1.running_var$"):
                save_checkpoint(model, path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.safetensors"]

    def test_large_is_finite(self, tmp_path):
        state = {"fpn.a": torch.full((9,), 3e38), "fpn.b": torch.zeros(0), "fpn.n": torch.tensor(3)}
        state |= {"fpn.h": torch.full((9,), 6e4).half(), "fpn.d": torch.full((2,), 1e300, dtype=torch.float64)}
        assert len(read_state(save_checkpoint(state, tmp_path / "model.pt"))) == 5

    def test_not_read_nor_converted(self, tmp_path):
        state = small_model().state_dict()
        state["fpn.p6.bias"][0] = float("nan")
        torch.save(state, tmp_path / "bad.pth")
        model = small_model()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match="bad.pth: holds values that are not finite: fpn.p6.bias$"):
            load_checkpoint(model, tmp_path / "bad.pth")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        with pytest.raises(CheckpointError, match="bad.pth: holds values that are not finite: fpn.p6.bias$"):
            convert(tmp_path / "bad.pth", tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()

    def test_half_must_hold_them(self, tmp_path):
        state = small_model().state_dict()
        state["backbone.bn1.running_var"][0] = 7e4
        path = save_checkpoint(state, tmp_path / "wide.pth")
        message = "wide.pth: holds values too large for torch.float16: backbone.bn1.running_var"
        with pytest.raises(CheckpointError, match=message):
            convert(path, tmp_path / "half.safetensors", torch.float16)
        assert convert(path, tmp_path / "bfloat.safetensors", torch.bfloat16) > 0


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_own_files_round_trip(tmp_path, suffix):
    source = small_model()
    path = save_checkpoint(source, tmp_path / f"model{suffix}")
    assert_equal_states(load_checkpoint(small_model(), path), source)
    misnamed = path.rename(tmp_path / "weights.bin")
    assert_equal_states(load_checkpoint(small_model(), misnamed), source)
    assert os.listdir(tmp_path) == ["weights.bin"]


def test_convert_gives_own_names(tmp_path):
    source = small_model()
    torch.save({"state_dict": {released_name(n): v for n, v in source.state_dict().items()}}, tmp_path / "released.pth")
    count = convert(tmp_path / "released.pth", tmp_path / "ours.safetensors")
    assert count == len(source.state_dict()) and set(read_state(tmp_path / "ours.safetensors")) == set(
        source.state_dict()
    )
    assert_equal_states(load_checkpoint(small_model(), tmp_path / "ours.safetensors"), source)
    torch.save({"bbox_head.fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="1 entries are not part of the model: bbox_head.fc.weight"):
        convert(tmp_path / "other.pth", tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_misfit_lists_every_kind_and_changes_nothing(tmp_path):
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    del state["fpn.p6.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["box_head.box_deltas.bias"] = torch.zeros(12)
    path = save_checkpoint(state, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, path)
    assert error.value.missing == ["fpn.p6.weight"] and error.value.unexpected == ["extra.weight"]
    assert error.value.wrong_shape == [("box_head.box_deltas.bias", (12,), (36,))]
    for words in (
        "bad.safetensors",
        "1 missing: fpn.p6.weight",
        "1 unexpected: extra.weight",
        "1 of the wrong shape: box_head.box_deltas.bias (12,) instead of (36,)",
    ):
        assert words in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_long_names_are_cut_in_messages(tmp_path):
    path = save_checkpoint(small_model().state_dict() | {"a" * 3000: torch.zeros(1)}, tmp_path / "long.safetensors")
    with pytest.raises(CheckpointError, match="1 unexpected: a{120}[.]{3}$"):
        load_checkpoint(small_model(), path)


def test_torchvision_backbone_loads_as_it_is(tmp_path):
    """ImageNet weights load: names without prefix, a classifier and, in old files, no batch counters."""
    source = small_model()
    state = {n: v for n, v in source.backbone.state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(state | {"fc.weight": torch.zeros(10, 128), "fc.bias": torch.zeros(10)}, tmp_path / "resnet50.pth")
    model = load_backbone(small_model(), tmp_path / "resnet50.pth")
    assert_equal_states(model.backbone, source.backbone)
    deformable = build_model("tiny_dcn", **SMALL)
    offsets = deformable.backbone.layer2[0].conv2.conv_offset.weight.clone()
    load_backbone(deformable, tmp_path / "resnet50.pth")
    assert torch.equal(deformable.backbone.layer2[0].conv2.weight, source.backbone.layer2[0].conv2.weight)
    assert torch.equal(deformable.backbone.layer2[0].conv2.conv_offset.weight, offsets)
    with pytest.raises(CheckpointError, match="a backbone alone"):
        load_checkpoint(small_model(), tmp_path / "resnet50.pth")


class Surprise:
    """Class of an object that a file of weights must not contain."""


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is neither"),
        (b"hello, I am text", "is neither"),
        (b"PK\x03\x04 cut", "is damaged"),
        (b"\x80\x02 cut", "is damaged"),
        (b"\x10\0\0\0\0\0\0\0{cut", "is damaged"),
    ],
)
def test_unreadable_files_are_named(tmp_path, content, words):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"weights.pth: {words}"):
        load_checkpoint(small_model(), path)


def test_damaged_pickles_are_refused(tmp_path):
    """A torch file with changed bytes gives weights or a CheckpointError, and no other exception of unpickling."""
    path, rng = tmp_path / "weights.pth", np.random.default_rng(0)
    torch.save({"model": {"a": torch.zeros(2, 3), "b": torch.ones(4)}}, path)
    content = path.read_bytes()
    for _ in range(400):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content) // 2, 2):  # the pickle is in the first half
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            read_state(path)


def test_files_without_weights_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(CheckpointError, match="No such file"):
        read_state(path)
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_state(tmp_path)
    torch.save({"state_dict": {"a": 3}}, path)
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_state(path)
    torch.save({"n_averaged": torch.tensor(3)}, path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_state(path)
    torch.save({"a": Surprise()}, path)
    with pytest.raises(CheckpointError, match=r"holds Python objects beside tensors: \S+\.Surprise$"):
        read_state(path)


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    """If the disk is full, the error is raised, the old checkpoint is kept, and no temporary file remains."""
    path = save_checkpoint({"fpn.a": torch.ones(3)}, tmp_path / "model.safetensors")
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint({"fpn.a": torch.zeros(3)}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.safetensors"]
    with pytest.raises(ValueError, match="must end in .safetensors, .pt or .pth, got '.*model.onnx'"):
        save_checkpoint({}, tmp_path / "model.onnx")
