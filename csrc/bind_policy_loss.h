#pragma once

#include <utility>

#include "bind_tensor.h"
#include "policy_loss.h"

namespace prism::bind::policy_loss_ {

// The options of a call: the same object serves every call with the same options.
struct PolicyPlan {
    PolicyOptions<double> options;

    template <class T>
    PolicyOptions<T> in() const {
        const PolicyOptions<double>& o = options;
        return {o.family, o.aggregation, o.divergence, o.straight_through, o.has_denominator, o.has_bound,
                static_cast<T>(o.clip_low), static_cast<T>(o.clip_high), static_cast<T>(o.bound), static_cast<T>(o.tau_positive),
                static_cast<T>(o.tau_negative), static_cast<T>(o.kl_coef), static_cast<T>(o.entropy_coef)};
    }
};

inline PolicyPlan plan(
    int family, int aggregation, int divergence, bool straight_through, bool has_denominator, double clip_low,
    double clip_high, bool has_bound, double bound, double tau_positive, double tau_negative, double kl_coef,
    double entropy_coef
) {
    return {{static_cast<Family>(family), static_cast<Aggregation>(aggregation), static_cast<Divergence>(divergence),
             straight_through, has_denominator, has_bound, 1.0 - clip_low, 1.0 + clip_high, bound, tau_positive,
             tau_negative, kl_coef, entropy_coef}};
}

// What a call is given, as it comes from Python.
struct Given {
    py::handle advantage, cu_seqlens, old_logp, token_advantage, entropy, ref_logp, is_weight, mask, denominator, norm_length;
};

// The tensors as the kernel reads them; false where one of them is not: nothing is computed then.
template <class T>
bool read(Reader& reader, PolicyArguments<T>& a, const Given& x) {
    const dlpack::Tensor& logp = reader.like();
    if (!reader.fits() || logp.dims != 1 || !holds<T>(logp) || (logp.sizes[0] > 1 && logp.strides[0] != 1)) return false;
    dlpack::Tensor offsets;
    a.offsets = reader.column<const int32_t>(x.cu_seqlens, -1);
    if (!reader.fits() || !view(x.cu_seqlens, offsets) || offsets.sizes[0] == 0) return false;
    a.logp = first<const T>(logp);
    a.tokens = logp.sizes[0];
    a.sequences = offsets.sizes[0] - 1;
    a.advantage = reader.column<const T>(x.advantage, a.sequences);
    for (auto [to, from] : {std::pair{&a.old_logp, x.old_logp}, {&a.token_advantage, x.token_advantage},
                            {&a.entropy, x.entropy}, {&a.ref_logp, x.ref_logp}, {&a.is_weight, x.is_weight}}) {
        *to = reader.column<const T>(from, a.tokens);
    }
    dlpack::Tensor mask;
    const bool boolean = !x.mask.is_none() && view(x.mask, mask) && holds<bool>(mask);
    a.mask_kind = x.mask.is_none() ? MaskKind::none : boolean ? MaskKind::boolean : MaskKind::number;
    a.mask = boolean ? static_cast<const void*>(reader.column<const bool>(x.mask, a.tokens))
                     : reader.column<const T>(x.mask, a.tokens);
    a.denominator = reader.scalar(x.denominator, false);
    a.norm_length = reader.scalar(x.norm_length, true);
    return reader.fits();
}

template <class T>
bool run_in(
    Reader& reader, const PolicyPlan& plan, const Given& given, const py::handle& loss, const py::handle& stats,
    const py::handle& slopes, int wanted, Address workspace, int threads, const py::object& stream
) {
    PolicyArguments<T> a{};
    if (!read(reader, a, given)) return false;
    a.options = plan.in<T>();
    a.loss = allocated<T>(loss);
    a.stats = allocated<T>(stats);
    a.slope = wanted == 0 ? nullptr : allocated<T>(slopes);
    a.entropy_slope = wanted == 2 ? a.slope + a.tokens : nullptr;
    a.workspace = at<double>(workspace);
    dispatch(stream, [&] { policy_loss_cpu(a, threads); }, [&](void* cuda) { return policy_loss_cuda(a, cuda); });
    return true;
}

// By position: naming twenty arguments costs as much as the work on a small batch. `wanted`: of how many inputs (logp, entropy)
// the slopes are.
inline bool run(
    const PolicyPlan& plan, const py::handle& logp, const py::handle& entropy, const py::handle& advantage,
    const py::handle& cu_seqlens, const py::handle& old_logp, const py::handle& token_advantage, const py::handle& ref_logp,
    const py::handle& is_weight, const py::handle& mask, const py::handle& denominator, const py::handle& norm_length,
    const py::handle& loss, const py::handle& stats, const py::handle& slopes, int wanted, Address workspace, int threads,
    const py::object& stream
) {
    Reader reader(logp);
    if (stream.is_none() && !reader.on_cpu()) return false;
    const Given given{advantage, cu_seqlens, old_logp, token_advantage, entropy, ref_logp, is_weight, mask, denominator,
                      norm_length};
    return holds<float>(reader.like())
               ? run_in<float>(reader, plan, given, loss, stats, slopes, wanted, workspace, threads, stream)
               : run_in<double>(reader, plan, given, loss, stats, slopes, wanted, workspace, threads, stream);
}

inline bool requires_grad(const py::handle& x) {
    static PyObject* const name = PyUnicode_InternFromString("requires_grad");
    const auto answer = py::reinterpret_steal<py::object>(PyObject_GetAttr(x.ptr(), name));
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
}

// A whole call on the CPU, its results allocated here: (loss, statistics); None, and nothing done, where an argument is not as
// the kernel reads it. `attach(logp, entropy, (), (loss, stats, slopes))` gives the loss its gradient, `name` the statistics
// their names, both from the tensors that they get.
inline py::object eager(
    const py::object& attach, const py::object& name, const PolicyPlan& plan, const py::handle& logp, const py::handle& entropy,
    const py::handle& advantage, const py::handle& cu_seqlens, const py::handle& old_logp, const py::handle& token_advantage,
    const py::handle& ref_logp, const py::handle& is_weight, const py::handle& mask, const py::handle& denominator,
    const py::handle& norm_length, bool learns, int threads
) {
    Reader reader(logp);
    if (!runs_here(reader) || reader.like().dims != 1) return py::none();
    const int64_t tokens = reader.like().sizes[0];
    const bool of_entropy =
        learns && plan.options.entropy_coef != 0.0 && !entropy.is_none() && requires_grad(entropy);
    const int wanted = of_entropy ? 2 : learns && requires_grad(logp) ? 1 : 0;
    const py::object loss = new_empty(logp, py::tuple(0)), stats = new_empty(logp, py::int_(static_cast<int>(stat_count)));
    py::object slopes = py::none();
    if (wanted == 1) slopes = new_empty(logp, py::int_(tokens));
    if (wanted == 2) slopes = new_empty(logp, py::make_tuple(2, tokens));
    const bool done = run(
        plan, logp, entropy, advantage, cu_seqlens, old_logp, token_advantage, ref_logp, is_weight, mask, denominator,
        norm_length, loss, stats, slopes, wanted, 0, threads, py::none()
    );
    if (!done) return py::none();
    const py::object value =
        wanted == 0 ? loss
                    : attach(logp, of_entropy ? entropy : py::handle(Py_None), py::tuple(0), py::make_tuple(loss, stats, slopes));
    const py::tuple views = stats.attr("unbind")();
    return py::make_tuple(value, name(views[py::slice(0, stat_count - 1, 1)]));
}

inline void add(py::module_& module) {
    module.attr("policy_stats") = static_cast<int>(stat_count);
    module.attr("policy_partials") = kPartials;
    py::class_<PolicyPlan>(module, "PolicyPlan");
    module.def("policy_plan", &plan);
    module.def("policy_loss", &run);
    module.def("policy_loss_eager", &eager);
}

}  // namespace prism::bind::policy_loss_
