"""The commands that an install puts on PATH: transport-expa to -expf, transport-expp, transport-audit.

Each runs its script as `python expb.py` would: the script's folder first on the path, the script's name for
messages and for the results folder. The scripts lie in the checkout, or in an installed copy inside the
package.
"""

import contextlib
import importlib
import io
import sys
from collections.abc import Sequence

from transport_geometry import PACKAGE, ROOT
from transport_geometry.errors import run_script

SCRIPTS = PACKAGE / "scripts" if ROOT == PACKAGE else ROOT


def _run(script: str, name: str) -> None:
    """`name` stands in for sys.argv[0]. (runpy.run_path would put the script's path there.)"""
    sys.path.insert(0, str(SCRIPTS))
    sys.argv[0] = name
    run_script(importlib.import_module(script).main)


def call(script: str, arguments: Sequence[str]) -> None:
    """Run a script in this process, as its command line would be; what it prints is not shown. Raises what it
    raises.
    """
    typed = sys.argv
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    try:
        sys.argv = [f"{script}.py", *arguments]
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(script).main()
    finally:
        sys.argv = typed


def instead(script: str) -> None:
    """Run another script in this one's place, with the same arguments and a results folder of its own."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    sys.argv[0] = f"{script}.py"
    importlib.import_module(script).main()


def expa() -> None:
    """Exp-A, into outputs/expa."""
    _run("expa", "expa.py")


def expb() -> None:
    """Exp-B, into outputs/expb."""
    _run("expb", "expb.py")


def expc() -> None:
    """Exp-C, into outputs/expc_fisher."""
    _run("expc_fisher", "expc_fisher.py")


def expd() -> None:
    """Exp-D, into outputs/expd_mi."""
    _run("expd_mi", "expd_mi.py")


def expe() -> None:
    """Exp-E, into outputs/expe_attention."""
    _run("expe_attention", "expe_attention.py")


def expf() -> None:
    """Exp-F, into outputs/expf_rate."""
    _run("expf_rate", "expf_rate.py")


def expp() -> None:
    """Exp-P, into outputs/expp_planted."""
    _run("expp_planted", "expp_planted.py")


def audit() -> None:
    """The audit of SAEs that exist, into outputs/audit: can their R² be trusted?"""
    _run("audit", "audit.py")
