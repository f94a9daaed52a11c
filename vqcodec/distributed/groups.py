"""Groups: files are converted several at a time, consecutive ones that are in memory together."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
Converted = tuple[bytes, tuple[str, ...]]  # a new file, and notes of one line each
Item = tuple[T, bytes, bool]  # a key, a file, and whether it is to be converted

MOST_FILES = 16  # enough for calls of the codec to be few, and not much to do again when an actor dies
MOST_PIXELS = 24_000_000  # one picture of a large camera, for which a worker has to have memory in any case
MOST_BYTES = 32 << 20  # of the files, of which some may be no pictures; less than the pixels take when decoded


class Converter:
    """Makes files from files."""

    def convert_many(self, files: Sequence[bytes]) -> list[Converted | Exception]:
        """Convert a group of files, one at least.

        Returns:
            For each file, in their order, what has become of it, or why it cannot be converted.
        """
        raise NotImplementedError

    def pixels(self, file: bytes) -> int:
        """How many pixels a file states that it decodes to.

        Raises:
            VqcodecError: the file cannot be read.
        """
        raise NotImplementedError

    def convert_each(
        self, items: Iterable[Item[T]], most_files: int = MOST_FILES
    ) -> Iterator[tuple[T, bytes, Converted | Exception | None]]:
        """Convert files group by group.

        Args:
            items: taken as they are needed, which is one beyond the group at most.
            most_files: of a group.

        Yields:
            For each item, in their order: its key, its file, and what `convert_many` has made of that; None if it is
            not to be converted.
        """
        for group in self._groups(items, most_files):
            files = [file for _, file, wanted in group if wanted]
            results = deque(self.convert_many(files) if files else ())  # from which each goes when it is taken
            yield from ((key, file, results.popleft() if wanted else None) for key, file, wanted in group)

    def _groups(self, items: Iterable[Item[T]], most_files: int) -> Iterator[list[Item[T]]]:
        """Split items into groups within the limits. One that alone exceeds a limit is a group of its own."""
        group: list[Item[T]] = []
        size = pixels = 0
        for item in items:
            _, file, wanted = item
            stated = self._stated(file) if wanted else 0
            if group and (len(group) == most_files or size + len(file) > MOST_BYTES or pixels + stated > MOST_PIXELS):
                yield group
                group, size, pixels = [], 0, 0
            group.append(item)
            size, pixels = size + len(file), pixels + stated
        if group:
            yield group

    def _stated(self, file: bytes) -> int:
        try:
            return self.pixels(file)
        except Exception:  # noqa: BLE001 - convert_many will tell what is wrong with this file
            return 0


def each(convert: Callable[[T], R], items: Iterable[T | Exception]) -> list[R | Exception]:
    """What a function makes of each item, or its exception: one bad file must not stop the others.

    Items that are exceptions stay.
    """
    made: list[R | Exception] = []
    for item in items:
        if isinstance(item, Exception):
            made.append(item)
            continue
        try:
            made.append(convert(item))
        except Exception as error:  # noqa: BLE001 - see above
            # Its frames, and those of the errors before it, keep pixels in memory.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            made.append(error)
    return made


def together(convert: Callable[[list[T]], Sequence[R]], items: Sequence[T | Exception]) -> list[R | Exception]:
    """As `each`, for a function that converts several items at once, and raises an exception if it cannot convert one.

    Then it gets them one by one.
    """
    usable = [item for item in items if not isinstance(item, Exception)]
    try:
        made = iter(convert(usable))
    except Exception:  # noqa: BLE001 - it will come again, for the item that it is about
        return each(lambda item: convert([item])[0], items)
    return [item if isinstance(item, Exception) else next(made) for item in items]
