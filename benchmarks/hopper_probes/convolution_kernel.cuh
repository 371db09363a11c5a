// SPDX-License-Identifier: Apache-2.0
// Prototype of a 3x3 convolution for Hopper: NHWC bf16, 256 to 256 channels, stride 1, bias and ReLU.
// For a work item, a block computes 256 pixels (four 8x8 sub-tiles of any level) by 128 outputs. For every chunk of 64
// channels the 10x10 halo of each sub-tile is loaded once by TMA for nine taps: A of tap (dy, dx) starts dy rows and dx
// pixels later. Warp 0 loads halos (two stages), warp 1 loads weights (five stages of one tap each), and two warpgroups
// multiply (wgmma m64n128k16).
// CLUSTER 2: two blocks compute the same outputs of different pixels. Each loads half of the weights for both.
// PLANES: halo as [8 planes][10][10][8 channels], no swizzle. ROWS: halo as [10][10][64 channels], 128-byte swizzle.
#pragma once

#include "probes.h"

namespace {

constexpr int C = 256, LEVELS = 5, TAPS = 9, CHUNKS = C / 64, OUTPUTS = 128, SUBTILES = 4;
constexpr int A_STAGES = 2, B_STAGES = 5, HALO_BYTES = 12800, HALO_STRIDE = 13312, B_BYTES = OUTPUTS * 128;
constexpr int A_BYTES = SUBTILES * HALO_STRIDE, STAGING_BYTES = 64 * OUTPUTS * 2;
constexpr int MEMORY = A_STAGES * A_BYTES + B_STAGES * B_BYTES + 2 * STAGING_BYTES + 1024;
static_assert(MEMORY <= 227 * 1024 - 2048, "dynamic and static shared memory of a block must fit");

enum Layout { PLANES, ROWS };
// Loads that are skipped. The sums are then wrong, but the time shows whether these loads limit the kernel.
enum Skip { LOAD_ALL = 0, SKIP_A = 1, SKIP_B = 2 };

struct Maps {
    CUtensorMap x[LEVELS], y[LEVELS], weights;
};

struct Subtile {
    int level, n, y, x;
};

struct Profile {
    uint64_t total, wait_a, wait_b, epilogue;  // cycles of the first consumer thread of a block
};

__device__ __forceinline__ uint64_t clock_if(bool wanted) { return wanted ? uint64_t(clock64()) : 0; }

// Current stage of a ring of mbarriers, and the parity to wait for.
template <int STAGES>
struct Ring {
    int stage = 0;
    unsigned parity;

    __device__ __forceinline__ explicit Ring(unsigned parity) : parity(parity) {}
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0, parity ^= 1;
        }
    }
};

// Block of the kernel: its work items, its shared memory, and the roles of its warps.
template <Layout LAYOUT, int CLUSTER, bool PROFILE>
struct Block {
    const Maps& maps;
    const Subtile* subtiles;
    int items, skip, rank, first_item, item_step;
    unsigned a_memory, b_memory, a_full, a_empty, b_full, b_empty;

