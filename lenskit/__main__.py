"""`python -m lenskit` is the command `lenskit`."""

from lenskit.cli import app

app(prog_name="lenskit")
