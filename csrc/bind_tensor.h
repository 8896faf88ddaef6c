// Reads torch's tensors without torch's headers: through the table of C functions of DLPack 1, which torch >= 2.11 hands out as
// `Tensor.__dlpack_c_exchange_api__`. A tensor then costs some ten nanoseconds; its attributes one by one, from Python, a
// microsecond. Nothing is copied and nothing is owned: what a view points to belongs to the tensor.
#pragma once

#include <cmath>
#include <type_traits>

#include "bind.h"

namespace prism::bind {

// Binary layout that DLPack 1 fixes, as far as it is used here.
namespace dlpack {

struct Tensor {
    void* data;
    int32_t device_type, device_index;
    int32_t dims;
    uint8_t code, bits;
    uint16_t lanes;
    const int64_t* sizes;
    const int64_t* strides;  // in elements
    uint64_t offset;         // in bytes
};
struct Functions {
    uint32_t major, minor;
    void* older;
    void *allocate, *own, *give_back;
    int (*view)(void* object, Tensor* out);  // not 0: a Python exception is set
    void* stream;
};
constexpr int kCpu = 1;
constexpr uint8_t kInteger = 0, kFloating = 2, kBoolean = 6;

}  // namespace dlpack

// Types whose objects are viewed; a subclass may mean something else by its contents and is not.
struct TensorAccess {
    const dlpack::Functions* functions = nullptr;
    PyTypeObject *tensor = nullptr, *parameter = nullptr;
};

inline TensorAccess& tensor_access() {
    static TensorAccess access;
    return access;
}

// False: torch's table is of another major version, or has no views.
inline bool use_tensors(const py::capsule& table, const py::type& tensor, const py::type& parameter) {
    const auto* functions = table.get_pointer<const dlpack::Functions>();
    if (functions->major != 1 || functions->view == nullptr) return false;
    // torch's types live as long as the process; no reference is counted.
    tensor_access() = {functions, reinterpret_cast<PyTypeObject*>(tensor.ptr()), reinterpret_cast<PyTypeObject*>(parameter.ptr())};
    return true;
}

template <class T>
constexpr uint8_t dlpack_code() {
    if (std::is_same_v<std::remove_const_t<T>, bool>) return dlpack::kBoolean;
    return std::is_floating_point_v<T> ? dlpack::kFloating : dlpack::kInteger;
}

template <class T>
bool holds(const dlpack::Tensor& x) {
    return x.code == dlpack_code<T>() && x.bits == 8 * sizeof(T) && x.lanes == 1;
}

template <class T>
T* first(const dlpack::Tensor& x) {
    return reinterpret_cast<T*>(static_cast<char*>(x.data) + x.offset);
}

// A plain tensor; false for anything else, which may be a tensor that cannot be viewed.
inline bool view(const py::handle& object, dlpack::Tensor& out) {
    const TensorAccess& access = tensor_access();
    const PyTypeObject* type = Py_TYPE(object.ptr());
    if (type != access.tensor && type != access.parameter) return false;
    if (access.functions != nullptr && access.functions->view(object.ptr(), &out) == 0) return true;
    PyErr_Clear();
    return false;
}

// Reads the arguments of one call for a kernel. Whatever is not as the kernels read it clears `fits`.
class Reader {
public:
    explicit Reader(const py::handle& like) { fits_ = view(like, like_); }

    bool fits() const { return fits_; }
    const dlpack::Tensor& like() const { return like_; }
    bool on_cpu() const { return like_.device_type == dlpack::kCpu; }

    // A dense column of `count` elements, of any number where it is negative. Null for None.
    template <class T>
    T* column(const py::handle& object, int64_t count) {
        dlpack::Tensor x;
        if (!fits_ || object.is_none()) return nullptr;
        if (!here(object, x) || x.dims != 1 || !holds<T>(x) || (count >= 0 && x.sizes[0] != count) ||
            (x.sizes[0] > 1 && x.strides[0] != 1)) {
            fits_ = false;
            return nullptr;
        }
        return first<T>(x);
    }

    // A number of the host >= 0 (> 0 with `positive`), a 0-d tensor of a kind that Scalar loads, or None.
    Scalar scalar(const py::handle& object, bool positive) {
        if (object.is_none()) return {nullptr, ScalarKind::host, 0.0};
        if (PyFloat_CheckExact(object.ptr()) || PyLong_CheckExact(object.ptr())) {
            const double number = PyFloat_AsDouble(object.ptr());
            if (PyErr_Occurred() != nullptr) PyErr_Clear(), fits_ = false;
            fits_ = fits_ && number < HUGE_VAL && (positive ? number > 0.0 : number >= 0.0);
            return {nullptr, ScalarKind::host, number};
        }
        dlpack::Tensor x;
        if (!fits_ || !here(object, x) || x.dims != 0) return fits_ = false, Scalar{nullptr, ScalarKind::host, 0.0};
        const ScalarKind kind = holds<float>(x)     ? ScalarKind::float32
                                : holds<double>(x)  ? ScalarKind::float64
                                : holds<int32_t>(x) ? ScalarKind::int32
                                : holds<int64_t>(x) ? ScalarKind::int64
                                                    : ScalarKind::host;
        fits_ = kind != ScalarKind::host;
        return {first<const void>(x), kind, 0.0};
    }

private:
    bool here(const py::handle& object, dlpack::Tensor& x) const {
        return view(object, x) && x.device_type == like_.device_type && x.device_index == like_.device_index;
    }

    dlpack::Tensor like_{};
    bool fits_ = false;
};

// Address of the first element of a tensor that the caller has just allocated.
template <class T>
T* allocated(const py::handle& object) {
    dlpack::Tensor x;
    if (!view(object, x)) throw std::invalid_argument("prism_fast._C: the result is no plain tensor");
    return first<T>(x);
}

// `like.new_empty(size)`.
inline py::object new_empty(const py::handle& like, const py::handle& size) {
    static PyObject* const name = PyUnicode_InternFromString("new_empty");
    PyObject* made = PyObject_CallMethodOneArg(like.ptr(), name, size.ptr());
    if (made == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
}

// Whether tensors of the CPU are to be computed on it: a dry run counts the launches that a card would see.
inline bool runs_here(const Reader& reader) { return reader.fits() && reader.on_cpu() && !launch_count().dry; }

}  // namespace prism::bind
