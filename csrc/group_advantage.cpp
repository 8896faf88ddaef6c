// CPU twin of the group-advantage kernel: rows are sorted by group (stable), groups are shared among threads.
#include "group_advantage.h"

#include <numeric>
#include <vector>

#include "parallel.h"

namespace prism {
namespace {

// One thread that walks over a list of rows in ascending order.
struct ListTeam {
    const int64_t* rows;
    int64_t count;

    template <class F>
    void each(F f) const {
        for (int64_t i = 0; i < count; ++i) f(rows[i]);
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

}  // namespace

template <class T>
void group_advantage_cpu(const AdvantageArguments<T>& a, int threads) {
    const int64_t rows = a.rows;
    std::vector<int64_t> start(rows + 1, 0), order(rows);
    for (int64_t row = 0; row < rows; ++row) {
        mark_unknown(a, row);
        if (a.known(row)) ++start[a.group[row] + 1];
    }
    std::partial_sum(start.begin(), start.end(), start.begin());
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t row = 0; row < rows; ++row) {
        if (a.known(row)) order[next[a.group[row]]++] = row;
    }

    auto for_groups = [&](auto f) {
        parallel_for(rows, rows * a.columns * 16, threads, [&](int64_t begin, int64_t end) {
            for (int64_t group = begin; group < end; ++group) {
                const ListTeam team{order.data() + start[group], start[group + 1] - start[group]};
                if (team.count > 0) f(team);
            }
        });
    };
    if (a.options.normalize != Normalize::batch) {
        for_groups([&](const ListTeam& team) {
            gather_values(team, a);
            finish_group(team, a);
        });
        return;
    }
    for_groups([&](const ListTeam& team) { gather_values(team, a); });
    const ListTeam all{order.data(), start[rows]};
    for (int term = 0; term < a.terms(); ++term) a.batch_scale(term) = scale_of_batch(all, a, term);
    for_groups([&](const ListTeam& team) { finish_group(team, a); });
}

template void group_advantage_cpu<float>(const AdvantageArguments<float>&, int);
template void group_advantage_cpu<double>(const AdvantageArguments<double>&, int);

}  // namespace prism
