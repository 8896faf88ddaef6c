"""Micro-benchmarks: our backends beside other packages, checked against float64 in the same run."""
