// Python module prism_fast._C; the functions of each op are defined in bind_<op>.h.
#include "bind_expert_rows.h"
#include "bind_group_advantage.h"
#include "bind_pairwise_loss.h"
#include "bind_policy_loss.h"
#include "bind_product.h"
#include "bind_route_experts.h"
#include "bind_scale.h"
#include "bind_selected_logprob.h"
#include "team.h"

namespace {

// Number of kernels that `call` would enqueue. Nothing is enqueued, so addresses and streams may be arbitrary.
int64_t count_launches(const pybind11::function& call) {
    struct Dry {
        Dry() { prism::launch_count() = {true, 0}; }
        ~Dry() { prism::launch_count() = {}; }
    } dry;
    call();
    return prism::launch_count().launches;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels of prism_fast; called through prism_fast.ops.native.";
    // Increased whenever a signature below changes, so that Python recognises a stale build.
    module.attr("interface") = 13;
#ifdef PRISM_FAST_CUDA
    module.attr("cuda_built") = true;
    module.attr("cuda_archs") = PRISM_FAST_CUDA_ARCHS;
#else
    module.attr("cuda_built") = false;
    module.attr("cuda_archs") = "";
#endif
    module.def("count_launches", &count_launches, pybind11::arg("call"));
    module.def("share_threads_of", &prism::share_threads_of, pybind11::arg("path"));
    prism::bind::expert_rows_::add(module);
    prism::bind::group_advantage_::add(module);
    prism::bind::policy_loss_::add(module);
    prism::bind::route_experts_::add(module);
    prism::bind::pairwise_loss_::add(module);
    prism::bind::product_::add(module);
    prism::bind::scale_::add(module);
    prism::bind::selected_logprob_::add(module);
}
