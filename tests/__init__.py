import prd  # noqa: F401  # sets the variables of MKL and OpenMP before a module of the tests imports torch
