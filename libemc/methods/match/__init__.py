"""Template matching: where in a specimen is something that looks like a given map, and how is it turned."""
