"""How the particles of a set differ, and which are alike."""
