#pragma once

#include <algorithm>
#include <vector>

#include "bind.h"
#include "pairwise_loss.h"

namespace prism::bind::pairwise_loss_ {

// columns: teacher, student, group, valid, teacher_length, student_length, loss, counts, stats, teacher_gradient,
// student_gradient, workspace.
template <class T>
void run(
    const Addresses<12>& columns, int64_t groups, int64_t rows, int width, bool has_clip, double clip, double l2, double spread,
    bool has_denominator, const Number& denominator, bool has_l2_denominator, const Number& l2_denominator,
    const std::vector<double>& penalty, const py::object& stream
) {
    PairwiseArguments<T> a{};
    a.teacher = at<const T>(columns[0]);
    a.student = at<const T>(columns[1]);
    a.group = at<const int64_t>(columns[2]);
    a.valid = at<const bool>(columns[3]);
    a.teacher_length = at<const T>(columns[4]);
    a.student_length = at<const T>(columns[5]);
    a.loss = at<T>(columns[6]);
    a.counts = at<int64_t>(columns[7]);
    a.stats = at<T>(columns[8]);
    a.teacher_gradient = at<T>(columns[9]);
    a.student_gradient = at<T>(columns[10]);
    a.workspace = at<double>(columns[11]);
    a.groups = groups;
    a.rows = rows;
    a.columns = width;
    a.has_clip = has_clip;
    a.clip = clip;
    a.l2 = l2;
    a.spread = spread;
    a.has_denominator = has_denominator;
    a.denominator = scalar(denominator);
    a.has_l2_denominator = has_l2_denominator;
    a.l2_denominator = scalar(l2_denominator);
    if (penalty.size() > kPenalties) throw std::invalid_argument("pairwise_loss: too many length penalties");
    std::copy(penalty.begin(), penalty.end(), a.penalty);
    dispatch(stream, [&] { pairwise_loss_cpu(a); }, [&](void* cuda) { return pairwise_loss_cuda(a, cuda); });
}

inline void add(py::module_& module) {
    module.attr("pairwise_penalties") = kPenalties;
    module.def("pairwise_loss_float32", &run<float>);
    module.def("pairwise_loss_float64", &run<double>);
}

}  // namespace prism::bind::pairwise_loss_
