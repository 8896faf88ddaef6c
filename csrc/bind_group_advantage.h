#pragma once

#include "bind.h"
#include "group_advantage.h"

namespace prism::bind::group_advantage_ {

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

template <class T>
void define(py::module_& module, const char* name) {
    module.def(
        name, &run<T>, py::kw_only(), py::arg("scores"), py::arg("row_stride"), py::arg("column_stride"), py::arg("group"),
        py::arg("weights"), py::arg("valid"), py::arg("gate"), py::arg("offset"), py::arg("out"), py::arg("workspace"),
        py::arg("rows"), py::arg("columns"), py::arg("normalize"), py::arg("invalid"), py::arg("eps"),
        py::arg("invalid_penalty"), py::arg("power"), py::arg("singleton_identity"), py::arg("per_score"),
        py::arg("threads"), py::arg("stream").none(true)
    );
}

inline void add(py::module_& module) {
    define<float>(module, "group_advantage_float32");
    define<double>(module, "group_advantage_float64");
}

}  // namespace prism::bind::group_advantage_
