"""Averages placed back in tilt series: particles, maps and records in, volumes, scenes and pictures out."""
