# SPDX-License-Identifier: Apache-2.0
"""select_candidates: `OpMatrix`, ties, non-finite values, sizes, and errors."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.op_matrix import OpMatrix, OpSample, assert_unchanged_by_autocast, to_dtype
from helpers.tensors import TOLERANCE, assert_near, leaves, map_tensors

from spatialflow import ops
from spatialflow.ops import reference

NAN, INF = math.nan, math.inf


def tensors(batch: int, classes: int, anchors: int, sizes: list) -> list:
    """Return float64 logits and deltas for levels of `sizes` (H, W), base anchors, valid sizes, scale factors."""
    logits = [torch.randn(batch, anchors * classes, *size, dtype=torch.float64) * 2 - 1 for size in sizes]
    deltas = [torch.randn(batch, anchors * 4, *size, dtype=torch.float64) for size in sizes]
    center, half = torch.randn(len(sizes), anchors, 2), 4 + 12 * torch.rand(len(sizes), anchors, 2)
    base = torch.cat([center - half, center + half], dim=2)
    valid = torch.tensor([[40, 60], [37, 64]])[torch.arange(batch) % 2]
    return [logits, deltas, base, valid, 0.5 + torch.rand(batch, 2)]


def strides_of(levels: list) -> list[int]:
    return [8 << level for level in range(len(levels))]


def select(logits, deltas, base, valid, scale, per_level: int) -> ops.Candidates:
    return ops.select_candidates(logits, deltas, base, strides_of(logits), valid, scale, per_level)


def expected(logits, deltas, base, valid, scale, per_level: int) -> ops.Candidates:
    return reference.select_candidates(logits, deltas, base, strides_of(logits), valid, scale, per_level)


def assert_equal_reference(values: list, per_level: int) -> ops.Candidates:
    """Compare with the reference, up to rounding but in the same order; return the operator's result."""
    candidates, wanted = select(*values, per_level), expected(*values, per_level)
    for value, wanted_value in zip(candidates, wanted, strict=False):
        torch.testing.assert_close(value, wanted_value, rtol=1e-5, atol=1e-4, equal_nan=True)
    return candidates


def sample(batch: int, classes: int, anchors: int, sizes: list, per_level: int):
    def resized(size: int = 0) -> list:
        return tensors(batch, classes, anchors, [(height + size, width + size) for height, width in sizes])

    def raw(logits, deltas, base, valid, scale, per_level):
        arguments = (logits, deltas, base, strides_of(logits), valid, scale, per_level)
        return torch.ops.spatialflow.select_candidates, arguments

    def build() -> OpSample:
        return OpSample(
            op=select,
            reference=expected,
            tensors=resized(),
            options={"per_level": per_level},
            differentiable=(),
            converted=(0, 1),
            raw=raw,
            images=(0, 1),
            resized=resized,
        )

    return build


