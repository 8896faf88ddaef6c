#pragma once

#include "bind.h"
#include "group_advantage.h"

namespace prism::bind::group_advantage_ {

// columns: scores, group, weights, valid, gate, offset, out.
template <class T>
void run(
    const Addresses<7>& columns, const std::array<int64_t, 2>& strides, int64_t rows, int width, int normalize, int invalid,
    double eps, double invalid_penalty, double power, bool singleton_identity, bool per_score, Address workspace, int threads,
    const py::object& stream
) {
    AdvantageArguments<T> a{};
    a.scores = at<const T>(columns[0]);
    a.group = at<const int64_t>(columns[1]);
    a.weights = at<const T>(columns[2]);
    a.valid = at<const bool>(columns[3]);
    a.gate = at<const T>(columns[4]);
    a.offset = at<const T>(columns[5]);
    a.out = at<T>(columns[6]);
    a.score_row_stride = strides[0];
    a.score_column_stride = strides[1];
    a.workspace = at<double>(workspace);
    a.rows = rows;
    a.columns = width;
    a.options = {static_cast<Normalize>(normalize), static_cast<Invalid>(invalid), eps, invalid_penalty, power,
                 singleton_identity, per_score};
    dispatch(
        stream, [&] { group_advantage_cpu(a, threads); }, [&](void* cuda) { return group_advantage_cuda(a, cuda); }
    );
}

inline void add(py::module_& module) {
    module.def("group_advantage_float32", &run<float>);
    module.def("group_advantage_float64", &run<double>);
}

}  // namespace prism::bind::group_advantage_
