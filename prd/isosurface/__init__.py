"""From a field to triangles: extraction, marching cubes, marching tetrahedra, coarse-to-fine search."""
