# Half of the time of a build goes into chat formats, images, HTTP and test programs, which take no time when a model runs:
# many small sources with the same large headers. Compile them in groups and at -Og; also what loads and quantizes models,
# and the memory of other architectures. GCC takes two thirds of the time of -O1 for it, and no more than for -O0. CMake
# includes this file before the CMakeLists.txt of the pinned llama.cpp.
#
# GCC collects garbage less often, which saves a tenth of its time and takes a fifth more memory.
#
# Headers are precompiled for upstream's sources only: ours must include what they use. ccache keeps no objects that were
# compiled with them, and after them GCC 12 rejects arm_sve.h.

add_compile_options($<$<COMPILE_LANG_AND_ID:CXX,GNU>:--param=ggc-min-heapsize=400000>)

# Assertions name their source without the folder of this machine, so equal sources give equal libraries.
add_compile_options("-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=")

# With KIMI_PORTABLE the libraries need no newer libstdc++ than that of GCC 11.
if (KIMI_PORTABLE)
    add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:SHELL:-include ${CMAKE_CURRENT_LIST_DIR}/portable.h>")
endif()

# Sets `result` to the sources of the target, with their folder, whose names match.
function(kimi_sources result target names)
    get_target_property(sources ${target} SOURCES)
    get_target_property(folder ${target} SOURCE_DIR)
    list(FILTER sources INCLUDE REGEX "${names}")
    list(TRANSFORM sources PREPEND "${folder}/")
    set(${result} ${sources} PARENT_SCOPE)
endfunction()

# Compiles the target's sources in groups of `size`, and those whose names match `alone` by themselves.
function(kimi_group target size alone)
    kimi_sources(sources ${target} "${alone}")
    set_source_files_properties(${sources} TARGET_DIRECTORY ${target} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
    set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE ${size})
endfunction()

# Sets properties of the target's sources whose names match.
function(kimi_set_sources target names)
    if (TARGET ${target})
        kimi_sources(sources ${target} "${names}")
        set_source_files_properties(${sources} TARGET_DIRECTORY ${target} PROPERTIES ${ARGN})
    endif()
endfunction()

function(kimi_precompile target)
    if (TARGET ${target} AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
        target_precompile_headers(${target} PRIVATE
            <algorithm> <cmath> <cstring> <fstream> <functional> <map> <memory> <mutex> <set> <sstream> <string> <thread>
            <unordered_map> <vector>)
        kimi_set_sources(${target} "^kimi/" SKIP_PRECOMPILE_HEADERS ON)
    endif()
endfunction()

function(kimi_compile_less)
    foreach(target IN ITEMS
            cpp-httplib ggml-rpc-server llama-bench-impl llama-cli-impl llama-common llama-completion-impl llama-server-impl
            mtmd server-context test-backend-ops test-chat-template test-llama-archs test-recurrent-state-rollback
            test-save-load-state)
        if (TARGET ${target})
            target_compile_options(${target} PRIVATE -Og)
        endif()
    endforeach()
    kimi_set_sources(llama
        "^llama-(adapter|arch|chat|hparams|kv-cache-d.*|memory-hybrid-idx|mmap|model|model-.*|quant)\\.cpp$"
        COMPILE_OPTIONS -Og SKIP_PRECOMPILE_HEADERS ON)
    kimi_set_sources(ggml-base "^(ggml-backend-meta|ggml-opt|gguf)\\.cpp$" COMPILE_OPTIONS -Og)
    if (TARGET server-context)
        kimi_group(server-context 4 "^server-context\\.cpp$")
    endif()
    if (TARGET mtmd)
        kimi_group(mtmd 16 "^[^/]*$") # all but models/
    endif()
    if (TARGET llama-common)
        set(for_each_token "^(ngram-.*|sampling|speculative)\\.cpp$")
        kimi_group(llama-common 8 "${for_each_token}|^json\\.cpp$") # json.cpp must precede its uses
        kimi_set_sources(llama-common "${for_each_token}" COMPILE_OPTIONS -O3 SKIP_PRECOMPILE_HEADERS ON)
    endif()
    foreach(target IN ITEMS llama llama-common mtmd server-context)
        kimi_precompile(${target})
    endforeach()
endfunction()

cmake_language(DEFER CALL kimi_compile_less)
