"""Splats: 3D Gaussians on a field's surface, how they are drawn, and their files."""
