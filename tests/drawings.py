"""Data sets of one's own, drawn for the tests: letters in several fonts, and coloured shapes."""

import random
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

FONTS = [
    ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{name}.ttf", 24)
    for name in ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic", "cmr10")
]
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230)}
SHAPES = ("circle", "square")
COLOURED_SHAPES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


def draw_letter(letter, chance):
    """A white letter on black, 28 x 28, turned and shifted at random."""
    image = Image.new("L", (28, 28))
    place = (14 + chance.uniform(-2, 2), 14 + chance.uniform(-2, 2))
    ImageDraw.Draw(image).text(place, letter, 255, chance.choice(FONTS), anchor="mm")
    return image.rotate(chance.uniform(-12, 12), Image.Resampling.BILINEAR)


def draw_shape(name, chance, side=32):
    """A coloured shape somewhere on a dark, noisy ground, side x side."""
    colour, shape = name.split()
    image = Image.effect_noise((side, side), 40).convert("RGB").point(lambda value: value // 2)
    size, x, y = (chance.uniform(low, high) * side for low, high in ((0.4, 0.6), (0.05, 0.35), (0.05, 0.35)))
    draw = ImageDraw.Draw(image)
    box, fill = (x, y, x + size, y + size), tuple(value + chance.randint(-30, 30) for value in COLOURS[colour])
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=fill)
    return image


def draw_folder(folder, classes, draw, **counts):
    """Draws so many pictures of each class for each split, as torchvision's ImageFolder has them."""
    chance = random.Random(1)
    for split, count in counts.items():
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                draw(name, chance).save(folder / split / name / f"{number}.png")
