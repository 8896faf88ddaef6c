#pragma once

#include "bind.h"
#include "policy_loss.h"

namespace prism::bind::policy_loss_ {

// The options of a call: the same object serves every call with the same options.
struct PolicyPlan {
    PolicyOptions<double> options;

    template <class T>
    PolicyOptions<T> in() const {
        const PolicyOptions<double>& o = options;
        return {o.family, o.aggregation, o.divergence, o.has_denominator, o.has_bound, static_cast<T>(o.clip_low),
                static_cast<T>(o.clip_high), static_cast<T>(o.bound), static_cast<T>(o.tau_positive),
                static_cast<T>(o.tau_negative), static_cast<T>(o.kl_coef), static_cast<T>(o.entropy_coef)};
    }
};

inline PolicyPlan plan(
    int family, int aggregation, int divergence, bool has_denominator, double clip_low, double clip_high, bool has_bound,
    double bound, double tau_positive, double tau_negative, double kl_coef, double entropy_coef
) {
    return {{static_cast<Family>(family), static_cast<Aggregation>(aggregation), static_cast<Divergence>(divergence),
             has_denominator, has_bound, 1.0 - clip_low, 1.0 + clip_high, bound, tau_positive, tau_negative, kl_coef,
             entropy_coef}};
}

// By position: naming thirty arguments costs as much as the work on a small batch.
template <class T>
void run(
    const PolicyPlan& plan, Address logp, Address old_logp, Address token_advantage, Address advantage, Address ref_logp,
    Address entropy, Address is_weight, Address mask, int mask_kind, Address offsets, Address loss, Address stats,
    Address slope, Address entropy_slope, Address workspace, int64_t tokens, int64_t sequences, Address denominator,
    int denominator_kind, double denominator_number, Address norm_length, int norm_kind, double norm_number, int threads,
    const py::object& stream
) {
    const PolicyArguments<T> a{
        at<const T>(logp),      at<const T>(old_logp),
        at<const T>(token_advantage), at<const T>(advantage),
        at<const T>(ref_logp),  at<const T>(entropy),
        at<const T>(is_weight), at<const void>(mask),
        at<const int32_t>(offsets), at<T>(loss),
        at<T>(stats),           at<T>(slope),
        at<T>(entropy_slope),   at<double>(workspace),
        tokens,                 sequences,
        static_cast<MaskKind>(mask_kind), scalar(denominator, denominator_kind, denominator_number),
        scalar(norm_length, norm_kind, norm_number), plan.in<T>()};
    dispatch(stream, [&] { policy_loss_cpu(a, threads); }, [&](void* cuda) { return policy_loss_cuda(a, cuda); });
}

inline void add(py::module_& module) {
    module.attr("policy_stats") = static_cast<int>(stat_count);
    module.attr("policy_partials") = kPartials;
    py::class_<PolicyPlan>(module, "PolicyPlan");
    module.def("policy_plan", &plan);
    module.def("policy_loss_float32", &run<float>);
    module.def("policy_loss_float64", &run<double>);
}

}  // namespace prism::bind::policy_loss_
