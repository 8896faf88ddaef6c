// Bradley-Terry loss of one teacher row against its group of student rows, with L2 and spread terms: the arithmetic, once, for
// the CPU twin and the CUDA kernel. Everything is computed in double; the inputs are small.
//
// Meaning: prism_fast/ops/pairwise_loss.py; executable specification: prism_fast/ops/reference/pairwise_loss.py. Teams are
// defined in group_advantage.h.
#pragma once

#include "scalar.h"

namespace prism {

constexpr int kPenalties = 16;  // scores that can have a length penalty

template <class T>
struct PairwiseArguments {
    const T* teacher;  // [groups, columns]
    const T* student;  // [rows, columns]
    const int64_t* group;  // [rows]
    const bool* valid;     // [rows] or null: all
    const T* teacher_length;  // [groups, columns] or null: no penalty
    const T* student_length;  // [rows, columns] or null
    T* loss;                  // []
    int64_t* counts;          // [3, columns]: pairs, ties, correct
    T* stats;                 // [5, columns]: margin, accuracy, teacher, student, loss
    T* teacher_gradient;      // [groups, columns] or null: no gradients wanted
    T* student_gradient;      // [rows, columns] or null
    double* workspace;        // [rows, columns]: derivative of each pair's loss with respect to its margin
    int64_t groups, rows;
    int columns;
    bool has_clip, has_denominator, has_l2_denominator;
    double clip, l2, spread;
    Scalar denominator, l2_denominator;
    double penalty[kPenalties];

    PRISM_HD bool known(int64_t row) const { return group[row] >= 0 && group[row] < groups; }
    PRISM_HD bool use(int64_t row) const { return valid == nullptr || valid[row]; }
    PRISM_HD double& pair_slope(int64_t row, int column) const { return workspace[row * columns + column]; }
};

// A score in the loss: minus its length penalty (`plain`), then clamped.
struct Score {
    double plain, value;
    bool passes;  // the clamp lets the gradient through
};

template <class T>
PRISM_HD inline Score score_of(const PairwiseArguments<T>& a, const T* scores, const T* lengths, int64_t row, int column) {
    double x = scores[row * a.columns + column];
    if (lengths != nullptr) x -= a.penalty[column] * log1p(static_cast<double>(lengths[row * a.columns + column]));
    if (!a.has_clip) return {x, x, true};
    return {x, x < -a.clip ? -a.clip : x > a.clip ? a.clip : x, x >= -a.clip && x <= a.clip};
}
template <class T>
PRISM_HD inline Score teacher_of(const PairwiseArguments<T>& a, int64_t group, int column) {
    return score_of(a, a.teacher, a.teacher_length, group, column);
}
template <class T>
PRISM_HD inline Score student_of(const PairwiseArguments<T>& a, int64_t row, int column) {
    return score_of(a, a.student, a.student_length, row, column);
}

// Quantile of the standard normal distribution, 0 < p < 1: an approximation to 4.5e-4 (Abramowitz and Stegun, 26.2.23), then
// two steps of Halley's method on the distribution function, which leave only rounding errors.
PRISM_HD inline double normal_quantile(double p) {
    const double tail = p < 0.5 ? p : 1.0 - p;
    const double t = sqrt(-2.0 * log(tail));
    double x = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)));
    x = -x;  // the quantile of `tail`, not positive
    for (int step = 0; step < 2; ++step) {
        const double error = 0.5 * erfc(-x * 0.70710678118654752440) - tail;
        const double u = error * 2.50662827463100050242 * exp(0.5 * x * x);  // over the density
        x -= u / (1.0 + 0.5 * x * u);
    }
    return p < 0.5 ? x : p > 0.5 ? -x : 0.0;
}

// Scalars of the whole call.
struct PairwiseScales {
    double pairs, share, l2_share;
};

PRISM_HD inline double inverse_count(double count) { return count == 0.0 ? 1.0 : 1.0 / count; }

template <class T, class Team>
PRISM_HD PairwiseScales pairwise_scales(const Team& rows, const PairwiseArguments<T>& a) {
    PairwiseScales s;
    s.pairs = rows.sum([&](int64_t row) { return a.use(row) ? 1.0 : 0.0; });
    s.share = inverse_count(a.has_denominator ? a.denominator.load() : s.pairs);
    const double scores = static_cast<double>((a.groups + a.rows) * a.columns);
    s.l2_share = a.l2 * inverse_count(a.has_l2_denominator ? a.l2_denominator.load() : scores);
    return s;
}

