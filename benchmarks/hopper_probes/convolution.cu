// SPDX-License-Identifier: Apache-2.0
// Checks and times of the prototype of a 3x3 convolution: every output is compared with a convolution in float32.
#include "convolution_kernel.cuh"

namespace {

// Convolution in float32: a thread computes one output channel of eight adjacent pixels. Weights: [tap][c][o].
__global__ void __launch_bounds__(C)
    reference_kernel(const bf16* x, const bf16* weights, const float* bias, float* y, int h, int w) {
    __shared__ float pixels[10][C];
    const int o = threadIdx.x, n = blockIdx.z, row = blockIdx.y, column = blockIdx.x * 8;
    float sums[8] = {};
    for (int dy = 0; dy < 3; ++dy) {
        __syncthreads();
        for (int i = 0; i < 10; ++i) {
            const int yy = row + dy - 1, xx = column + i - 1;
            const bool inside = yy >= 0 && yy < h && xx >= 0 && xx < w;
            pixels[i][o] = inside ? __bfloat162float(x[((size_t(n) * h + yy) * w + xx) * C + o]) : 0.f;
        }
        __syncthreads();
        for (int c = 0; c < C; ++c) {
            for (int dx = 0; dx < 3; ++dx) {
                const float weight = __bfloat162float(weights[((dy * 3 + dx) * C + c) * C + o]);
                for (int i = 0; i < 8; ++i) {
                    sums[i] += weight * pixels[i + dx][c];
                }
            }
        }
    }
    for (int i = 0; i < 8 && column + i < w; ++i) {
        y[((size_t(n) * h + row) * w + column + i) * C + o] = fmaxf(sums[i] + bias[o], 0.f);
    }
}

struct Mismatches {
    int count, shown;
    struct {
        int n, y, x, channel;
        float expected, actual;
    } first[8];
};

__global__ void compare_kernel(
    const float* expected, const bf16* actual, size_t count, int h, int w, float absolute, float relative,
    Mismatches* mismatches) {
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
        const float a = expected[i], b = __bfloat162float(actual[i]);
        if (fabsf(a - b) <= absolute + relative * fabsf(a)) {
            continue;
        }
        atomicAdd(&mismatches->count, 1);
        const int slot = atomicAdd(&mismatches->shown, 1);
        if (slot >= 8) {
            continue;
        }
        const size_t pixel = i / C;
        mismatches->first[slot] = {int(pixel / w / h), int(pixel / w % h), int(pixel % w), int(i % C), a, b};
    }
}

struct Problem {
    int images, levels, heights[LEVELS], widths[LEVELS];
    std::vector<Buffer<bf16>*> x, y;
    std::vector<Buffer<float>*> expected;
    Maps maps{};
    std::vector<Subtile> subtiles;
    double pixels = 0;

    Problem(Layout layout, int cluster, int images, int levels, const Buffer<bf16>& weights)
        : images(images), levels(levels) {
        const int sizes[LEVELS][2] = {{100, 168}, {50, 84}, {25, 42}, {13, 21}, {7, 11}};
        CUresult verdict = encode_weights(&maps.weights, weights.data, TAPS, C, C, OUTPUTS / cluster);
        for (int level = 0; level < levels; ++level) {
            const int h = heights[level] = sizes[level][0], w = widths[level] = sizes[level][1];
            const size_t count = size_t(images) * h * w * C;
            x.push_back(new Buffer<bf16>(random_values(count, 100 + level)));
            y.push_back(new Buffer<bf16>(count));
            expected.push_back(new Buffer<float>(count));
            CUtensorMap* map = &maps.x[level];
            if (verdict == CUDA_SUCCESS) {
                verdict = layout == PLANES ? encode_planes(map, x[level]->data, images, h, w, C)
                                           : encode_rows(map, x[level]->data, images, h, w, C);
            }
            if (verdict == CUDA_SUCCESS) {
                verdict = encode_rows(&maps.y[level], y[level]->data, images, h, w, C, 8, 8);
            }
            const int rows = (h + 7) / 8, columns = (w + 7) / 8;
            for (int i = 0; i < images * rows * columns; ++i) {
                subtiles.push_back({level, i / columns / rows, i / columns % rows * 8, i % columns * 8});
            }
            pixels += double(images) * h * w;
        }
        if (verdict != CUDA_SUCCESS) {
            finding("\"error\": \"map refused\", \"code\": %d", int(verdict));
            exit(1);
        }
        // A sub-tile outside its level loads zeros and stores nothing.
        while (subtiles.size() % (SUBTILES * cluster)) {
            subtiles.push_back({0, 0, 4096, 0});
        }
    }

