#pragma once

#include "bind.h"
#include "product.h"

namespace prism::bind::product_ {

template <class T>
void define(py::module_& module, const char* name) {
    module.def(
        name,
        [](Address a, bool a_turned, int64_t a_line, Address b, bool b_turned, int64_t b_line, Address c, int64_t c_line,
           int64_t rows, int64_t columns, int64_t depth, int threads) {
            py::gil_scoped_release unlocked;
            product(
                ProductArguments<T>{
                    at<const T>(a), a_turned, a_line, at<const T>(b), b_turned, b_line, at<T>(c), c_line, rows, columns,
                    depth},
                threads
            );
        },
        py::kw_only(), py::arg("a"), py::arg("a_turned"), py::arg("a_line"), py::arg("b"), py::arg("b_turned"),
        py::arg("b_line"), py::arg("c"), py::arg("c_line"), py::arg("rows"), py::arg("columns"), py::arg("depth"),
        py::arg("threads")
    );
}

inline void add(py::module_& module) {
    module.def("use_products_of", &use_products_of, py::arg("path"));
    define<float>(module, "product_float32");
    define<double>(module, "product_float64");
}

}  // namespace prism::bind::product_
