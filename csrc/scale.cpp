#include "scale.h"

namespace prism {

template <class T>
void scale_cpu(const ScaleArguments<T>& a) {
    const T factor = scale_factor(a);
    const T* x = a.x;
    T* out = a.out;
    for (int64_t i = 0; i < a.count; ++i) out[i] = x[i] * factor;
}

template void scale_cpu<float>(const ScaleArguments<float>&);
template void scale_cpu<double>(const ScaleArguments<double>&);

}  // namespace prism
