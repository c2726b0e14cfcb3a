"""Decodes a HEIC, as iPhones store photographs, from standard input to a PPM on standard output, upright.

opening.py runs this as a process of its own, with its limits as arguments. Before it looks at the file it gives up what
it does not need, so that a hostile file can open no other and no connection. Only the pixels, in HEVC, are decoded by a
library in C, libde265; the boxes around them (ISO/IEC 14496-12 and 23008-12) are read here. Of a large picture only as
many pixels are kept as will be looked at; standard error has the factor by which it was reduced.
"""

import ctypes
import resource
import sys
from collections.abc import Iterator

from PIL import Image

TOO_LARGE, NO_LIBRARY = 3, 4  # the exit status where it is not the file that is damaged

Box = tuple[bytes, bytes]  # the type, and the content


class Fields:
    """Reads the fields of a box, one after another. Raise ValueError where it ends too early."""

    def __init__(self, content: bytes) -> None:
        self.content, self.position = content, 0

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        field = self.content[self.position : self.position + size]
        if len(field) < size:
            raise ValueError("a box or a file ends too early")
        self.position += size
        return field

    def number(self, size: int) -> int:
        """Return the next number, of so many bytes."""
        return int.from_bytes(self.take(size), "big")

    def boxes(self) -> Iterator[Box]:
        """Yield the boxes in the rest."""
        while self.position < len(self.content):
            size, kind = self.number(4), self.take(4)
            if size == 1:
                yield kind, self.take(self.number(8) - 16)
            else:  # 0 is the last box's, which reaches to the end
                yield kind, self.take(size - 8 if size else len(self.content) - self.position)


class Items:
    """The items of a HEIC, by their numbers: pictures, tiles of pictures, and others."""

    def __init__(self, file: bytes) -> None:
        meta = dict(Fields(dict(Fields(file).boxes())[b"meta"][4:]).boxes())
        primary = Fields(meta[b"pitm"])
        self.primary = primary.number(2 if primary.number(4) >> 24 == 0 else 4)
        self.kinds = dict(read_kinds(Fields(meta[b"iinf"])))
        self.contents = dict(read_contents(Fields(meta[b"iloc"]), file, meta.get(b"idat", b"")))
        self.parts = dict(read_parts(Fields(meta.get(b"iref", bytes(4)))))
        self.properties = dict(read_properties(dict(Fields(meta[b"iprp"]).boxes())))


def read_kinds(fields: Fields) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each item, and its type, such as hvc1, a picture in HEVC."""
    fields.number(2 if fields.number(4) >> 24 == 0 else 4)  # how many there are
    for _, content in fields.boxes():
        entry = Fields(content)
        number = entry.number(2 if entry.number(4) >> 24 == 2 else 4)
        entry.take(2)  # the protection
        yield number, entry.take(4)


def read_contents(fields: Fields, file: bytes, idat: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the number of each item, and its content, in parts."""
    version = fields.number(4) >> 24
    sizes = f"{fields.number(2):04x}"
    offset, length, base, index = (int(size, 16) for size in sizes)
    for _ in range(fields.number(4 if version == 2 else 2)):
        number = fields.number(4 if version == 2 else 2)
        source = Fields(idat if version and fields.number(2) & 15 == 1 else file)
        fields.take(2)  # the file, which is this one
        start = fields.number(base)
        parts = []
        for _ in range(fields.number(2)):
            fields.take(index if version else 0)
            source.position = start + fields.number(offset)
            parts.append(source.take(fields.number(length) or len(source.content) - source.position))
        yield number, parts


def read_parts(fields: Fields) -> Iterator[tuple[int, list[int]]]:
    """Yield the number of each item that is made of others, such as a grid of tiles, and their numbers."""
    size = 2 if fields.number(4) >> 24 == 0 else 4
    for kind, content in fields.boxes():
        if kind == b"dimg":
            entry = Fields(content)
            number = entry.number(size)
            yield number, [entry.number(size) for _ in range(entry.number(2))]


