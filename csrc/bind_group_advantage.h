#pragma once

#include "bind_tensor.h"
#include "group_advantage.h"

namespace prism::bind::group_advantage_ {

// The tensors as the kernels read them; false where one of them is not: nothing is computed then.
template <class T>
bool read(
    Reader& reader, AdvantageArguments<T>& a, const py::handle& group, const py::handle& weights, const py::handle& valid,
    const py::handle& gate, const py::handle& offset
) {
    const dlpack::Tensor& scores = reader.like();
    if (!reader.fits() || scores.dims != 2 || !holds<T>(scores)) return false;
    a.scores = first<const T>(scores);
    a.score_row_stride = scores.strides[0];
    a.score_column_stride = scores.strides[1];
    a.rows = scores.sizes[0];
    a.columns = static_cast<int>(scores.sizes[1]);
    a.group = reader.column<const int64_t>(group, a.rows);
    a.weights = reader.column<const T>(weights, a.columns);
    a.valid = reader.column<const bool>(valid, a.rows);
    a.gate = reader.column<const T>(gate, a.rows);
    a.offset = reader.column<const T>(offset, a.rows);
    return reader.fits() && !group.is_none() && !weights.is_none();
}

template <class T>
bool run_in(
    Reader& reader, AdvantageArguments<T> a, const py::handle& group, const py::handle& weights, const py::handle& valid,
    const py::handle& gate, const py::handle& offset, const py::handle& out, Address workspace, int threads,
    const py::object& stream
) {
    if (!read(reader, a, group, weights, valid, gate, offset)) return false;
    a.out = allocated<T>(out);
    a.workspace = at<double>(workspace);
    dispatch(
        stream, [&] { group_advantage_cpu(a, threads); }, [&](void* cuda) { return group_advantage_cuda(a, cuda); }
    );
    return true;
}

// By position, like the policy loss.
inline bool run(
    const py::handle& scores, const py::handle& group, const py::handle& weights, const py::handle& valid,
    const py::handle& gate, const py::handle& offset, const py::handle& out, int normalize, int invalid, double eps,
    double invalid_penalty, double power, bool singleton_identity, bool per_score, Address workspace, int threads,
    const py::object& stream
) {
    Reader reader(scores);
    const AdvantageOptions options{static_cast<Normalize>(normalize), static_cast<Invalid>(invalid), eps, invalid_penalty,
                                   power, singleton_identity, per_score};
    auto in = [&](auto arguments) {
        arguments.options = options;
        return run_in(reader, arguments, group, weights, valid, gate, offset, out, workspace, threads, stream);
    };
    if (stream.is_none() && !reader.on_cpu()) return false;
    return holds<float>(reader.like()) ? in(AdvantageArguments<float>{}) : in(AdvantageArguments<double>{});
}

// A whole call on the CPU, its result allocated here: None, and nothing done, where an argument is not as the kernels read it.
inline py::object eager(
    int normalize, int invalid, double eps, double invalid_penalty, double power, bool singleton_identity, bool per_score,
    const py::handle& scores, const py::handle& group, const py::handle& weights, const py::handle& valid,
    const py::handle& gate, const py::handle& offset, int threads
) {
    Reader reader(scores);
    const dlpack::Tensor& like = reader.like();
    if (!runs_here(reader) || like.dims != 2) return py::none();
    const py::object out =
        per_score ? new_empty(scores, py::make_tuple(like.sizes[0], like.sizes[1])) : new_empty(scores, py::int_(like.sizes[0]));
    const bool done = run(
        scores, group, weights, valid, gate, offset, out, normalize, invalid, eps, invalid_penalty, power, singleton_identity,
        per_score, 0, threads, py::none()
    );
    return done ? out : py::none();
}

inline void add(py::module_& module) {
    module.def("group_advantage", &run);
    module.def("group_advantage_eager", &eager);
}

}  // namespace prism::bind::group_advantage_
