#pragma once

#include <algorithm>
#include <vector>

#include "bind.h"
#include "pairwise_loss.h"

namespace prism::bind::pairwise_loss_ {

template <class T>
void run(
    Address teacher, Address student, Address group, Address valid, Address teacher_length, Address student_length,
    Address loss, Address counts, Address stats, Address teacher_gradient, Address student_gradient, Address workspace,
    int64_t groups, int64_t rows, int columns, bool has_clip, double clip, double l2, double spread, Address denominator,
    int denominator_kind, double denominator_number, bool has_denominator, Address l2_denominator, int l2_denominator_kind,
    double l2_denominator_number, bool has_l2_denominator, const std::vector<double>& penalty, const py::object& stream
) {
    PairwiseArguments<T> a{
        at<const T>(teacher), at<const T>(student), at<const int64_t>(group), at<const bool>(valid),
        at<const T>(teacher_length), at<const T>(student_length), at<T>(loss), at<int64_t>(counts), at<T>(stats),
        at<T>(teacher_gradient), at<T>(student_gradient), at<double>(workspace), groups, rows, columns, has_clip,
        has_denominator, has_l2_denominator, clip, l2, spread, scalar(denominator, denominator_kind, denominator_number),
        scalar(l2_denominator, l2_denominator_kind, l2_denominator_number), {}};
    if (penalty.size() > kPenalties) throw std::invalid_argument("pairwise_loss: too many length penalties");
    std::copy(penalty.begin(), penalty.end(), a.penalty);
    dispatch(stream, [&] { pairwise_loss_cpu(a); }, [&](void* cuda) { return pairwise_loss_cuda(a, cuda); });
}

template <class T>
void define(py::module_& module, const char* name) {
    module.def(
        name, &run<T>, py::kw_only(), py::arg("teacher"), py::arg("student"), py::arg("group"), py::arg("valid"),
        py::arg("teacher_length"), py::arg("student_length"), py::arg("loss"), py::arg("counts"), py::arg("stats"),
        py::arg("teacher_gradient"), py::arg("student_gradient"), py::arg("workspace"), py::arg("groups"), py::arg("rows"),
        py::arg("columns"), py::arg("has_clip"), py::arg("clip"), py::arg("l2"), py::arg("spread"), py::arg("denominator"),
        py::arg("denominator_kind"), py::arg("denominator_number"), py::arg("has_denominator"), py::arg("l2_denominator"),
        py::arg("l2_denominator_kind"), py::arg("l2_denominator_number"), py::arg("has_l2_denominator"), py::arg("penalty"),
        py::arg("stream").none(true)
    );
}

inline void add(py::module_& module) {
    module.attr("pairwise_penalties") = kPenalties;
    define<float>(module, "pairwise_loss_float32");
    define<double>(module, "pairwise_loss_float64");
}

}  // namespace prism::bind::pairwise_loss_
