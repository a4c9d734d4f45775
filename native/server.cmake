# Installs the patched sources of llama-server into razor_local/share/llama-server, where
# razor_local/server/build.py compiles them against the installed libllama at the first 'razor-local serve'.

if (RAZOR_STOCK)
    return()
endif()

set(razor_server_sources razor_local/share/llama-server)

# the files that upstream's build generates; the web page would need npm, so there is none
set(BUILD_COMPILER "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
set(BUILD_TARGET   "${CMAKE_SYSTEM_NAME} ${CMAKE_SYSTEM_PROCESSOR}")
set(N_ASSETS 0)
set(USE_GZIP false)
set(ASSET_ARRAYS "")
set(ASSET_TABLE "")
configure_file(${razor_tree}/common/build-info.cpp.in ${CMAKE_BINARY_DIR}/server/build-info.cpp @ONLY)
configure_file(${razor_tree}/tools/ui/ui.cpp.in       ${CMAKE_BINARY_DIR}/server/ui.cpp @ONLY)
configure_file(${razor_tree}/tools/ui/ui.h.in         ${CMAKE_BINARY_DIR}/server/ui.h @ONLY)

set(razor_source_files FILES_MATCHING PATTERN "*.c" PATTERN "*.cpp" PATTERN "*.h" PATTERN "*.hpp" PATTERN "LICENSE*")

install(DIRECTORY ${razor_tree}/common ${razor_tree}/include ${razor_tree}/vendor
    DESTINATION ${razor_server_sources} COMPONENT razor ${razor_source_files})
install(DIRECTORY ${razor_tree}/ggml/include
    DESTINATION ${razor_server_sources}/ggml COMPONENT razor ${razor_source_files})
install(DIRECTORY ${razor_tree}/tools/mtmd ${razor_tree}/tools/server
    DESTINATION ${razor_server_sources}/tools COMPONENT razor ${razor_source_files}
    PATTERN "debug/*.cpp" EXCLUDE PATTERN "tests" EXCLUDE PATTERN "bench" EXCLUDE PATTERN "legacy-models" EXCLUDE
    PATTERN "mtmd-cli.cpp" EXCLUDE PATTERN "deprecation-warning.cpp" EXCLUDE)
install(FILES ${razor_tree}/src/llama-ext.h
    DESTINATION ${razor_server_sources}/src COMPONENT razor)
install(FILES
    ${CMAKE_BINARY_DIR}/server/build-info.cpp ${CMAKE_BINARY_DIR}/server/ui.cpp ${CMAKE_BINARY_DIR}/server/ui.h
    native/src/llama-razor.h native/src/server/razor-server.cpp native/src/server/razor-server.h
    DESTINATION ${razor_server_sources}/razor COMPONENT razor)
