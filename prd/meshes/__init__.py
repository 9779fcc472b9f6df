"""Triangle meshes: cleaning, simplification, textures, export and reading."""