class TestSelectCandidates(OpMatrix):
    has_gradient = False
    samples = {
        "pyramid": sample(2, 5, 3, [(8, 10), (5, 6), (7, 5)], 100),
        "many classes": sample(1, 40, 2, [(6, 7)], 30),
        "all": sample(2, 8, 3, [(9, 5), (7, 6)], 0),
    }
    thin_samples = {
        f"{batch} images, {classes} classes, {anchors} anchors, {height} x {width}": sample(
            batch, classes, anchors, [(height, width), (2, 3)], 4
        )
        for batch, classes, anchors, height, width in (
            (1, 8, 3, 5, 6),
            (2, 1, 1, 5, 6),
            (2, 8, 2, 1, 6),
            (2, 8, 2, 5, 1),
            (2, 8, 9, 1, 1),
            (1, 1, 1, 1, 1),
            (0, 8, 2, 5, 6),
            (2, 0, 2, 5, 6),
            (2, 8, 2, 0, 6),
            (2, 8, 2, 5, 0),
        )
    }

    def test_reference(self, make_sample, dtype):
        """Candidates equal the reference's, from the same rounded inputs, in float32 (float64 for float64 inputs)."""
        sample = make_sample()
        values = to_dtype(sample, dtype)
        candidates = sample.op(*values, **sample.options)
        doubles = [
            map_tensors(lambda t: t.double(), value) if i in sample.converted else value
            for i, value in enumerate(values)
        ]
        computed = torch.float64 if dtype == torch.float64 else torch.float32
        assert_near(candidates, sample.reference(*doubles, **sample.options), computed)
        assert all(leaf.dtype == computed for leaf in candidates)

    def test_autocast(self, make_sample):
        """Autocast rounds neither inputs nor results."""
        assert_unchanged_by_autocast(make_sample())

    def test_detached(self, make_sample):
        """In forward mode, the results have no tangent."""
        sample = make_sample()
        logits, deltas, *rest = sample.tensors
        _, pushed = torch.func.jvp(
            lambda *levels: sample.op(levels[: len(logits)], levels[len(logits) :], *rest, **sample.options),
            (*logits, *deltas),
            tuple(map(torch.ones_like, (*logits, *deltas))),
        )
        assert not any(leaf.any() for leaf in leaves(pushed))

    def test_vmap(self, make_sample):
        """A mapped dimension is a further batch dimension."""
        sample = make_sample()
        logits, deltas, base, valid, scale = sample.tensors
        stacked = [torch.stack([level, -level], dim=-1) for level in logits]

        def mapped(*levels):
            return tuple(sample.op(list(levels), deltas, base, valid, scale, **sample.options))

        results = torch.func.vmap(mapped, in_dims=-1)(*stacked)
        for index, levels in enumerate((logits, [-level for level in logits])):
            wanted = sample.op(levels, deltas, base, valid, scale, **sample.options)
            assert all(torch.equal(result[index], value) for result, value in zip(results, wanted, strict=False))
        nothing = torch.func.vmap(mapped)(*(level.expand(0, *level.shape) for level in logits))
        assert [result.shape for result in nothing] == [(0, *value.shape) for value in wanted]
        by_scale = torch.func.vmap(lambda s: tuple(sample.op(logits, deltas, base, valid, s, **sample.options)))
        twice = by_scale(torch.stack([scale, 2 * scale]))[0]
        assert torch.equal(twice[0], 2 * twice[1])
        with pytest.raises(ValueError, match="base_anchors must not be mapped"):
            torch.func.vmap(lambda b: tuple(sample.op(logits, deltas, b, valid, scale, **sample.options)))(base[None])


def indexed(values: list) -> list:
    """Change deltas, anchors and sizes so that the x1 of a box is the index of its anchor within its level."""
    logits, deltas, base, valid, scale = values
    anchors = base.shape[1]
    deltas = [torch.zeros_like(level) for level in deltas]
    for stride, level in zip(strides_of(logits), deltas, strict=False):
        height, width = level.shape[2:]
        cells = torch.arange(height * width, dtype=level.dtype).view(height, width)
        for anchor in range(anchors):
            level[:, 4 * anchor] = cells * anchors + anchor - torch.arange(width) * stride
    corners = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(len(logits), anchors, 4)
    return [logits, deltas, corners, torch.full_like(valid, 1 << 22), torch.ones_like(scale)]


def kept_anchors(values: list, per_level: int) -> list:
    """Return the (B, N) indices of the kept anchors within their levels."""
    logits, *rest = indexed(values)
    return select(logits, *rest, per_level).boxes[..., 0].round().long().tolist()


