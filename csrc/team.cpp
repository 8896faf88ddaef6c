#include "team.h"

#include "parallel.h"

#ifdef __linux__
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace prism {

bool share_threads_of([[maybe_unused]] const char* path) {
#ifdef __linux__
    // Searches only the library's own dependencies: a process may hold several OpenMP libraries.
    if (void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD)) {
        team_call() = reinterpret_cast<TeamCall>(dlsym(library, "GOMP_parallel"));
        dlclose(library);
        // A forked child has none of the parent's threads, and an OpenMP library that waits for them waits for ever.
        pthread_atfork(nullptr, nullptr, [] { team_call() = nullptr; });
    }
#endif
    return team_call() != nullptr;
}

}  // namespace prism
