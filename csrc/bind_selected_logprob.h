#pragma once

#include "bind.h"
#include "selected_logprob.h"

namespace prism::bind::selected_logprob_ {

template <class S>
void run(
    Address logits, int64_t row_stride, Address target, bool target_is_64, Address temperature, int64_t temperature_stride,
    double one_temperature, int64_t ignore_index, int64_t rows, int64_t vocabulary, Address logp, Address entropy,
    Address top, Address log_sum, Address logp_grad, int64_t logp_grad_stride, Address entropy_grad,
    int64_t entropy_grad_stride, Address gradient, Address bad, bool backward, int threads, const py::object& stream
) {
    using T = typename ComputedIn<S>::type;
    const LogprobArguments<S> a{
        at<const S>(logits), row_stride, at<const void>(target), target_is_64,
        at<const T>(temperature), temperature_stride, static_cast<T>(one_temperature), ignore_index,
        rows, vocabulary, at<T>(logp), at<T>(entropy), at<T>(top), at<T>(log_sum),
        at<const T>(logp_grad), logp_grad_stride, at<const T>(entropy_grad), entropy_grad_stride, at<S>(gradient),
        at<int64_t>(bad)};
    if (backward) {
        dispatch(
            stream, [&] { selected_logprob_backward_cpu(a, threads); },
            [&](void* cuda) { return selected_logprob_backward_cuda(a, cuda); }
        );
    } else {
        dispatch(
            stream, [&] { selected_logprob_cpu(a, threads); },
            [&](void* cuda) { return selected_logprob_cuda(a, cuda); }
        );
    }
}

template <class S>
void define(py::module_& module, const char* name) {
    module.def(
        name, &run<S>, py::kw_only(), py::arg("logits"), py::arg("row_stride"), py::arg("target"), py::arg("target_is_64"),
        py::arg("temperature"), py::arg("temperature_stride"), py::arg("one_temperature"), py::arg("ignore_index"),
        py::arg("rows"), py::arg("vocabulary"), py::arg("logp"), py::arg("entropy"), py::arg("top"), py::arg("log_sum"),
        py::arg("logp_grad"), py::arg("logp_grad_stride"), py::arg("entropy_grad"), py::arg("entropy_grad_stride"),
        py::arg("gradient"), py::arg("bad"), py::arg("backward"), py::arg("threads"), py::arg("stream").none(true)
    );
}

inline void add(py::module_& module) {
    define<float>(module, "selected_logprob_float32");
    define<double>(module, "selected_logprob_float64");
    define<Bfloat16>(module, "selected_logprob_bfloat16");
    define<Float16>(module, "selected_logprob_float16");
}

}  // namespace prism::bind::selected_logprob_
