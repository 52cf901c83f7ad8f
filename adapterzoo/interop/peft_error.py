"""What can't be carried to PEFT's files or from them."""

from collections.abc import Sequence

from adapterzoo.errors import AdapterError, listing


class PeftError(AdapterError, ValueError):
    """A model that PEFT's format can't hold, or files that no adapter can be read from. Nothing was changed.

    Args:
        what: what was tried.
        problems: everything that stands against it.
    """

    def __init__(self, what: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{what}:{listing(self.problems)}")
