// SPDX-License-Identifier: Apache-2.0
#include "inflate.h"

#include <algorithm>
#include <cstring>
#include <memory>

namespace spatialflow::evaluation {
namespace {

constexpr int kLongestCode = 15;
constexpr const char* kTruncated = "compressed data end too early";
constexpr const char* kBadCode = "compressed data hold an invalid code";

// Bits of the stream, lowest first. Past the end zeros are delivered and counted, so that a code may be looked up
// with fewer bits than the table is wide; consuming them is what overrun() reports.
class BitReader {
public:
    BitReader(const uint8_t* data, size_t size) : next_(data), end_(data + size) {}

    // At least 56 bits are available afterwards.
    void refill() {
        if (end_ - next_ >= 8) {
            uint64_t word;
            std::memcpy(&word, next_, sizeof word);
            bits_ |= word << count_;
            next_ += (63 - count_) >> 3;
            count_ |= 56;
            return;
        }
        while (count_ < 56) {
            if (next_ < end_) {
                bits_ |= static_cast<uint64_t>(*next_++) << count_;
            } else {
                padding_ += 8;
            }
            count_ += 8;
        }
    }

    uint32_t peek(int count) const { return static_cast<uint32_t>(bits_ & ((uint64_t{1} << count) - 1)); }

    void drop(int count) {
        bits_ >>= count;
        count_ -= count;
    }

    uint32_t take(int count) {
        const uint32_t value = peek(count);
        drop(count);
        return value;
    }

    bool overrun() const { return count_ < padding_; }

    // Drops the rest of the current byte and hands out `size` whole bytes, or nullptr if there are fewer.
    const uint8_t* take_bytes(size_t size) {
        drop(count_ & 7);
        next_ -= (count_ - std::min(count_, padding_)) / 8;  // give back whole bytes that were read ahead
        bits_ = 0;
        count_ = padding_ = 0;
        if (static_cast<size_t>(end_ - next_) < size) return nullptr;
        const uint8_t* bytes = next_;
        next_ += size;
        return bytes;
    }

private:
    const uint8_t* next_;
    const uint8_t* end_;
    uint64_t bits_ = 0;
    int count_ = 0;
    int padding_ = 0;
};

// Canonical Huffman code as a two-level table. An entry holds (symbol << 8 | code length); codes longer than
// kPrimary go through an entry with kSubtable set: (offset << 8 | kSubtable | bits of the second level).
// Length 0 marks bits that no code begins with.
template <int kPrimary, int kSymbols>
class Code {
public:
    static constexpr uint32_t kSubtable = 0x80;

    // False if the lengths describe no prefix code. An incomplete code is accepted only if it has at most one symbol,
    // which is how encoders write "no distances" and "one distance".
    bool build(const uint8_t* lengths, int symbols) {
        int of_length[kLongestCode + 1] = {};
        for (int s = 0; s < symbols; ++s) ++of_length[lengths[s]];
        int used = symbols - of_length[0];
        of_length[0] = 0;
        uint32_t next_code[kLongestCode + 2] = {};
        uint32_t code = 0;
        for (int length = 1; length <= kLongestCode; ++length) {
            code = (code + static_cast<uint32_t>(of_length[length - 1])) << 1;
            next_code[length] = code;
            if (code + static_cast<uint32_t>(of_length[length]) > (1u << length)) return false;
        }
        const bool complete = next_code[kLongestCode] + static_cast<uint32_t>(of_length[kLongestCode]) ==
                              (1u << kLongestCode);
        if (!complete && used > 1) return false;

        // A second-level table is as wide as the longest code with its prefix.
        uint8_t widest[1 << kPrimary] = {};
        uint16_t reversed[kSymbols];
        for (int s = 0; s < symbols; ++s) {
            const int length = lengths[s];
            if (length == 0) continue;
            reversed[s] = reverse(next_code[length]++, length);
            if (length > kPrimary) {
                uint8_t& bits = widest[reversed[s] & ((1 << kPrimary) - 1)];
                bits = std::max(bits, static_cast<uint8_t>(length - kPrimary));
            }
        }
        std::fill(table_, table_ + (1 << kPrimary), 0u);
        uint32_t end = 1 << kPrimary;
        for (uint32_t prefix = 0; prefix < (1u << kPrimary); ++prefix) {
            if (widest[prefix] == 0) continue;
            if (end + (1u << widest[prefix]) > kSize) return false;
            table_[prefix] = end << 8 | kSubtable | widest[prefix];
            std::fill(table_ + end, table_ + end + (1u << widest[prefix]), 0u);
            end += 1u << widest[prefix];
        }
        for (int s = 0; s < symbols; ++s) {
            const int length = lengths[s];
            if (length == 0) continue;
            const uint32_t entry = static_cast<uint32_t>(s) << 8 | static_cast<uint32_t>(length);
            if (length <= kPrimary) {
                for (uint32_t i = reversed[s]; i < (1u << kPrimary); i += 1u << length) table_[i] = entry;
            } else {
                const uint32_t link = table_[reversed[s] & ((1 << kPrimary) - 1)];
                const uint32_t step = 1u << (length - kPrimary);
                for (uint32_t i = reversed[s] >> kPrimary; i < (1u << (link & 0x7F)); i += step) {
                    table_[(link >> 8) + i] = entry;
                }
            }
        }
        return true;
    }

