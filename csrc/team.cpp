#include "team.h"

#include "parallel.h"

#ifdef __linux__
#include <dlfcn.h>
#endif

namespace prism {

bool share_threads_of([[maybe_unused]] const char* path) {
#ifdef __linux__
    // Searches what the library itself depends on: a process may hold several OpenMP libraries.
    if (void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD)) {
        team_call() = reinterpret_cast<TeamCall>(dlsym(library, "GOMP_parallel"));
        dlclose(library);
    }
#endif
    return team_call() != nullptr;
}

}  // namespace prism
