"""One generic registry: names to classes, with errors that print what exists."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from moa_peft.errors import UserError

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """Names of one kind of part (``router``, ``expert``, ...) and the classes that implement them.

    Args:
        kind: the word used in error messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Decorator that enters a class under `name`; a name can be taken once."""

        def enter(entry: C) -> C:
            if name in self._entries:
                raise ValueError(
                    f"{self.kind} {name!r} is already registered (existing={self._entries[name]}, new={entry})"
                )
            self._entries[name] = entry  # type: ignore[assignment]
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        """The class registered as `name`.

        Raises:
            UserError: for an unknown name, with the list of known ones.
        """
        if not isinstance(name, str) or name not in self._entries:
            raise UserError(f"Unknown {self.kind} {name!r}. Known: {', '.join(sorted(self._entries))}.")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def items(self) -> Iterator[tuple[str, T]]:
        """Names and classes, in order of registration."""
        return iter(self._entries.items())
