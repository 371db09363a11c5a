// SPDX-License-Identifier: Apache-2.0
//
// Python module spatialflow._evaluation: functions on numpy arrays, without torch. The GIL is released while pixels are
// read.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "evaluation/id_maps.h"
#include "evaluation/pair_counts.h"
#include "evaluation/png_filters.h"

namespace py = pybind11;

namespace {

std::string shape_text(const py::array& array) {
    std::string text = "(";
    for (py::ssize_t d = 0; d < array.ndim(); ++d) {
        text += (d ? ", " : "") + std::to_string(array.shape(d));
    }
    return text + ") " + py::str(array.dtype()).cast<std::string>();
}

bool is_rgb_image(const py::array& array) {
    return array.ndim() == 3 && array.shape(2) == 3 && py::isinstance<py::array_t<uint8_t>>(array);
}

// Return (H, W, 3) uint8 pixels or (H, W) int32 ids as a contiguous array. `name` is the name of the argument in the
// error message.
py::array contiguous_id_map(const py::array& array, const char* name) {
    if (is_rgb_image(array)) {
        return py::array_t<uint8_t, py::array::c_style>::ensure(array);
    }
    if (array.ndim() == 2 && py::isinstance<py::array_t<int32_t>>(array)) {
        return py::array_t<int32_t, py::array::c_style>::ensure(array);
    }
    throw py::value_error(
        std::string(name) + " must be an (H, W) int32 id map or (H, W, 3) uint8 pixels, got " + shape_text(array));
}

py::array_t<int32_t> decode_ids(const py::array& image, bool bgr) {
    if (!is_rgb_image(image)) {
        throw py::value_error("image must be (H, W, 3) uint8 pixels, got " + shape_text(image));
    }
    const auto pixels = py::array_t<uint8_t, py::array::c_style>::ensure(image);
    py::array_t<int32_t> ids({pixels.shape(0), pixels.shape(1)});
    const uint8_t* source = pixels.data();
    int32_t* target = ids.mutable_data();
    const auto count = static_cast<size_t>(ids.size());
    {
        py::gil_scoped_release release;
        spatialflow::decode_ids(source, count, bgr, target);
    }
    return ids;
}

py::array_t<uint8_t> encode_ids(const py::array& ids, bool bgr) {
    if (ids.ndim() != 2 || !py::isinstance<py::array_t<int32_t>>(ids)) {
        throw py::value_error("ids must be an (H, W) int32 id map, got " + shape_text(ids));
    }
    const auto source = py::array_t<int32_t, py::array::c_style>::ensure(ids);
    py::array_t<uint8_t> pixels({source.shape(0), source.shape(1), py::ssize_t{3}});
    const int32_t* data = source.data();
    uint8_t* target = pixels.mutable_data();
    const auto count = static_cast<size_t>(source.size());
    size_t done;
    {
        py::gil_scoped_release release;
        done = spatialflow::encode_ids(data, count, bgr, target);
    }
    if (done < count) {
        throw py::value_error("ids must lie in [0, 16777215] to fit three bytes, got " + std::to_string(data[done]));
    }
    return pixels;
}

py::array_t<int32_t> unfilter_png(const py::buffer& data, py::ssize_t height, py::ssize_t width, int channels) {
    const py::buffer_info lines = data.request();
    if (height < 1 || width < 1 || (channels != 3 && channels != 4)) {
        throw py::value_error(
            "height and width must be at least 1 and channels 3 or 4, got " + std::to_string(height) + ", " +
            std::to_string(width) + " and " + std::to_string(channels));
    }
    const py::ssize_t line = 1 + width * channels;
    if (lines.ndim != 1 || lines.itemsize != 1 || lines.strides[0] != 1 || lines.size / line != height ||
        lines.size % line != 0) {
        throw py::value_error(
            "lines must be " + std::to_string(height) + " * " + std::to_string(line) + " bytes, got " +
            std::to_string(lines.size));
    }
    py::array_t<int32_t> ids({height, width});
    const auto* source = static_cast<const uint8_t*>(lines.ptr);
    int32_t* target = ids.mutable_data();
    size_t done;
    {
        py::gil_scoped_release release;
        done = spatialflow::unfilter_png(
            source, static_cast<size_t>(height), static_cast<size_t>(width), channels, target);
    }
    if (done < static_cast<size_t>(height)) {
        throw py::value_error("unknown filter " + std::to_string(source[done * static_cast<size_t>(line)]));
    }
    return ids;
}

spatialflow::IdImage id_image(const py::array& array) {
    using Kind = spatialflow::IdImage::Kind;
    return {array.ndim() == 2 ? Kind::kIds : Kind::kRgb, array.data()};
}

py::object count_pairs(const py::array& first, const py::array& second) {
    const py::array a = contiguous_id_map(first, "first");
    const py::array b = contiguous_id_map(second, "second");
    if (a.shape(0) != b.shape(0) || a.shape(1) != b.shape(1)) {
        throw py::value_error(
            "first and second must have the same height and width, got " + shape_text(a) + " and " + shape_text(b));
    }
    const auto pixels = static_cast<size_t>(a.shape(0) * a.shape(1));
    const spatialflow::IdImage first_image = id_image(a);
    const spatialflow::IdImage second_image = id_image(b);
    std::optional<std::vector<spatialflow::PairCount>> counted;
    {
        py::gil_scoped_release release;
        counted = spatialflow::count_pairs(first_image, second_image, pixels);
    }
    if (!counted) {
        return py::none();
    }
    const std::vector<spatialflow::PairCount>& pairs = *counted;
    const auto size = static_cast<py::ssize_t>(pairs.size());
    py::array_t<int64_t> first_ids(size), second_ids(size), counts(size);
    for (py::ssize_t i = 0; i < size; ++i) {
        first_ids.mutable_data()[i] = pairs[i].first;
        second_ids.mutable_data()[i] = pairs[i].second;
        counts.mutable_data()[i] = pairs[i].count;
    }
    return py::make_tuple(first_ids, second_ids, counts);
}

}  // namespace

PYBIND11_MODULE(_evaluation, module) {
    module.doc() = "Pixel counts for panoptic quality, and conversion of id maps. Requires NumPy only.";
    module.def(
        "decode_ids", &decode_ids, py::arg("image"), py::kw_only(), py::arg("bgr") = false,
        "Convert (H, W, 3) uint8 pixels to (H, W) int32 ids, red + 256 * green + 65536 * blue. bgr: OpenCV's order.");
    module.def(
        "encode_ids", &encode_ids, py::arg("ids"), py::kw_only(), py::arg("bgr") = false,
        "Convert (H, W) int32 ids in [0, 2^24) to (H, W, 3) uint8 pixels, the inverse of decode_ids.");
    module.def(
        "unfilter_png", &unfilter_png, py::arg("lines"), py::arg("height"), py::arg("width"), py::arg("channels"),
        "Decode the filtered lines of an 8-bit PNG with 3 or 4 channels, height * (1 + width * channels) bytes, to\n"
        "(H, W) int32 ids.");
    module.def(
        "count_pairs", &count_pairs, py::arg("first"), py::arg("second"),
        "Count the pixels of each pair of ids. Return three int64 arrays: first ids, second ids and counts.\n\n"
        "There is a row per pair that occurs, sorted by first, then second id. A map is (H, W) int32 ids or\n"
        "(H, W, 3) uint8 RGB pixels; both have the same height and width. Return None for noise, where runs of\n"
        "equal pairs are shorter than about eight pixels on average.");
}
