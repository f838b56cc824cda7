"""Files that a folder of real images may hold, made by code, each with what the preprocess stage must make of it."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from components.spaces.pixels import PixelSpace

RECIPE = PixelSpace(image_size=16, min_side=4)
"""The outcomes hold for this recipe."""
STAGE_REASONS = frozenset(["unreadable", "duplicate"])
"""Reasons that lie in the folder, not in the bytes."""

Files = dict[str, bytes]


def picture(seed: int, width: int = 40, height: int = 32, channels: int = 3) -> Image.Image:
    """Returns a picture with edges and some noise, unlike that of any other seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(x / rng.uniform(3, 12) + rng.uniform(0, 6)) * np.cos(y / rng.uniform(3, 12)) for _ in range(channels)]
    values = (np.stack(waves, axis=-1) + rng.normal(0, 8, (height, width, channels))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(values[:, :, 0] if channels == 1 else values)


def sixteen_bits(seed: int) -> Image.Image:
    return Image.fromarray(np.asarray(picture(seed, channels=1)).astype(np.uint16) * 251 + seed)


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def turned(image: Image.Image, form: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, form, exif=exif)


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes], interlaced: bool = False, pieces: int = 1) -> bytes:
    """Returns a PNG of these filtered rows, with extra chunks ahead of the image data, which is cut in pieces."""
    data = zlib.compress(rows)
    step = -(-len(data) // pieces)
    chunks = [(b"IHDR", struct.pack(">2I5B", width, height, bits, colour, 0, 0, int(interlaced))), *extra]
    chunks += [(b"IDAT", data[at : at + step]) for at in range(0, len(data), step)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in [*chunks, (b"IEND", b"")])


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def grey_png(seed: int, bits: int, *extra: tuple[bytes, bytes]) -> bytes:
    """Returns a hand-made grey PNG of 40x32 samples of 1, 2, 4, 8 or 16 bits."""
    samples = np.asarray(picture(seed, channels=1)).astype(np.uint32) * ((1 << bits) - 1) // 255
    if bits == 16:
        rows = samples.astype(">u2").view(np.uint8).reshape(32, 80)
    else:
        planes = samples.astype(np.uint8)[:, :, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint8) & 1
        rows = np.packbits(planes.reshape(32, -1), axis=1)
    return png(40, 32, bits, 0, b"".join(b"\0" + row.tobytes() for row in rows), *extra)


def interlaced_png(seed: int) -> bytes:
    """Returns an Adam7 PNG made by hand: Pillow reads such files and does not write them."""
    values = np.asarray(picture(seed))
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [b"\0" + row.tobytes() for top, left, down, across in passes for row in values[top::down, left::across]]
    return png(40, 32, 8, 2, b"".join(rows), interlaced=True)


def tiff(width: int, height: int, *extra: tuple[int, int, int]) -> bytes:
    """Returns a little TIFF header that claims these sides, with one strip of 8 bytes, and extra tags (tag, type, value)."""
    tags = {256: (4, width), 257: (4, height), 258: (3, 8), 259: (3, 1), 262: (3, 1), 273: (4, 8), 277: (3, 1), 278: (4, height), 279: (4, 8)}
    tags |= {tag: (kind, value) for tag, kind, value in extra}
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def gif(width: int, height: int, frame: tuple[int, int, int, int], *, disposal: int = 0, code_size: int = 2) -> bytes:
    """Returns a GIF whose only frame (left, top, width, height) holds next to no data."""
    control = b"!\xf9\x04" + bytes([disposal << 2, 0, 0, 0, 0])
    image = b"," + struct.pack("<4HB", *frame, 0) + bytes([code_size]) + b"\x02\x4c\x01\0"
    return b"GIF89a" + struct.pack("<2H3B", width, height, 0x80, 0, 0) + bytes([0, 9, 0, 255, 255, 255]) + control + image + b";"


def replaced(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new, 1)


def scrambled(content: bytes, first: int, last: int, seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, last - first, dtype=np.uint8).tobytes()
    return content[:first] + noise + content[last:]


def _strange_jpegs() -> Files:
    plain, cmyk = encode(picture(1), "JPEG"), picture(2).convert("CMYK")
    files = {f"turned {n}.jpg": turned(picture(10 + n), "JPEG", n) for n in (3, 6, 7, 9)}
    return files | {
        "cmyk.jpg": encode(cmyk, "JPEG"),
        "ycck.jpg": replaced(encode(cmyk, "JPEG", quality=80), b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2"),
        "progressive.jpg": encode(picture(3), "JPEG", progressive=True),
        "grey.jpg": encode(picture(4, channels=1), "JPEG"),
        "two pictures.mpo.jpg": encode(picture(5), "MPO", save_all=True, append_images=[picture(6)]),
        "bytes behind the end.jpg": plain + bytes(99) + b"trailer",
        "padding between markers.jpg": plain[:2] + b"\xff\xff\xff" + plain[2:],
        "with a thumbnail.jpg": plain[:2] + b"\xff\xed" + struct.pack(">H", len(plain) + 2) + plain + plain[2:],
        "exif that is noise.jpg": plain[:2] + b"\xff\xe1\0\x12Exif\0\0MM\0*\xff\xff\xff\xff" + plain[2:],
        "profile that is noise.jpg": encode(picture(7), "JPEG", icc_profile=b"no profile" * 20),
        "a jpeg by content.png": encode(picture(8), "JPEG", quality=60),
        "narrow.jpg": encode(picture(9, 4, 3000), "JPEG"),
        "UPPER.JPG": encode(picture(91), "JPEG"),
    }


def _strange_pngs() -> Files:
    palette = picture(20).quantize(16)
    glass = picture(21).convert("RGBA")
    glass.putalpha(picture(22, channels=1))
    return {
        **{f"{bits} bit.png": grey_png(30 + bits, bits) for bits in (1, 2, 4, 8, 16)},
        **{f"{bits} bit with a key.png": grey_png(50 + bits, bits, (b"tRNS", struct.pack(">H", 1))) for bits in (1, 2, 4, 8, 16)},
        "16 bit colour.png": png(4, 4, 16, 2, b"".join(b"\0" + np.random.default_rng(9).bytes(24) for _ in range(4))),
        "16 bit grey and alpha.png": png(4, 4, 16, 4, b"".join(b"\0" + np.random.default_rng(8).bytes(16) for _ in range(4))),
        "palette.png": encode(palette, "PNG"),
        "palette with alpha.png": encode(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        "alpha.png": encode(glass, "PNG"),
        "interlaced.png": interlaced_png(23),
        "turned.png": turned(picture(24), "PNG", 6),
        "animated.png": encode(picture(25), "PNG", save_all=True, append_images=[picture(26)]),
        "many small chunks.png": png(4, 4, 8, 0, b"".join(bytes([0, 9, 80, row, 255]) for row in range(4)), pieces=9),
        "bytes behind the end.png": encode(picture(27), "PNG") + b"trailer" * 9,
        "unknown chunk.png": png(4, 4, 8, 0, b"".join(bytes([0, 1, 2, 3, row]) for row in range(4)), (b"quUx", b"hi")),
        "profile that is noise.png": png(4, 4, 8, 0, b"".join(bytes([0, 5, 6, 7, row]) for row in range(4)), (b"iCCP", b"x\0\0notdeflate")),
    }


def _strange_others() -> Files:
    grey, flat = picture(60, channels=1), picture(61).quantize(16)
    outside = encode(picture(59).quantize(16), "GIF")
    outside = outside[:6] + struct.pack("<2H", 10, 10) + outside[10:]
    return {
        "lossy.webp": encode(picture(62), "WEBP"),
        "lossless with alpha.webp": encode(picture(63).convert("RGBA"), "WEBP", lossless=True),
        "animated.webp": encode(picture(64), "WEBP", save_all=True, append_images=[picture(65)]),
        "turned.webp": turned(picture(66), "WEBP", 8),
        "plain.gif": encode(flat, "GIF"),
        "animated.gif": encode(picture(67).quantize(16), "GIF", save_all=True, append_images=[flat]),
        "key colour.gif": encode(picture(68).quantize(16), "GIF", transparency=3),
        "frame outside of the canvas.gif": outside,
        "1 bit.bmp": encode(grey.convert("1"), "BMP"),
        "palette.bmp": encode(flat, "BMP"),
        "colour.bmp": encode(picture(69), "BMP"),
        "lzw.tif": encode(picture(70), "TIFF", compression="tiff_lzw"),
        "deflate.tif": encode(picture(71), "TIFF", compression="tiff_adobe_deflate"),
        "jpeg inside.tif": encode(picture(72), "TIFF", compression="jpeg"),
        "fax.tif": encode(picture(73, channels=1).convert("1"), "TIFF", compression="group4"),
        "16 bit.tif": encode(sixteen_bits(74), "TIFF"),
        "cmyk.tif": encode(picture(75).convert("CMYK"), "TIFF"),
        "pages.tiff": encode(picture(76), "TIFF", save_all=True, append_images=[picture(77)]),
        "big.tif": encode(picture(78), "TIFF", big_tiff=True),
        "turned.tif": turned(picture(79), "TIFF", 6),
        "plain.avif": encode(picture(80), "AVIF"),
        "turned.avif": turned(picture(81), "AVIF", 6),
        "colour.ppm": encode(picture(82), "PPM"),
        "16 bit.pgm": encode(sixteen_bits(83), "PPM"),
        "text.ppm": b"P3\n# a comment\n4 4 255\n" + b" ".join(b"%d" % value for value in range(48)) + b"\n",
        "plain.jp2": encode(picture(84), "JPEG2000"),
        "stream.jp2": encode(picture(85), "JPEG2000", no_jp2=True),
        "16 bit.jp2": encode(sixteen_bits(86), "JPEG2000"),
    }


def _no_images() -> Files:
    return {
        "empty.png": b"",
        "text.jpg": b"this is not a picture\n",
        "page.png": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "zeros.png": bytes(1000),
        "archive.gif": b"PK\3\4" + bytes(60),
        "document.jpg": b"%PDF-1.7\n%%EOF\n",
        "film.webp": b"\0\0\0\x18ftypisom\0\0\0\0isommp41",
        "sound.webp": b"RIFF\x24\0\0\0WAVEfmt " + bytes(28),
        "two bytes.jpg": b"\xff\xd8",
        "BM is a word.bmp": b"BMW made this text file, which starts as bitmaps do",
        "P6 is a word.ppm": b"P6 was the name of a processor",
    }


def _corrupt() -> Files:
    jpeg, whole, webp = encode(picture(100), "JPEG"), encode(picture(101), "PNG"), encode(picture(102), "WEBP")
    deflated, avif, jp2 = encode(picture(103), "TIFF", compression="tiff_adobe_deflate"), encode(picture(104), "AVIF"), encode(picture(105), "JPEG2000")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    return {
        "flipped bit.png": bytes(flipped),
        "wrong checksum.png": whole[:29] + b"\0\0\0\0" + whole[33:],
        "no width.png": png(0, 4, 8, 0, bytes(4)),
        "rows missing.png": png(40, 32, 8, 0, bytes(41 * 5)),
        "unknown depth.png": png(4, 4, 3, 0, bytes(20)),
        "no frame.jpg": b"\xff\xd8\xff\xdb\0\x43" + bytes(65) + b"\xff\xd9",
        "no tables.jpg": jpeg[:2] + jpeg[jpeg.index(b"\xff\xc0") :],
        "bad code size.gif": gif(8, 8, (0, 0, 8, 8), code_size=13),
        "noise inside.webp": scrambled(webp, 20, len(webp)),
        "noise inside.tif": scrambled(deflated, 8, 60),
        "no size.tif": encode(picture(106), "TIFF").replace(struct.pack("<HH", 256, 3), struct.pack("<HH", 255, 3)).replace(b"\0\1\4\0", b"\xff\0\4\0"),
        "noise inside.avif": scrambled(avif, avif.index(b"mdat") + 4, len(avif)),
        "noise inside.jp2": scrambled(jp2, jp2.index(b"\xff\x93") - 60, len(jp2) - 2),
        "no grey levels.pgm": b"P5 4 4 0\n" + bytes(16),
        "no height.bmp": replaced(encode(picture(107), "BMP"), struct.pack("<2i", 40, 32), struct.pack("<2i", 40, 0)),
    }


def _cut_short() -> Files:
    whole = {
        "jpg": encode(picture(120), "JPEG"),
        "png": encode(picture(121), "PNG"),
        "webp": encode(picture(122), "WEBP"),
        "gif": encode(picture(123).quantize(16), "GIF"),
        "bmp": encode(picture(124), "BMP"),
        "tif": encode(picture(125), "TIFF"),
        "avif": encode(picture(126), "AVIF"),
        "ppm": encode(picture(127), "PPM"),
        "jp2": encode(picture(128), "JPEG2000"),
    }
    files = {f"half a file.{suffix}": content[: len(content) // 2] for suffix, content in whole.items()}
    files |= {f"start of a header.{suffix}": content[:20] for suffix, content in whole.items() if suffix != "ppm"}
    return files | {
        "start of a header.ppm": b"P6\n40",
        "no mark of the end.jpg": whole["jpg"][:-2],
        "no last chunk.png": whole["png"][:-12],
        "no trailer.gif": whole["gif"][:-1],
        "one byte missing.webp": whole["webp"][:-1],
        "one byte missing.bmp": whole["bmp"][:-1],
        "one byte missing.jp2": whole["jp2"][:-1],
        "progressive.jpg": encode(picture(129), "JPEG", progressive=True)[:-300],
        "directory behind the end.tif": b"II*\0\xf0\xff\0\0" + bytes(40),
        "strip behind the end.tif": tiff(40, 32, (273, 4, 99_999), (279, 4, 1280)),
        "thumbnail only.jpg": b"\xff\xd8\xff\xed" + struct.pack(">H", len(whole["jpg"]) + 2) + whole["jpg"],
    }


def _too_large() -> Files:
    text, jp2 = zlib.compress(bytes(5_000_000)), encode(picture(140), "JPEG2000")
    jpeg, avif = encode(picture(141), "JPEG"), encode(picture(142), "AVIF")
    stream, size = jp2.index(b"\xff\x4f\xff\x51") + 8, struct.pack(">2I", 60_000, 60_000)
    vp8x = struct.pack("<4sIB3x", b"VP8X", 10, 0) + (16_383).to_bytes(3, "little") * 2
    vp8l = struct.pack("<4sI", b"VP8L", 6) + b"\x2f" + struct.pack("<I", 16_382 | 16_382 << 14) + b"\0"
    return {
        "bomb.png": png(60_000, 60_000, 8, 0, bytes(100_000)),
        "text bomb.png": png(4, 4, 8, 0, bytes(20), (b"zTXt", b"Comment\0\0" + text)),
        "profile bomb.png": png(4, 4, 8, 0, bytes(20), (b"iCCP", b"x\0\0" + text)),
        "bomb.jpg": replaced(jpeg, struct.pack(">2H", 32, 40), struct.pack(">2H", 65_500, 65_500)),
        "canvas.gif": gif(65_535, 65_535, (0, 0, 4, 4)),
        "frame.gif": gif(4, 4, (60_000, 60_000, 4, 4)),
        "disposal.gif": gif(65_535, 65_534, (0, 0, 65_535, 65_534), disposal=2),
        "canvas.webp": b"RIFF" + struct.pack("<I", 4 + len(vp8x)) + b"WEBP" + vp8x,
        "lossless.webp": b"RIFF" + struct.pack("<I", 4 + len(vp8l)) + b"WEBP" + vp8l,
        "bomb.bmp": replaced(encode(picture(143), "BMP"), struct.pack("<2i", 40, 32), struct.pack("<2i", 90_000, 90_000)),
        "bomb.tif": tiff(100_000, 100_000),
        "tiles.tif": tiff(40, 32, (322, 4, 65_536), (323, 4, 65_536)),
        "bomb.pgm": b"P5 99999 99999 255\n" + bytes(10),
        "bomb.avif": replaced(avif, b"ispe\0\0\0\0" + struct.pack(">2I", 40, 32), b"ispe\0\0\0\0" + struct.pack(">2I", 16_000, 16_000)),
        "header.jp2": replaced(jp2, b"ihdr" + struct.pack(">2I", 32, 40), b"ihdr" + size),
        "stream behind a small header.jp2": jp2[:stream] + size + jp2[stream + 8 :],
    }


def _too_small() -> Files:
    return {
        "one pixel.gif": encode(Image.new("L", (1, 1), 7), "GIF"),
        "low.jpg": encode(picture(150, 100, 3), "JPEG"),
        "slim.png": encode(picture(151, 2, 90), "PNG"),
        "slim.webp": encode(picture(152, 3, 50), "WEBP"),
    }


def _unsupported() -> Files:
    values = np.asarray(picture(160, channels=1))
    five = encode(picture(161).convert("RGBA"), "JPEG2000", no_jp2=True)
    jpeg = encode(picture(162), "JPEG")
    return {
        "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40),
        "heic inside.jpg": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(50),
        "xl stream.jpg": b"\xff\x0a" + bytes(range(40)),
        "xl container.png": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40),
        "layers.jpg": b"8BPS\0\1" + bytes(40),
        "canon 2.tif": b"II*\0\x10\0\0\0CR\2\0" + bytes(60),
        "canon 3.jpg": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(40),
        "fuji.tif": b"FUJIFILMCCD-RAW 0201" + bytes(60),
        "negative.tif": tiff(4, 8, (50706, 1, 0x00000401)),
        "preview of raw.tif": tiff(4, 4, (254, 4, 1), (330, 4, 8)),
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "drawing.png": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        "icon.png": encode(picture(163, 16, 16), "ICO"),
        "float.tif": encode(Image.fromarray(values.astype(np.float32)), "TIFF"),
        "32 bit.tif": encode(Image.fromarray(values.astype(np.int32)), "TIFF"),
        "lab.tif": encode(Image.new("LAB", (8, 8), (50, 3, 9)), "TIFF"),
        "float.ppm": b"PF\n4 4\n-1.0\n" + bytes(192),
        "12 bit.jpg": replaced(jpeg, b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
        "five components.jp2": five[:40] + b"\0\5" + five[42:],
        "12 bit.tif": tiff(4, 9, (258, 3, 12)),
    }


CONTENTS: list[tuple[str, str, Callable[[], Files]]] = [
    ("strange/jpeg", "row", _strange_jpegs),
    ("strange/png", "row", _strange_pngs),
    ("strange/others", "row", _strange_others),
    ("not_an_image", "not_an_image", _no_images),
    ("corrupt", "corrupt", _corrupt),
    ("truncated", "truncated", _cut_short),
    ("too_large", "too_large", _too_large),
    ("too_small", "too_small", _too_small),
    ("unsupported", "unsupported", _unsupported),
]
NAMES = [
    "two words.png",
    "line\nfeed.png",
    " leading blank.png",
    "-dash.png",
    "日本語.png",
    "русский.png",
    "العربية.png",
    "ελληνικά.png",
    "\U0001f98a.png",
    "e\u0301 as two.png",
    "\u00e9 as one.png",
    "quote'\"$(x)`*?.png",
    "back\\slash.png",
    "n" * 251 + ".png",
    os.fsdecode(b"latin-\xe9\xff.png"),
]


def write_hostile(folder: Path) -> dict[str, str]:
    """Writes files that are hard to take, the same bytes under the same names every time.

    Returns:
        for each image by its path below the folder, `row` or the reason it is quarantined for, with `RECIPE`.
    """
    outcomes: dict[str, str] = {}
    for below, outcome, make in CONTENTS:
        (folder / below).mkdir(parents=True, exist_ok=True)
        for name, content in make().items():
            (folder / below / name).write_bytes(content)
            outcomes[f"{below}/{name}"] = outcome
    return outcomes | _write_names(folder / "names") | _write_copies(folder / "copies") | _write_no_files(folder / "no files")


def _write_names(folder: Path) -> dict[str, str]:
    outcomes = {}
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(NAMES):
        try:
            (folder / name).write_bytes(encode(picture(200 + number), "PNG"))
        except (OSError, UnicodeError):  # this file system takes no such name
            continue
        outcomes[f"names/{name}"] = "row"
    return outcomes


def _write_copies(folder: Path) -> dict[str, str]:
    content = encode(picture(300), "PNG")
    for name in ("B.png", "a.png", "sub/z.png", "é.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return {"copies/B.png": "row", "copies/a.png": "duplicate", "copies/sub/z.png": "duplicate", "copies/é.png": "duplicate"}


def _write_no_files(folder: Path) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "loop to a.png").symlink_to("loop to b.png")
    (folder / "loop to b.png").symlink_to("loop to a.png")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.png").mkdir()
    (folder / "parent").symlink_to("..", target_is_directory=True)
    names = ["dangling.png", "loop.png", "loop to a.png", "loop to b.png", "pipe.jpg"]
    if os.geteuid() != 0:  # root reads everything
        (folder / "locked.png").write_bytes(encode(picture(301), "PNG"))
        (folder / "locked.png").chmod(0)
        names.append("locked.png")
    return {f"no files/{name}": "unreadable" for name in names}


def write_good(folder: Path, count: int = 200) -> None:
    """Writes this many sound images of all formats and many sizes, no two alike, in two levels of folders."""
    forms = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "ppm": "PPM", "jp2": "JPEG2000", "avif": "AVIF"}
    for number in range(count):
        suffix = list(forms)[number % len(forms)]
        image = picture(1000 + number, 16 + number * 7 % 60, 16 + number * 11 % 50, 1 if number % 5 == 0 else 3)
        path = folder / f"class {number % 4}" / f"{number:05d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image, forms[suffix]))