    ~Problem() {
        for (int level = 0; level < levels; ++level) {
            delete x[level], delete y[level], delete expected[level];
        }
    }

    // Print up to eight elements per level that differ from the reference; return the number of all that differ.
    int compare(const bf16* transposed_weights, const float* bias, float absolute, float relative, const char* what) {
        int wrong = 0;
        Buffer<Mismatches> mismatches(1);
        for (int level = 0; level < levels; ++level) {
            const int h = heights[level], w = widths[level];
            reference_kernel<<<dim3((w + 7) / 8, h, images), C>>>(
                x[level]->data, transposed_weights, bias, expected[level]->data, h, w);
            mismatches.zero();
            compare_kernel<<<1024, 256>>>(
                expected[level]->data, y[level]->data, y[level]->size, h, w, absolute, relative, mismatches.data);
            finish("compare_kernel");
            const Mismatches result = mismatches.host()[0];
            wrong += result.count;
            for (int i = 0; i < std::min(result.shown, 8); ++i) {
                const auto& mismatch = result.first[i];
                finding(
                    "\"case\": \"%s\", \"level\": %d, \"n\": %d, \"y\": %d, \"x\": %d, \"channel\": %d, \"expected\": "
                    "%.6g, "
                    "\"got\": \"%.6g\", \"wrong_of_level\": %d",
                    what, level, mismatch.n, mismatch.y, mismatch.x, mismatch.channel, mismatch.expected,
                    mismatch.actual, result.count);
            }
        }
        return wrong;
    }

    void spoil_outputs() {
        for (Buffer<bf16>* buffer : y) {
            CHECK(cudaMemset(buffer->data, 0xff, buffer->size * sizeof(bf16)));
        }
    }
};

std::vector<bf16> transposed(const std::vector<bf16>& weights) {
    std::vector<bf16> result(weights.size());
    for (int tap = 0; tap < TAPS; ++tap) {
        for (int o = 0; o < C; ++o) {
            for (int c = 0; c < C; ++c) {
                result[(tap * C + c) * C + o] = weights[(tap * C + o) * C + c];
            }
        }
    }
    return result;
}

void upload(const Buffer<bf16>& target, const std::vector<bf16>& values) {
    CHECK(cudaMemcpy(target.data, values.data(), values.size() * sizeof(bf16), cudaMemcpyHostToDevice));
}

// Locate an error: run the convolution with weights that are the identity at one tap and zero elsewhere, tap by tap.
// Each output is then the ReLU of a shifted input. `launch(bias)` runs the convolution.
template <typename Launch>
void probe_taps(Problem& problem, const Buffer<bf16>& weights, Launch launch) {
    Buffer<float> no_bias(C);
    no_bias.zero();
    for (int tap = 0; tap < TAPS; ++tap) {
        std::vector<bf16> copying(TAPS * C * C, __float2bfloat16(0));
        for (int c = 0; c < C; ++c) {
            copying[(tap * C + c) * C + c] = __float2bfloat16(1);
        }
        Buffer<bf16> transposed_device(transposed(copying));
        upload(weights, copying);
        problem.spoil_outputs();
        launch(no_bias.data);
        finish("convolution_kernel, one tap");
        char what[40];
        snprintf(what, sizeof(what), "identity at tap %d", tap);
        const int wrong = problem.compare(transposed_device.data, no_bias.data, 0, 0, what);
        finding("\"case\": \"%s\", \"wrong\": %d", what, wrong);
    }
}

// Return the milliseconds per launch of `runs` launches in a CUDA graph, the least of three replays.
template <typename Launch>
double graph_milliseconds(int runs, Launch launch) {
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CHECK(cudaStreamCreate(&stream));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < runs; ++i) {
        launch(stream);
    }
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&executable, graph, 0));
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    float best = 1e9f;
    for (int repeat = 0; repeat < 4; ++repeat) {
        CHECK(cudaEventRecord(begin, stream));
        CHECK(cudaGraphLaunch(executable, stream));
        CHECK(cudaEventRecord(end, stream));
        finish("convolution_kernel, timed");
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (repeat) {
            best = std::min(best, ms / runs);
        }
    }
    CHECK(cudaGraphExecDestroy(executable));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    CHECK(cudaStreamDestroy(stream));
    return best;
}

