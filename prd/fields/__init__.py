"""Fields: shapes with colour in the cube [-1, 1]^3; what models make and renderers, exporters and metrics take."""
