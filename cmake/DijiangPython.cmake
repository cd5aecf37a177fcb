# The pybind11 module _core: the kernels on NumPy arrays, without torch.
if(NOT pybind11_DIR)
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 CONFIG QUIET)
if(NOT pybind11_FOUND)
  message(STATUS "dijiang: no _core module (${Python_EXECUTABLE} has no pybind11)")
  return()
endif()
pybind11_add_module(_core MODULE NO_EXTRAS ${python_sources})  # without slow link-time optimisation
target_include_directories(_core PRIVATE csrc)
target_link_libraries(_core PRIVATE dijiang_core)
target_compile_options(_core PRIVATE -Wall -Wextra)
set(cuda_architectures "")
if(DIJIANG_HAS_CUDA)
  string(REPLACE ";" "," cuda_architectures "${CMAKE_CUDA_ARCHITECTURES}")
endif()
target_compile_definitions(_core PRIVATE
  DIJIANG_VERSION="${PROJECT_VERSION}"
  DIJIANG_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
  DIJIANG_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}"
  DIJIANG_CUDA_ARCHITECTURES="${cuda_architectures}")
