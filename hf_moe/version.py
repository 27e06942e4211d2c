"""The package's version, alone, so that building needs no imports."""

__version__ = "0.1.0"
