"""What the bytes of an image file say before anything is decoded: its format, its sides, and whether the file ends early."""

import re
import struct
import zlib
from collections.abc import Iterator

MAGICS = [
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
]
UNREAD_MAGICS = [
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"II\xbc", "JPEG XR"),
    (b"8BPS", "Photoshop"),
    (b"IIRO", "camera raw"),
    (b"IIRS", "camera raw"),
    (b"MMOR", "camera raw"),
    (b"IIU\0", "camera raw"),
    (b"FUJIFILMCCD-RAW", "camera raw"),
    (b"FOVb", "camera raw"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"%!PS", "PostScript"),
    (b"DDS ", "DDS"),
    (b"\0\0\1\0", "ICO"),
    (b"icns", "ICNS"),
    (b"qoif", "QOI"),
    (b"SIMPLE  =", "FITS"),
    (b"<svg", "SVG"),
    (b"P7\n", "PAM"),
    (b"PF\n", "PFM"),
    (b"Pf\n", "PFM"),
]
AVIF_BRANDS = frozenset([b"avif", b"avis"])
UNREAD_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"hevx": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"mif1": "HEIC", b"crx ": "camera raw"}
BMP_HEADERS = frozenset([12, 16, 40, 52, 56, 64, 108, 124])
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
PNM_MAGIC = re.compile(rb"P[1-6](?:\s|#[^\r\n]*[\r\n])+\d")
PNM_TOKEN = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])*([^\s#]+)")
PNM_DIGITS = 10  # Pillow takes no longer number
TIFF_WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
TIFF_DATA = [(273, 279), (324, 325)]


def identify(content: bytes) -> str | None:
    """Returns Pillow's name of the format that the first bytes are of, None unless it is one that is read."""
    for magic, form in MAGICS:
        if content.startswith(magic):
            return None if form == "TIFF" and content[8:10] == b"CR" else form
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    if content[:2] == b"BM" and int.from_bytes(content[14:18], "little") in BMP_HEADERS:
        return "BMP"
    if AVIF_BRANDS & set(_brands(content)):
        return "AVIF"
    return "PPM" if PNM_MAGIC.match(content) else None


def identify_unread(content: bytes) -> str | None:
    """Returns the name of the image format that the first bytes are of, among those that are known and not read."""
    for magic, name in UNREAD_MAGICS:
        if content.startswith(magic):
            return name
    if content[:4] == b"II*\0" and content[8:10] == b"CR":
        return "camera raw"
    if content.startswith(b"<?xml") and b"<svg" in content[:1024]:
        return "SVG"
    return next((UNREAD_BRANDS[brand] for brand in _brands(content) if brand in UNREAD_BRANDS), None)


def _brands(content: bytes) -> list[bytes]:
    if content[4:8] != b"ftyp":
        return []
    end = min(int.from_bytes(content[:4], "big"), 256)
    return [content[8:12], *(content[at : at + 4] for at in range(16, end, 4))]


def declared_sizes(content: bytes, form: str) -> list[tuple[int, int]]:
    """Returns each (width, height) for which Pillow, or the library below it, may take memory before Pillow tells the image's size.

    Raises:
        IndexError, struct.error: if the file ends before it says so.
    """
    if form == "WEBP":
        return _webp_sizes(content)
    if form == "GIF":
        return [struct.unpack_from("<2H", content, 6), next(_gif_frames(content), (0, 0))]
    if form == "JPEG2000" and (at := content.find(b"\xff\x4f\xff\x51")) >= 0:
        right, bottom, left, top = struct.unpack_from(">4I", content, at + 8)
        return [(right - left, bottom - top)]
    return []


def _webp_sizes(content: bytes) -> list[tuple[int, int]]:
    if content[12:16] == b"VP8X":
        return [(int.from_bytes(content[24:27], "little") + 1, int.from_bytes(content[27:30], "little") + 1)]
    if content[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 21)
        return [((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)]
    width, height = struct.unpack_from("<2H", content, 26)
    return [(width & 0x3FFF, height & 0x3FFF)]


def num_components(content: bytes) -> int:
    """Returns how many components a JPEG 2000 code stream holds, 0 without one."""
    at = content.find(b"\xff\x4f\xff\x51")
    return int.from_bytes(content[at + 40 : at + 42], "big") if at >= 0 else 0


def ends_early(content: bytes, form: str) -> bool:
    """Tells whether the file ends early: shorter than its own structure says, or without its end marker; bytes after that do not matter."""
    try:
        return _ENDS_EARLY[form](content)
    except (IndexError, OverflowError, struct.error):  # it points behind its end, or behind that of any file
        return True


def _jpeg_ends_early(content: bytes) -> bool:
    at = 2
    while (at := content.find(b"\xff", at)) >= 0:
        marker = content[at + 1]
        if marker == 0xDA:  # a thumbnail's end of image lies before the scan, ours behind it; none can lie in coded data
            return content.rfind(b"\xff\xd9", at) < 0
        if marker == 0xD9:
            return False
        has_length = 0xC0 <= marker <= 0xFE and not 0xD0 <= marker <= 0xD9
        at += 2 + struct.unpack_from(">H", content, at + 2)[0] if has_length else 1
    return True


def _png_ends_early(content: bytes) -> bool:
    for kind, _, end in _png_chunks(content):
        if kind == b"IEND" or not kind.isalpha():  # no chunk at all: broken, not cut
            return end > len(content) and kind.isalpha()
    return True


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields kind, first byte of the data and end of each chunk."""
    at = 8
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        yield kind, at + 8, at + 12 + length
        at += 12 + length


def png_lacks_rows(content: bytes) -> bool:
    """Tells whether the deflated data of a PNG hold fewer rows than its header says; Pillow leaves those black."""
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">2I5B", content, 16)
    steps = ADAM7 if interlaced else [(0, 0, 1, 1)]
    sides = [((width - left + across - 1) // across, (height - top + down - 1) // down) for left, top, across, down in steps]
    needed = sum(((columns * bits * PNG_CHANNELS[colour] + 7) // 8 + 1) * rows for columns, rows in sides if columns > 0)
    inflater = zlib.decompressobj()
    for kind, start, end in _png_chunks(content):
        data = content[start : end - 4] if kind == b"IDAT" else b""
        while data:
            needed -= len(inflater.decompress(data, 1 << 20))
            data = inflater.unconsumed_tail
    return needed > 0


def _gif_ends_early(content: bytes) -> bool:
    for _ in _gif_frames(content):
        pass
    return False


def _gif_frames(content: bytes) -> Iterator[tuple[int, int]]:
    """Yields the right and lower edge of each frame up to the trailer; an IndexError where there is none."""
    at = 13 + _gif_palette(content[10])
    while (kind := content[at]) != 0x3B:
        if kind == 0x2C:
            left, top, width, height, flags = struct.unpack_from("<4HB", content, at + 1)
            yield left + width, top + height
            at += 11 + _gif_palette(flags)
        elif kind == 0x21:
            at += 2
        else:
            at += 1
            continue
        while length := content[at]:
            at += length + 1
        at += 1


def _gif_palette(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _webp_ends_early(content: bytes) -> bool:
    return int.from_bytes(content[4:8], "little") + 8 > len(content)


def _avif_ends_early(content: bytes) -> bool:
    return _boxes_end_early(content, b"mdat")


def _jpeg2000_ends_early(content: bytes) -> bool:
    if content[:4] != b"\xff\x4f\xff\x51" and _boxes_end_early(content, b"jp2c"):
        return True
    return content.rfind(b"\xff\xd9", content.find(b"\xff\x4f\xff\x51")) < 0  # above FF8F there is nothing but markers in a code stream


def _boxes_end_early(content: bytes, needed: bytes) -> bool:
    at, found = 0, False
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        if length == 1:
            (length,) = struct.unpack_from(">Q", content, at + 8)
        found |= kind == needed
        if length < 8:  # 0: up to the end of the file
            break
        at += length
    return at > len(content) or not found


def _bmp_ends_early(content: bytes) -> bool:
    offset, header = struct.unpack_from("<2I", content, 10)
    if header < 40:
        width, height, _, bits = struct.unpack_from("<4H", content, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<2i2HI", content, 18)
    if compression in (0, 3, 6):
        return offset + (width * bits + 31 >> 5) * 4 * abs(height) > len(content)
    return struct.unpack_from("<I", content, 2)[0] > len(content)


def _pnm_ends_early(content: bytes) -> bool:
    tokens, at = [], 2
    for _ in range(2 if content[1:2] in b"14" else 3):
        match = PNM_TOKEN.match(content, at)
        if match is None:
            return True
        tokens.append(int(match[1]) if match[1].isdigit() and len(match[1]) <= PNM_DIGITS else 0)
        at = match.end()
    width, height, samples = tokens[0], tokens[1], 3 if content[1:2] in b"36" else 1
    if content[1:2] in b"123":
        rest = re.sub(rb"#[^\r\n]*", b"", content[at:])
        return (len(b"".join(rest.split())) if content[1:2] == b"1" else len(rest.split())) < width * height * samples
    row = (width + 7) // 8 if content[1:2] == b"4" else width * samples * (2 if tokens[2] > 255 else 1)
    return at + 1 + row * height > len(content)


def _tiff_ends_early(content: bytes) -> bool:
    tags = _tiff_tags(content)
    for offsets, counts in TIFF_DATA:
        pairs = zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False)
        if any(offset + count > len(content) for offset, count in pairs):
            return True
    return False


def _tiff_tags(content: bytes) -> dict[int, tuple[int, ...]]:
    """Returns where the data of the first page lie. A struct.error where the file ends before."""
    order, big = "<" if content[:1] == b"I" else ">", 43 in content[2:4]
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), content, at)
    entry = order + ("HHQ8s" if big else "HHI4s")
    tags = {}
    for index in range(min(count, 4096)):
        tag, kind, number, value = struct.unpack_from(entry, content, at + (8 if big else 2) + index * struct.calcsize(entry))
        width = TIFF_WIDTHS.get(kind, 1) * number
        if width > len(value):
            (start,) = struct.unpack(order + ("Q" if big else "I"), value)
            if start + width > len(content):
                raise struct.error(f"tag {tag} lies behind the end")
            value = content[start : start + width]
        if tag in (273, 279, 324, 325) and kind in (3, 4, 16):
            tags[tag] = struct.unpack_from(f"{order}{number}{ {3: 'H', 4: 'I', 16: 'Q'}[kind] }", value)
    return tags


_ENDS_EARLY = {
    "JPEG": _jpeg_ends_early,
    "PNG": _png_ends_early,
    "GIF": _gif_ends_early,
    "WEBP": _webp_ends_early,
    "AVIF": _avif_ends_early,
    "JPEG2000": _jpeg2000_ends_early,
    "BMP": _bmp_ends_early,
    "PPM": _pnm_ends_early,
    "TIFF": _tiff_ends_early,
}
