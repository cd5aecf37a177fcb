# Two installations from one build:
#   component python  the libraries of the Python package, into PREFIX/dijiang (setup.py uses it)
#   default           headers, libraries and find_package(dijiang) for C++ programs
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

add_custom_target(python_libraries)
foreach(target dijiang_ops dijiang_ops_cuda _core)
  if(TARGET ${target})
    add_dependencies(python_libraries ${target})
    install(TARGETS ${target} LIBRARY DESTINATION dijiang COMPONENT python EXCLUDE_FROM_ALL)
  endif()
endforeach()

set(exported dijiang_core)
if(TARGET dijiang_core_cuda)
  list(APPEND exported dijiang_core_cuda)
endif()
install(TARGETS ${exported} EXPORT dijiangTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/dijiang DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT dijiangTargets NAMESPACE dijiang:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/dijiang)