class TestCases:
    def test_known_answer(self):
        logits, deltas = torch.zeros(1, 2, 1, 3), torch.zeros(1, 4, 1, 3)
        logits[0, :, 0, 2], logits[0, :, 0, 1] = torch.tensor([4.0, 5.0]), torch.tensor([INF, -INF])
        deltas[0, :, 0, 2] = torch.tensor([0.5, -0.25, math.log(2), 100.0])  # the height grows 62.5 times
        base = torch.tensor([[[-4.0, -2.0, 4.0, 2.0]]])
        candidates = ops.select_candidates(
            [logits], [deltas], base, [8], torch.tensor([[16, 22]]), torch.tensor([[2.0, 0.5]]), 2
        )
        assert candidates.boxes.tolist() == [[[2.0, 0.0, 6.0, 4.0], [6.0, 0.0, 11.0, 32.0]]]
        torch.testing.assert_close(candidates.scores, torch.tensor([[[1.0, 0.0], [0.98201379, 0.99330715]]]))

    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    @pytest.mark.parametrize("per_level", [1, 7, 100, 2047, 2048, 2049, 3000])
    def test_ties(self, dtype, per_level):
        """With few distinct logits, the best anchors come first, and equal ones in index order, also at the last rank.

        A level of which all anchors are kept is not sorted.
        """
        values = tensors(2, 3, 2, [(40, 41), (3, 4)])
        values[0] = [(level * 2).floor().clamp(-3, 1).to(dtype) / 2 for level in values[0]]
        values[1] = [level.to(dtype) for level in values[1]]
        assert_equal_reference(values, per_level)
        double = [[level.double() for level in values[0]], [level.double() for level in values[1]], *values[2:]]
        kept = kept_anchors(double, per_level)
        for image in range(2):
            wanted = []
            for level in double[0]:
                best = level[image].unflatten(0, (2, 3)).amax(1).permute(1, 2, 0).flatten().tolist()
                order = sorted(range(len(best)), key=lambda anchor: (-best[anchor], anchor))
                wanted += order[:per_level] if per_level < len(best) else range(len(best))
            assert kept[image] == wanted

    @pytest.mark.parametrize("value", [0.0, -0.0, NAN, INF, -INF])
    def test_all_equal(self, value):
        values = tensors(1, 4, 2, [(60, 50)])
        values[0] = [torch.full_like(values[0][0], value)]
        assert kept_anchors(values, 2500) == [list(range(2500))]

    def test_zeros_of_both_signs_are_equal(self):
        values = tensors(1, 1, 1, [(2, 4)])
        values[0] = [torch.tensor([-1.0, -0.0, 0.0, -0.0, 1.0, 0.0, -0.0, 0.0], dtype=torch.float64).view(1, 1, 2, 4)]
        assert kept_anchors(values, 5) == [[4, 1, 2, 3, 5]]

    @pytest.mark.parametrize("classes", [1, 3, 16, 40])
    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    def test_nan_logits(self, dtype, classes):
        """NaN is never the best logit; anchors with only NaN rank as -inf; the score of NaN is NaN."""
        values = [*tensors(2, classes, 2, [(5, 7)])]
        logits = values[0][0].view(2, 2, classes, 5, 7)
        logits[:, 0, 0, 1, 2] = NAN
        logits[:, 1, -1, 3, 3] = NAN
        logits[0, 1, :, 0, 0] = NAN
        logits[1, 0, :, 4, 6] = -INF
        logits[1, 1, :, 4, 6] = NAN
        values[:2] = [[level.to(dtype) for level in levels] for levels in values[:2]]
        candidates = assert_equal_reference(values, 69)
        assert candidates.scores.isnan().any()
        kept = kept_anchors([[level.double() for level in levels] for levels in values[:2]] + values[2:], 69)
        assert (1 if classes > 1 else 49) not in kept[0]  # the last of the anchors with only NaN
        assert kept[1][-1] == 68 and 69 not in kept[1]  # 68 (-inf) and 69 (only NaN) are equal: the lower index is kept
        assert_equal_reference(values, 0)

    def test_non_finite_deltas(self):
        """NaN deltas give NaN corners, which NMS drops; boxes of infinite and huge deltas are clipped to the image."""
        values = tensors(1, 2, 1, [(4, 4)])
        values[:2] = [[level.float() for level in levels] for levels in values[:2]]
        deltas = values[1][0].permute(0, 2, 3, 1).reshape(16, 4)  # one row per anchor
        deltas[:8] = torch.tensor([NAN, INF, -INF, 3e38]).repeat(2)[:, None]
        deltas[8] = torch.tensor([0.0, 0.0, INF, -INF])
        values[1] = [deltas.view(1, 4, 4, 4).permute(0, 3, 1, 2)]
        candidates = assert_equal_reference(values, 0)
        bad = candidates.boxes[0].isnan().any(dim=1)
        assert bad.tolist() == [anchor % 4 == 0 and anchor < 8 for anchor in range(16)]
        limit = torch.tensor([60.0, 40.0]) / values[4][0]
        inside = candidates.boxes[0, ~bad]
        assert (inside >= 0).all() and (inside <= limit.repeat(2) * 1.001).all()
        detected = ops.multiclass_nms(*candidates, -1.0, 1.0, 100)
        assert 0 < detected.count.item() and not detected.boxes.isnan().any()
        for place, name in ((0, "class_logits"), (1, "box_deltas"), (2, "base_anchors"), (4, "scale_factors")):
            wrong = map_tensors(torch.clone, tensors(1, 2, 1, [(4, 4)]))
            leaves(wrong[place])[0].view(-1)[3 if place < 4 else 1] = NAN
            with ops.checked(), pytest.raises(ValueError, match=rf"candidates: {name}.* must be finite, got nan at"):
                select(*wrong, 3)

    def test_bad_sizes_and_scales(self):
        """Invalid sizes and scales do not crash and agree with the reference."""
        values = tensors(2, 3, 2, [(5, 6)])
        values[3] = torch.tensor([[-5, 1 << 62], [0, -(1 << 62)]])
        values[4] = torch.tensor([[0.0, NAN], [INF, -1.0]])
        assert_equal_reference(values, 10)

    @pytest.mark.parametrize("per_level", [0, 1, 5, 30, 31, 1000, 2048, 2100, 5000, 8999, 9000, 9001, (1 << 31) - 1])
    def test_number_kept(self, per_level):
        """All (0), few, one chunk of 2048, several chunks, and more than there are."""
        values = tensors(2, 2, 3, [(50, 60), (2, 5), (1, 1)])
        candidates = assert_equal_reference(values, per_level)
        most = per_level or 1 << 31
        assert candidates.boxes.shape == (2, min(9000, most) + min(30, most) + min(3, most), 4)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    @pytest.mark.parametrize("classes, anchors", [(1, 1), (8, 9), (16, 3), (80, 9), (150, 1), (133, 2), (1000, 1)])
    def test_numbers_of_classes(self, classes, anchors, dtype, layout):
        """Rows of logits shorter and longer than a vector, with and without a remainder."""
        values = tensors(1, classes, anchors, [(4, 7)])
        values[:2] = [[t.to(dtype).contiguous(memory_format=layout) for t in levels] for levels in values[:2]]
        assert_equal_reference(values, 20)

    def test_levels_of_a_larger_tensor(self):
        """Slices that begin at any channel, with gaps between pixels, give the results of dense levels."""
        values = tensors(2, 8, 2, [(5, 6), (3, 3)])
        values[:2] = [[level.half() for level in levels] for levels in values[:2]]
        for first in (0, 1, 8):
            sliced = []
            for levels in values[:2]:
                shapes = [(2, level.shape[1] + 16, *level.shape[2:]) for level in levels]
                wider = [
                    torch.full(shape, NAN, dtype=torch.half).contiguous(memory_format=torch.channels_last)
                    for shape in shapes
                ]
                sliced.append([w[:, first : first + t.shape[1]].copy_(t) for w, t in zip(wider, levels, strict=False)])
            candidates, plain = select(*sliced, *values[2:], 10), select(*values, 10)
            assert all(torch.equal(a, b) for a, b in zip(candidates, plain, strict=False))

    def test_no_images_and_no_cells(self):
        for batch, size in ((0, (5, 6)), (2, (0, 6)), (2, (5, 0))):
            candidates = select(*tensors(batch, 3, 2, [size, size]), 4)
            rows = 8 if size == (5, 6) else 0
            assert candidates.boxes.shape == (batch, rows, 4) and candidates.scores.shape == (batch, rows, 3)

    def test_one_image_of_a_batch(self):
        values = [
            map_tensors(lambda t: t.float() if t.is_floating_point() else t, v)
            for v in tensors(3, 5, 3, [(9, 8), (4, 4)])
        ]
        together = select(*values, 25)
        for image in range(3):
            logits, deltas, base, valid, scale = values
            image_levels = [[level[image : image + 1] for level in levels] for levels in (logits, deltas)]
            single = select(*image_levels, base, valid[image : image + 1], scale[image : image + 1], 25)
            assert all(torch.equal(a[image], b[0]) for a, b in zip(together, single, strict=False))

    def test_large_level(self):
        """Several threads share the level on the CPU, several blocks on a GPU."""
        values = tensors(1, 16, 9, [(64, 70), (8, 9)])
        values[:2] = [[t.bfloat16().contiguous(memory_format=torch.channels_last) for t in v] for v in values[:2]]
        assert_equal_reference(values, 1000)


