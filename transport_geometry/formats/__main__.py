"""`python -m transport_geometry.formats`: see `sae_files`."""

from transport_geometry.errors import run_script
from transport_geometry.formats.sae_files import main

run_script(main)
