"""Convert a checkpoint (an embedded name, a folder, or a hub id) to lenskit's format: `lenskit convert`.

python scripts/convert.py SOURCE DEST [--revision REVISION] [--token TOKEN]
"""

import typer

from lenskit.cli import convert

if __name__ == "__main__":
    typer.run(convert)
