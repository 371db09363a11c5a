// SPDX-License-Identifier: Apache-2.0
// spatialflow._evaluation: numpy in, numpy out, the GIL released while pixels are read. No torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "id_maps.h"
#include "pair_counts.h"
#include "png.h"

namespace py = pybind11;
namespace evaluation = spatialflow::evaluation;

namespace {

std::string shape_text(const py::array& array) {
    std::string text = "(";
    for (py::ssize_t d = 0; d < array.ndim(); ++d) {
        text += (d ? ", " : "") + std::to_string(array.shape(d));
    }
    return text + ") " + py::str(array.dtype()).cast<std::string>();
}

bool is_pixels(const py::array& array) {
    return array.ndim() == 3 && array.shape(2) == 3 && py::isinstance<py::array_t<uint8_t>>(array);
}

// (H, W, 3) uint8 pixels or (H, W) int32 ids, contiguous; `name` is the argument's, for the error.
py::array contiguous_id_map(const py::array& array, const char* name) {
    if (is_pixels(array)) return py::array_t<uint8_t, py::array::c_style>::ensure(array);
    if (array.ndim() == 2 && py::isinstance<py::array_t<int32_t>>(array)) {
        return py::array_t<int32_t, py::array::c_style>::ensure(array);
    }
    throw py::value_error(std::string(name) + " must be an (H, W) int32 id map or (H, W, 3) uint8 pixels, got " +
                          shape_text(array));
}

py::array_t<int32_t> decode_ids(const py::array& image, bool bgr) {
    if (!is_pixels(image)) {
        throw py::value_error("image must be (H, W, 3) uint8 pixels, got " + shape_text(image));
    }
    const auto pixels = py::array_t<uint8_t, py::array::c_style>::ensure(image);
    py::array_t<int32_t> ids({pixels.shape(0), pixels.shape(1)});
    const uint8_t* source = pixels.data();
    int32_t* target = ids.mutable_data();
    const auto count = static_cast<size_t>(ids.size());
    {
        py::gil_scoped_release release;
        evaluation::decode_ids(source, count, bgr, target);
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
        done = evaluation::encode_ids(data, count, bgr, target);
    }
    if (done < count) {
        throw py::value_error("ids must lie in [0, 16777215] to fit three bytes, got " + std::to_string(data[done]));
    }
    return pixels;
}

py::array_t<uint8_t> decode_png(const py::bytes& data) {
    const auto file = static_cast<std::string_view>(data);
    const auto* bytes = reinterpret_cast<const uint8_t*>(file.data());
    const evaluation::PngSize size = evaluation::read_png_header(bytes, file.size());
    py::array_t<uint8_t> pixels({static_cast<py::ssize_t>(size.height), static_cast<py::ssize_t>(size.width),
                                 py::ssize_t{3}});
    uint8_t* target = pixels.mutable_data();
    py::gil_scoped_release release;
    evaluation::decode_png(bytes, file.size(), target);
    return pixels;
}

evaluation::IdImage id_image(const py::array& array, bool bgr) {
    using Kind = evaluation::IdImage::Kind;
    return {array.ndim() == 2 ? Kind::kIds : bgr ? Kind::kBgr : Kind::kRgb, array.data()};
}

py::tuple count_pairs(const py::array& first, const py::array& second, bool bgr) {
    const py::array a = contiguous_id_map(first, "first");
    const py::array b = contiguous_id_map(second, "second");
    if (a.shape(0) != b.shape(0) || a.shape(1) != b.shape(1)) {
        throw py::value_error("first and second must have the same height and width, got " + shape_text(a) + " and " +
                              shape_text(b));
    }
    const auto pixels = static_cast<size_t>(a.shape(0) * a.shape(1));
    const evaluation::IdImage first_image = id_image(a, bgr);
    const evaluation::IdImage second_image = id_image(b, bgr);
    std::vector<evaluation::PairCount> pairs;
    {
        py::gil_scoped_release release;
        pairs = evaluation::count_pairs(first_image, second_image, pixels);
    }
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
    module.doc() = "Counting behind panoptic quality, and id maps; needs numpy only.";
    module.def("decode_ids", &decode_ids, py::arg("image"), py::kw_only(), py::arg("bgr") = false,
               "(H, W, 3) uint8 pixels to (H, W) int32 ids: red + 256 * green + 65536 * blue; bgr: OpenCV's order.");
    module.def("encode_ids", &encode_ids, py::arg("ids"), py::kw_only(), py::arg("bgr") = false,
               "(H, W) int32 ids in [0, 2^24) to (H, W, 3) uint8 pixels, the inverse of decode_ids.");
    py::register_exception<evaluation::PngError>(module, "PngError", PyExc_ValueError);
    module.def("decode_png", &decode_png, py::arg("data"),
               "The bytes of an 8-bit RGB or RGBA PNG to (H, W, 3) uint8, red first. Raises PngError (a ValueError).");
    module.def("count_pairs", &count_pairs, py::arg("first"), py::arg("second"), py::kw_only(), py::arg("bgr") = false,
               "Ids of both maps and the pixels they share, as three int64 arrays: one row per pair that occurs.\n\n"
               "Maps are (H, W) int32 or (H, W, 3) uint8 (in OpenCV's order with bgr), of equal height and width; the\n"
               "two may differ in kind. Rows ascend by first, then second id.");
}
