"""A run on disk: files, manifests, metrics, processes."""
