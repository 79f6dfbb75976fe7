"""Exceptions that are reported as one-line messages, and what other libraries' errors become."""

import contextlib
import io
import os
import pathlib
import pickle
import re
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator


class UserError(Exception):
    """Bad arguments or input: the script prints one line and exits with status 2."""


class Damaged(UserError):
    """A file is missing or has other bytes than were written."""


class Fault(Exception):
    """A run failed (a loss that is not finite, a full disk): one line, exit status 1."""


# ------------------------------------------------------------------------------------- errors of libraries
# what reading a file raises if its content is wrong
CONTENT_ERRORS = (
    *(ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)


def reason(error: BaseException) -> str:
    """A library's error message in one line."""
    import huggingface_hub.errors as hub

    if isinstance(error, hub.GatedRepoError):
        return "gated on the hub (401 or 403): accept its terms there and log in with `hf auth login`"
    if isinstance(error, hub.RepositoryNotFoundError):
        return "no local path, and no repository of the hub that you may read (401 or 404)"
    if isinstance(error, KeyError):
        return f"no {error} in it"
    if isinstance(error, ImportError) and error.__cause__:
        # transformers says what it could not import; the cause says why
        if "torchvision" in (why := reason(error.__cause__)):
            return f"torchvision is built for another torch ({why}): nothing here needs it, uninstall it"
        return f"{type(error).__name__}: {why}"
    # without advice and without torch's C++ frames
    text = re.split("For more information|Exception raised from", str(error))[0]
    text = textwrap.shorten(text, 280, placeholder=" ...")
    plain = isinstance(error, (OSError, ValueError, UserError))
    return text if text and plain else f"{type(error).__name__} {text}"


@contextlib.contextmanager
def one_line(about: str) -> Iterator[None]:
    """Turn any exception within into a UserError whose message begins with `about`."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{about}: {reason(error)}") from error


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Turn an exception while reading a file into Damaged, or into UserError if access is denied or fails."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise Damaged(f"{path}: {error.strerror}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except CONTENT_ERRORS as error:
        raise Damaged(f"{path}: damaged ({type(error).__name__})") from error


# ------------------------------------------------------------------------------------ text within a message
def brief(text: str, most: int = 60) -> str:
    """`text`, or its beginning and its length."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def printable(text: str, what: str) -> str:
    """Return `text`, a name for messages and files. Raises UserError for control characters, text that is not
    valid Unicode, and names that are too long.
    """
    if re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", text):
        raise UserError(f"{what} {brief(ascii(text))}: a control character in it")
    if len(text) > 1000:
        raise UserError(f"{what} {brief(text)}: too long for a name")
    return text


# ------------------------------------------------------------------------------------------------ a script
def run_script(main: Callable[[], object]) -> None:
    """Run a script. Exit status: 0 done; 2 bad arguments or input, 1 a fault, each with one line; 130
    interrupted; 141, as in a shell, if the output is closed (`| head`). Other exceptions give a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a locale without R² is no reason to stop
    name = pathlib.Path(sys.argv[0]).name
    if "RANK" in os.environ:
        name += f", rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    status, message, ended = 141, "", False
    try:
        try:
            main()
            status = 0
        except SystemExit as end:  # from argparse, or a script's own status
            status, ended = int(end.code or 0), True
        sys.stdout.flush()  # at exit a closed pipe could no longer be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        status, message = 2, str(error)
    except Fault as error:
        status, message = 1, str(error)
    except OSError as error:  # a folder that went away, a disk that is full
        status, message = 1, reason(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted; the same command goes on from here"
    if message:
        print(f"{name}:", *message.split(), file=sys.stderr)
    if status or ended:
        sys.exit(status)
