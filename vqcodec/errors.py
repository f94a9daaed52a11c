"""The exceptions of vqcodec.

    VqcodecError
    +-- FormatError            the bytes are not a .vqz file this version can read
    |   +-- NotVqzError        wrong magic
    |   +-- VersionError       a format version this program does not know
    |   +-- HeaderError        a header field outside its allowed values, or a wrong header check
    |   +-- TruncatedError     the file ends before it should
    |   +-- ChecksumError      a chunk or segment is damaged
    |   +-- TrailingDataError  bytes after the last segment
    |   +-- LimitError         a size in the file exceeds a limit
    +-- WeightsError           weights missing, unreadable, or not the ones a file was made with
    +-- ImageError             a picture that cannot be read, or that the codec does not support
    +-- TargetError            no quality reaches the size, PSNR or SSIMULACRA2 that was asked for
    +-- TrainingError          nothing to train on, or a run that cannot be resumed

Each message is one line that says what was found and what was expected. The command line adds the file's name.
"""


def one_line(error: Exception) -> str:
    """One line that says what went wrong, without the name of a file."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = next(iter(text.splitlines()), "")
    return line if isinstance(error, (VqcodecError, OSError)) else f"{type(error).__name__}: {line}"


class VqcodecError(Exception):
    """Base class of the errors that a user, a calling program or a file can cause."""


class FormatError(VqcodecError):
    """The bytes are not a .vqz file that this version can read."""


class NotVqzError(FormatError):
    """The bytes do not start with the .vqz magic number."""


class VersionError(FormatError):
    """The file has a format version that this program does not know."""


class HeaderError(FormatError):
    """A header field is outside its allowed values, or the header check does not match."""


class TruncatedError(FormatError):
    """The file ends before its last segment does."""


class ChecksumError(FormatError):
    """A metadata chunk or a segment is damaged: its CRC-32 does not match."""


class TrailingDataError(FormatError):
    """There are bytes after the last segment."""


class LimitError(FormatError):
    """A size stated in the file exceeds the limit set by the caller or by the format."""


class WeightsError(VqcodecError):
    """Weights are missing, unreadable, or not the ones a file was made with."""


class ImageError(VqcodecError):
    """A picture cannot be read, or is of a kind that the codec does not support."""


class TargetError(VqcodecError):
    """No quality reaches the size, PSNR or SSIMULACRA2 that was asked for."""


class TrainingError(VqcodecError):
    """There is nothing to train on, or a run cannot be resumed."""
