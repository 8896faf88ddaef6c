// Group-relative advantages: the arithmetic, once, for the CPU twin and the CUDA kernel.
//
// Meaning: prism_fast/ops/group_advantage.py; executable specification: prism_fast/ops/reference/group_advantage.py.
//
// A *team* walks over the rows of one group: on the CPU one thread with a list, on the GPU a warp. Its functions are
//     each(f)            f(row) for every row of the group; a row is always visited by the same member of the team
//     scan(f)            every member calls f(row) for every row of the group
//     sum(f), lowest(f)  the sum and the minimum of f(row), known to every member, added in an order fixed by the rows alone
// Because a row belongs to one member, the workspace is updated in place without synchronisation.
#pragma once

#include "numeric.h"

namespace prism {

enum class Normalize : int { per_score, combined, mean_only, leave_one_out, batch };
enum class Invalid : int { below_min, exclude, as_is };

struct AdvantageOptions {
    Normalize normalize;
    Invalid invalid;
    double eps;
    double invalid_penalty;
    double power;
    bool singleton_identity;
    bool per_score;
};

// Everything but `out` and `workspace` is read only. T is float or double; all arithmetic is in double.
template <class T>
struct AdvantageArguments {
    const T* scores;  // [rows, columns], strides below, in elements
    int64_t score_row_stride, score_column_stride;
    const int64_t* group;  // [rows], ids in [0, rows); other ids give NaN
    const T* weights;      // [columns]
    const bool* valid;     // [rows] or null: all valid
    const T* gate;         // [rows] or null: 1
    const T* offset;       // [rows] or null: 0
    T* out;                // [rows], or [rows, columns] with per_score
    double* workspace;     // [rows, terms] values, then [terms] scales of the whole batch; null: the CPU twin's own
    int64_t rows;
    int columns;
    AdvantageOptions options;

