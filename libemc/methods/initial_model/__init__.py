"""Initial models from nothing: stochastic gradient descent on a small reference, all poses weighed at each step."""
