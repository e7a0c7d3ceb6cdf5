"""Gold-standard refinement of particle poses: an exhaustive search in space at low resolution, then Gauss-Newton on slices."""
