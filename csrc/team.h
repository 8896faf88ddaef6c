#pragma once

namespace prism {

// Makes parallel_for use the OpenMP threads of the shared library at `path`, which is already loaded. Returns whether it has
// usable ones; if not, parallel_for starts threads of its own.
bool share_threads_of(const char* path);

}  // namespace prism
