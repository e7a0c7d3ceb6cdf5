"""File formats, one file each. Other packages' conventions end here: what leaves this room is in ours.

The room is numpy only; it knows no records and no methods. Readers return small frozen dataclasses (`geometry`), and a
file that cannot be understood is an `InputError` of one line that names the file and what to do. Writers are atomic.
"""
