# SPDX-License-Identifier: Apache-2.0
"""Operators called with arrays of other libraries (docs/arrays.md): CuPy on a GPU, else NumPy."""

import types

import numpy as np
import pytest
import torch
from helpers.tensors import DEVICE, leaves
from test_surface import public

from spatialflow import ops
from spatialflow.ops.arrays import with_arrays

cupy = None
if DEVICE == "cuda":
    cupy = pytest.importorskip("cupy", reason="on a GPU the test needs CuPy, which is not installed")
elif np.lib.NumpyVersion(np.__version__) < "2.1.0":
    pytest.skip("needs NumPy 2.1, the first version with read-only arrays in DLPack", allow_module_level=True)


def box_rows(count, batch=None):
    corner = torch.rand(count, 2) * 8
    boxes = torch.cat([corner, corner + 1 + torch.rand(count, 2) * 6], dim=1)
    return boxes if batch is None else torch.cat([torch.arange(count)[:, None] % batch, boxes], dim=1)


def feature_pyramid():
    return [torch.randn(2, 8, 10, 12), torch.randn(2, 8, 5, 6)]


def roi_cases():
    pyramid = feature_pyramid()
    return {
        "roi_align": (ops.roi_align, {"input": pyramid[0], "boxes": box_rows(5, 2), "output_size": 3}),
        "roi_align, list": (
            ops.roi_align,
            {"input": pyramid[0], "boxes": [box_rows(2), box_rows(3)], "output_size": 3},
        ),
        "RoIAlign": (ops.RoIAlign(2, 0.5, 2), {"input": pyramid[0], "boxes": box_rows(5, 2)}),
        "multilevel_roi_align": (
            ops.multilevel_roi_align,
            {"features": pyramid, "boxes": [box_rows(2), box_rows(3)], "output_size": 3, "strides": (1, 2)},
        ),
    }


def detection_cases():
    scores = torch.rand(9)
    return {
        "nms": (ops.nms, {"boxes": box_rows(9), "scores": scores, "iou_threshold": 0.3}),
        "batched_nms": (
            ops.batched_nms,
            {"boxes": box_rows(9), "scores": scores, "idxs": torch.arange(9) % 2, "iou_threshold": 0.3},
        ),
        "multiclass_nms": (
            ops.multiclass_nms,
            {
                "boxes": box_rows(9),
                "scores": torch.rand(9, 2),
                "score_threshold": 0.1,
                "iou_threshold": 0.3,
                "max_detections": 6,
            },
        ),
        "select_candidates": (
            ops.select_candidates,
            {
                "class_logits": [torch.randn(1, 4, 2, 3)],
                "box_deltas": [torch.randn(1, 8, 2, 3)],
                "base_anchors": box_rows(2)[None],
                "strides": (8,),
                "valid_sizes": torch.tensor([[16, 24]]),
                "scale_factors": torch.ones(1, 2),
                "per_level": 5,
            },
        ),
    }


def deform_conv2d_cases():
    input, weight, bias = torch.randn(2, 8, 10, 12), torch.randn(8, 8, 3, 3), torch.randn(8)
    offset, mask = torch.randn(2, 18, 10, 12), torch.rand(2, 9, 10, 12)
    return {
        "deform_conv2d": (ops.deform_conv2d, {"input": input, "offset": offset, "weight": weight, "padding": 1}),
        "deform_conv2d, optional": (
            ops.deform_conv2d,
            {"input": input, "offset": offset, "weight": weight, "bias": bias, "padding": 1, "mask": mask},
        ),
        "deform_conv2d, packed": (
            ops.deform_conv2d,
            {
                "input": input,
                "offset": offset,
                "weight": ops.pack_deform_conv2d(weight, bias),
                "padding": 1,
                "mask": mask,
                "mask_sigmoid": True,
                "relu": True,
            },
        ),
        "pack_deform_conv2d": (ops.pack_deform_conv2d, {"weight": weight, "bias": bias}),
    }


