# llama.cpp with our patches and sources.

set(razor_tree ${CMAKE_BINARY_DIR}/llama.cpp) # a fixed place: another path would compile everything again

# unpack and patch

option(RAZOR_TESTS "targets of llama.cpp's own tests, built when named (tests/tools/upstream_tests.py)" OFF)

set(razor_parts CMakeLists.txt LICENSE cmake ggml include src vendor common tools/mtmd tools/server tools/ui/ui.cpp.in tools/ui/ui.h.in)
set(razor_common OFF)
if (RAZOR_TOOLS)
    set(razor_common ON)
    list(APPEND razor_parts scripts/ui-assets.cmake tools)
endif()
if (RAZOR_WEB_UI)
    list(APPEND razor_parts scripts/ui-assets.cmake tools/ui)
endif()
if (RAZOR_TESTS)
    set(razor_common ON)
    list(APPEND razor_parts tests)
endif()

set(razor_patches "")
set(razor_sources "")
if (NOT RAZOR_STOCK)
    file(GLOB razor_patches CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/native/patches/*.patch)
    file(GLOB razor_sources CONFIGURE_DEPENDS
        ${CMAKE_CURRENT_SOURCE_DIR}/native/src/*.cpp ${CMAKE_CURRENT_SOURCE_DIR}/native/src/cpu/*.cpp)
endif()
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    ${razor_patches} ${CMAKE_CURRENT_SOURCE_DIR}/native/unpack.py ${CMAKE_CURRENT_SOURCE_DIR}/native/apply_patches.py)

message(CHECK_START "razor_local: llama.cpp of llama-cpp-python ${razor_version}, unpacked and patched")
set(patch_args "")
foreach (patch ${razor_patches}) # glob sorts by name: 0001-, 0002-, …
    list(APPEND patch_args --patch ${patch})
endforeach()
execute_process(
    COMMAND ${Python_EXECUTABLE} -B ${CMAKE_CURRENT_SOURCE_DIR}/native/unpack.py
        --sdist ${razor_sdist} --tree ${razor_tree} ${patch_args} ${razor_parts}
    RESULT_VARIABLE status
    OUTPUT_VARIABLE output OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_VARIABLE  error  ERROR_STRIP_TRAILING_WHITESPACE)
if (NOT status EQUAL 0)
    message(CHECK_FAIL "failed")
    message(FATAL_ERROR "${error}")
endif()
message(CHECK_PASS "${output}")

# CPU instructions that the library may use

set(razor_avx2 OFF)
if (RAZOR_NATIVE)
    message(STATUS "razor_local: CPU instructions: all of this machine's CPU (RAZOR_NATIVE=ON)")
elseif (NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|i.86)$")
    message(STATUS "razor_local: CPU instructions: those of every ${CMAKE_SYSTEM_PROCESSOR} CPU (RAZOR_NATIVE=OFF)")
elseif (RAZOR_AVX2)
    set(razor_avx2 ON)
    message(STATUS "razor_local: CPU instructions: AVX2, BMI2, FMA and F16C (RAZOR_NATIVE=OFF)")
else()
    message(STATUS "razor_local: CPU instructions: those of every x86-64 CPU, which is slow (RAZOR_AVX2=OFF)")
endif()

# configure: shared libraries, nothing else unless asked for

set(BUILD_SHARED_LIBS        ON)
set(GGML_NATIVE              ${RAZOR_NATIVE} CACHE BOOL "" FORCE)
foreach (feature SSE42 AVX AVX2 BMI2 FMA F16C) # ggml's defaults depend on SOURCE_DATE_EPOCH and on earlier configure runs
    set(GGML_${feature}      ${razor_avx2} CACHE BOOL "" FORCE)
endforeach()
set(GGML_CUDA                ${RAZOR_CUDA}   CACHE BOOL "" FORCE)
set(GGML_METAL               ${RAZOR_METAL}  CACHE BOOL "" FORCE)
set(GGML_METAL_EMBED_LIBRARY ${RAZOR_METAL}  CACHE BOOL "" FORCE)
set(GGML_VULKAN              ${RAZOR_VULKAN} CACHE BOOL "" FORCE)
set(GGML_RPC                 ${RAZOR_RPC}    CACHE BOOL "" FORCE)
set(GGML_RPC_RDMA            OFF CACHE BOOL "" FORCE) # would link to libibverbs where it is installed
set(GGML_BACKEND_DL          OFF CACHE BOOL "" FORCE) # its loader also looks in the current folder
set(LLAMA_BUILD_COMMON       ${razor_common} CACHE BOOL "" FORCE)
set(LLAMA_BUILD_TOOLS        ${RAZOR_TOOLS}  CACHE BOOL "" FORCE)
set(LLAMA_BUILD_SERVER       ${RAZOR_TOOLS}  CACHE BOOL "" FORCE)
set(LLAMA_TOOLS_INSTALL      ON  CACHE BOOL "" FORCE)
set(LLAMA_BUILD_APP          OFF CACHE BOOL "" FORCE) # sdist lacks a header of it
set(LLAMA_BUILD_EXAMPLES     OFF CACHE BOOL "" FORCE)
set(LLAMA_BUILD_TESTS        ${RAZOR_TESTS}  CACHE BOOL "" FORCE)
set(LLAMA_OPENSSL            OFF CACHE BOOL "" FORCE) # no downloads by the tools
set(LLAMA_USE_PREBUILT_UI    OFF CACHE BOOL "" FORCE) # nor during the build
set(LLAMA_BUILD_UI           ${RAZOR_WEB_UI} CACHE BOOL "" FORCE)

# upstream asks git for its commit: without this it would find ours, and each of our commits would
# compile ggml again
set(ENV{GIT_CEILING_DIRECTORIES} ${CMAKE_BINARY_DIR})
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT ${razor_version})

# everything in one folder, found from there
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
if (APPLE)
    set(razor_origin "@loader_path")
else()
    set(razor_origin "$ORIGIN")
endif()
set(CMAKE_INSTALL_RPATH "${razor_origin};${razor_origin}/../lib")
set(RAZOR_RPATH "" CACHE STRING "additional folders in which the libraries look for others, such as CUDA's")
list(APPEND CMAKE_INSTALL_RPATH ${RAZOR_RPATH})

add_subdirectory(${razor_tree} ${CMAKE_BINARY_DIR}/llama EXCLUDE_FROM_ALL)

# our sources: outside of upstream's unity build, so that a change compiles one file

if (razor_sources)
    target_sources(llama PRIVATE ${razor_sources})
    target_include_directories(llama PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/native/src)
    set_source_files_properties(${razor_sources} TARGET_DIRECTORY llama PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
    set_source_files_properties(${CMAKE_CURRENT_SOURCE_DIR}/native/src/llama-razor.cpp TARGET_DIRECTORY llama PROPERTIES
        COMPILE_DEFINITIONS "RAZOR_BUILD_INFO=\"${razor_version} ${razor_sha256} ${razor_options}\"")

    # attention is compiled for several CPUs, and chosen at run time
    if (CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang" AND NOT MSVC)
        set(razor_x86 OFF)
        if (CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" AND NOT CMAKE_OSX_ARCHITECTURES MATCHES "arm64")
            set(razor_x86 ON)
        endif()
        foreach (isa avx512 avx2 neon)
            set(razor_isa_options -ffp-contract=fast -Wno-psabi)
            if (razor_x86 AND isa STREQUAL avx512)
                list(APPEND razor_isa_options -mavx512f -mfma -mf16c)
            elseif (razor_x86 AND isa STREQUAL avx2)
                list(APPEND razor_isa_options -mavx2 -mfma -mf16c)
            endif()
            set_source_files_properties(${CMAKE_CURRENT_SOURCE_DIR}/native/src/cpu/llama-razor-attn-${isa}.cpp
                TARGET_DIRECTORY llama PROPERTIES COMPILE_OPTIONS "${razor_isa_options}")
        endforeach()
    endif()
endif()

# attention on CUDA is compiled into its backend; properties of single files, so that the others are compiled as in a stock build

if (razor_sources AND TARGET ggml-cuda)
    set(razor_cuda_call_sites ${razor_tree}/ggml/src/ggml-cuda/ggml-cuda.cu)
    set(razor_cuda_dir ${CMAKE_CURRENT_SOURCE_DIR}/native/src/cuda)
    set(razor_cuda ${razor_cuda_dir}/ggml-razor.cu)
    target_sources(ggml-cuda PRIVATE ${razor_cuda} ${razor_cuda_dir}/ggml-razor-ampere.cu)
    set_property(SOURCE ${razor_cuda_call_sites} TARGET_DIRECTORY ggml-cuda APPEND PROPERTY COMPILE_DEFINITIONS GGML_CUDA_RAZOR)
    set_property(SOURCE ${razor_cuda_call_sites} TARGET_DIRECTORY ggml-cuda APPEND PROPERTY INCLUDE_DIRECTORIES ${razor_cuda_dir})

    # the matrix instructions of compute capability 9.0 are in code for it alone, beside that for the architectures asked for
    find_package(CUDAToolkit)
    if (CUDAToolkit_VERSION VERSION_GREATER_EQUAL 12.0)
        set(razor_hopper ${razor_cuda_dir}/ggml-razor-hopper.cu)
        target_sources(ggml-cuda PRIVATE ${razor_hopper})
        set_property(SOURCE ${razor_hopper} TARGET_DIRECTORY ggml-cuda APPEND PROPERTY COMPILE_OPTIONS -gencode=arch=compute_90a,code=sm_90a)
        set_property(SOURCE ${razor_cuda} TARGET_DIRECTORY ggml-cuda APPEND PROPERTY COMPILE_DEFINITIONS GGML_CUDA_RAZOR_HOPPER)
    endif()
endif()

# what razor adds to the RPC backend

if (razor_sources AND TARGET ggml-rpc)
    target_sources(ggml-rpc PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/native/src/rpc/ggml-razor-rpc.cpp)
    target_include_directories(ggml-rpc PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/native/src/rpc)
endif()

# what razor adds to llama-server

if (razor_sources AND RAZOR_TOOLS)
    target_sources(server-context PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/native/src/server/razor-server.cpp)
    target_include_directories(server-context PUBLIC ${CMAKE_CURRENT_SOURCE_DIR}/native/src ${CMAKE_CURRENT_SOURCE_DIR}/native/src/server)
endif()

# what is built and installed

set(razor_libraries llama)
foreach (target ggml ggml-base ggml-cpu ggml-blas ggml-cuda ggml-metal ggml-vulkan ggml-rpc)
    if (TARGET ${target})
        list(APPEND razor_libraries ${target})
    endif()
endforeach()

set(razor_tools "")
if (RAZOR_TOOLS)
    set(razor_tools llama-bench llama-perplexity llama-server)
    list(APPEND razor_libraries llama-common llama-bench-impl llama-perplexity-impl llama-server-impl mtmd)
endif()

# one file per library: wheels hold no links, and a copy under another name would be loaded twice
foreach (target ${razor_libraries})
    set_property(TARGET ${target} PROPERTY VERSION)
    set_property(TARGET ${target} PROPERTY SOVERSION)
endforeach()

add_custom_target(razor ALL DEPENDS ${razor_libraries} ${razor_tools})
