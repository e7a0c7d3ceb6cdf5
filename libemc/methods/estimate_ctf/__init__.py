"""CTF estimation: defocus, astigmatism and phase shift of every tilt from the rings of the whole series, each with its error."""
