"""Plots and pages, from numbers that others made."""
