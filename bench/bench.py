"""The package `bench` for `python bench/SCRIPT.py`: beside a script is where Python looks for it first.

`python -m bench.SCRIPT` in the folder above finds the package itself and does not need this.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent)]
