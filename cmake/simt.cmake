# SPDX-License-Identifier: Apache-2.0
#
# The CUDA kernels compiled as C++ for the SIMT interpreter (docs/simt.md) and registered for CPU tensors. Tests load
# this library instead of the CPU library.
find_package(Threads REQUIRED)
set(simt_sources "")
foreach(source IN LISTS ops shared_sources cuda_only_sources)
  # CMake compiles a source in one language only, and the CUDA library compiles the .cu file as CUDA.
  set(wrapper "${CMAKE_BINARY_DIR}/simt/${source}.cpp")
  file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#include \"cuda/${source}.cu\"\n")
  list(APPEND simt_sources "${wrapper}")
endforeach()
# Without fused multiply-adds, so that decisions at a threshold equal those of the CPU and CUDA libraries.
set_source_files_properties(${simt_sources} PROPERTIES COMPILE_OPTIONS "-Wno-unknown-pragmas;-ffp-contract=off")
spatialflow_library(spatialflow_simt ${simt_sources})
target_link_libraries(spatialflow_simt PRIVATE spatialflow_torch Threads::Threads)
target_compile_options(spatialflow_simt PRIVATE -march=native -g1)