    __device__ __forceinline__ Block(
        const Maps& maps, const Subtile* subtiles, int items, int skip, const unsigned char* memory,
        const uint64_t* barriers)
        : maps(maps),
          subtiles(subtiles),
          items(items),
          skip(skip),
          rank(blockIdx.x % CLUSTER),
          first_item(blockIdx.x / CLUSTER),
          item_step(gridDim.x / CLUSTER) {
        a_memory = (shared_address(memory) + 1023) / 1024 * 1024, b_memory = a_memory + A_STAGES * A_BYTES;
        a_full = shared_address(barriers), a_empty = a_full + 8 * A_STAGES;
        b_full = a_empty + 8 * A_STAGES, b_empty = b_full + 8 * B_STAGES;
    }

    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < A_STAGES; ++i) {
            mbarrier_init(a_full + 8 * i, 1), mbarrier_init(a_empty + 8 * i, 8);
        }
        for (int i = 0; i < B_STAGES; ++i) {
            mbarrier_init(b_full + 8 * i, 1), mbarrier_init(b_empty + 8 * i, 8 * CLUSTER);
        }
        mbarrier_init_fence();
    }
    __device__ __forceinline__ Subtile subtile(int item, int i) const {
        return subtiles[(item / 2 * CLUSTER + rank) * SUBTILES + i];
    }

    // ---- producers: one thread each ----

    __device__ __forceinline__ void load_halos() const {
        Ring<A_STAGES> ring(1);
        for (int item = first_item; item < items; item += item_step) {
            Subtile tiles[SUBTILES];
            for (int i = 0; i < SUBTILES; ++i) {
                tiles[i] = subtile(item, i);
            }
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                mbarrier_wait(a_empty + 8 * ring.stage, ring.parity, 30);
                load_halo(tiles, chunk, ring.stage);
                ring.advance();
            }
        }
    }
    __device__ __forceinline__ void load_halo(const Subtile (&tiles)[SUBTILES], int chunk, int stage) const {
        const unsigned full = a_full + 8 * stage;
        if (skip & SKIP_A) {
            mbarrier_arrive(full);
            return;
        }
        mbarrier_expect(full, SUBTILES * HALO_BYTES);
#pragma unroll
        for (int i = 0; i < SUBTILES; ++i) {
            const unsigned target = a_memory + stage * A_BYTES + i * HALO_STRIDE;
            const CUtensorMap* map = &maps.x[tiles[i].level];
            if constexpr (LAYOUT == PLANES) {
                tma_load_5d(target, map, 0, tiles[i].x - 1, tiles[i].y - 1, chunk * 8, tiles[i].n, full);
            } else {
                tma_load_4d(target, map, chunk * 64, tiles[i].x - 1, tiles[i].y - 1, tiles[i].n, full);
            }
        }
    }

    __device__ __forceinline__ void load_weights() const {
        Ring<B_STAGES> ring(1);
        for (int item = first_item; item < items; item += item_step) {
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                for (int tap = 0; tap < TAPS; ++tap) {
                    mbarrier_wait(b_empty + 8 * ring.stage, ring.parity, 31);
                    load_tap(item, chunk, tap, ring.stage);
                    ring.advance();
                }
            }
        }
    }
    __device__ __forceinline__ void load_tap(int item, int chunk, int tap, int stage) const {
        const unsigned full = b_full + 8 * stage;
        if (skip & SKIP_B) {
            mbarrier_arrive(full);
            return;
        }
        mbarrier_expect(full, B_BYTES);
        const unsigned target = b_memory + stage * B_BYTES + rank * (B_BYTES / CLUSTER);
        const int output = item % 2 * OUTPUTS + rank * (OUTPUTS / CLUSTER);
        if constexpr (CLUSTER > 1) {
            tma_load_3d_multicast(target, &maps.weights, chunk * 64, output, tap, full, (1 << CLUSTER) - 1);
        } else {
            tma_load_3d(target, &maps.weights, chunk * 64, output, tap, full);
        }
    }

    // ---- consumers: two warpgroups ----

    __device__ __forceinline__ void release_weights(int stage) const {
        if constexpr (CLUSTER > 1) {
            for (int block = 0; block < CLUSTER; ++block) {
                mbarrier_arrive_at(b_empty + 8 * stage, block);
            }
        } else {
            mbarrier_arrive(b_empty + 8 * stage);
        }
    }
    // Release the stage of halos before `stage`.
    __device__ __forceinline__ void release_halos(int stage) const {
        mbarrier_arrive(a_empty + 8 * (stage == 0 ? A_STAGES - 1 : stage - 1));
    }

    __device__ __forceinline__ void multiply(const float* bias, Profile* profile) const {
        const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), consumer = warpgroup - 1;
        const int warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0), lane = threadIdx.x % 32;
        const bool profiling = PROFILE && threadIdx.x == 128;
        const uint64_t begin = clock_if(profiling);
        Profile sum{};
        Ring<A_STAGES> a_ring(0);
        Ring<B_STAGES> b_ring(0);
        float d[2][OUTPUTS / 2];
        for (int t = 0; t < 2; ++t) {
            for (float& element : d[t]) {
                element = 0;
            }
        }
        for (int item = first_item; item < items; item += item_step) {
            int read_stage = -1;  // stage of weights that the previous group of products has read
#pragma unroll 1
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                const uint64_t time = clock_if(profiling);
                mbarrier_wait(a_full + 8 * a_ring.stage, a_ring.parity, 32);
                sum.wait_a += clock_if(profiling) - time;
                multiply_chunk(chunk, consumer, lane, profiling, a_ring.stage, b_ring, read_stage, sum, d);
                a_ring.advance();
            }
            wgmma_wait<0>();
            pin(d[0]);
            pin(d[1]);
            if (lane == 0) {
                release_weights(read_stage);
                release_halos(a_ring.stage);
            }
            const uint64_t time = clock_if(profiling);
            store_item(item, consumer, warp, lane, bias, d);
            sum.epilogue += clock_if(profiling) - time;
        }
        if (threadIdx.x % 128 == 0) {
            asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
        }
        // A block must not end while another block still arrives at its mbarriers.
        if constexpr (CLUSTER > 1) {
            cluster_synchronize();
        }
        if (profiling) {
            profile[blockIdx.x] = {clock_if(true) - begin, sum.wait_a, sum.wait_b, sum.epilogue};
        }
    }

    // Multiply the nine taps of one chunk of 64 channels.
    __device__ __forceinline__ void multiply_chunk(
        int chunk, int consumer, int lane, bool profiling, int a_stage, Ring<B_STAGES>& ring, int& read_stage,
        Profile& sum, float (&d)[2][OUTPUTS / 2]) const {
        const unsigned a_tile = a_memory + a_stage * A_BYTES + consumer * 2 * HALO_STRIDE;
#pragma unroll 1
        for (int tap = 0; tap < TAPS; ++tap) {
            const uint64_t time = clock_if(profiling);
            mbarrier_wait(b_full + 8 * ring.stage, ring.parity, 33);
            sum.wait_b += clock_if(profiling) - time;
            multiply_tap(a_tile, ring.stage, chunk, tap, d);
            if (lane == 0 && read_stage >= 0) {
                release_weights(read_stage);
                if (tap == 0) {
                    release_halos(a_stage);
                }
            }
            read_stage = ring.stage;
            ring.advance();
        }
    }
    __device__ __forceinline__ void multiply_tap(
        unsigned a_tile, int b_stage, int chunk, int tap, float (&d)[2][OUTPUTS / 2]) const {
        const int shift = tap / 3 * 10 + tap % 3;
        const uint64_t a = LAYOUT == PLANES ? matrix_descriptor(a_tile + shift * 16, 1600, 160, SWIZZLE_NONE)
                                            : matrix_descriptor(a_tile + shift * 128, 16, 1280, SWIZZLE_128);
        const uint64_t b = matrix_descriptor(b_memory + b_stage * B_BYTES, 16, 1024, SWIZZLE_128);
        constexpr int A_STEP = (LAYOUT == PLANES ? 3200 : 32) / 16;
        pin(d[0]);
        pin(d[1]);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < 4; ++s) {
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                Wgmma<OUTPUTS>::ss(d[t], a + t * (HALO_STRIDE / 16) + s * A_STEP, b + s * 2, (chunk | tap | s) != 0);
            }
        }
        wgmma_commit();
        wgmma_wait<1>();
        pin(d[0]);
        pin(d[1]);
    }

    // Store the two sub-tiles of a warpgroup through shared memory.
    __device__ __forceinline__ void store_item(
        int item, int consumer, int warp, int lane, const float* bias, const float (&d)[2][OUTPUTS / 2]) const {
        const unsigned staging = b_memory + B_STAGES * B_BYTES + consumer * STAGING_BYTES;
        const int first_output = item % 2 * OUTPUTS;
        const bool is_first_thread = threadIdx.x % 128 == 0;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            if (is_first_thread) {
                asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
            }
            asm volatile("bar.sync %0, 128;" ::"r"(1 + consumer) : "memory");
            stage_outputs(staging, warp, lane, bias + first_output, d[t]);
            fence_async_proxy();
            asm volatile("bar.sync %0, 128;" ::"r"(1 + consumer) : "memory");
            if (is_first_thread) {
                store_box(subtile(item, consumer * 2 + t), first_output, staging);
            }
        }
    }
    // Store outputs of a sub-tile to shared memory in bf16, with bias and ReLU.
    __device__ __forceinline__ void stage_outputs(
        unsigned staging, int warp, int lane, const float* bias, const float (&d)[OUTPUTS / 2]) const {
        const int row = warp * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
        for (int j = 0; j < OUTPUTS / 8; j += 2) {
            unsigned packed[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = (j + i / 2) * 8 + lane % 4 * 2, element = (j + i / 2) * 4 + i % 2 * 2;
                const float2 offset = *reinterpret_cast<const float2*>(bias + column);
                const __nv_bfloat162 pair =
                    __floats2bfloat162_rn(fmaxf(d[element] + offset.x, 0.f), fmaxf(d[element + 1] + offset.y, 0.f));
                packed[i] = *reinterpret_cast<const unsigned*>(&pair);
            }
            const int group = j + lane / 16;
            const unsigned target = staging + group / 8 * 8192 + row * 128 + ((group % 8 ^ (row & 7)) << 4);
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(target),
                         "r"(packed[0]), "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
                         : "memory");
        }
    }
    __device__ __forceinline__ void store_box(const Subtile& tile, int first_output, unsigned staging) const {
        const CUtensorMap* map = &maps.y[tile.level];
        for (int half = 0; half < 2; ++half) {
            asm volatile(
                "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(map),
                "r"(first_output + half * 64), "r"(tile.x), "r"(tile.y), "r"(tile.n), "r"(staging + half * 8192)
                : "memory");
        }
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
};

template <Layout LAYOUT, int CLUSTER, bool PROFILE>
__global__ void __launch_bounds__(384, 1) convolution_kernel(
    const __grid_constant__ Maps maps, const Subtile* subtiles, int items, const float* bias, int skip,
    Profile* profile) {
    extern __shared__ unsigned char memory[];
    __shared__ alignas(8) uint64_t barriers[2 * (A_STAGES + B_STAGES)];
    __shared__ float bias_shared[C];
    const Block<LAYOUT, CLUSTER, PROFILE> block(maps, subtiles, items, skip, memory, barriers);
    if (threadIdx.x == 0) {
        block.init_barriers();
    }
    if (threadIdx.x < C) {
        bias_shared[threadIdx.x] = bias[threadIdx.x];
    }
    __syncthreads();
    if constexpr (CLUSTER > 1) {
        cluster_synchronize();
    }
    if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) {
            block.load_halos();
        } else if (threadIdx.x == 32) {
            block.load_weights();
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    block.multiply(bias_shared, profile);
}

}  // namespace