def read_properties(iprp: dict[bytes, bytes]) -> Iterator[tuple[int, list[Box]]]:
    """Yield the number of each item, and its properties in order."""
    every = [*Fields(iprp[b"ipco"]).boxes()]
    fields = Fields(iprp[b"ipma"])
    version, flags = divmod(fields.number(4), 1 << 24)
    size = 2 if flags & 1 else 1
    for _ in range(fields.number(4)):
        number = fields.number(2 if version == 0 else 4)
        # The highest bit says that the property is essential. Numbers begin at 1; 0 is none.
        indices = [fields.number(size) & ((1 << 8 * size - 1) - 1) for _ in range(fields.number(1))]
        yield number, [every[index - 1] for index in indices if index]


# From an item to its picture ------------------------------------------------------------------------------------------


class Pointer(ctypes.c_void_p):
    """A pointer that ctypes leaves as it is; it would turn a c_void_p into a number, and pass 32 bits of that."""


class Decoder:
    """Decodes the pictures of a HEIC, each reduced by a factor."""

    def __init__(self, library: ctypes.CDLL, items: Items) -> None:
        self.library, self.items = library, items
        for name in ("new_decoder", "get_next_picture", "get_image_plane"):
            getattr(library, f"de265_{name}").restype = Pointer
        self.factor = 1

    def decode(self, max_pixels: int, side: int) -> Image.Image:
        """Return the main picture, upright, reduced to less than four times `side` if its tiles can be halved."""
        number, items = self.items.primary, self.items
        size = self.size(number)
        if size[0] * size[1] > max_pixels:
            sys.exit(TOO_LARGE)
        tile = self.size(items.parts[number][0]) if items.kinds[number] == b"grid" else None
        while max(size) >= 4 * self.factor * side and not any(length % (2 * self.factor) for length in tile or ()):
            self.factor *= 2
        image = self.grid(number, tile) if tile else self.picture(number)
        for kind, content in items.properties[number]:
            image = transform(image, kind, Fields(content), self.factor)
        return image

    def size(self, number: int) -> tuple[int, int]:
        """Return the width and height of an item's picture, as the file says."""
        fields = Fields(dict(self.items.properties[number])[b"ispe"][4:])
        return fields.number(4), fields.number(4)

    def grid(self, number: int, tile: tuple[int, int]) -> Image.Image:
        """Return a picture that is stored in tiles, row by row."""
        fields = Fields(b"".join(self.items.contents[number]))
        size = 4 if fields.number(2) & 1 else 2
        rows, columns = fields.number(1) + 1, fields.number(1) + 1
        width, height = (-(-fields.number(size) // self.factor) for _ in range(2))
        whole = Image.new("RGB", (width, height))
        for place, part in zip(range(rows * columns), self.items.parts[number], strict=True):
            row, column = divmod(place, columns)
            whole.paste(self.picture(part), (column * tile[0] // self.factor, row * tile[1] // self.factor))
        return whole

    def picture(self, number: int) -> Image.Image:
        """Return the picture of an item in HEVC, reduced."""
        library, properties = self.library, self.items.properties[number]
        decoder = library.de265_new_decoder()
        for unit in units(dict(properties)[b"hvcC"], b"".join(self.items.contents[number])):
            library.de265_push_NAL(decoder, unit, len(unit), ctypes.c_int64(0), None)
        library.de265_flush_data(decoder)
        decoded, more = Pointer(), ctypes.c_int(1)
        while not decoded:
            if not more.value or library.de265_decode(decoder, ctypes.byref(more)):
                raise ValueError("no picture")
            decoded = library.de265_get_next_picture(decoder)
        said = [content[10] >> 7 for _, content in properties if content[:4] == b"nclx"]  # overrules the stream
        full_range = bool(said[0] if said else library.de265_get_image_full_range_flag(decoded))
        count = 3 if library.de265_get_chroma_format(decoded) else 1
        bands = [self.band(decoded, band, full_range) for band in range(count)]
        width, height = (-(-length // self.factor) for length in bands[0].size)
        bands = [band.resize((width, height), Image.Resampling.BOX) for band in bands]  # chroma has fewer pixels
        library.de265_free_decoder(decoder)
        return Image.merge("YCbCr", bands).convert("RGB") if count == 3 else bands[0]

    def band(self, decoded: Pointer, band: int, full_range: bool) -> Image.Image:
        """Return a band of a decoded picture, luma or one of the two chroma, in 8 bits and the full range."""
        stride = ctypes.c_int()
        plane = self.library.de265_get_image_plane(decoded, band, ctypes.byref(stride))
        size = self.library.de265_get_image_width(decoded, band), self.library.de265_get_image_height(decoded, band)
        bits = self.library.de265_get_bits_per_pixel(decoded, band)
        mode = "L" if bits == 8 else "I;16"
        image = Image.frombytes(mode, size, ctypes.string_at(plane, stride.value * size[1]), "raw", mode, stride.value)
        if bits > 8:
            image = image.point(lambda value: value * (255 / (2**bits - 1))).convert("L")
        if full_range:
            return image
        zero, span, middle = (16, 219, 0) if band == 0 else (128, 224, 128)
        return image.point([round(min(max((value - zero) * 255 / span + middle, 0), 255)) for value in range(256)])


def units(configuration: bytes, content: bytes) -> Iterator[bytes]:
    """Yield the units of an HEVC stream (NAL units): its parameters, then what they apply to."""
    fields = Fields(configuration)
    size = fields.take(22)[21] % 4 + 1
    for _ in range(fields.number(1)):
        fields.take(1)
        for _ in range(fields.number(2)):
            yield fields.take(fields.number(2))
    fields = Fields(content)
    while fields.position < len(content):
        yield fields.take(fields.number(size))


def transform(image: Image.Image, kind: bytes, fields: Fields, factor: int) -> Image.Image:
    """Return a picture cut, turned or mirrored, if that is what a property of it says."""
    if kind == b"irot":
        return image.rotate(90 * (fields.number(1) & 3), expand=True)  # exact: Pillow transposes for these angles
    if kind == b"imir":
        left_right = fields.number(1) & 1
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT if left_right else Image.Transpose.FLIP_TOP_BOTTOM)
    if kind == b"clap":  # a size, and how far its centre is from the picture's, in pixels before the reduction
        pairs = [(int.from_bytes(fields.take(4), "big", signed=True), fields.number(4)) for _ in range(4)]
        width, height, x, y = (above / below / factor for above, below in pairs)
        left, top = (image.width - width) / 2 + x, (image.height - height) / 2 + y
        return image.crop((round(left), round(top), round(left + width), round(top + height)))
    return image


def main() -> None:
    """Decode standard input to standard output. The arguments: pixels, bytes of memory, the side."""
    max_pixels, memory, side = map(int, sys.argv[1:])
    try:
        library = ctypes.CDLL("libde265.so.0")
    except OSError:
        sys.exit(NO_LIBRARY)
    Image.preinit()  # imports what writing a PPM needs
    # No more memory than this, no other files or sockets, and, unless this is root, no other processes. It ends after
    # these seconds, more than opening.py waits for it, also if opening.py's own process has been killed.
    for limit, value in (("AS", memory), ("CPU", 20), ("NOFILE", 0), ("NPROC", 0), ("FSIZE", 0), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (value, value))
    decoder = Decoder(library, Items(sys.stdin.buffer.read()))
    decoder.decode(max_pixels, side).save(sys.stdout.buffer, "PPM")
    sys.stderr.write(str(decoder.factor))


if __name__ == "__main__":
    main()
