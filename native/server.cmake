# Installs the patched sources of llama-server into razor_local/share/llama-server, where
# razor_local/server/build.py compiles them against the installed libllama at the first 'razor-local serve'.

if (RAZOR_STOCK)
    return()
endif()

set(razor_server_sources razor_local/share/llama-server)

# the files that upstream's build generates

set(BUILD_COMPILER "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
set(BUILD_TARGET   "${CMAKE_SYSTEM_NAME} ${CMAKE_SYSTEM_PROCESSOR}")
configure_file(${razor_tree}/common/build-info.cpp.in ${CMAKE_BINARY_DIR}/server/build-info.cpp @ONLY)

if (RAZOR_WEB_UI)
    # build in the folder of upstream's target llama-ui, which then does not build the page again
    # the script exits with 0 even if npm is missing, so check its output
    set(razor_ui ${CMAKE_BINARY_DIR}/llama/tools/ui)
    message(CHECK_START "razor_local: the web page of llama-server, built with npm")
    execute_process(
        COMMAND ${CMAKE_COMMAND} -DUI_SOURCE_DIR=${razor_tree}/tools/ui -DUI_BINARY_DIR=${razor_ui}
            -DLLAMA_SOURCE_DIR=${razor_tree} -DLLAMA_BUILD_NUMBER=${LLAMA_BUILD_NUMBER} -DHF_VERSION=${razor_version}
            -DHF_ENABLED=OFF -DBUILD_UI=ON -DLLAMA_UI_GZIP=ON -P ${razor_tree}/scripts/ui-assets.cmake
        OUTPUT_VARIABLE output
        ERROR_VARIABLE  output)
    set(ui "")
    if (EXISTS ${razor_ui}/ui.h)
        file(READ ${razor_ui}/ui.h ui)
    endif()
    if (NOT ui MATCHES "#define LLAMA_UI_HAS_ASSETS")
        message(CHECK_FAIL "failed")
        message(FATAL_ERROR "The web page could not be built: install Node.js 20 or later with npm and connect to the npm registry, or unset RAZOR_WEB_UI. The output was:\n${output}")
    endif()
    message(CHECK_PASS "done")
else()
    set(razor_ui ${CMAKE_BINARY_DIR}/server)
    set(N_ASSETS 0)
    set(USE_GZIP false)
    set(ASSET_ARRAYS "")
    set(ASSET_TABLE "")
    configure_file(${razor_tree}/tools/ui/ui.cpp.in ${razor_ui}/ui.cpp @ONLY)
    configure_file(${razor_tree}/tools/ui/ui.h.in   ${razor_ui}/ui.h   @ONLY)
endif()

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
    ${CMAKE_BINARY_DIR}/server/build-info.cpp ${razor_ui}/ui.cpp ${razor_ui}/ui.h
    native/src/llama-razor.h native/src/server/razor-server.cpp native/src/server/razor-server.h
    DESTINATION ${razor_server_sources}/razor COMPONENT razor)
