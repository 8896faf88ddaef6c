#pragma once

#include "bind.h"
#include "policy_loss.h"

namespace prism::bind::policy_loss_ {

template <class T>
void run(
    Address logp, Address old_logp, Address token_advantage, Address advantage, Address ref_logp, Address entropy,
    Address is_weight, Address mask, int mask_kind, Address offsets, Address loss, Address stats, Address slope,
    Address entropy_slope, Address workspace, int64_t tokens, int64_t sequences, Address denominator, int denominator_kind,
    double denominator_number, bool has_denominator, Address norm_length, int norm_kind, double norm_number, int family,
    int aggregation, int divergence, double clip_low, double clip_high, bool has_bound, double bound, double tau_positive,
    double tau_negative, double kl_coef, double entropy_coef, int threads, const py::object& stream
) {
    const PolicyOptions<T> options{
        static_cast<Family>(family),
        static_cast<Aggregation>(aggregation),
        static_cast<Divergence>(divergence),
        has_denominator,
        has_bound ? T(1) : T(0),
        static_cast<T>(1.0 - clip_low),
        static_cast<T>(1.0 + clip_high),
        static_cast<T>(bound),
        static_cast<T>(tau_positive),
        static_cast<T>(tau_negative),
        static_cast<T>(kl_coef),
        static_cast<T>(entropy_coef)};
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
        scalar(norm_length, norm_kind, norm_number), options};
    dispatch(stream, [&] { policy_loss_cpu(a, threads); }, [&](void* cuda) { return policy_loss_cuda(a, cuda); });
}

template <class T>
void define(py::module_& module, const char* name) {
    module.def(
        name, &run<T>, py::kw_only(), py::arg("logp"), py::arg("old_logp"), py::arg("token_advantage"), py::arg("advantage"),
        py::arg("ref_logp"), py::arg("entropy"), py::arg("is_weight"), py::arg("mask"), py::arg("mask_kind"),
        py::arg("offsets"), py::arg("loss"), py::arg("stats"), py::arg("slope"), py::arg("entropy_slope"),
        py::arg("workspace"), py::arg("tokens"), py::arg("sequences"), py::arg("denominator"), py::arg("denominator_kind"),
        py::arg("denominator_number"), py::arg("has_denominator"), py::arg("norm_length"), py::arg("norm_kind"),
        py::arg("norm_number"), py::arg("family"), py::arg("aggregation"), py::arg("divergence"), py::arg("clip_low"),
        py::arg("clip_high"), py::arg("has_bound"), py::arg("bound"), py::arg("tau_positive"), py::arg("tau_negative"),
        py::arg("kl_coef"), py::arg("entropy_coef"), py::arg("threads"), py::arg("stream").none(true)
    );
}

inline void add(py::module_& module) {
    module.attr("policy_stats") = static_cast<int>(stat_count);
    module.attr("policy_partials") = kPartials;
    define<float>(module, "policy_loss_float32");
    define<double>(module, "policy_loss_float64");
}

}  // namespace prism::bind::policy_loss_
