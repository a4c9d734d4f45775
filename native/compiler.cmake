# CMake's own words for a missing compiler take ten lines and do not name the package to install.

include(CheckLanguage)

message(STATUS "razor_local: this compiles llama.cpp with CMake, Ninja and a C and C++ compiler, in about 3 minutes on two cores (CUDA takes much longer)")
message(CHECK_START "razor_local: C and C++ compiler")
check_language(C)
check_language(CXX)
if (NOT CMAKE_C_COMPILER OR NOT CMAKE_CXX_COMPILER)
    message(CHECK_FAIL "not found")
    set(named "")
    if (NOT "$ENV{CC}$ENV{CXX}" STREQUAL "") # set by the user, or by the build backend from what compiled Python
        set(named " (CC is '$ENV{CC}', CXX is '$ENV{CXX}')")
    endif()
    message(FATAL_ERROR
        "razor_local is compiled when it is installed from source, but no C and C++ compiler was found${named}: install one (Debian and Ubuntu: apt install g++, Fedora: dnf "
        "install gcc-c++, macOS: xcode-select --install, Windows: Visual Studio Build Tools) or name "
        "yours in the environment variables CC and CXX.")
endif()
enable_language(C)
enable_language(CXX)
message(CHECK_PASS "${CMAKE_CXX_COMPILER} (${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION})")
