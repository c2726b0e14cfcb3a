"""Exports for other programs. evaluate.py imports this with --export only, for it takes seconds and packages."""
