#pragma once

#include "bind.h"
#include "scale.h"

namespace prism::bind::scale_ {

template <class T>
void run(Address x, Address upstream, Address factor, Address out, int64_t count, const py::object& stream) {
    const ScaleArguments<T> a{at<const T>(x), at<const T>(upstream), at<const T>(factor), at<T>(out), count};
    dispatch(stream, [&] { scale_cpu(a); }, [&](void* cuda) { return scale_cuda(a, cuda); });
}

template <class T>
bool is_one(Address upstream, Address factor) {
    return scale_is_one(at<const T>(upstream), at<const T>(factor));
}

inline void add(py::module_& module) {
    module.def("scale_is_one_float32", &is_one<float>);
    module.def("scale_is_one_float64", &is_one<double>);
    module.def("scale_float32", &run<float>);
    module.def("scale_float64", &run<double>);
}

}  // namespace prism::bind::scale_