def flow_cases():
    pyramid, weight, bias = feature_pyramid(), torch.randn(8, 8, 3, 3), torch.randn(8)
    packed = ops.pack_conv3x3(weight, bias)
    subnets = ops.SubnetParameters(cls=((weight, bias),), reg=((weight, None),), segmentation_levels=1)
    return {
        "flow_conv2d": (ops.flow_conv2d, {"x": pyramid[0], "flow": None, "weight": weight}),
        "flow_conv2d, list": (ops.flow_conv2d, {"x": pyramid, "flow": pyramid, "weight": weight, "bias": bias}),
        "flow_conv2d, several": (
            ops.flow_conv2d,
            {"x": [pyramid, pyramid[0]], "flow": None, "weight": [packed, packed]},
        ),
        "flow_conv2d, packed": (ops.flow_conv2d, {"x": pyramid, "flow": pyramid, "weight": packed}),
        "flow_conv2d, active": (
            ops.flow_conv2d,
            {"x": pyramid, "flow": None, "weight": packed, "active": torch.tensor([False, True])},
        ),
        "pack_conv3x3": (ops.pack_conv3x3, {"weight": weight, "bias": bias}),
        "fused_subnets": (ops.fused_subnets, {"levels": pyramid, "parameters": subnets}),
        "fused_subnets, packed": (ops.fused_subnets, {"levels": pyramid, "parameters": ops.pack_subnets(subnets)}),
        "pack_subnets": (ops.pack_subnets, {"parameters": subnets}),
    }


def normalization_and_loss_cases():
    input, weight, bias = torch.randn(2, 8, 10, 12), torch.randn(8), torch.randn(8)
    logits = torch.randn(4, 3)
    return {
        "sigmoid_focal_loss": (ops.sigmoid_focal_loss, {"logits": logits, "labels": torch.tensor([0, 1, 3, -1])}),
        "group_norm_relu": (ops.group_norm_relu, {"input": input, "num_groups": 2, "upsample": True}),
        "group_norm_relu, optional": (
            ops.group_norm_relu,
            {"input": input, "num_groups": 1, "weight": weight, "bias": bias},
        ),
    }


def panoptic_cases():
    instances = {
        "masks": torch.rand(3, 8, 9) > 0.6,
        "scores": torch.rand(3),
        "labels": torch.tensor([5, 6, 7]),
    }
    stuff = torch.randint(2, (8, 9))
    gt_map, pred_map = torch.randint(3, (2, 6, 7), dtype=torch.int32)
    counts = {"gt_segments": 2, "pred_segments": 2}
    return {
        "paste_masks": (ops.paste_masks, {"mask_logits": torch.randn(3, 5, 5), "boxes": box_rows(3), "size": (8, 9)}),
        "stuff_labels": (
            ops.stuff_labels,
            {"logits": torch.randn(4, 3).T[:, None], "valid_size": (4, 9), "original_size": (6, 7)},
        ),
        "panoptic_merge": (
            ops.panoptic_merge,
            {
                **instances,
                "boxes": box_rows(3),
                "stuff": stuff,
                "stuff_labels": 2,
                "stuff_area_threshold": 4,
            },
        ),
        "panoptic_merge, no boxes": (
            ops.panoptic_merge,
            {**instances, "boxes": None, "stuff": stuff, "stuff_labels": 2},
        ),
        "panoptic_quality_counts": (ops.panoptic_quality_counts, {"gt_map": gt_map, "pred_map": pred_map, **counts}),
    }


def image_cases():
    photograph = torch.randint(256, (7, 9, 3), dtype=torch.uint8)
    colors = {"mean": (1.0, 2.0, 3.0), "std": (4.0, 5.0, 6.0)}
    return {
        "preprocess_images": (ops.preprocess_images, {"images": photograph, "sizes": (14, 18), **colors}),
        "preprocess_images, list": (
            ops.preprocess_images,
            {"images": [photograph, photograph[:5]], "sizes": [(14, 18), (4, 5)], **colors},
        ),
    }


def cases():
    """Return (function, arguments) by name, including lists, optional arguments and named tuples."""
    return {
        **roi_cases(),
        **detection_cases(),
        **deform_conv2d_cases(),
        **flow_cases(),
        **normalization_and_loss_cases(),
        **panoptic_cases(),
        **image_cases(),
    }


NAMES = tuple(cases())


