"""Tensors in, tensors out: geometry, Fourier space, CTF, slices, statistics. No files, no options, no prints; the device follows the input."""
