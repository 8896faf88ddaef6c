#pragma once

#include "bind.h"
#include "expert_rows.h"

namespace prism::bind::expert_rows_ {

template <class S>
void define(py::module_& module, const std::string& type) {
    using T = typename ComputedIn<S>::type;
    module.def(
        ("swiglu_" + type).c_str(),
        [](Address pre, int64_t row_stride, int64_t rows, int64_t inner, Address act, int threads) {
            py::gil_scoped_release unlocked;
            swiglu(SwigluArguments<S>{at<const S>(pre), row_stride, rows, inner, at<S>(act)}, threads);
        },
        py::kw_only(), py::arg("pre"), py::arg("row_stride"), py::arg("rows"), py::arg("inner"), py::arg("act"),
        py::arg("threads")
    );
    module.def(
        ("swiglu_backward_" + type).c_str(),
        [](Address pre, int64_t row_stride, int64_t rows, int64_t inner, Address assignment, Address weights, Address d_act,
           Address d_pre, Address d_weights, int threads) {
            py::gil_scoped_release unlocked;
            swiglu_backward(
                SwigluGradientArguments<S>{
                    at<const S>(pre), row_stride, rows, inner, at<const int64_t>(assignment), at<const T>(weights),
                    at<S>(d_act), at<S>(d_pre), at<T>(d_weights)},
                threads
            );
        },
        py::kw_only(), py::arg("pre"), py::arg("row_stride"), py::arg("rows"), py::arg("inner"), py::arg("assignment"),
        py::arg("weights"), py::arg("d_act"), py::arg("d_pre"), py::arg("d_weights"), py::arg("threads")
    );
    module.def(
        ("add_rows_" + type).c_str(),
        [](Address from, int64_t rows, int64_t width, Address assignment, int top_k, Address weights, Address to,
           int threads) {
            py::gil_scoped_release unlocked;
            add_rows(
                AddRowsArguments<S>{
                    at<const S>(from), rows, width, at<const int64_t>(assignment), top_k, at<const T>(weights), at<T>(to)},
                threads
            );
        },
        py::kw_only(), py::arg("source"), py::arg("rows"), py::arg("width"), py::arg("assignment"), py::arg("top_k"),
        py::arg("weights"), py::arg("to"), py::arg("threads")
    );
}

inline void add(py::module_& module) {
    define<float>(module, "float32");
    define<double>(module, "float64");
    define<Bfloat16>(module, "bfloat16");
    define<Float16>(module, "float16");
    module.def(
        "prefer_huge_pages", [](Address address, int64_t bytes) { prefer_huge_pages(at<void>(address), bytes); },
        py::arg("address"), py::arg("bytes")
    );
}

}  // namespace prism::bind::expert_rows_
