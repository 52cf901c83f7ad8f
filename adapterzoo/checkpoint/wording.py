"""How files and what is in them are named in messages."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from adapterzoo.errors import CheckpointError


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Turn what the system, or safetensors, says of a file into a CheckpointError that begins with `what`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{what}: {error}") from error


def short(value: object, limit: int = 80) -> str:
    """A value out of a file, short enough for a message, and with nothing in it that a terminal would obey."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 4]}...{text[-1]}"


def shown(path: Path) -> str:
    """A path in a message."""
    return repr(str(path))


def some(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")