// One score: loss and statistics, gradients of the students but for the spread term. Returns the Bradley-Terry loss and,
// in `squares`, the sum of all squares. `first` is true for one member of the team.
template <class T, class Team>
PRISM_HD double pair_column(
    const Team& rows, const Team& teachers, const PairwiseArguments<T>& a, const PairwiseScales& scales, int column, bool first,
    double& squares
) {
    const double unknown = NAN;
    auto teacher_row = [&](int64_t row) { return a.known(row) ? a.group[row] : 0; };
    auto rival = [&](int64_t row) { return a.groups == 0 ? unknown : teacher_of(a, teacher_row(row), column).value; };
    auto margin = [&](int64_t row) { return (a.known(row) ? rival(row) : unknown) - student_of(a, row, column).value; };
    // Compared before the clamp, which makes scores beyond its bounds equal.
    auto ahead = [&](int64_t row) { return a.known(row) ? teacher_of(a, a.group[row], column).plain : unknown; };
    const double loss = rows.sum([&](int64_t row) {
        const bool use = a.use(row);
        double value = 0.0, slope = 0.0;
        if (use) {
            const double x = -margin(row), e = exp(x < 0.0 ? x : -x);
            value = log1p(e) + (x > 0.0 ? x : 0.0);
            slope = -(x < 0.0 ? e : 1.0) / (1.0 + e);
        }
        a.pair_slope(row, column) = slope;
        if (a.student_gradient != nullptr) {
            const Score s = student_of(a, row, column);
            const double gradient = -slope * scales.share + (a.l2 != 0.0 ? 2.0 * scales.l2_share * s.value : 0.0);
            a.student_gradient[row * a.columns + column] = static_cast<T>(s.passes ? gradient : 0.0);
        }
        return value;
    }) * scales.share;
    auto behind = [&](int64_t row) { return student_of(a, row, column).plain; };
    const double ties = rows.sum([&](int64_t row) { return a.use(row) && ahead(row) == behind(row) ? 1.0 : 0.0; });
    const double correct = rows.sum([&](int64_t row) { return a.use(row) && ahead(row) > behind(row) ? 1.0 : 0.0; });
    auto mean = [&](auto value) { return rows.sum([&](int64_t row) { return a.use(row) ? value(row) : 0.0; }) / scales.pairs; };
    const double mean_margin = mean(margin), mean_teacher = mean(rival);
    const double mean_student = mean([&](int64_t row) { return student_of(a, row, column).value; });
    if (a.l2 != 0.0) {
        squares += teachers.sum([&](int64_t group) {
            const double t = teacher_of(a, group, column).value;
            return t * t;
        });
        squares += rows.sum([&](int64_t row) {
            const double s = student_of(a, row, column).value;
            return s * s;
        });
    }
    if (first) {
        a.counts[column] = static_cast<int64_t>(scales.pairs);
        a.counts[a.columns + column] = static_cast<int64_t>(ties);
        a.counts[2 * a.columns + column] = static_cast<int64_t>(correct);
        const double values[] = {mean_margin, correct / (scales.pairs - ties), mean_teacher, mean_student, loss};
        for (int i = 0; i < 5; ++i) a.stats[i * a.columns + column] = static_cast<T>(values[i]);
    }
    return loss;
}

// One score of one group, after pair_column: the teacher's gradient and the spread term of the students. Returns the group's
// sum of squared distances. `first` as above.
template <class T, class Team>
PRISM_HD double group_column(
    const Team& team, const PairwiseArguments<T>& a, const PairwiseScales& scales, int64_t group, int column, bool first
) {
    if (a.teacher_gradient != nullptr) {
        const double slope = team.sum([&](int64_t row) { return a.pair_slope(row, column); });
        const Score t = teacher_of(a, group, column);
        const double gradient = slope * scales.share + (a.l2 != 0.0 ? 2.0 * scales.l2_share * t.value : 0.0);
        if (first) a.teacher_gradient[group * a.columns + column] = static_cast<T>(t.passes ? gradient : 0.0);
    }
    if (a.spread == 0.0) return 0.0;
    const double n = team.sum([&](int64_t row) { return a.use(row) ? 1.0 : 0.0; });
    if (n < 2.0) return 0.0;
    const double mean = team.sum([&](int64_t row) { return a.use(row) ? student_of(a, row, column).value : 0.0; }) / n;
    // Equal scores rank in the order of their rows. The distances overwrite the pairs' slopes, which are no longer needed.
    auto distance = [&](int64_t row) {
        if (!a.use(row)) return 0.0;
        const double s = student_of(a, row, column).value;
        double rank = 0.0;
        team.scan([&](int64_t other) {
            if (!a.use(other)) return;
            const double x = student_of(a, other, column).value;
            if (x < s || (x == s && other < row)) rank += 1.0;
        });
        return s - mean - normal_quantile((rank + 0.5) / n);
    };
    team.each([&](int64_t row) { a.pair_slope(row, column) = distance(row); });
    const double squares = team.sum([&](int64_t row) { return a.pair_slope(row, column) * a.pair_slope(row, column); });
    if (a.student_gradient != nullptr) {
        team.each([&](int64_t row) {
            if (!a.use(row) || !student_of(a, row, column).passes) return;
            T& gradient = a.student_gradient[row * a.columns + column];
            // The mean depends on every score, but the distances add up to 0: the gradient through the mean is 0.
            const double more = 2.0 * a.spread * scales.share * a.pair_slope(row, column);
            gradient = static_cast<T>(static_cast<double>(gradient) + more);
        });
    }
    return squares;
}

template <class T>
PRISM_HD inline double total_loss(
    const PairwiseArguments<T>& a, const PairwiseScales& scales, double bradley_terry, double squares, double distances
) {
    double total = bradley_terry;  // a weight of 0 leaves its term out: 0 * NaN is NaN
    if (a.l2 != 0.0) total += scales.l2_share * squares;
    if (a.spread != 0.0) total += a.spread * scales.share * distances;
    return total;
}

// CPU twin, on the caller's thread.
template <class T>
void pairwise_loss_cpu(const PairwiseArguments<T>& a);

// Enqueues the CUDA kernel (one launch) on `stream` and returns a cudaError_t. Never synchronises.
template <class T>
int pairwise_loss_cuda(const PairwiseArguments<T>& a, void* stream);

}  // namespace prism
