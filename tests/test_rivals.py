import io

import numpy as np
import pytest
from PIL import Image

from vqcodec.studio import rivals


@pytest.fixture(params=["AVIF", "JPEG XL"])
def codec(request):
    if request.param not in rivals.available():
        pytest.skip(f"Pillow writes no {request.param} here; JPEG XL needs pip install pillow-jxl-plugin")
    return request.param


def test_a_file_of_equal_size(codec, make_photo):
    photo, out = make_photo(96, 128), io.BytesIO()
    Image.fromarray(photo).save(out, {"AVIF": "AVIF", "JPEG XL": "JXL"}[codec], quality=60)
    data, seconds = rivals.encode(codec, photo, out.tell())
    assert len(data) == out.tell() and seconds > 0
    with Image.open(io.BytesIO(data)) as picture:
        assert np.array_equal(rivals.decode(data), np.asarray(picture.convert("RGB")))
    smallest = rivals.encode(codec, photo, 1)[0]
    assert len(smallest) < len(data) < len(rivals.encode(codec, photo, 1e9)[0])


def test_a_search_ends_when_it_is_told_to(codec, make_photo):
    def check():
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        rivals.encode(codec, make_photo(8, 8), 100, check)
