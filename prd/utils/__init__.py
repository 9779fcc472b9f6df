"""Helpers without knowledge of 3D: arguments, files, memory, threads, checked types."""
