"""Whatever form a picture has, the file that extract writes is trained upright, on white, with its own greys."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import imagesize
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from kohaku_wrap.dataset.images.checking import CheckedImage, ImageRefused, check_image
from kohaku_wrap.dataset.images.jpeg_rows import lacks_rows
from kohaku_wrap.training.data.images import UnreadableImage, load_pixels

WIDTH, HEIGHT = 96, 64
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif"}
TURNED = range(2, 9)
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def paint(mode: str = "RGB") -> Image.Image:
    """A picture in which no turn or mirror looks like another."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    pixels = np.stack([columns * 255 // (WIDTH - 1), rows * 255 // (HEIGHT - 1), np.full_like(rows, 40)], -1)
    pixels[:16, :32] = (250, 240, 20)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def save(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def with_orientation(kind: str, orientation: int, image: Image.Image | None = None, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(image or paint(), kind, exif=exif, **options)


def png(depth: int, colour: int, samples: np.ndarray, transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG of any depth and colour type, with one transparent colour where it is given."""
    height, width = samples.shape[:2]
    bits = np.unpackbits(samples.reshape(height, -1).astype(">u2").view(np.uint8).reshape(height, -1, 2), axis=2)
    rows = np.packbits(bits[:, :, 16 - depth :].reshape(height, -1), axis=1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    if transparent:
        chunks.append((b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def trained(checked: CheckedImage) -> np.ndarray:
    """The pixels as sd-scripts reads the file; its size, its tag and imagesize must all say the same.

    Releases of imagesize differ in what they say of a picture that is turned by its tag: none may be left.
    """
    with Image.open(io.BytesIO(checked.content)) as image:
        assert image.getexif().get(0x0112, 1) == 1
        assert image.size == (checked.width, checked.height) == imagesize.get(io.BytesIO(checked.content))
        return np.array(image.convert("RGB"))


def distance(pixels: np.ndarray, wanted: np.ndarray) -> float:
    assert pixels.shape == wanted.shape
    return float(np.abs(pixels.astype(int) - wanted.astype(int)).mean())


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", FORMATS)
def test_turned_pictures_are_written_upright(kind: str, orientation: int) -> None:
    content = with_orientation(kind, orientation)
    checked = check_image(content, FORMATS[kind])
    with Image.open(io.BytesIO(content)) as image:
        wanted = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    assert checked.rewritten and not checked.reduced
    assert distance(trained(checked), wanted) <= (0 if kind in ("PNG", "AVIF") else 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_turned_png_keep_their_mode_and_every_pixel(mode: str) -> None:
    image = paint().quantize(16) if mode == "P" else paint(mode)
    checked = check_image(with_orientation("PNG", 6, image, icc_profile=ICC), "png")
    with Image.open(io.BytesIO(checked.content)) as read:
        assert read.mode == mode and read.info["icc_profile"] == ICC
    assert (trained(checked) == np.rot90(np.array(image.convert("RGB")), -1)).all()


def test_turned_pictures_stay_lossless_where_they_were() -> None:
    content = with_orientation("WEBP", 8, lossless=True)
    assert (trained(check_image(content, "webp")) == np.rot90(np.array(paint()))).all()
    cmyk = check_image(with_orientation("JPEG", 3, paint("CMYK")), "jpg")
    with Image.open(io.BytesIO(save(paint("CMYK"), "JPEG"))) as image:
        assert distance(trained(cmyk), np.rot90(np.array(image.convert("RGB")), 2)) < 3


@pytest.mark.parametrize("kind", FORMATS)
def test_upright_pictures_stay_byte_for_byte(kind: str) -> None:
    for content in (save(paint(), kind), with_orientation(kind, 1), save(paint(), kind, icc_profile=ICC)):
        checked = check_image(content, FORMATS[kind])
        assert checked.content == content and not checked.rewritten
        assert trained(checked).shape == (HEIGHT, WIDTH, 3)


def test_broken_exif_refuses_no_picture() -> None:
    for exif in (b"Exif\0\0", b"Exif\0\0junk", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        content = save(paint(), "JPEG", exif=exif)
        assert check_image(content, "jpg").content == content
    nine = save(paint(), "PNG", exif=with_orientation("JPEG", 9)[30:90])
    assert check_image(nine, "png").content == nine


def see_through(mode: str) -> Image.Image:
    """Noise under full transparency on the left, half of it in the middle."""
    image = paint(mode)
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, :32], alpha[:, 32:48] = 0, 128
    image.putalpha(Image.fromarray(alpha))
    return image


def on_white(image: Image.Image) -> np.ndarray:
    pixels = np.array(image.convert("RGBA")).astype(float)
    alpha = pixels[:, :, 3:] / 255
    return np.rint(pixels[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("WEBP", {}), ("AVIF", {})]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_transparent_parts_are_white(kind: str, options: dict, mode: str) -> None:
    content = save(see_through(mode), kind, **options)
    checked = check_image(content, FORMATS[kind])
    with Image.open(io.BytesIO(content)) as image:
        wanted = on_white(image)
    pixels = trained(checked)
    assert checked.rewritten and distance(pixels, wanted) <= (3 if kind == "WEBP" and not options else 0.5)
    assert distance(pixels[:, :28], np.full((HEIGHT, 28, 3), 255)) < 1


def test_full_alpha_is_left_alone() -> None:
    for image, kind in ((paint("RGBA"), "PNG"), (paint("LA"), "PNG"), (paint("RGBA"), "WEBP")):
        content = save(image, kind)
        assert check_image(content, FORMATS[kind]).content == content


@pytest.mark.parametrize("transparency", [0, bytes([0, 128]), bytes([255] * 3 + [0])])
def test_palettes_with_transparency(transparency: int | bytes) -> None:
    content = save(paint().quantize(8), "PNG", transparency=transparency)
    with Image.open(io.BytesIO(content)) as image:
        wanted = on_white(image.convert("RGBA"))
    assert distance(trained(check_image(content, "png")), wanted) < 0.5
    unused = save(Image.new("P", (8, 8), 1), "PNG", transparency=0)
    assert check_image(unused, "png").content == unused


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_one_transparent_grey_at_every_depth(depth: int) -> None:
    most = (1 << depth) - 1
    samples = np.tile(np.arange(64) * most // 63, (16, 1))
    grey = (samples >> 8 if depth == 16 else samples * 255 // most).astype(np.uint8)
    for key in (0, most, int(samples[0, 20])):
        wanted = np.where(samples == key, 255, grey)
        pixels = trained(check_image(png(depth, 0, samples, (key,)), "png"))
        assert (pixels == wanted[:, :, None]).all()


@pytest.mark.parametrize("depth", [8, 16])
def test_one_transparent_colour(depth: int) -> None:
    colours = np.array(paint()).astype(int)
    key = tuple(colours[40, 50].tolist())
    wanted = np.where((colours == key).all(axis=2, keepdims=True), 255, colours)
    scale = 257 if depth == 16 else 1
    checked = check_image(png(depth, 2, colours * scale, tuple(value * scale for value in key)), "png")
    assert checked.rewritten and (trained(checked) == wanted).all()


@pytest.mark.parametrize(("colour", "mode"), [(0, "L"), (2, "RGB"), (4, "LA"), (6, "RGBA")])
def test_16_bits_become_8(colour: int, mode: str) -> None:
    image = paint(mode) if colour in (0, 2) else see_through(mode[:-1])
    samples = np.array(image).astype(int) * 257
    wanted = np.array(image.convert("RGB")) if colour in (0, 2) else on_white(image)
    assert distance(trained(check_image(png(16, colour, samples), "png")), wanted) < 0.5
    ramp = np.tile(np.arange(0, 65536, 256) + 77, (4, 1))
    assert (trained(check_image(png(16, 0, ramp), "png"))[:, :, 0] == np.arange(256)).all()


def test_16_bit_grey_is_never_trained_white(tmp_path) -> None:
    path = tmp_path / "1.png"
    path.write_bytes(png(16, 0, np.tile(np.arange(64) * 1000, (8, 1))))
    with pytest.raises(UnreadableImage, match="16-bit grey"):
        load_pixels(path, (64, 8))
    path.write_bytes(check_image(path.read_bytes(), "png").content)
    assert load_pixels(path, (64, 8))[0, :, 0].tolist() == [value * 1000 >> 8 for value in range(64)]


def test_animations_give_their_first_frame() -> None:
    frames = [see_through("RGB"), paint("RGBA")]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        content = save(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        checked = check_image(content, FORMATS[kind])
        assert checked.rewritten and distance(trained(checked), on_white(frames[0])) < 0.5
        still = save(paint(), kind, save_all=True, append_images=[paint("L").convert("RGB")], **options)
        assert check_image(still, FORMATS[kind]).content == still


@pytest.mark.parametrize("image", [paint("1"), paint().quantize(16), paint("L")], ids=["1", "P", "L"])
def test_smaller_copies_are_smooth(image: Image.Image) -> None:
    checked = check_image(save(image, "PNG"), "png", max_pixels=WIDTH * HEIGHT // 9)
    assert checked.reduced and not checked.rewritten
    size = (checked.width, checked.height)
    wanted = np.array(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    assert distance(trained(checked), wanted) < 1


def test_smaller_copies_follow_the_rule_too() -> None:
    most = WIDTH * HEIGHT // 4
    turned = check_image(with_orientation("JPEG", 6), "jpg", max_pixels=most)
    assert (turned.width, turned.height) == (HEIGHT // 2, WIDTH // 2) and turned.reduced and turned.rewritten
    for content in (
        save(see_through("RGB"), "PNG"),
        save(Image.new("P", (96, 64), 0), "PNG", transparency=0),
        png(1, 0, np.zeros((64, 96), int), (0,)),
    ):
        assert trained(check_image(content, "png", max_pixels=most))[:, :10].min() > 250


def grey_below(options: dict) -> Image.Image:
    image = Image.new("RGB", (144, 96), (128, 128, 128))
    image.paste(paint().crop((0, 0, 96, 40)))
    return image.convert(options.get("mode", "RGB"))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"progressive": True}, {"optimize": True}, {"subsampling": 0}, {"mode": "L"}, {"mode": "CMYK"},
        {"restart_marker_blocks": 3}, {"restart_marker_rows": 1, "progressive": True}, {"quality": 30},
    ],
)  # fmt: skip
def test_grey_rows_are_told_from_missing_ones(options: dict) -> None:
    saved = {name: value for name, value in options.items() if name != "mode"}
    whole = save(grey_below(options), "JPEG", **saved)
    assert check_image(whole, "jpg", known_size=(999, 999)).content == whole
    flat = save(Image.new("RGB", (64, 64), (128, 128, 128)), "JPEG", **saved)
    assert check_image(flat, "jpg", known_size=(999, 999)).content == flat
    full = save(Image.effect_noise((144, 96), 90).convert(options.get("mode", "RGB")), "JPEG", **saved)
    start = next(place for place in range(2, len(full)) if full[place : place + 2] in (b"\xff\xc0", b"\xff\xc2"))
    lying = full[: start + 5] + struct.pack(">H", 400) + full[start + 7 :]
    with Image.open(io.BytesIO(lying)) as image:
        image.load()
        assert lacks_rows(image, lying)
    with pytest.raises(ImageRefused, match="says 144x400 and has fewer rows"):
        check_image(lying, "jpg", known_size=(144, 96))


def test_an_image_behind_a_link_that_leads_nowhere_is_to_be_put_back(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UnreadableImage, match=r"a\.png: the image cannot be read") as unreadable:
        load_pixels(tmp_path / "a.png", (8, 8))
    assert "`kwrap import` linked back where it lay" in unreadable.value.next_step