    // Columns that are normalised: the scores, or their weighted sum.
    PRISM_HD int terms() const { return options.normalize == Normalize::combined ? 1 : columns; }
    PRISM_HD int out_columns() const { return options.per_score ? columns : 1; }
    PRISM_HD double& value(int64_t row, int term) const { return workspace[row * terms() + term]; }
    PRISM_HD double& batch_scale(int term) const { return workspace[rows * terms() + term]; }
    PRISM_HD double score(int64_t row, int column) const {
        return scores[row * score_row_stride + column * score_column_stride];
    }
    PRISM_HD double weight(int column) const { return weights[column]; }
    PRISM_HD bool known(int64_t row) const { return group[row] >= 0 && group[row] < rows; }
    PRISM_HD bool is_valid(int64_t row) const { return valid == nullptr || valid[row]; }
    // Rows that enter their group's statistics.
    PRISM_HD bool counted(int64_t row) const { return options.invalid != Invalid::exclude || is_valid(row); }
};

// Writes the values to be normalised: scores, with those of invalid rows replaced, or their weighted sum.
template <class T, class Team>
PRISM_HD void gather_values(const Team& team, const AdvantageArguments<T>& a) {
    const bool replace = a.valid != nullptr && a.options.invalid == Invalid::below_min;
    const bool combine = a.options.normalize == Normalize::combined;
    const double valid_rows = replace ? team.sum([&](int64_t row) { return a.is_valid(row) ? 1.0 : 0.0; }) : 0.0;
    if (combine) team.each([&](int64_t row) { a.value(row, 0) = 0.0; });
    for (int column = 0; column < a.columns; ++column) {
        double floor = -1.0;
        if (valid_rows > 0.0) {
            floor += team.lowest([&](int64_t row) { return a.is_valid(row) ? a.score(row, column) : INFINITY; });
        }
        team.each([&](int64_t row) {
            const double x = replace && !a.is_valid(row) ? floor : a.score(row, column);
            if (combine) {
                a.value(row, 0) += x * a.weight(column);
            } else {
                a.value(row, column) = x;
            }
        });
    }
}

// Unbiased standard deviation + eps over all counted rows; the team walks over the whole batch.
template <class T, class Team>
PRISM_HD double scale_of_batch(const Team& team, const AdvantageArguments<T>& a, int term) {
    auto in = [&](int64_t row) { return a.known(row) && a.counted(row); };
    const double count = team.sum([&](int64_t row) { return in(row) ? 1.0 : 0.0; });
    const double mean = team.sum([&](int64_t row) { return in(row) ? a.value(row, term) : 0.0; }) / fmax(count, 1.0);
    const double squares = team.sum([&](int64_t row) {
        const double d = in(row) ? a.value(row, term) - mean : 0.0;
        return d * d;
    });
    return sqrt(squares / fmax(count - 1.0, 1.0)) + a.options.eps;
}

// Replaces the values of one term by normalised ones. Rows that are not counted get 0.
template <class T, class Team>
PRISM_HD void normalize_values(
    const Team& team, const AdvantageArguments<T>& a, int term, double size, Normalize how, bool singleton_identity
) {
    const double eps = a.options.eps;
    const double low = team.lowest([&](int64_t row) { return a.counted(row) ? a.value(row, term) : INFINITY; });
    // Distances from the minimum are exactly 0 in a group of equal scores; a mean of 0.9s is not exactly 0.9.
    const double total = team.sum([&](int64_t row) { return a.counted(row) ? a.value(row, term) - low : 0.0; });
    const double mean = total / fmax(size, 1.0);
    auto center = [&](int64_t row) { return a.counted(row) ? a.value(row, term) - low - mean : 0.0; };
    double scale = 1.0, alone = low;  // `alone`: the value of a group's only counted row, which is its minimum
    if (how == Normalize::per_score || how == Normalize::combined) {
        const double squares = team.sum([&](int64_t row) { return center(row) * center(row); });
        scale = sqrt(squares / fmax(size - 1.0, 1.0)) + eps;
        alone = low / (1.0 + eps);
    } else if (how == Normalize::batch) {
        scale = a.batch_scale(term);
        alone = low / scale;
    } else if (how == Normalize::leave_one_out) {
        scale = fmax(size - 1.0, 1.0) / fmax(size, 1.0);
    }
    team.each([&](int64_t row) {
        const double centered = center(row);
        double z = centered == 0.0 ? 0.0 : centered / scale;  // also with eps = 0
        if (singleton_identity && size == 1.0 && a.counted(row)) z = alone;
        a.value(row, term) = z;
    });
}

// From the values of one group to its advantages.
template <class T, class Team>
PRISM_HD void finish_group(const Team& team, const AdvantageArguments<T>& a) {
    const AdvantageOptions& o = a.options;
    const double size = team.sum([&](int64_t row) { return a.counted(row) ? 1.0 : 0.0; });
    for (int term = 0; term < a.terms(); ++term) {
        normalize_values(team, a, term, size, o.normalize, o.singleton_identity);
        if (o.power != 1.0 && size > 1.0) {
            team.each([&](int64_t row) {
                const double z = a.value(row, term);
                a.value(row, term) = z == 0.0 ? 0.0 : copysign(pow(fabs(z), o.power), z);
            });
            normalize_values(team, a, term, size, Normalize::per_score, false);
        }
    }
    team.each([&](int64_t row) {
        const double gate = a.gate == nullptr ? 1.0 : static_cast<double>(a.gate[row]);
        double sum = 0.0;
        for (int term = 0; term < a.terms(); ++term) {
            const double weight = o.normalize == Normalize::combined ? 1.0 : a.weight(term);
            const double share = a.value(row, term) * weight * gate;
            if (o.per_score) a.out[row * a.columns + term] = static_cast<T>(share);
            sum += share;
        }
        if (o.per_score) return;
        if (a.offset != nullptr) sum += a.offset[row];
        if (!a.is_valid(row)) sum -= o.invalid_penalty;
        a.out[row] = static_cast<T>(sum);
    });
}

// A row with an id outside [0, rows) belongs to no group.
template <class T>
PRISM_HD void mark_unknown(const AdvantageArguments<T>& a, int64_t row) {
    if (a.known(row)) return;
    for (int column = 0; column < a.out_columns(); ++column) a.out[row * a.out_columns() + column] = static_cast<T>(NAN);
}

// CPU twin, on at most `threads` threads.
template <class T>
void group_advantage_cpu(AdvantageArguments<T> a, int threads);

// Enqueues the CUDA kernels on `stream` and returns a cudaError_t (0: enqueued). Never synchronises.
template <class T>
int group_advantage_cuda(const AdvantageArguments<T>& a, void* stream);

}  // namespace prism
