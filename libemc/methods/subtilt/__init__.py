"""Each image of a particle by itself: how good it is, and how much it counts."""