    // The next symbol, or -1 if no code begins with the next bits. Needs kLongestCode bits in the reader.
    int read(BitReader& bits) const {
        uint32_t entry = table_[bits.peek(kPrimary)];
        if (entry & kSubtable) {
            const uint32_t index = bits.peek(kLongestCode) >> kPrimary & ((1u << (entry & 0x7F)) - 1);
            entry = table_[(entry >> 8) + index];
        }
        if (entry == 0) return -1;
        bits.drop(static_cast<int>(entry & 0x7F));
        return static_cast<int>(entry >> 8);
    }

private:
    // Second-level tables of a complete code never hold more than twice as many entries as there are symbols,
    // plus one widest table.
    static constexpr uint32_t kSize = (1u << kPrimary) + 2 * kSymbols + (1u << (kLongestCode - kPrimary));

    static uint16_t reverse(uint32_t code, int length) {
        uint32_t result = 0;
        for (int i = 0; i < length; ++i) result |= (code >> i & 1) << (length - 1 - i);
        return static_cast<uint16_t>(result);
    }

    uint32_t table_[kSize];
};

constexpr int kLiteralSymbols = 288;
constexpr int kDistanceSymbols = 32;
constexpr int kEndOfBlock = 256;
constexpr uint16_t kLengthBase[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                      31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
constexpr uint8_t kLengthExtra[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
constexpr uint16_t kDistanceBase[30] = {1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
                                        193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
constexpr uint8_t kDistanceExtra[30] = {0, 0, 0, 0, 1, 1, 2, 2,  3,  3,  4,  4,  5,  5,  6,
                                        6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13};

// Copies `length` bytes from `distance` back, in wide steps that may write up to 31 bytes too many.
void copy_match(uint8_t* out, size_t distance, size_t length) {
    const uint8_t* from = out - distance;
    if (distance == 1) {
        std::memset(out, *from, length);
        return;
    }
    // Until 32 bytes lie between source and target, each step doubles what may be copied at once.
    while (distance < 32 && length > distance) {
        std::memmove(out, from, distance);
        out += distance;
        length -= distance;
        distance *= 2;
    }
    if (distance < 32) {
        std::memmove(out, from, length);
        return;
    }
    for (size_t i = 0; i < length; i += 32) std::memcpy(out + i, from + i, 32);
}

class Inflater {
public:
    Inflater(const uint8_t* input, size_t input_size, uint8_t* output, size_t output_size)
        : bits_(input, input_size), begin_(output), out_(output), end_(output + output_size) {}

    const char* run() {
        for (bool last = false; !last;) {
            bits_.refill();
            last = bits_.take(1) != 0;
            const char* error = nullptr;
            switch (bits_.take(2)) {
                case 0: error = stored_block(); break;
                case 1: error = fixed_block(); break;
                case 2: error = dynamic_block(); break;
                default: error = "compressed data hold an unknown block type";
            }
            if (bits_.overrun()) return kTruncated;
            if (error != nullptr) return error;
        }
        return out_ == end_ ? nullptr : "compressed data end before the last pixel";
    }

private:
    const char* stored_block() {
        const uint8_t* header = bits_.take_bytes(4);
        if (header == nullptr) return kTruncated;
        const unsigned size = header[0] | header[1] << 8;
        if ((size ^ 0xFFFFu) != static_cast<unsigned>(header[2] | header[3] << 8)) return kBadCode;
        const uint8_t* bytes = bits_.take_bytes(size);
        if (bytes == nullptr) return kTruncated;
        if (static_cast<size_t>(end_ - out_) < size) return kTooLong;
        if (size != 0) std::memcpy(out_, bytes, size);
        out_ += size;
        return nullptr;
    }

    const char* fixed_block() {
        uint8_t lengths[kLiteralSymbols];
        std::fill(lengths, lengths + 144, uint8_t{8});
        std::fill(lengths + 144, lengths + 256, uint8_t{9});
        std::fill(lengths + 256, lengths + 280, uint8_t{7});
        std::fill(lengths + 280, lengths + 288, uint8_t{8});
        literals_.build(lengths, kLiteralSymbols);
        std::fill(lengths, lengths + kDistanceSymbols, uint8_t{5});
        distances_.build(lengths, kDistanceSymbols);
        return coded_block();
    }

    const char* dynamic_block() {
        const int literal_count = static_cast<int>(bits_.take(5)) + 257;
        const int distance_count = static_cast<int>(bits_.take(5)) + 1;
        const int meta_count = static_cast<int>(bits_.take(4)) + 4;
        if (literal_count > 286 || distance_count > 30) return kBadCode;
        constexpr uint8_t kOrder[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
        uint8_t meta_lengths[19] = {};
        for (int i = 0; i < meta_count; ++i) {
            bits_.refill();
            meta_lengths[kOrder[i]] = static_cast<uint8_t>(bits_.take(3));
        }
        Code<7, 19> meta;
        if (!meta.build(meta_lengths, 19)) return kBadCode;
        uint8_t lengths[kLiteralSymbols + kDistanceSymbols] = {};
        const int total = literal_count + distance_count;
        for (int i = 0; i < total;) {
            bits_.refill();
            if (bits_.overrun()) return kTruncated;
            const int symbol = meta.read(bits_);
            if (symbol < 0) return kBadCode;
            if (symbol < 16) {
                lengths[i++] = static_cast<uint8_t>(symbol);
                continue;
            }
            if (symbol == 16 && i == 0) return kBadCode;
            const uint8_t value = symbol == 16 ? lengths[i - 1] : uint8_t{0};
            const int repeat = symbol == 16   ? 3 + static_cast<int>(bits_.take(2))
                               : symbol == 17 ? 3 + static_cast<int>(bits_.take(3))
                                              : 11 + static_cast<int>(bits_.take(7));
            if (i + repeat > total) return kBadCode;
            std::fill(lengths + i, lengths + i + repeat, value);
            i += repeat;
        }
        if (lengths[kEndOfBlock] == 0) return kBadCode;
        if (!literals_.build(lengths, literal_count)) return kBadCode;
        if (!distances_.build(lengths + literal_count, distance_count)) return kBadCode;
        return coded_block();
    }

    const char* coded_block() {
        for (;;) {
            bits_.refill();  // 56 bits: a literal or a whole match (15 + 5 + 15 + 13) fits
            const int symbol = literals_.read(bits_);
            if (symbol < 0) return kBadCode;
            if (symbol < kEndOfBlock) {
                if (out_ == end_) return kTooLong;
                *out_++ = static_cast<uint8_t>(symbol);
                if (bits_.overrun()) return kTruncated;
                continue;
            }
            if (symbol == kEndOfBlock) return nullptr;
            if (symbol > 285) return kBadCode;
            const size_t length = kLengthBase[symbol - 257] + bits_.take(kLengthExtra[symbol - 257]);
            const int code = distances_.read(bits_);
            if (code < 0 || code > 29) return kBadCode;
            const size_t distance = kDistanceBase[code] + bits_.take(kDistanceExtra[code]);
            if (bits_.overrun()) return kTruncated;
            if (distance > static_cast<size_t>(out_ - begin_)) return "compressed data refer to bytes before their start";
            if (length > static_cast<size_t>(end_ - out_)) return kTooLong;
            copy_match(out_, distance, length);
            out_ += length;
        }
    }

    static constexpr const char* kTooLong = "compressed data hold more than the image";

    BitReader bits_;
    uint8_t* begin_;
    uint8_t* out_;
    uint8_t* end_;
    Code<10, kLiteralSymbols> literals_;
    Code<8, kDistanceSymbols> distances_;
};

}  // namespace

const char* inflate(const uint8_t* input, size_t input_size, uint8_t* output, size_t output_size) {
    return std::make_unique<Inflater>(input, input_size, output, output_size)->run();
}

}  // namespace spatialflow::evaluation