template <Layout LAYOUT, int CLUSTER>
void run_convolution() {
    prepare_device();
    const std::vector<bf16> weights = random_values(TAPS * C * C, 7, 0.05f);
    std::vector<float> bias(C);
    for (int o = 0; o < C; ++o) {
        bias[o] = 0.01f * float(o % 32 - 16);
    }
    Buffer<bf16> weights_device(weights), transposed_device(transposed(weights));
    Buffer<float> bias_device(bias);
    const int blocks = multiprocessors() / CLUSTER * CLUSTER;
    Buffer<Profile> profile(blocks);
    profile.zero();
    const auto kernel = convolution_kernel<LAYOUT, CLUSTER, false>;
    const auto profiled_kernel = convolution_kernel<LAYOUT, CLUSTER, true>;
    allow_shared_memory(kernel, MEMORY);
    allow_shared_memory(profiled_kernel, MEMORY);

    const struct {
        const char* name;
        int images, levels;
    } cases[] = {{"P3", 1, 1}, {"P3..P7", 1, 5}, {"P3..P7, 8 images", 8, 5}};
    for (const auto& item : cases) {
        Problem problem(LAYOUT, CLUSTER, item.images, item.levels, weights_device);
        Buffer<Subtile> subtiles(problem.subtiles);
        const int items = int(problem.subtiles.size()) / (SUBTILES * CLUSTER) * 2;
        const auto launch = [&](decltype(kernel) chosen, cudaStream_t stream, const float* bias, int skip) {
            cudaLaunchAttribute attribute{};
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim.x = CLUSTER, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
            cudaLaunchConfig_t config{};
            config.gridDim = dim3(std::min(blocks, items * CLUSTER)), config.blockDim = dim3(384);
            config.dynamicSmemBytes = MEMORY, config.stream = stream;
            config.attrs = &attribute, config.numAttrs = CLUSTER > 1;
            const Subtile* list = subtiles.data;
            CHECK(cudaLaunchKernelEx(&config, chosen, problem.maps, list, items, bias, skip, profile.data));
        };
        problem.spoil_outputs();
        launch(kernel, nullptr, bias_device.data, LOAD_ALL);
        finish("convolution_kernel");
        const int wrong = problem.compare(transposed_device.data, bias_device.data, 0.01f, 0.01f, item.name);
        if (wrong && &item == cases) {
            probe_taps(problem, weights_device, [&](const float* bias) { launch(kernel, nullptr, bias, LOAD_ALL); });
            upload(weights_device, weights);
        }

        double times[4];
        for (int skip = LOAD_ALL; skip <= (SKIP_A | SKIP_B); ++skip) {
            times[skip] =
                graph_milliseconds(20, [&](cudaStream_t stream) { launch(kernel, stream, bias_device.data, skip); });
        }
        launch(profiled_kernel, nullptr, bias_device.data, LOAD_ALL);
        finish("convolution_kernel, profiled");
        Profile sum{};
        for (const Profile& block : profile.host()) {
            sum.total += block.total, sum.wait_a += block.wait_a, sum.wait_b += block.wait_b,
                sum.epilogue += block.epilogue;
        }
        const int rounds = (items * CLUSTER + blocks - 1) / blocks;
        const double cycles = double(sum.total) + 1, flop = 2.0 * problem.pixels * C * C * TAPS;
        finding(
            "\"case\": \"%s\", \"cluster\": %d, \"right\": %s, \"wrong\": %d, \"us\": %.2f, \"tflops\": %.1f, "
            "\"items_of_blocks\": %d, \"rounds\": %d, \"us_per_round\": %.2f, "
            "\"tflops_of_full_tiles_and_rounds\": %.1f, "
            "\"us_without_halo_loads\": %.2f, \"us_without_weight_loads\": %.2f, \"us_without_loads\": %.2f, "
            "\"share_waiting_for_halos\": %.3f, \"share_waiting_for_weights\": %.3f, \"share_epilogue\": %.3f",
            item.name, CLUSTER, wrong ? "false" : "true", wrong, times[0] * 1e3, flop / times[0] * 1e-9,
            items * CLUSTER, rounds, times[0] * 1e3 / rounds,
            2.0 * 256 * OUTPUTS * C * TAPS * blocks * rounds / times[0] * 1e-9, times[SKIP_A] * 1e3,
            times[SKIP_B] * 1e3, times[SKIP_A | SKIP_B] * 1e3, double(sum.wait_a) / cycles, double(sum.wait_b) / cycles,
            double(sum.epilogue) / cycles);
    }
}

}  // namespace

void probe_convolution_planes() { run_convolution<PLANES, 1>(); }
void probe_convolution_rows() { run_convolution<ROWS, 1>(); }
void probe_convolution_planes_cluster() { run_convolution<PLANES, 2>(); }
void probe_convolution_rows_cluster() { run_convolution<ROWS, 2>(); }
