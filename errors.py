"""What goes wrong and is said in one line: bad input and faults, and what a library's own errors become."""
import contextlib
import re
import textwrap
from collections.abc import Iterator


class UserError(Exception):
    """Bad arguments or input: the script prints the message on one line and exits with status 2."""


class Damaged(UserError):
    """A file is not what was written: other bytes, or gone."""


class Fault(Exception):
    """A run gone wrong (a loss that is not finite, a disk that is full): one line, exit status 1."""


def said(error: BaseException) -> str:
    """What a library's error says, in one line."""
    import huggingface_hub.errors as hub
    if isinstance(error, hub.GatedRepoError):
        return "gated on the hub (401 or 403): accept its terms there and log in with `hf auth login`"
    if isinstance(error, hub.RepositoryNotFoundError):
        return "no local path, and no repository of the hub that you may read (401 or 404)"
    text = re.split("For more information|Exception raised from", str(error))[0]  # advice, and torch's frames in C++
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
        raise UserError(f"{where}: {said(error)}") from error


def brief(text: str, most: int = 60) -> str:
    """`text`, or its beginning and how long it is."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def printable(text: str, what: str) -> str:
    """`text`, a name that is to stand on one line and in files. Raises UserError for control characters and what is no Unicode."""
    if re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", text):
        raise UserError(f"{what} {brief(ascii(text))}: a control character in it")
    if len(text) > 1000:
        raise UserError(f"{what} {brief(text)}: too long for a name")
    return text
