# Sets razor_sdist, the path of the pinned sdist, and razor_version and razor_sha256, what the pin says.
#
# A file named by -DRAZOR_SDIST or the environment variable RAZOR_LOCAL_SDIST is taken, else the copy
# in the user's cache folder, else pip downloads it there: pip knows the user's index, proxy and
# certificates. The sha256 is checked every time.

set(RAZOR_SDIST "" CACHE FILEPATH "the pinned sdist of llama-cpp-python (empty: environment variable RAZOR_LOCAL_SDIST, else download)")

set(razor_pin ${CMAKE_CURRENT_SOURCE_DIR}/native/llama-cpp-python.txt)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${razor_pin})
file(STRINGS ${razor_pin} pin REGEX "^llama-cpp-python==")
if (NOT pin MATCHES "^llama-cpp-python==([0-9][0-9a-z.]*) --hash=sha256:([0-9a-f]+)$")
    message(FATAL_ERROR "${razor_pin} has no line 'llama-cpp-python==VERSION --hash=sha256:HASH': restore it from git")
endif()
set(razor_version ${CMAKE_MATCH_1})
set(razor_sha256  ${CMAKE_MATCH_2})
set(razor_sdist_name llama_cpp_python-${razor_version}.tar.gz)

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)

function(razor_cache_dir result)
    if (WIN32)
        set(base "$ENV{LOCALAPPDATA}")
    elseif (APPLE)
        set(base "$ENV{HOME}/Library/Caches")
    elseif (NOT "$ENV{XDG_CACHE_HOME}" STREQUAL "")
        set(base "$ENV{XDG_CACHE_HOME}")
    else()
        set(base "$ENV{HOME}/.cache")
    endif()
    if (NOT IS_ABSOLUTE "${base}" OR base STREQUAL "/.cache" OR base STREQUAL "/Library/Caches")
        set(base ${CMAKE_BINARY_DIR}) # no home folder: keep the download with the build
    endif()
    file(TO_CMAKE_PATH "${base}/razor_local" base)
    set(${result} "${base}" PARENT_SCOPE)
endfunction()

# downloads the sdist to ${file}: into a folder of its own first, then renamed, so that a build
# beside this one never sees half a file
function(razor_download file)
    message(CHECK_START "razor_local: downloading ${razor_sdist_name} to ${file}")
    string(RANDOM LENGTH 8 suffix)
    set(temp ${file}.${suffix}.part)
    execute_process(
        COMMAND ${Python_EXECUTABLE} -m pip --disable-pip-version-check --no-input --retries 2 download --no-deps
            --no-binary llama-cpp-python --require-hashes --requirement ${razor_pin} --dest ${temp}
        RESULT_VARIABLE status
        OUTPUT_VARIABLE output
        ERROR_VARIABLE  output)
    if (status EQUAL 0 AND EXISTS ${temp}/${razor_sdist_name})
        file(RENAME ${temp}/${razor_sdist_name} ${file})
        file(REMOVE_RECURSE ${temp})
        message(CHECK_PASS "done")
        return()
    endif()
    file(REMOVE_RECURSE ${temp})
    message(CHECK_FAIL "failed")
    set(offline "set the environment variable RAZOR_LOCAL_SDIST to a copy of ${razor_sdist_name}")
    if (output MATCHES "No module named pip")
        message(FATAL_ERROR "${Python_EXECUTABLE} has no pip to download ${razor_sdist_name}: install pip, or ${offline}.")
    elseif (output MATCHES "DO NOT MATCH THE HASHES[^\n]*")
        message(FATAL_ERROR "The ${razor_sdist_name} of your package index has another sha256 than the pinned ${razor_sha256}: "
            "use another index (PIP_INDEX_URL), or ${offline}.")
    endif()
    set(reason "")
    string(REGEX MATCHALL "(ERROR|error): [^\n]*" errors "${output}")
    if (errors)
        list(POP_BACK errors reason)
        set(reason " (pip: ${reason})")
    endif()
    message(FATAL_ERROR "Could not download ${razor_sdist_name}${reason}: connect to the network, or ${offline}.")
endfunction()

function(razor_find_sdist result)
    set(file "${RAZOR_SDIST}")
    if (file STREQUAL "")
        set(file "$ENV{RAZOR_LOCAL_SDIST}")
    endif()
    if (NOT file STREQUAL "")
        get_filename_component(file "${file}" ABSOLUTE BASE_DIR ${CMAKE_SOURCE_DIR})
        message(CHECK_START "razor_local: ${file}")
        if (NOT EXISTS "${file}" OR IS_DIRECTORY "${file}")
            message(CHECK_FAIL "not a file")
            message(FATAL_ERROR "RAZOR_LOCAL_SDIST names ${file}, which is not a file: name a copy of ${razor_sdist_name}, or unset it to download one.")
        endif()
        file(SHA256 "${file}" found)
        if (NOT found STREQUAL razor_sha256)
            message(CHECK_FAIL "wrong sha256")
            message(FATAL_ERROR "${file} has sha256 ${found}, expected ${razor_sha256} (${razor_sdist_name}): name the right file in RAZOR_LOCAL_SDIST, or unset it to download one.")
        endif()
        message(CHECK_PASS "sha256 is right")
        set(${result} "${file}" PARENT_SCOPE)
        return()
    endif()

    razor_cache_dir(cache)
    set(file ${cache}/${razor_sdist_name})
    file(MAKE_DIRECTORY ${cache})
    # one download for two builds at once; the second goes on with the first one's file
    file(LOCK ${file}.lock GUARD FUNCTION TIMEOUT 900 RESULT_VARIABLE lock)
    if (EXISTS ${file})
        file(SHA256 ${file} found)
        if (NOT found STREQUAL razor_sha256)
            message(STATUS "razor_local: ${file} is damaged, downloading it again")
            file(REMOVE ${file})
        endif()
    endif()
    if (NOT EXISTS ${file})
        razor_download(${file})
        file(SHA256 ${file} found)
        if (NOT found STREQUAL razor_sha256)
            file(REMOVE ${file})
            message(FATAL_ERROR "The downloaded ${razor_sdist_name} has sha256 ${found}, expected ${razor_sha256}: "
                "set the environment variable RAZOR_LOCAL_SDIST to a right copy.")
        endif()
    endif()
    message(STATUS "razor_local: ${file}, sha256 is right")
    set(${result} ${file} PARENT_SCOPE)
endfunction()

razor_find_sdist(razor_sdist)