def convert(function, value):
    """Apply `function` to each tensor within lists, tuples and named tuples."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        parts = [convert(function, item) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def to_array(tensor):
    return cupy.from_dlpack(tensor) if cupy else tensor.numpy()


def arrays_in(arguments):
    return {name: convert(to_array, value) for name, value in arguments.items()}


def address(value):
    """Return the address of the first element."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return value.data.ptr if cupy else value.__array_interface__["data"][0]


def assert_equal(result, expected):
    """Assert the same structure and values, with arrays in place of tensors."""
    if isinstance(expected, (list, tuple)):
        assert type(result) is type(expected) and len(result) == len(expected)
        for item, expected_item in zip(result, expected):
            assert_equal(item, expected_item)
    elif isinstance(expected, torch.Tensor):
        assert type(result) is (cupy or np).ndarray
        assert result.shape == tuple(expected.shape)
        torch.testing.assert_close(torch.from_dlpack(result), expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert result == expected


def test_every_operator_has_a_case():
    covered = {function.__name__ for function, _ in cases().values() if isinstance(function, types.FunctionType)}
    assert covered == {*public(), "pack_conv3x3", "pack_deform_conv2d", "pack_subnets"}


@pytest.mark.parametrize("name", NAMES)
def test_arrays_give_arrays(name, monkeypatch):
    """Results equal those of tensors, and neither inputs nor outputs are copied."""
    function, arguments = cases()[name]
    expected, arrays = function(**arguments), arrays_in(arguments)
    library, imported, exported = cupy or np, [], []
    take, give = torch.from_dlpack, library.from_dlpack

    def taking(array):
        imported.append((address(array), take(array)))
        return imported[-1][1]

    def giving(tensor):
        exported.append((address(tensor), give(tensor)))
        return exported[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "from_dlpack", taking)
        patch.setattr(library, "from_dlpack", giving)
        result = function(**arrays)
    assert imported and all(pointer == address(tensor) for pointer, tensor in imported)
    assert all(pointer == address(array) for pointer, array in exported)
    assert_equal(result, expected)


# pack_subnets makes a separate call for each convolution, so arrays and tensors may mix in its argument.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "pack_subnets"])
def test_arrays_and_tensors_do_not_mix(name):
    """An array among tensors raises an error that names it. It replaces the last tensor of each argument in turn."""
    function, arguments = cases()[name]
    names = [key for key, value in arguments.items() if leaves(value)]
    if sum(len(leaves(arguments[key])) for key in names) < 2:
        names = []
    for key in names:
        count, converted = len(leaves(arguments[key])), []

        def convert_last(tensor, count=count, converted=converted):
            converted.append(tensor)
            return to_array(tensor) if len(converted) == count else tensor

        with pytest.raises(
            TypeError,
            match=rf"\b{key}\S* must be a tensor, got ndarray, as \S+ is a tensor|"
            r"the (weight|bias) of \S+ must be a tensor, got ndarray",
        ):
            function(**arguments | {key: convert(convert_last, arguments[key])})


class Foreign:
    """An array that supports only DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __array_namespace__(self):
        return FOREIGN


FOREIGN = types.SimpleNamespace(__name__="foreign", from_dlpack=lambda tensor: Foreign(to_array(tensor)))


def test_any_library_with_dlpack():
    function, arguments = cases()["multiclass_nms"]
    result = function(**{key: convert(lambda t: Foreign(to_array(t)), value) for key, value in arguments.items()})
    assert type(result) is ops.Detections and all(type(part) is Foreign for part in result)
    assert_equal(ops.Detections(*(part.array for part in result)), function(**arguments))


def test_two_libraries():
    function, arguments = cases()["nms"]
    arrays = arrays_in(arguments)
    with pytest.raises(TypeError, match=r"nms: scores must be an array of (numpy|cupy) as boxes is, got Foreign"):
        function(**arrays | {"scores": Foreign(arrays["scores"])})


def test_unchanged_inputs_are_returned_as_the_same_array():
    """Levels returned by an absent sub-network, and the weight within a packed weight, are the arrays of the call."""
    function, arguments = cases()["fused_subnets"]
    arrays = arrays_in(arguments)
    assert function(**arrays).thing[0] is arrays["levels"][0]
    conv = arrays_in(cases()["pack_conv3x3"][1])
    assert ops.pack_conv3x3(**conv).weight is conv["weight"]


def test_results_keep_their_memory():
    """A result stays valid after the tensor that owned its memory, and the arguments, are deleted."""
    function, arguments = cases()["roi_align"]
    expected = function(**arguments)
    result = function(**arrays_in(arguments))
    for _ in range(20):
        torch.full_like(expected, 7.0)
    assert_equal(result, expected)


def test_checked():
    boxes = to_array(torch.full((3, 4), torch.nan))
    with ops.checked(), pytest.raises(ValueError, match="nms: boxes must be finite, got nan"):
        ops.nms(boxes, to_array(torch.rand(3)), 0.5)


def test_no_tensor_at_all():
    with pytest.raises(TypeError, match="roi_align: boxes must be a tensor, got float"):
        ops.roi_align(torch.rand(1, 1, 4, 4), 3.0, 2)
    with pytest.raises(TypeError, match=r"roi_align: boxes\[1\] must be a tensor, got list"):
        ops.roi_align(to_array(torch.rand(2, 1, 4, 4)), [to_array(box_rows(2)), [0.0, 0.0, 1.0, 1.0]], 2)
    with pytest.raises(TypeError, match="nms: scores must be a tensor, got NoneType"):
        ops.nms(torch.rand(3, 4), None, 0.5)
    with pytest.raises(TypeError, match="nms: boxes must be a tensor, got list"):
        ops.nms([to_array(box_rows(3))], to_array(torch.rand(3)), 0.5)
    conv = ops.pack_conv3x3(torch.rand(2, 2, 3, 3))
    with pytest.raises(TypeError, match=r"flow_conv2d: weight\.packed must be a tensor, got NoneType"):
        ops.flow_conv2d(torch.rand(1, 2, 4, 4), None, conv._replace(packed=None))


def test_a_module_with_parameters_takes_tensors():
    module = ops.DeformConv2d(2, 3, 3)
    with pytest.raises(TypeError, match="deform_conv2d: input must be a tensor, got ndarray, as weight is a tensor"):
        module(to_array(torch.rand(1, 2, 5, 5)), to_array(torch.zeros(1, 18, 3, 3)))


@pytest.mark.skipif(DEVICE == "cuda", reason="needs NumPy arrays, which are on the CPU")
class TestNumpy:
    def test_masked(self):
        """A masked array is refused: DLPack has no mask, so masked values would be used."""
        boxes = np.ma.masked_array(to_array(box_rows(3)), mask=np.eye(3, 4) > 0)
        with pytest.raises(BufferError, match="nms: boxes must have no mask, which would be lost, got MaskedArray"):
            ops.nms(boxes, to_array(torch.rand(3)), 0.5)

    def test_read_only(self):
        """Read-only arrays are accepted, because operators do not write to their arguments."""
        function, arguments = cases()["preprocess_images"]
        arrays = arrays_in(arguments)
        arrays["images"].flags.writeable = False
        assert_equal(function(**arrays), function(**arguments))

    def test_results_share_memory_in_both_directions(self):
        """The array and the tensor share memory: a write to one is visible in the other."""
        tensors = {}

        def keep(x: "torch.Tensor"):
            tensors["input"], tensors["output"] = x, x * 2
            return tensors["output"]

        array = np.arange(4.0)
        result = with_arrays(keep, {"x": array})
        array[0], tensors["output"][1] = 50.0, 60.0
        assert tensors["input"][0] == 50 and result[1] == 60 and np.shares_memory(result, tensors["output"].numpy())

    @pytest.mark.parametrize(
        "change, reason",
        [
            (lambda a: a[::-1], r"must not have negative strides, got \(-16, 4\)"),
            (lambda a: a[:, ::-1], r"must not have negative strides, got \(16, -4\)"),
            (lambda a: a.astype(">f4"), "must be shared without a copy, and cannot be: .*byte order"),
            (lambda a: a.astype(object), "must be shared without a copy, and cannot be: "),
            (
                lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(np.float32).reshape(a.shape),
                "must be aligned to its 4 bytes per element",
            ),
        ],
        ids=["rows reversed", "columns reversed", "other byte order", "objects", "misaligned"],
    )
    def test_an_array_that_needs_a_copy(self, change, reason):
        """Torch 2.13 would abort the process on negative strides."""
        with pytest.raises(BufferError, match=f"nms: boxes {reason}"):
            ops.nms(change(box_rows(9).numpy()), torch.rand(9).numpy(), 0.5)

    @pytest.mark.parametrize("change", [lambda a: a[::2], lambda a: a[:0], lambda a: a[:1][::-1], np.asfortranarray])
    def test_strides(self, change):
        boxes, scores = change(box_rows(9).numpy()), change(torch.rand(9).numpy())
        expected = ops.nms(torch.tensor(boxes.copy()), torch.tensor(scores.copy()), 0.3)
        assert_equal(ops.nms(boxes, scores, 0.3), expected)

    def test_bfloat16_has_no_dtype(self):
        _, arguments = cases()["preprocess_images"]
        with pytest.raises(BufferError, match="preprocess_images: a result of dtype bfloat16 cannot be an array of"):
            ops.preprocess_images(**arrays_in(arguments), dtype=torch.bfloat16)

    @pytest.mark.skipif(
        torch.__version__ < "2.13", reason="torch before 2.13 treats arrays in compiled code as tensors"
    )
    def test_compiled(self):
        """torch.compile breaks the graph at a call with arrays; with `fullgraph=True` it raises an error."""
        function, arguments = cases()["nms"]
        torch._dynamo.reset()
        expected, arrays = function(**arguments), arrays_in(arguments)
        assert_equal(torch.compile(lambda: function(**arrays), backend="eager")(), expected)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="arrays of other libraries cannot be part of a compi"):
            torch.compile(lambda: function(**arrays), backend="eager", fullgraph=True)()

    def test_numbers_of_numpy_are_numbers(self):
        """NumPy scalars have no `__dlpack__` and may be mixed with tensors."""
        boxes, scores = box_rows(9), torch.rand(9)
        assert torch.equal(ops.nms(boxes, scores, np.float32(0.5)), ops.nms(boxes, scores, 0.5))


@pytest.mark.skipif(DEVICE == "cuda", reason="needs arrays on the CPU")
def test_jax():
    """JAX arrays work, in bfloat16 too, with `from_dlpack` found by their array namespace."""
    jax = pytest.importorskip("jax")
    features, boxes = torch.rand(2, 3, 8, 9), box_rows(4, 2)
    for dtype in (torch.float32, torch.bfloat16):
        expected = ops.roi_align(features.to(dtype), boxes, 2)
        result = ops.roi_align(jax.numpy.from_dlpack(features.to(dtype)), jax.numpy.from_dlpack(boxes), 2)
        assert isinstance(result, jax.Array) and torch.equal(torch.from_dlpack(result), expected)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU with CuPy and SPATIALFLOW_BACKEND=cuda")
class TestCupy:
    @pytest.mark.parametrize("new_stream", ["cupy", "torch", "both"])
    def test_streams_are_ordered(self, new_stream):
        """Operators wait for CuPy's stream before they read an array, and CuPy waits for torch's stream."""
        side = cupy.cuda.Stream(non_blocking=True) if new_stream != "torch" else cupy.cuda.Stream.null
        stream = torch.cuda.Stream() if new_stream != "cupy" else torch.cuda.default_stream()
        matrix = cupy.random.rand(4096, 4096, dtype=cupy.float32)
        boxes = cupy.asarray([[0.0, 0.0, 0.0, 8.0, 8.0]], dtype=cupy.float32)
        cupy.cuda.Device().synchronize()
        for _ in range(5):
            with side, torch.cuda.stream(stream):
                product = matrix
                for _ in range(8):
                    product = product @ matrix / 2048
                features = product[None, None, :16, :16] * 0 + 3
                pooled = ops.roi_align(features, boxes, 2)
                doubled = pooled * 2
            side.synchronize()
            assert (doubled == 6).all()

    def test_another_device_than_the_current_one(self):
        if cupy.cuda.runtime.getDeviceCount() < 2:
            pytest.skip("needs two GPUs")
        with cupy.cuda.Device(1):
            boxes, scores = cupy.asarray(cupy.random.rand(9, 4)), cupy.random.rand(9)
        kept = ops.nms(boxes, scores, 0.5)
        assert kept.device.id == 1
