"""Small pictures that renderers must go on drawing."""
