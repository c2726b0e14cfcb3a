"""Virtual environments with what a program from elsewhere needs, and nothing else."""

import subprocess
import sys


def make_environment(folder, requirements):
    """Makes a virtual environment in a folder with the packages that a file pins, and returns its Python."""
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--requirement", requirements]
    subprocess.run([python, *words], check=True)
    return python
