// Helpers of the bindings of all ops. Tensors come as addresses and strides, the CUDA stream as an integer: no torch headers, so
// one binary serves every torch version. The Python caller has checked shapes and dtypes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "launch_count.h"
#include "scalar.h"

namespace prism::bind {

namespace py = pybind11;
using Address = uintptr_t;

template <class P>
P* at(Address address) {
    return reinterpret_cast<P*>(address);
}

// Addresses of tensors in an order that the binding states; 0 for a missing one. Arguments go by position: naming twenty of them
// costs as much as the work on a small batch.
template <size_t count>
using Addresses = std::array<Address, count>;

// (address, kind, number): a number on the host (address 0) or a 0-d tensor of a dtype in ScalarKind.
using Number = std::tuple<Address, int, double>;
inline Scalar scalar(const Number& x) {
    const auto [address, kind, number] = x;
    return {at<const void>(address), static_cast<ScalarKind>(address == 0 ? 0 : kind), number};
}

// Runs the CPU twin if `stream` is None, else the CUDA kernel on that stream.
template <class Cpu, class Cuda>
void dispatch(const py::object& stream, Cpu cpu, [[maybe_unused]] Cuda cuda) {
    if (stream.is_none()) {
        py::gil_scoped_release unlocked;
        cpu();
        return;
    }
#ifdef PRISM_FAST_CUDA
    const int error = cuda(at<void>(stream.cast<Address>()));
    if (error != 0) throw std::runtime_error(std::string("prism_fast CUDA kernel: ") + cuda_error_text(error));
#else
    throw std::runtime_error("prism_fast._C was built without CUDA");
#endif
}

}  // namespace prism::bind
