// Rows sorted by group on the CPU.
#pragma once

#include <numeric>
#include <vector>

#include "numeric.h"

namespace prism {

// One thread that walks over a list of rows in ascending order.
struct ListTeam {
    const int64_t* rows;
    int64_t count;

    template <class F>
    void each(F f) const {
        for (int64_t i = 0; i < count; ++i) f(rows[i]);
    }
    template <class F>
    void scan(F f) const {
        each(f);
    }
    template <class F>
    double sum(F f) const {
        double total = 0.0;
        each([&](int64_t row) { total += f(row); });
        return total;
    }
    template <class F>
    double lowest(F f) const {
        double low = INFINITY;
        each([&](int64_t row) { low = lower(f(row), low); });
        return low;
    }
};

// Row numbers by group, ascending within each; rows with an id outside [0, groups) are left out.
class GroupedRows {
public:
    GroupedRows(const int64_t* group, int64_t rows, int64_t groups) : start_(groups + 1, 0), order_(rows) {
        auto known = [&](int64_t row) { return group[row] >= 0 && group[row] < groups; };
        for (int64_t row = 0; row < rows; ++row) {
            if (known(row)) ++start_[group[row] + 1];
        }
        std::partial_sum(start_.begin(), start_.end(), start_.begin());
        std::vector<int64_t> next(start_.begin(), start_.end() - 1);
        for (int64_t row = 0; row < rows; ++row) {
            if (known(row)) order_[next[group[row]]++] = row;
        }
    }
    ListTeam of(int64_t group) const { return {order_.data() + start_[group], start_[group + 1] - start_[group]}; }
    ListTeam all() const { return {order_.data(), start_.back()}; }

private:
    std::vector<int64_t> start_, order_;
};

}  // namespace prism
