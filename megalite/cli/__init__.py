"""The ``megalite`` command line: one file per command."""
