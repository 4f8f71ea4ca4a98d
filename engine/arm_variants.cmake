# GCC knows SME since version 14. With an older one there are no variants of the CPU backend for it, and a processor with
# SME uses the best of the others. They are configured, but no target depends on them, so they are not compiled. Included
# before llama.cpp's CMakeLists.txt, for builds for all CPUs on ARM.
function(add_dependencies target)
    foreach(needed IN LISTS ARGN)
        if (NOT (needed MATCHES "^ggml-cpu-armv9\\." AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU"
                 AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 14))
            _add_dependencies(${target} ${needed})
        endif()
    endforeach()
endfunction()
