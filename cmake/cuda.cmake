# SPDX-License-Identifier: Apache-2.0
#
# The CUDA library. Building it needs the toolkit but no GPU.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  if(DEFINED ENV{TORCH_CUDA_ARCH_LIST})
    # "8.0;9.0a+PTX" -> "80-real;90a"
    string(REPLACE " " ";" listed "$ENV{TORCH_CUDA_ARCH_LIST}")
    set(CMAKE_CUDA_ARCHITECTURES "")
    foreach(entry IN LISTS listed)
      string(REPLACE "." "" number "${entry}")
      if(number MATCHES "\\+PTX$")
        string(REPLACE "+PTX" "" number "${number}")
        list(APPEND CMAKE_CUDA_ARCHITECTURES "${number}")
      else()
        list(APPEND CMAKE_CUDA_ARCHITECTURES "${number}-real")
      endif()
    endforeach()
  else()
    set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90a-real 100-real 120-real)
  endif()
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)

# The library uses symbols of libtorch_cuda.so, which a CPU-only torch lacks. It is linked with a stub of the same
# soname. At run time the name resolves to the libtorch_cuda.so that torch has loaded.
set(stub_dir "${CMAKE_BINARY_DIR}/torch_cuda_stub")
string(CONCAT stub
  "extern \"C\" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n"
  "extern \"C\" int torch_get_cuda_stream_from_pool(bool, int, void**) { return 1; }\n"
  "extern \"C\" int torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char**) { return 1; }\n"
  "extern \"C\" void torch_c10_cuda_free_error_msg(char*) {}\n")
file(CONFIGURE OUTPUT "${stub_dir}/torch_cuda_stub.cpp" CONTENT "${stub}" @ONLY)
add_library(torch_cuda_stub SHARED "${stub_dir}/torch_cuda_stub.cpp")
set_target_properties(torch_cuda_stub PROPERTIES
  OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY "${stub_dir}" CXX_VISIBILITY_PRESET default)

set(cuda_sources ${ops} ${shared_sources} ${cuda_only_sources})
foreach(list IN ITEMS cuda_sources cuda_unfused)
  list(TRANSFORM ${list} PREPEND "csrc/cuda/")
  list(TRANSFORM ${list} APPEND ".cu")
endforeach()
set_source_files_properties(${cuda_unfused} PROPERTIES COMPILE_OPTIONS --fmad=false)
spatialflow_library(spatialflow_cuda ${cuda_sources})
target_link_libraries(spatialflow_cuda PRIVATE spatialflow_torch torch_cuda_stub)
target_link_options(spatialflow_cuda PRIVATE -Wl,--no-as-needed)
target_compile_definitions(spatialflow_cuda PRIVATE USE_CUDA)
target_compile_options(spatialflow_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo --compress-mode=size --expt-relaxed-constexpr -Xcompiler=-Wall>)
set_target_properties(spatialflow_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
