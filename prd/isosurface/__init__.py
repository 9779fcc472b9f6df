"""Triangles of a field's surface: extraction, marching cubes, marching tetrahedra, coarse-to-fine search."""
