# SPDX-License-Identifier: Apache-2.0
"""The network optimized for inference equals the plain modules, for every kind of configuration."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from helpers.golden_models import assert_close, golden_model
from helpers.small_models import VARIANTS, random_model
from helpers.tensors import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from spatialflow.models.heads import upsample_stuff_logits
from spatialflow.models.optimized import backbone as optimized_backbone
from spatialflow.models.optimized.backbone import FusedStem
from spatialflow.models.optimized.inference import optimize_for_inference
from spatialflow.ops import PackedConv, stuff_labels

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.06}
"""Tolerances of the network's outputs, relative to their largest value, by the dtype of weights and features."""

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def assert_same_outputs(model, images):
    fast = optimize_for_inference(model)
    with torch.inference_mode():
        expected, actual = model(images), fast(images)
        for name in expected._fields:
            a, b = getattr(actual, name), getattr(expected, name)
            assert (a is None) == (b is None)
            for x, y in zip(a, b) if isinstance(b, list) else [(a, b)] if b is not None else []:
                assert_close(name, x, y.numpy())
        if expected.thing_features is not None:
            rois = torch.tensor([[0, 3.0, 5, 40, 60], [1, 0, 0, 90, 20], [0, 7, 7, 7, 7]]).to(images)
            labels = torch.tensor([0, 2, 1])
            for chosen in (labels, None):
                assert_close(
                    "masks",
                    fast.thing_logits(actual.thing_features, rois, chosen),
                    model.thing_logits(expected.thing_features, rois, chosen).numpy(),
                )
    return fast


@pytest.mark.parametrize("name, overrides", VARIANTS)
def test_outputs_equal_the_plain_modules(name, overrides):
    model = random_model(name, **overrides)
    deformable = any("offset" in name for name, _ in model.named_parameters()) or "dcn" in name
    dtype = torch.float64 if deformable else torch.float32  # moving sampling points amplify rounding
    assert_same_outputs(model.to(dtype), torch.randn(2, 3, 64, 96, dtype=dtype))


def test_goldens(large_goldens):
    """The optimized network reproduces the recorded outputs, too."""
    arrays = np.load(large_goldens / "forward" / "tiny_b2.npz")
    fast = assert_same_outputs(golden_model(large_goldens, "tiny", "tiny"), torch.from_numpy(arrays["img"]))
    with torch.inference_mode():
        output = fast(torch.from_numpy(arrays["img"]))
    for i in range(5):
        assert_close("class_logits", output.class_logits[i], arrays[f"cls_score_l{i}"])
        assert_close("box_deltas", output.box_deltas[i], arrays[f"bbox_pred_l{i}"])
    assert_close(
        "stuff_logits", upsample_stuff_logits(output.stuff_logits)[:, :, ::4, ::4], arrays["stuff_logits_sub4"]
    )
    for i in range(2):
        labels = stuff_labels(output.stuff_logits[i], (224, 288), (224, 288))
        assert np.array_equal(labels.numpy(), arrays["stuff_argmax"][i])


