"""How large a picture may be, whether it is read from a picture file or promised by the header of a .vqz file."""

# 400 million pixels are 1.2 GB of RGB: more than any camera takes in one shot, and about what a desktop can hold.
DEFAULT_MAX_PIXELS = 400_000_000
LEAST_SIDE = 64  # sides are padded to a multiple of it, so a shorter one takes as much memory


def excess(width: int, height: int, max_pixels: int | None) -> str:
    """Why a picture is too large, in one line; "" if it is not.

    Sides below `LEAST_SIDE` count as that long where the memory would be more than that of any picture within both
    limits, `max_pixels` and the default.

    Args:
        width, height: in pixels. max_pixels: largest width x height to accept; None for no limit.
    """
    if max_pixels is None:
        return ""
    if width * height > max_pixels:
        return f"the picture has {width} x {height} = {width * height} pixels, the limit is {max_pixels}"
    wide, high, limit = max(width, LEAST_SIDE), max(height, LEAST_SIDE), max(max_pixels, DEFAULT_MAX_PIXELS)
    if wide * high > limit:
        return (
            f"the picture has {width} x {height} pixels and takes as much memory as {wide} x {high} = {wide * high},"
            f" the limit is {limit}"
        )
    return ""
