"""Micro-benchmarks: ours per backend beside what else can be installed, checked against float64 in the same run."""