def changed(place: int, value) -> list:
    """Return arguments with one replaced; a tensor in place of a list replaces the list's last level."""
    logits, deltas, base, valid, scale = tensors(2, 3, 2, [(4, 5), (2, 3)])
    arguments = [logits, deltas, base, [8, 16], valid, scale, 5]
    if isinstance(arguments[place], list) and isinstance(value, torch.Tensor):
        value = [*arguments[place][:-1], value]
    arguments[place] = value
    return arguments


class TestErrors:
    @pytest.mark.parametrize(
        "place, value, message",
        [
            (0, torch.ones(2, 6, 2, 3).long(), r"class_logits\[1\] must be float32.*got int64"),
            (0, torch.ones(2, 6, 2, 3), r"class_logits\[1\] must be float64, got float32"),
            (0, torch.ones(6, 2, 3).double(), r"class_logits\[1\] must be \(B, A \* classes, H, W\), got .*\(6, 2"),
            (0, torch.ones(2, 8, 2, 3).double(), r"class_logits\[1\] must have the batch size and the channels of"),
            (0, torch.ones(2, 6, 2, 4).double(), r"box_deltas\[1\] must have shape \(2, 8, 2, 4\), got .*, 2, 3\)"),
            (0, [torch.ones(2, 6, 4, 5).double()], "box_deltas must have one tensor per level.*got 2 for 1 levels"),
            (
                0,
                [torch.ones(2, 7, 4, 5).double(), torch.ones(2, 7, 2, 3).double()],
                r"class_logits\[0\] must have a multiple of 2 channels.*got shape \(2, 7, 4, 5\)",
            ),
            (0, [], "class_logits must be a sequence of at least one level, got none"),
            (0, None, "class_logits must be a sequence of at least one level, got a tensor of shape"),
            (1, torch.ones(2, 6, 2, 3).double(), r"box_deltas\[1\] must have shape \(2, 8, 2, 3\)"),
            (1, torch.ones(2, 8, 2, 3), r"box_deltas\[1\] must be float64, got float32"),
            (2, torch.ones(2, 2, 5), r"base_anchors must have shape \(2, A, 4\) with A > 0, got shape \(2, 2, 5\)"),
            (2, torch.ones(1, 2, 4), r"base_anchors must have shape \(2, A, 4\)"),
            (2, torch.ones(2, 0, 4), r"base_anchors must have shape \(2, A, 4\) with A > 0"),
            (2, torch.ones(2, 2, 4).double(), "base_anchors must be float32, got float64"),
            (3, [8], "strides must have one number per level of class_logits, got 1 for 2 levels"),
            (3, [8, 0], "strides must be from 1 to 2147483647, got 0"),
            (4, torch.ones(3, 2).long(), r"valid_sizes must have shape \(2, 2\), got shape \(3, 2\)"),
            (4, torch.ones(2, 2), "valid_sizes must be int64, got float32"),
            (5, torch.ones(2, 1), r"scale_factors must have shape \(2, 2\), got shape \(2, 1\)"),
            (5, torch.ones(2, 2).double(), "scale_factors must be float32, got float64"),
            (6, -1, "per_level must be from 0 to 2147483647, got -1"),
            (6, 1 << 31, "per_level must be from 0 to 2147483647, got 2147483648"),
        ],
        ids=str,
    )
    def test_errors_name_argument_rule_and_value(self, place, value, message):
        arguments = changed(place, value)
        if value is None:
            arguments[0] = torch.ones(2, 6, 4, 5)
        with pytest.raises((RuntimeError, ValueError), match=message):
            ops.select_candidates(*arguments)

    @pytest.mark.parametrize("height, width", [(2**32, 2**32), (2**31, 2**32), (1, 2**31), (2**16, 2**15)])
    def test_too_many_anchors_of_no_image(self, height, width):
        """2^32 anchors or more raise an error, also without images, where H * W may overflow 64 bits."""
        logits, deltas = (torch.empty(0, count, 1, 1).expand(0, count, height, width) for count in (6, 8))
        message = rf"class_logits\[0\] must have fewer than 2\^32 anchors, got {height} x {width} cells of 2"
        with pytest.raises(RuntimeError, match=message):
            ops.select_candidates(
                [logits], [deltas], torch.zeros(1, 2, 4), (8,), torch.zeros(0, 2).long(), torch.zeros(0, 2), 5
            )
