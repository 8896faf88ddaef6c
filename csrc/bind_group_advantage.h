#pragma once

#include "bind.h"
#include "group_advantage.h"

namespace prism::bind::group_advantage_ {

// By position, like the policy loss.
template <class T>
void run(
    Address scores, int64_t row_stride, int64_t column_stride, Address group, Address weights, Address valid, Address gate,
    Address offset, Address out, Address workspace, int64_t rows, int columns, int normalize, int invalid, double eps,
    double invalid_penalty, double power, bool singleton_identity, bool per_score, int threads, const py::object& stream
) {
    const AdvantageArguments<T> a{
        at<const T>(scores), row_stride,         column_stride,      at<const int64_t>(group),
        at<const T>(weights), at<const bool>(valid), at<const T>(gate), at<const T>(offset),
        at<T>(out),          at<double>(workspace), rows,             columns,
        {static_cast<Normalize>(normalize), static_cast<Invalid>(invalid), eps, invalid_penalty, power, singleton_identity,
         per_score}};
    dispatch(
        stream, [&] { group_advantage_cpu(a, threads); }, [&](void* cuda) { return group_advantage_cuda(a, cuda); }
    );
}

inline void add(py::module_& module) {
    module.def("group_advantage_float32", &run<float>);
    module.def("group_advantage_float64", &run<double>);
}

}  // namespace prism::bind::group_advantage_
