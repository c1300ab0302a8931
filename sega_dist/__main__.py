"""`python -m sega_dist` is `sega-dist`."""

from sega_dist.cli import program

program()
