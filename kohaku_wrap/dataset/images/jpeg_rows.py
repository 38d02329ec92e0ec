"""Does a JPEG hold all the rows that its header says? libjpeg fills what is missing with grey and says nothing."""

from __future__ import annotations

import io

from PIL import Image

MIDDLE = {127, 128}
"""What every channel holds where data are missing: 128, or 127 in CMYK as Pillow turns it round."""

START_OF_SCAN = 0xDA
RESTARTS = range(0xD0, 0xD8)
STANDALONE = (0x01, *RESTARTS, 0xD8)
"""Markers without a length: TEM, RST0 … RST7 and SOI."""

NOISE = bytes(byte * 151 % 251 for byte in range(1, 97))
MORE_DATA = NOISE + b"".join(bytes([0xFF, marker]) + NOISE for marker in (*RESTARTS, *RESTARTS))
"""Data of a scan in any code, with every restart marker that a decoder may wait for."""


def lacks_rows(image: Image.Image, content: bytes) -> bool:
    """True where the lower rows of the loaded JPEG are filled in; a picture that is grey there is told from it.

    More data after the last of its first scan would become pixels where rows are missing. Where none are, a decoder
    leaves them alone.
    """
    last_row = image.crop((0, image.height - 1, image.width, image.height))
    if not all(set(channel.getextrema()) <= MIDDLE for channel in last_row.split()):
        return False
    end = find_end_of_first_scan(content)
    longer = content[:end] + MORE_DATA + content[end:]
    try:
        with Image.open(io.BytesIO(longer), formats=("JPEG",)) as other:
            return other.tobytes() != image.tobytes()
    except (OSError, SyntaxError, ValueError):
        # Nothing shows that rows are missing.
        return False


def find_end_of_first_scan(content: bytes) -> int:
    """Where the data of the first scan end; the end of the file where there is none. Source: ITU T.81, B.1.1."""
    position = 2
    while position + 4 <= len(content):
        marker = content[position + 1]
        if content[position] != 0xFF or marker in (0x00, 0xFF):
            position += 1
            continue
        position += 2 + (0 if marker in STANDALONE else int.from_bytes(content[position + 2 : position + 4], "big"))
        if marker == START_OF_SCAN:
            break
    while (position := content.find(b"\xff", position)) >= 0 and position + 1 < len(content):
        if content[position + 1] != 0x00 and content[position + 1] not in RESTARTS:
            return position
        position += 2
    return len(content)
