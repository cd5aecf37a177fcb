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

# dijiang::core, and where built dijiang::core_cuda, dijiang::torch, dijiang::torch_cuda.
install(TARGETS dijiang_core EXPORT dijiangTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
if(TARGET dijiang_core_cuda)
  install(TARGETS dijiang_core_cuda EXPORT dijiangTargets
    ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
foreach(pair dijiang_ops:torch dijiang_ops_cuda:torch_cuda)
  string(REPLACE ":" ";" pair ${pair})
  list(GET pair 0 target)
  list(GET pair 1 name)
  if(TARGET ${target})
    set_target_properties(${target} PROPERTIES EXPORT_NAME ${name})
    # Programs reach the operators through torch's registry, not through symbols of the library.
    target_link_options(${target} INTERFACE "LINKER:--no-as-needed")
    install(TARGETS ${target} EXPORT dijiangTargets
      LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  endif()
endforeach()
install(DIRECTORY include/dijiang DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/dijiang)
install(EXPORT dijiangTargets NAMESPACE dijiang:: DESTINATION ${package_dir})
configure_package_config_file(cmake/dijiangConfig.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/dijiangConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/dijiangConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/dijiangConfig.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/dijiangConfigVersion.cmake DESTINATION ${package_dir})
