// CPU twin of the group-advantage kernel: rows are sorted by group (stable), and threads share the groups.
#include "group_advantage.h"

#include <algorithm>
#include <vector>

#include "grouped_rows.h"
#include "parallel.h"

namespace prism {

template <class T>
void group_advantage_cpu(AdvantageArguments<T> a, int threads) {
    const int64_t rows = a.rows;
    thread_local std::vector<double> own;
    if (a.workspace == nullptr) {
        own.resize(std::max<size_t>(own.size(), (rows + 1) * a.terms()));
        a.workspace = own.data();
    }
    for (int64_t row = 0; row < rows; ++row) mark_unknown(a, row);
    const GroupedRows grouped(a.group, rows, rows);

    auto for_groups = [&](auto f) {
        parallel_for(rows, rows * a.columns * 16, threads, [&](int64_t begin, int64_t end) {
            for (int64_t group = begin; group < end; ++group) {
                const ListTeam team = grouped.of(group);
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
    const ListTeam all = grouped.all();
    for (int term = 0; term < a.terms(); ++term) a.batch_scale(term) = scale_of_batch(all, a, term);
    for_groups([&](const ListTeam& team) { finish_group(team, a); });
}

template void group_advantage_cpu<float>(AdvantageArguments<float>, int);
template void group_advantage_cpu<double>(AdvantageArguments<double>, int);

}  // namespace prism
