// SPDX-License-Identifier: Apache-2.0
//
// Bounds-checked pointers of kernels (csrc/cuda/platform.h): Global<T> checks the bounds of its tensor, Shared<T> those
// of its array. Every access through Shared<T> is recorded in the shadow memory (shadow.h).
#pragma once

#include <type_traits>

#include "simt/block.h"

namespace spatialflow {

// Vector of kWidth elements, loaded or stored by one access.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vec {
    T values[kWidth];
    T& operator[](int i) { return values[i]; }
    const T& operator[](int i) const { return values[i]; }
};

template <typename T>
class Global {
public:
    using Element = std::remove_const_t<T>;

    Global() = default;
    Global(std::nullptr_t) {}
    Global(T* data, int64_t count) : data_(data), begin_(address(data)), end_(begin_ + count * sizeof(T)) {}
    template <typename Other, typename = std::enable_if_t<std::is_same_v<const Other, T> && !std::is_const_v<Other>>>
    Global(const Global<Other>& other) : data_(other.data_), begin_(other.begin_), end_(other.end_) {}

    explicit operator bool() const { return begin_ != 0; }
    Global operator+(int64_t offset) const {
        Global result = *this;
        result.data_ = reinterpret_cast<T*>(address(data_) + static_cast<uintptr_t>(offset) * sizeof(T));
        return result;
    }
    Global operator-(int64_t offset) const { return *this + -offset; }
    Global& operator+=(int64_t offset) { return *this = *this + offset; }

    T& operator[](const simt::Index& index) const { return *(*this + index.value).checked(1, index.location); }

    // Return a pointer to `count` adjacent elements, which must be in bounds and aligned to their total size.
    T* checked(int count, simt::SourceLocation location) const {
        const uintptr_t at = address(data_), bytes = sizeof(T) * static_cast<size_t>(count);
        if (__builtin_expect(at < begin_ || at + bytes > end_, 0)) {
            simt::current_block().fail(
                location,
                simt::concatenate(
                    "out of bounds: element ",
                    (static_cast<int64_t>(at) - static_cast<int64_t>(begin_)) / static_cast<int64_t>(sizeof(T)),
                    count > 1 ? simt::concatenate(" and ", count - 1, " after it") : std::string(),
                    " of a global buffer of ", (end_ - begin_) / sizeof(T)));
        }
        if (__builtin_expect(count > 1 && at % bytes != 0, 0)) {
            simt::current_block().fail(
                location, simt::concatenate(
                              "misaligned: ", bytes, " bytes at an address that is a multiple of ", at & (~at + 1)));
        }
        return data_;
    }

    // Raw pointer, for host functions that pass the address to the hardware.
    T* data() const { return data_; }
    bool holds(int64_t count) const {
        return address(data_) >= begin_ && address(data_) + static_cast<uintptr_t>(count) * sizeof(T) <= end_;
    }

    template <typename To>
    Global<To> cast() const {
        Global<To> pointer;
        pointer.data_ = reinterpret_cast<To*>(data_);
        pointer.begin_ = begin_;
        pointer.end_ = end_;
        return pointer;
    }

private:
    template <typename Other>
    friend class Global;

    static uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

    T* data_ = nullptr;
    uintptr_t begin_ = 0, end_ = 0;
};

// Proxy of one element of shared memory: a conversion reads it, an assignment writes it. The proxy cannot be copied:
// kernels write `float x = tile[i]`, not `auto`.
template <typename T>
class SharedElement {
public:
    SharedElement(size_t at, simt::SourceLocation location) : at_(at), location_(location) {}
    SharedElement(const SharedElement&) = delete;

    operator T() && { return read(); }
    const T& operator=(const T& value) && {
        write(value);
        return value;
    }
    const SharedElement& operator=(SharedElement&& other) && {
        write(other.read());
        return *this;
    }
    void operator+=(const T& value) && { write(static_cast<T>(read() + value)); }
    void operator-=(const T& value) && { write(static_cast<T>(read() - value)); }
    void operator*=(const T& value) && { write(static_cast<T>(read() * value)); }
    void operator|=(const T& value) && { write(static_cast<T>(read() | value)); }
    void operator&=(const T& value) && { write(static_cast<T>(read() & value)); }

private:
    T read() const {
        simt::current_block().note_read(at_, sizeof(T), simt::Shadow::kPlain, location_);
        T value;
        std::memcpy(static_cast<void*>(&value), simt::current_block().shared_memory(at_), sizeof(T));
        return value;
    }
    void write(const T& value) const {
        simt::current_block().note_write(at_, sizeof(T), simt::Shadow::kPlain, location_);
        std::memcpy(simt::current_block().shared_memory(at_), static_cast<const void*>(&value), sizeof(T));
    }

