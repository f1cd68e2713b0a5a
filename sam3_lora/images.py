"""Image files: those in a folder, their size, their pixels, and which of them are refused."""

import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from sam3_lora.geometry import PIXEL_LIMIT

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
# PIL's plugins raise these on broken files, SyntaxError and struct.error included.
IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
# In a name or a path: control characters, and halves of a character pair, which no encoding has.
UNSAFE = re.compile("[\0-\x1f\x7f\ud800-\udfff]")
NAMES_LISTED = 5
EXIF_SWAPS_SIDES = (5, 6, 7, 8)  # values of the EXIF tag Orientation that turn by 90 degrees

# Of images that `refuse_bomb` refuses; or, from PIL, of twice as many pixels.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DatasetError(ValueError):
    """Data that cannot be used: what was expected, what was found, what to do."""


def listed(names: list[str]) -> str:
    """Returns the first of some names, for a message."""
    return ", ".join(names[:NAMES_LISTED]) + ", ..." * (len(names) > NAMES_LISTED)


def refuse_bomb(image: Image.Image) -> None:
    """Raises DecompressionBombError where PIL warns; it refuses only images of twice as much."""
    if image.width * image.height > PIXEL_LIMIT:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")


@contextmanager
def open_image(path: Path, wanted: str = "an image") -> Iterator[Image.Image]:
    """Opens an image file; what fails within, as it is read, is told as a fault of the file.

    Raises:
        DatasetError: Not an image that PIL reads, cut short, of too many pixels, or no plain file.
    """
    if UNSAFE.search(path.name):
        found = f"{ascii(path.name)} in {path.parent}"
        raise DatasetError(f"expected {wanted} of a printable name, found {found}; rename it")
    if path.exists() and not path.is_file():  # a pipe or a device may have no end
        raise DatasetError(f"expected {wanted}, found {path}, which is no file; name another")
    try:
        with Image.open(path) as image:
            refuse_bomb(image)
            yield image
    except Image.DecompressionBombError as error:
        message = f"expected {wanted} of at most {PIXEL_LIMIT} pixels, found {path} ({error})"
        raise DatasetError(f"{message}; cut it into tiles") from error
    except IMAGE_ERRORS as error:
        message = f"expected {wanted} that PIL reads, found {path} ({error})"
        raise DatasetError(f"{message}; replace the file or leave it out") from error


def list_images(path: Path, flag: str) -> list[Path]:
    """The image at a path, or those directly in a folder, sorted; hidden files are skipped.

    Raises:
        DatasetError: There is none; `flag` is what named the path.
    """
    if not path.exists():
        found = f"found no {path}; correct the path"
        raise DatasetError(f"{flag}: expected an image or a folder of images, {found}")
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        found = "found none; name the folder that holds them"
        raise DatasetError(f"{flag}: expected images ({kinds}) directly in {path}, {found}")
    return images


def image_size(path: Path) -> tuple[int, int]:
    """Returns (width, height) in pixels as shown, after EXIF rotation; reads the header only.

    Raises:
        DatasetError: As `open_image`.
    """
    with open_image(path) as image:
        # The base class's getexif: that of PNG would decode the whole image first.
        turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        return image.size[::-1] if turn in EXIF_SWAPS_SIDES else image.size


def read_image(path: Path) -> np.ndarray:
    """Reads an image as it is shown, after EXIF rotation, with alpha dropped.

    Returns:
        RGB, uint8 (height, width, 3). 16-bit grey is scaled by the bits in use, 8 at least;
        32-bit and float grey are stretched from their least to their largest finite value.

    Raises:
        DatasetError: As `open_image`.
    """
    with open_image(path) as image:
        # PIL before 11 opens 16-bit PNG in mode I; exif_transpose forgets the format.
        is_uint16 = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")
        return _to_rgb(ImageOps.exif_transpose(image), is_uint16)


def _to_rgb(image: Image.Image, is_uint16: bool) -> np.ndarray:
    """The pixels of an image of any mode as uint8 (height, width, 3)."""
    if is_uint16:
        grey = np.asarray(image).astype(np.float32)
        # Cameras of 8, 10 or 12 bits write their values into 16-bit files as they are.
        bits = max(8, int(grey.max(initial=0)).bit_length())
        grey = grey * (255 / (2**bits - 1))
    elif image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float64)
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        grey = (values - low) / max(high - low, np.finfo(np.float64).tiny) * 255
    else:
        if image.mode == "P":  # straight to RGB, PIL warns of a palette with transparency
            image = image.convert("RGBA")
        return np.array(image.convert("RGB"))
    return np.repeat(np.rint(grey).astype(np.uint8)[:, :, None], 3, axis=2)
