# Included by CMake inside llama.cpp's own project (CMAKE_PROJECT_llama.cpp_INCLUDE, set in .ci/install.py).
# The Python binding switches the helper library on, with its HTTP client, and ships neither:
# without them the build has 83 steps instead of 193.
set(LLAMA_BUILD_COMMON OFF)
