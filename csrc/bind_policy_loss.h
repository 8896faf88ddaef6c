#pragma once

#include "bind.h"
#include "policy_loss.h"

namespace prism::bind::policy_loss_ {

// The options of a call as prism_fast/ops/native/policy_loss.py packs them; the last is the length that a mean divides by.
constexpr size_t kOptions = 14;
using Packed = std::array<double, kOptions>;

template <class T>
PolicyOptions<T> options_of(const Packed& x, bool has_denominator) {
    const auto whole = [&](size_t i) { return static_cast<int>(x[i]); };
    const auto number = [&](size_t i) { return static_cast<T>(x[i]); };
    PolicyOptions<T> o{};
    o.family = static_cast<Family>(whole(0));
    o.aggregation = static_cast<Aggregation>(whole(1));
    o.divergence = static_cast<Divergence>(whole(2));
    o.straight_through = whole(3) != 0;
    o.has_bound = whole(4) != 0;
    o.has_denominator = has_denominator;
    o.clip_low = number(5);
    o.clip_high = number(6);
    o.bound = number(7);
    o.tau_positive = number(8);
    o.tau_negative = number(9);
    o.kl_coef = number(10);
    o.entropy_coef = number(11);
    o.kl_importance = whole(12) != 0;
    return o;
}

// columns: logp, old_logp, token_advantage, advantage, ref_logp, entropy, is_weight, mask, cu_seqlens, loss, stats, slope,
// entropy_slope, bad.
template <class T>
void run(
    const Addresses<14>& columns, const Packed& options, int64_t tokens, int64_t sequences, bool mask_is_boolean,
    bool has_denominator, const Number& denominator, const Number& norm_length, Address workspace, int threads,
    const py::object& stream
) {
    PolicyArguments<T> a{};
    a.logp = at<const T>(columns[0]);
    a.old_logp = at<const T>(columns[1]);
    a.token_advantage = at<const T>(columns[2]);
    a.advantage = at<const T>(columns[3]);
    a.ref_logp = at<const T>(columns[4]);
    a.entropy = at<const T>(columns[5]);
    a.is_weight = at<const T>(columns[6]);
    a.mask = at<const void>(columns[7]);
    a.mask_kind = a.mask == nullptr ? MaskKind::none : mask_is_boolean ? MaskKind::boolean : MaskKind::number;
    a.offsets = at<const int32_t>(columns[8]);
    a.loss = at<T>(columns[9]);
    a.stats = at<T>(columns[10]);
    a.slope = at<T>(columns[11]);
    a.entropy_slope = at<T>(columns[12]);
    a.bad = at<int64_t>(columns[13]);
    a.workspace = at<double>(workspace);
    a.tokens = tokens;
    a.sequences = sequences;
    a.denominator = scalar(denominator);
    a.norm_length = scalar(norm_length);
    a.options = options_of<T>(options, has_denominator);
    dispatch(stream, [&] { policy_loss_cpu(a, threads); }, [&](void* cuda) { return policy_loss_cuda(a, cuda); });
}

inline void add(py::module_& module) {
    module.attr("policy_stats") = static_cast<int>(stat_count);
    module.attr("policy_partials") = kPartials;
    module.def("policy_loss_float32", &run<float>);
    module.def("policy_loss_float64", &run<double>);
}

}  // namespace prism::bind::policy_loss_
