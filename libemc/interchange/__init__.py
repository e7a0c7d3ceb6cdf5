"""Other packages' data into our records, and ours into theirs: for the programs that import and export.

Sees formats, records and methods together, as `project` does; the conventions themselves end in `io`.
"""