class Recorded(TorchDispatchMode):
    """Names of the operators that were called, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


def test_stuff_head_stays_channels_last():
    """Each of six blocks is a convolution and one `group_norm_relu`; only the logits are upsampled separately.

    No tensor is copied to another layout.
    """
    head = optimize_for_inference(random_model("tiny")).stuff_head
    channels, sizes = head.blocks[0][0].conv.packed.weight.shape[1], ((8, 12), (4, 6), (2, 3))
    features = [torch.randn(1, channels, *size).to(memory_format=torch.channels_last) for size in sizes]
    with torch.inference_mode(), Recorded() as recorded:
        logits = head(features)
    assert logits.is_contiguous(memory_format=torch.channels_last)
    assert recorded.names.count("group_norm_relu") == 6 and recorded.names.count("upsample_bilinear2d") == 1
    unwanted = {"native_group_norm", "relu", "relu_", "clone", "_to_copy", "copy_", "contiguous"}
    assert not unwanted & set(recorded.names), recorded.names


@pytest.mark.parametrize("with_labels", [True, False])
def test_mask_head_computes_active_boxes(with_labels):
    """Logits of active boxes are bitwise equal to those without flags; features of the other boxes are not read."""
    model = random_model("tiny")
    head = optimize_for_inference(model).thing_head
    channels = model.config.model.fpn_channels
    features, active = torch.randn(5, channels, 14, 14), torch.tensor([True, False, True, False, False])
    labels = torch.tensor([0, 2, 1, 0, 2]) if with_labels else None
    with torch.inference_mode():
        expected = head(features, labels)
        features[~active] = float("nan")
        actual = head(features, labels, active)
        assert torch.equal(actual[active], expected[active])
        assert actual.isfinite().all(), "features of inactive boxes were read"
        plain = model.thing_head(features, labels, active)
    assert_close("masks", actual[active], plain[active].numpy())


def test_source_is_neither_changed_nor_shared():
    model = random_model("tiny")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(1, 3, 64, 64)
    fast = optimize_for_inference(model)
    with torch.inference_mode():
        first = fast(images).class_logits[0].clone()
        for parameter in model.parameters():
            parameter.add_(1.0) if not parameter.is_inference() else None
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    with torch.inference_mode():
        assert torch.equal(fast(images).class_logits[0], first)
    assert all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items() if name.endswith("running_mean")
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("name", ["tiny", "tiny_dcn"])
def test_copies_compute_the_same(name, copied):
    fast, images = optimize_for_inference(random_model(name)), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected, actual = fast(images), copied(fast)(images)
    for logits, wanted in zip(actual.class_logits, expected.class_logits):
        assert torch.equal(logits, wanted)
    assert torch.equal(actual.stuff_logits, expected.stuff_logits)


@pytest.mark.parametrize("name, dtypes", [("tiny", DTYPES), ("tiny_dcn", [torch.float32, torch.float64])])
def test_moved_to_another_dtype(name, dtypes):
    """The convolutions are packed again, with weights rounded to the first dtype and then to the second."""
    model, images = random_model(name), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    rois, labels = torch.tensor([[0, 3.0, 5, 40, 60]], dtype=torch.float64), torch.tensor([1])
    with torch.inference_mode():
        output = copy.deepcopy(model).double()(images)
        expected = [*output.class_logits, output.stuff_logits]
        expected.append(model.double().thing_logits(output.thing_features, rois, labels))
        for original, target in itertools.product(dtypes, dtypes):
            fast = optimize_for_inference(model, dtype=original).to(target)
            output = fast(images.to(target))
            actual = [*output.class_logits, output.stuff_logits]
            actual.append(fast.thing_logits(output.thing_features, rois.to(target), labels))
            amplification = 50 if name == "tiny_dcn" else 1  # rounding moves sampling points
            tolerance = max(DTYPES[original], DTYPES[target]) * amplification
            for value, wanted in zip(actual, expected, strict=True):
                assert value.dtype == target
                assert (value - wanted).abs().max() < tolerance * wanted.abs().max(), (original, target)


def test_moved_to_where_it_is():
    """A move to the same device and dtype does not pack the weights again."""
    fast = optimize_for_inference(random_model("tiny"))
    before = [module.packed for module in fast.modules() if hasattr(module, "packed")]
    fast.to("cpu").float().requires_grad_(False)
    after = [module.packed for module in fast.modules() if hasattr(module, "packed")]
    assert len(before) > 3 and all(a is b for a, b in zip(_convs(before), _convs(after), strict=True))


def _convs(value):
    """Return all PackedConv in nested tuples and lists."""
    if isinstance(value, PackedConv):
        return [value]
    return [conv for part in value for conv in _convs(part)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("name", ["tiny", "tiny_dcn"])
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=needs_gpu)])
def test_moved_to_another_device(name, device):
    fast, images = optimize_for_inference(random_model(name)), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = fast(images)
        actual = fast.to(device)(images.to(device))
        for logits, wanted in zip(actual.class_logits, expected.class_logits, strict=True):
            assert logits.device.type == device and logits.shape == wanted.shape
            if device == "cuda":
                assert (logits.cpu() - wanted).abs().max() < 1e-2 * wanted.abs().max()  # TF32


@pytest.mark.parametrize("images_dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_images_of_another_dtype_are_refused(images_dtype):
    fast = optimize_for_inference(random_model("tiny"))
    rule = f"x must be torch.float32 .* got {images_dtype} on {DEVICE}"
    with torch.inference_mode(), pytest.raises(RuntimeError, match=rule):
        fast(torch.randn(1, 3, 64, 64, dtype=images_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("images_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, images_dtype):
    """Weights and images may be float32 or bfloat16; results are close to those of the plain modules in float64."""
    model, images = random_model("tiny").to(dtype), torch.randn(1, 3, 64, 64).to(images_dtype)
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(images.double()).stuff_logits
        with torch.autocast(DEVICE, torch.bfloat16):
            actual = optimize_for_inference(model)(images).stuff_logits
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("name, dtype", [("tiny", torch.float32), ("tiny_dcn", torch.float64)])
def test_compiled(name, dtype):
    """torch.compile makes one graph, with the outputs of the eager network."""
    fast, images = optimize_for_inference(random_model(name), dtype=dtype), torch.randn(1, 3, 64, 64, dtype=dtype)
    with torch.no_grad():
        compiled = torch.compile(fast.forward, backend="aot_eager", fullgraph=True)(images)
        for logits, wanted in zip(compiled.class_logits, fast(images).class_logits, strict=True):
            assert (logits - wanted).abs().max() < DTYPES[dtype] * wanted.abs().max()


def test_another_version_is_refused(monkeypatch):
    """Other versions may arrange the weights differently."""
    content = pickle.dumps(optimize_for_inference(random_model("tiny")))
    monkeypatch.setattr(optimized_backbone, "__version__", "9.9")
    with pytest.raises(RuntimeError, match="was pickled by spatialflow .*, and this is 9.9: create it again"):
        pickle.loads(content)


@pytest.mark.parametrize("dtype, channels", [(torch.bfloat16, 8), (torch.float32, 4)], ids=str)
def test_the_stem_reads_whole_vectors_of_channels_on_a_gpu(dtype, channels):
    conv = torch.nn.Conv2d(3, 16, 7, 2, 3)
    stem = FusedStem(conv.to("meta", dtype))
    assert stem.weight.shape[1] == channels and stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert stem(torch.empty(1, 3, 32, 64, device="meta", dtype=dtype)).shape == (1, 16, 16, 32)


def test_further_channels_of_the_stem_change_nothing():
    conv, images = torch.nn.Conv2d(3, 16, 7, 2, 3).double(), torch.randn(2, 3, 32, 64, dtype=torch.float64)
    stem = FusedStem(conv)
    stem.weight = torch.nn.functional.pad(stem.weight, (0, 0, 0, 0, 0, 5))
    y = stem(images)
    torch.testing.assert_close(y, conv(images).relu())
    assert y.is_contiguous(memory_format=torch.channels_last)
