#pragma once

#include "bind.h"
#include "route_experts.h"

namespace prism::bind::route_experts_ {

inline PlanArguments plan(
    Address chosen, int64_t rows, int experts, int top_k, Address permutation, Address tokens, Address slots, Address offsets,
    Address counts
) {
    return {at<int64_t>(chosen), rows,          experts,          top_k, at<int64_t>(permutation), at<int32_t>(tokens),
            at<int32_t>(slots),  at<int32_t>(offsets), at<int32_t>(counts)};
}

template <class S>
void run(
    Address logits, int64_t row_stride, int64_t rows, int experts, int top_k, bool renormalize, Address weights,
    Address chosen, Address permutation, Address tokens, Address slots, Address offsets, Address load, Address z_stat,
    Address sums, Address counts, int threads, const py::object& stream
) {
    using T = typename ComputedIn<S>::type;
    const RouteArguments<S> a{
        plan(chosen, rows, experts, top_k, permutation, tokens, slots, offsets, counts), at<const S>(logits), row_stride, renormalize,
        at<T>(weights), at<T>(load), at<T>(z_stat), at<double>(sums)};
    dispatch(
        stream, [&] { route_experts_cpu(a, threads); }, [&](void* cuda) { return route_experts_cuda(a, cuda); }
    );
}

template <class S>
void backward(
    Address logits, int64_t row_stride, int64_t rows, int experts, int top_k, bool renormalize, Address weights,
    Address chosen, Address weights_grad, int64_t weights_grad_row, int64_t weights_grad_column, Address load_grad,
    int64_t load_grad_stride, Address z_grad, Address gradient, int threads, const py::object& stream
) {
    using T = typename ComputedIn<S>::type;
    const RouteGradientArguments<S> a{
        at<const S>(logits), row_stride, at<const int64_t>(chosen), at<const T>(weights), rows, experts, top_k, renormalize,
        at<const T>(weights_grad), weights_grad_row, weights_grad_column, at<const T>(load_grad), load_grad_stride,
        at<const T>(z_grad), at<S>(gradient)};
    dispatch(
        stream, [&] { route_experts_backward_cpu(a, threads); },
        [&](void* cuda) { return route_experts_backward_cuda(a, cuda); }
    );
}

template <class T>
void given(
    Address index, Address given, int64_t rows, int experts, int top_k, Address weights, Address chosen, Address permutation,
    Address tokens, Address slots, Address offsets, Address counts, int threads, const py::object& stream
) {
    const GivenArguments<T> a{
        plan(chosen, rows, experts, top_k, permutation, tokens, slots, offsets, counts), at<const int64_t>(index), at<const T>(given),
        at<T>(weights)};
    dispatch(
        stream, [&] { plan_experts_cpu(a, threads); }, [&](void* cuda) { return plan_experts_cuda(a, cuda); }
    );
}

template <class S>
void define(py::module_& module, const std::string& type) {
    module.def(
        ("route_experts_" + type).c_str(), &run<S>, py::arg("logits"), py::arg("row_stride"), py::arg("rows"),
        py::arg("experts"), py::arg("top_k"), py::arg("renormalize"), py::arg("weights"), py::arg("chosen"),
        py::arg("permutation"), py::arg("tokens"), py::arg("slots"), py::arg("offsets"), py::arg("load"),
        py::arg("z_stat"), py::arg("sums"), py::arg("counts"), py::arg("threads"), py::arg("stream").none(true)
    );
    module.def(
        ("route_experts_backward_" + type).c_str(), &backward<S>, py::arg("logits"), py::arg("row_stride"),
        py::arg("rows"), py::arg("experts"), py::arg("top_k"), py::arg("renormalize"), py::arg("weights"), py::arg("chosen"),
        py::arg("weights_grad"), py::arg("weights_grad_row"), py::arg("weights_grad_column"), py::arg("load_grad"),
        py::arg("load_grad_stride"), py::arg("z_grad"), py::arg("gradient"), py::arg("threads"), py::arg("stream").none(true)
    );
}

template <class T>
void define_given(py::module_& module, const char* name) {
    module.def(
        name, &given<T>, py::arg("index"), py::arg("given"), py::arg("rows"), py::arg("experts"),
        py::arg("top_k"), py::arg("weights"), py::arg("chosen"), py::arg("permutation"), py::arg("tokens"), py::arg("slots"),
        py::arg("offsets"), py::arg("counts"), py::arg("threads"), py::arg("stream").none(true)
    );
}

inline void add(py::module_& module) {
    module.attr("route_chunk") = kChunk;
    module.attr("route_max_experts") = kMaxExperts;
    module.attr("route_max_chosen") = kMaxChosen;
    define<float>(module, "float32");
    define<double>(module, "float64");
    define<Bfloat16>(module, "bfloat16");
    define<Float16>(module, "float16");
    define_given<float>(module, "plan_experts_float32");
    define_given<double>(module, "plan_experts_float64");
}

}  // namespace prism::bind::route_experts_
