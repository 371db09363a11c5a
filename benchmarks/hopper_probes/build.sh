#!/bin/sh
# Build the probes into build/hopper_probes of the repository. The target machine needs only the driver.
set -e
cd "$(dirname "$0")"
out=../../build/hopper_probes
mkdir -p "$out"
python3 generate_wgmma.py > "$out/wgmma.cuh"
flags="-gencode=arch=compute_90a,code=sm_90a -std=c++17 -O3 -Xcompiler=-Wall,-Wextra -Xptxas=-warn-spills -I$out -I../../csrc"
objects=
for name in layouts rates latencies convolution main; do
  nvcc $flags -c $name.cu -o "$out/$name.o"
  objects="$objects $out/$name.o"
done
nvcc $flags -cudart static $objects -o "$out/hopper_probes"
strip "$out/hopper_probes"
