"""A tilt series refined from all of its particles: geometry, CTF and motion that make every one of them fit better."""
