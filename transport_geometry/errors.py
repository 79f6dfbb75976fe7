"""What goes wrong and is said in one line: bad input and faults, and what a library's own errors become."""

import contextlib
import os
import pathlib
import pickle
import re
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator


class UserError(Exception):
    """Bad arguments or input: the script prints the message on one line and exits with status 2."""


class Damaged(UserError):
    """A file is not what was written: other bytes, or gone."""


class Fault(Exception):
    """A run gone wrong (a loss that is not finite, a disk that is full): one line, exit status 1."""


def reason(error: BaseException) -> str:
    """What a library's error says, in one line."""
    import huggingface_hub.errors as hub

    if isinstance(error, hub.GatedRepoError):
        return "gated on the hub (401 or 403): accept its terms there and log in with `hf auth login`"
    if isinstance(error, hub.RepositoryNotFoundError):
        return "no local path, and no repository of the hub that you may read (401 or 404)"
    # advice, and torch's frames in C++
    text = re.split("For more information|Exception raised from", str(error))[0]
    text = textwrap.shorten(text, 280, placeholder=" ...")
    if isinstance(error, KeyError):
        return f"no {error} in it"
    plain = isinstance(error, (OSError, ValueError, UserError))
    return text if text and plain else f"{type(error).__name__} {text}"


@contextlib.contextmanager
def one_line(where: str) -> Iterator[None]:
    """Whatever files or a network make the loaders raise is a UserError that says where."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{where}: {reason(error)}") from error


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """A file that cannot be read, or not understood, is one line."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise Damaged(f"{path}: {error.strerror}") from error
    except OSError as error:  # not to be read by this user, or not now: nobody's damage
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        RuntimeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise Damaged(f"{path}: damaged ({type(error).__name__})") from error


def brief(text: str, most: int = 60) -> str:
    """`text`, or its beginning and how long it is."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def printable(text: str, what: str) -> str:
    """`text`, a name that is to stand on one line and in files. Raises UserError for control characters and
    what is no Unicode.
    """
    if re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", text):
        raise UserError(f"{what} {brief(ascii(text))}: a control character in it")
    if len(text) > 1000:
        raise UserError(f"{what} {brief(text)}: too long for a name")
    return text


def run_script(main: Callable[[], object]) -> None:
    """Exit status: 0 done, 2 unusable arguments or input, 1 a fault; one line each, a traceback only for what
    nobody foresaw.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a locale without R² is no reason to stop
    name = pathlib.Path(sys.argv[0]).name + (
        f", rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}" if "RANK" in os.environ else ""
    )
    try:
        main()
    except UserError as error:
        status, message = 2, str(error)
    except Fault as error:
        status, message = 1, str(error)
    except OSError as error:  # a folder that went away, a disk that is full
        status, message = 1, reason(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted; the same command goes on from here"
    else:
        return
    print(f"{name}:", *message.split(), file=sys.stderr)
    sys.exit(status)
