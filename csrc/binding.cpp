// Python module prism_fast._C. Tensors come as addresses and strides, the CUDA stream as an integer: no torch headers, so
// one binary serves every torch version. Shapes and dtypes were checked by the Python caller.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "group_advantage.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class P>
P* at(Address address) {
    return reinterpret_cast<P*>(address);
}

[[maybe_unused]] void check_cuda(int error) {
#ifdef PRISM_FAST_CUDA
    if (error != 0) throw std::runtime_error(std::string("prism_fast CUDA kernel: ") + prism::cuda_error_text(error));
#else
    (void)error;
#endif
}

// `stream`: None for the CPU twin, an integer for CUDA.
template <class T>
void group_advantage(
    Address scores, int64_t row_stride, int64_t column_stride, Address group, Address weights, Address valid, Address gate,
    Address offset, Address out, Address workspace, int64_t rows, int columns, int normalize, int invalid, double eps,
    double invalid_penalty, double power, bool singleton_identity, bool per_score, int threads, py::object stream
) {
    const prism::AdvantageArguments<T> arguments{
        at<const T>(scores), row_stride,         column_stride,      at<const int64_t>(group),
        at<const T>(weights), at<const bool>(valid), at<const T>(gate), at<const T>(offset),
        at<T>(out),          at<double>(workspace), rows,             columns,
        {static_cast<prism::Normalize>(normalize), static_cast<prism::Invalid>(invalid), eps, invalid_penalty, power,
         singleton_identity, per_score}};
    if (stream.is_none()) {
        py::gil_scoped_release unlocked;
        prism::group_advantage_cpu(arguments, threads);
        return;
    }
#ifdef PRISM_FAST_CUDA
    check_cuda(prism::group_advantage_cuda(arguments, at<void>(stream.cast<Address>())));
#else
    throw std::runtime_error("prism_fast._C was built without CUDA");
#endif
}

template <class T>
void define_group_advantage(py::module_& module, const char* name) {
    module.def(
        name, &group_advantage<T>, py::kw_only(), py::arg("scores"), py::arg("row_stride"), py::arg("column_stride"),
        py::arg("group"), py::arg("weights"), py::arg("valid"), py::arg("gate"), py::arg("offset"), py::arg("out"),
        py::arg("workspace"), py::arg("rows"), py::arg("columns"), py::arg("normalize"), py::arg("invalid"), py::arg("eps"),
        py::arg("invalid_penalty"), py::arg("power"), py::arg("singleton_identity"), py::arg("per_score"),
        py::arg("threads"), py::arg("stream").none(true)
    );
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled kernels of prism_fast; called through prism_fast.ops.native.";
    // Raised whenever a signature below changes, so that a stale build in a checkout is named as such.
    module.attr("interface") = 1;
#ifdef PRISM_FAST_CUDA
    module.attr("cuda_built") = true;
    module.attr("cuda_archs") = PRISM_FAST_CUDA_ARCHS;
#else
    module.attr("cuda_built") = false;
    module.attr("cuda_archs") = "";
#endif
    define_group_advantage<float>(module, "group_advantage_float32");
    define_group_advantage<double>(module, "group_advantage_float64");
}
