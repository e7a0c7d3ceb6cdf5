"""Numerics and records to results: the steps of the workflow. No files, no options."""
