# Finds torch's headers and libraries by asking Python where the package lies, and sets
# DIJIANG_HAS_TORCH. find_package(Torch) is not used: it overrides CMAKE_CUDA_ARCHITECTURES, adds
# global compiler flags, and pulls in libraries that the stable ABI does not need.
set(DIJIANG_HAS_TORCH OFF)
if(NOT DIJIANG_PYTHON AND DIJIANG_TORCH STREQUAL "OFF")
  return()
endif()

if(NOT DEFINED Python_EXECUTABLE AND EXISTS ${CMAKE_SOURCE_DIR}/.venv/bin/python)
  set(Python_EXECUTABLE ${CMAKE_SOURCE_DIR}/.venv/bin/python)
endif()
set(Python_FIND_VIRTUALENV FIRST)
find_package(Python COMPONENTS Interpreter Development.Module)
if(NOT Python_Interpreter_FOUND AND NOT DIJIANG_TORCH STREQUAL "ON")
  message(STATUS "dijiang: kernels alone (no Python found)")
  set(DIJIANG_PYTHON OFF)
  return()
endif()
if(DIJIANG_TORCH STREQUAL "OFF")
  return()
endif()

if(NOT DIJIANG_TORCH_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(DIJIANG_TORCH_DIR "${torch_dir}" CACHE PATH "torch package folder (include/, lib/)" FORCE)
endif()
if(NOT EXISTS "${DIJIANG_TORCH_DIR}/include/torch/csrc/stable/library.h")
  if(DIJIANG_TORCH STREQUAL "ON")
    message(FATAL_ERROR "DIJIANG_TORCH=ON, but ${Python_EXECUTABLE} has no torch >= 2.10: install "
      "it, or set DIJIANG_TORCH_DIR to a folder with include/ and lib/")
  endif()
  message(STATUS "dijiang: no torch operators (${Python_EXECUTABLE} has no torch >= 2.10)")
  return()
endif()
set(DIJIANG_HAS_TORCH ON)
set(DIJIANG_TORCH_CPU_LIBRARY ${DIJIANG_TORCH_DIR}/lib/libtorch_cpu.so)
if(EXISTS ${DIJIANG_TORCH_DIR}/lib/libtorch_cuda.so)
  set(DIJIANG_TORCH_CUDA_LIBRARY ${DIJIANG_TORCH_DIR}/lib/libtorch_cuda.so)
elseif(DIJIANG_HAS_CUDA)
  message(STATUS "dijiang: no CUDA operators (the torch found is a CPU build)")
endif()

# A library of torch operators against the stable ABI of torch 2.10, so that one build serves 2.10
# and every later torch. SHARED, not MODULE, so that C++ programs can link it too.
function(dijiang_add_ops_library name)
  add_library(${name} SHARED ${ARGN})
  target_include_directories(${name} PRIVATE csrc)
  target_include_directories(${name} SYSTEM PRIVATE ${DIJIANG_TORCH_DIR}/include)
  target_compile_definitions(${name} PRIVATE TORCH_TARGET_VERSION=0x020a000000000000ULL)
  target_compile_options(${name} PRIVATE -Wall -Wextra)
  # dijiang_core's include directory alone is PUBLIC, for <dijiang/ops.h>.
  target_include_directories(${name} PUBLIC
    $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:include>)
  target_link_libraries(${name} PRIVATE $<BUILD_INTERFACE:dijiang_core>)
  set_target_properties(${name} PROPERTIES PREFIX "" CXX_VISIBILITY_PRESET hidden
    BUILD_RPATH ${DIJIANG_TORCH_DIR}/lib)
endfunction()
