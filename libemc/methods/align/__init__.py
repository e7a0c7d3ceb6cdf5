"""Tilt-series alignment: from images and nominal angles to the geometry of every tilt, with an honest error for each."""
