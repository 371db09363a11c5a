// SPDX-License-Identifier: Apache-2.0
// hopper_probes NAME: run one probe, which prints its findings as JSON lines. Without a name: list the probes.
#include "probes.h"

int main(int argc, char** argv) {
    const struct {
        const char* name;
        void (*run)();
    } probes[] = {
        {"device", probe_device},
        {"planes", probe_planes},
        {"rows", probe_rows},
        {"fragments", probe_fragments},
        {"tma", probe_tma},
        {"red", probe_red},
        {"mma", probe_mma},
        {"wgmma", probe_wgmma},
        {"l2", probe_l2},
        {"hbm", probe_hbm},
        {"latency", probe_latency},
        {"launch", probe_launch},
        {"convolution_planes", probe_convolution_planes},
        {"convolution_rows", probe_convolution_rows},
        {"convolution_planes_cluster", probe_convolution_planes_cluster},
        {"convolution_rows_cluster", probe_convolution_rows_cluster}};
    for (const auto& probe : probes) {
        if (argc < 2) {
            puts(probe.name);
        } else if (!strcmp(argv[1], probe.name)) {
            probe_name = probe.name;
            probe.run();
            return 0;
        }
    }
    return argc < 2 ? 0 : 2;
}
