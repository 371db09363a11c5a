# SPDX-License-Identifier: Apache-2.0
#
# The CUDA kernels as plain C++ under the SIMT interpreter (docs/simt.md), registered for CPU tensors. The library stands
# in for the CPU library: operators without a CUDA kernel come from their CPU source. With SPATIALFLOW_SANITIZE it is
# another library, so that both can be built.
find_package(Threads REQUIRED)
set(simt_sources "")
foreach(op IN LISTS ops cuda_shared)
  if(op IN_LIST cuda_ops OR op IN_LIST cuda_shared)
    # A source has one language in a folder, and the CUDA library compiles the .cu file as CUDA.
    set(wrapper "${CMAKE_BINARY_DIR}/simt/${op}.cpp")
    file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#include \"cuda/${op}.cu\"\n")
    # Products are rounded before they are added to, as decisions at a threshold expect.
    set_source_files_properties("${wrapper}" PROPERTIES COMPILE_OPTIONS "-Wno-unknown-pragmas;-ffp-contract=off")
    list(APPEND simt_sources "${wrapper}")
  else()
    list(APPEND simt_sources "csrc/cpu/${op}.cpp")
  endif()
endforeach()
spatialflow_library(spatialflow_simt ${simt_sources})
target_link_libraries(spatialflow_simt PRIVATE spatialflow_torch Threads::Threads)
target_compile_options(spatialflow_simt PRIVATE -march=native -g1)
if(SPATIALFLOW_SANITIZE)
  set_target_properties(spatialflow_simt PROPERTIES OUTPUT_NAME spatialflow_simt_sanitized)
  target_compile_options(spatialflow_simt PRIVATE -O1 -fno-sanitize-recover=all)
endif()
