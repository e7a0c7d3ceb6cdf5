"""Tensors in, tensors out: geometry, Fourier space, CTF, slices, statistics; the device follows the input.

No files, no options, no prints.
"""
