"""Template matching in the tilt series of a project, or in a finished tomogram: files in, picks and pictures out."""
