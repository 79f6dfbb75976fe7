"""What goes wrong and is said in one line: bad input and faults, and what a library's own errors become."""

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
    """Bad arguments or input: the script prints the message on one line and exits with status 2."""


class Damaged(UserError):
    """A file is not what was written: other bytes, or gone."""


class Fault(Exception):
    """A run gone wrong (a loss that is not finite, a disk that is full): one line, exit status 1."""


# ------------------------------------------------------------------------------------- errors of libraries
# what reading a file raises that is there and holds something else than it should
CONTENT_ERRORS = (
    *(ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)


def reason(error: BaseException) -> str:
    """What a library's error says, in one line."""
    import huggingface_hub.errors as hub

    if isinstance(error, hub.GatedRepoError):
        return "gated on the hub (401 or 403): accept its terms there and log in with `hf auth login`"
    if isinstance(error, hub.RepositoryNotFoundError):
        return "no local path, and no repository of the hub that you may read (401 or 404)"
    if isinstance(error, KeyError):
        return f"no {error} in it"
    if isinstance(error, ImportError) and error.__cause__:
        # transformers says what it could not import, and its cause why
        if "torchvision" in (why := reason(error.__cause__)):
            return f"torchvision is built for another torch ({why}): nothing here needs it, uninstall it"
        return f"{type(error).__name__}: {why}"
    # advice, and torch's frames in C++
    text = re.split("For more information|Exception raised from", str(error))[0]
    text = textwrap.shorten(text, 280, placeholder=" ...")
    plain = isinstance(error, (OSError, ValueError, UserError))
    return text if text and plain else f"{type(error).__name__} {text}"


@contextlib.contextmanager
def one_line(about: str) -> Iterator[None]:
    """Whatever files or a network make the loaders raise is a UserError that says what it is about."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{about}: {reason(error)}") from error


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """A file that cannot be read, or not understood, is one line: Damaged, or UserError where this user may
    not read it, or not now, which is nobody's damage.
    """
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


# ------------------------------------------------------------------------------------------------ a script
def run_script(main: Callable[[], object]) -> None:
    """Exit status: 0 done, 2 unusable arguments or input, 1 a fault; one line each, a traceback only for what
    nobody foresaw. Where nobody reads on (`| head`) nothing is said, and what is not done is 141, as a shell
    has it.
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
        except SystemExit as end:  # argparse's, or an answer in the status
            status, ended = int(end.code or 0), True
        sys.stdout.flush()  # at Python's own end a closed pipe would be an error that nobody can catch
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
