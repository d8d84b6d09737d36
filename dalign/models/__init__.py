"""The decoder: layers, adapters, parameter trees, meshes."""
