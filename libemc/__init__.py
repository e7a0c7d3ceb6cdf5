"""emc: cryo-electron tomography, from a raw tilt series to a subtomogram average, on one forward model.

The rooms: `numerics` (tensors in, tensors out), `io` (one file per format; conventions end there), `records` (the typed
JSON models), `methods` (numerics and records to results), `cli` (the runner), `view` (plots). Who may import whom is
held by import-linter (.importlinter).
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # small matrices: threads cost more than they give

__version__ = "0.1.0"
