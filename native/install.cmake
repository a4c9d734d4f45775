# Into the Python package: razor_local/lib, and razor_local/bin for the tools.

install(TARGETS ${razor_libraries}
    LIBRARY DESTINATION razor_local/lib COMPONENT razor
    RUNTIME DESTINATION razor_local/lib COMPONENT razor
    ARCHIVE DESTINATION razor_local/lib COMPONENT razor_dev EXCLUDE_FROM_ALL
    PUBLIC_HEADER  DESTINATION razor_local/include COMPONENT razor_dev EXCLUDE_FROM_ALL
    PRIVATE_HEADER DESTINATION razor_local/include COMPONENT razor_dev EXCLUDE_FROM_ALL)
install(FILES ${razor_tree}/LICENSE DESTINATION razor_local/lib RENAME LICENSE-llama.cpp COMPONENT razor)

if (RAZOR_TOOLS)
    install(TARGETS ${razor_tools} RUNTIME DESTINATION razor_local/bin COMPONENT razor)
endif()
