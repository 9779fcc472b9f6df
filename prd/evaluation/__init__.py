"""Measuring and showing what models make: reports, comparisons, benchmarks."""
