# The target sparsify::sparsify, the C library of an installed Python package:
#
#     execute_process(COMMAND python -m sparsify native --cmake OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE)
#     find_package(sparsify CONFIG REQUIRED PATHS ${folder} NO_DEFAULT_PATH)
#     target_link_libraries(program PRIVATE sparsify::sparsify)
#
# The program then finds the library where it is now, and beside itself: to ship it, copy the library there.
get_filename_component(_sparsify_package "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)
if(NOT TARGET sparsify::sparsify)
    add_library(sparsify::sparsify INTERFACE IMPORTED)
    # By its file name: it has no name of its own, and a path in the program would be the only place to look.
    set_target_properties(sparsify::sparsify PROPERTIES
        INTERFACE_INCLUDE_DIRECTORIES "${_sparsify_package}/csrc"
        INTERFACE_LINK_LIBRARIES "-L${_sparsify_package};-l:_native.so"
        INTERFACE_LINK_OPTIONS "LINKER:-rpath,$ORIGIN:${_sparsify_package}")
endif()
unset(_sparsify_package)
