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
void define(py::module_& module, const char* name) {
    module.def(
        name, &run<T>, py::kw_only(), py::arg("x"), py::arg("upstream"), py::arg("factor"), py::arg("out"),
        py::arg("count"), py::arg("stream").none(true)
    );
}

inline void add(py::module_& module) {
    define<float>(module, "scale_float32");
    define<double>(module, "scale_float64");
}

}  // namespace prism::bind::scale_