    size_t at_;
    simt::SourceLocation location_;
};

template <typename T>
class Shared {
public:
    using Element = std::remove_const_t<T>;

    Shared() = default;
    explicit Shared(const simt::Block::Array& array)
        : at_(static_cast<int64_t>(array.begin)), begin_(array.begin), end_(array.end) {}
    template <typename Other, typename = std::enable_if_t<std::is_same_v<const Other, T> && !std::is_const_v<Other>>>
    Shared(const Shared<Other>& other) : at_(other.at_), begin_(other.begin_), end_(other.end_) {}

    Shared operator+(int64_t offset) const {
        Shared result = *this;
        result.at_ += offset * static_cast<int64_t>(sizeof(T));
        return result;
    }
    Shared operator-(int64_t offset) const { return *this + -offset; }
    Shared& operator+=(int64_t offset) { return *this = *this + offset; }

    SharedElement<Element> operator[](const simt::Index& index) const {
        static_assert(
            sizeof(T) % simt::kGranularity == 0,
            "shared elements must be at least 2 bytes: races are detected at 2-byte granularity");
        const Shared element = *this + index.value;
        return SharedElement<Element>(element.checked(sizeof(T), alignof(T), index.location), index.location);
    }

    // Return the offset of this pointer in the block's shared memory, checked for an access of `bytes` bytes.
    size_t checked(size_t bytes, size_t alignment, simt::SourceLocation location) const {
        simt::current_block().check_shared(begin_, at_, end_, bytes, alignment, location);
        return static_cast<size_t>(at_);
    }

    int64_t offset() const { return at_; }

    template <typename To>
    Shared<To> cast() const {
        Shared<To> pointer;
        pointer.at_ = at_;
        pointer.begin_ = begin_;
        pointer.end_ = end_;
        return pointer;
    }

private:
    template <typename Other>
    friend class Shared;

    int64_t at_ = 0;
    size_t begin_ = 0, end_ = 0;
};

#define SPATIALFLOW_SHARED(type, name, count)         \
    static const char name##_declared_here = 0;       \
    const ::spatialflow::Shared<type> name(           \
        ::spatialflow::simt::current_block().declare( \
            &name##_declared_here, #name, sizeof(type) * (count), ::spatialflow::simt::SourceLocation::current()))
#define SPATIALFLOW_DYNAMIC_SHARED(type, name) \
    const ::spatialflow::Shared<type> name(::spatialflow::simt::current_block().dynamic_array())

template <typename To, typename From>
inline Global<To> pointer_cast(const Global<From>& pointer) {
    return pointer.template cast<To>();
}
template <typename To, typename From>
inline Shared<To> pointer_cast(const Shared<From>& pointer) {
    return pointer.template cast<To>();
}

template <int kWidth, typename T>
inline Vec<std::remove_const_t<T>, kWidth> load_vector(
    const Global<T>& source, simt::SourceLocation location = simt::SourceLocation::current()) {
    Vec<std::remove_const_t<T>, kWidth> value;
    std::memcpy(static_cast<void*>(&value), source.checked(kWidth, location), sizeof(value));
    return value;
}
template <int kWidth, typename T>
inline Vec<std::remove_const_t<T>, kWidth> load_vector(
    const Shared<T>& source, simt::SourceLocation location = simt::SourceLocation::current()) {
    Vec<std::remove_const_t<T>, kWidth> value;
    const size_t at = source.checked(sizeof(value), sizeof(value), location);
    simt::current_block().note_read(at, sizeof(value), simt::Shadow::kPlain, location);
    std::memcpy(static_cast<void*>(&value), simt::current_block().shared_memory(at), sizeof(value));
    return value;
}
template <int kWidth, typename T>
inline void store_vector(
    const Global<T>& target, const Vec<T, kWidth>& value,
    simt::SourceLocation location = simt::SourceLocation::current()) {
    std::memcpy(static_cast<void*>(target.checked(kWidth, location)), &value, sizeof(value));
}
template <int kWidth, typename T>
inline void store_vector(
    const Shared<T>& target, const Vec<T, kWidth>& value,
    simt::SourceLocation location = simt::SourceLocation::current()) {
    const size_t at = target.checked(sizeof(value), sizeof(value), location);
    simt::current_block().note_write(at, sizeof(value), simt::Shadow::kPlain, location);
    std::memcpy(simt::current_block().shared_memory(at), &value, sizeof(value));
}

}  // namespace spatialflow
