"""Helpers of the library that know nothing of 3D."""
