#pragma once

namespace prism {

// Makes parallel_for use the OpenMP threads that the shared library at `path`, loaded already, computes with. Whether it has
// any that are understood here; without, parallel_for starts threads of its own.
bool share_threads_of(const char* path);

}  // namespace prism
