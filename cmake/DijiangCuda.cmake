# Finds the CUDA compiler and sets DIJIANG_HAS_CUDA. Architectures are CMake's ordinary
# CMAKE_CUDA_ARCHITECTURES; the default carries code for sm_80 (and its kin) and sm_90a, and PTX of
# compute_80 for what is newer.
set(DIJIANG_HAS_CUDA OFF)
if(DIJIANG_CUDA STREQUAL "OFF")
  message(STATUS "dijiang: CPU build (DIJIANG_CUDA=OFF)")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(DIJIANG_CUDA STREQUAL "ON")
    message(FATAL_ERROR "DIJIANG_CUDA=ON, but no CUDA compiler was found: put nvcc on PATH or set "
      "CMAKE_CUDA_COMPILER")
  endif()
  message(STATUS "dijiang: CPU build (no CUDA compiler found)")
  return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "80;90a-real" CACHE STRING "CUDA architectures")
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)  # torch's own: two runtimes in one process waste memory
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
set(DIJIANG_HAS_CUDA ON)
message(STATUS "dijiang: CUDA ${CMAKE_CUDA_COMPILER_VERSION} build for ${CMAKE_CUDA_ARCHITECTURES}")

add_library(dijiang_cuda_flags INTERFACE)
# --threads: the architectures of a file are compiled side by side.
target_compile_options(dijiang_cuda_flags INTERFACE
  "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra;--expt-relaxed-constexpr;-Xptxas=-warn-spills;--threads=2>")
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13)  # whose drivers all know it
  # A fifth of the size: 17 MB for 89.
  target_compile_options(dijiang_cuda_flags INTERFACE
    "$<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>")
endif()
