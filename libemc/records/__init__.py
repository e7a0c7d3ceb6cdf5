"""The JSON bookkeeping: typed records, read and written whole, changed by one program at a time, with their history.

This room knows no numbers but those of JSON: it imports neither numpy nor torch, so that a program that only looks at a
record starts at once. What a record may hold is in `models`; `python -m libemc.records.schema info/` tells the world.
"""

from libemc.records.models import (
    Alignment,
    Ctf,
    Deformation,
    Fingerprint,
    HistoryEntry,
    Landmarks,
    Optics,
    Particle,
    ParticleFile,
    ParticleSet,
    ParticleTilts,
    Picks,
    RawImages,
    Record,
    Replaced,
    Run,
    Source,
    Subtilt,
    Tilts,
    TiltSeriesRecord,
    Tomogram,
)
from libemc.records.particles import half_of, image_places, load_particles, particles_path, save_particles
from libemc.records.runs import fingerprint, next_run_directory
from libemc.records.store import finish, load, save_new, update
from libemc.records.text import dumps, parse
from libemc.records.tiltseries import find_tiltseries, load_tiltseries, need, need_picks, tiltseries_path

__all__ = [
    "Alignment",
    "Ctf",
    "Deformation",
    "Fingerprint",
    "HistoryEntry",
    "Landmarks",
    "Optics",
    "Particle",
    "ParticleFile",
    "ParticleSet",
    "ParticleTilts",
    "Picks",
    "RawImages",
    "Record",
    "Replaced",
    "Run",
    "Source",
    "Subtilt",
    "TiltSeriesRecord",
    "Tilts",
    "Tomogram",
    "dumps",
    "find_tiltseries",
    "fingerprint",
    "finish",
    "half_of",
    "image_places",
    "load",
    "load_particles",
    "load_tiltseries",
    "need",
    "need_picks",
    "next_run_directory",
    "parse",
    "particles_path",
    "save_new",
    "save_particles",
    "tiltseries_path",
    "update",
]
