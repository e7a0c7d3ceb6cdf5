"""The runner and the shared options: what every program stands on, and the only room that talks to a user.

A program file declares itself and ends so:

    program = Program(doc=__doc__, name="emc_x", arguments=arguments, main=main, standard=("overwrite", "dry-run"))
    entry = program.entry

    if __name__ == "__main__":
        entry()

This room sees `libemc.records` and `libemc.errors` only. It loads torch when a program that offers --threads or
--device begins to work, and not before: `--help` and a misspelt option are answered at once.
"""

from libemc.cli import options
from libemc.cli.runner import Program, Run

__all__ = ["Program", "Run", "options"]
