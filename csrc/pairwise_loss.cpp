// CPU twin of the pairwise loss. A batch holds some hundred rows; threads would cost more than they save.
#include "pairwise_loss.h"

#include "grouped_rows.h"

namespace prism {
namespace {

// One thread over the rows 0 .. count - 1.
struct RowTeam {
    int64_t count;

    template <class F>
    double sum(F f) const {
        double total = 0.0;
        for (int64_t row = 0; row < count; ++row) total += f(row);
        return total;
    }
};

}  // namespace

template <class T>
void pairwise_loss_cpu(const PairwiseArguments<T>& a) {
    const RowTeam rows{a.rows}, teachers{a.groups};
    const GroupedRows grouped(a.group, a.rows, a.groups);
    const PairwiseScales scales = pairwise_scales(rows, a);
    double bradley_terry = 0.0, squares = 0.0, distances = 0.0;
    for (int column = 0; column < a.columns; ++column) {
        bradley_terry += pair_column(rows, teachers, a, scales, column, true, squares);
        for (int64_t group = 0; group < a.groups; ++group) {
            distances += group_column(grouped.of(group), a, scales, group, column, true);
        }
    }
    *a.loss = static_cast<T>(total_loss(a, scales, bradley_terry, squares, distances));
}

template void pairwise_loss_cpu<float>(const PairwiseArguments<float>&);
template void pairwise_loss_cpu<double>(const PairwiseArguments<double>&);

}  // namespace prism
