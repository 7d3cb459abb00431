"""Plumbline: collect, embed, index, retrieve, score; every step on disk, every step restartable."""

__version__ = "0.1.0"
