# Language level, build type, warnings and optimisation flags shared by every target.
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_CXX_FLAGS_RELEASE "-O3")  # asserts stay on: they cost nothing measurable here

find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()

# Never -ffast-math: infinities and NaN keep their meaning. -march=native is not used either; the
# kernels choose AVX2 or AVX-512 at run time.
include(CheckCXXCompilerFlag)
add_library(dijiang_kernel_flags INTERFACE)
target_compile_options(dijiang_kernel_flags INTERFACE
  -Wall -Wextra
  -Wno-maybe-uninitialized  # g++ 12 warns inside its own AVX-512 header
  -fno-math-errno -fno-trapping-math -ffp-contract=fast)
check_cxx_compiler_flag(-mprefer-vector-width=512 DIJIANG_PREFER_VECTOR_WIDTH)
if(DIJIANG_PREFER_VECTOR_WIDTH)
  target_compile_options(dijiang_kernel_flags INTERFACE -mprefer-vector-width=512)
endif()

if(DIJIANG_SANITIZE)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${DIJIANG_SANITIZE}>
    $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer>
    $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize-recover=all>)
  add_link_options(-fsanitize=${DIJIANG_SANITIZE})
  set(DIJIANG_TORCH OFF)   # sanitized libraries do not load into an ordinary Python
  set(DIJIANG_PYTHON OFF)
endif()
