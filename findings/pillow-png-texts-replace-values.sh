#!/usr/bin/env bash
# Pillow 13.0.0: a text chunk of a PNG becomes an entry of image.info under its keyword, also where Pillow keeps values
# of its own: with the keyword "transparency", convert("RGBA") raises TypeError.
#
# PNG lets a text have any keyword of Latin letters. So what `info` has under a name need not be what Pillow, or the
# program, means by it: whoever reads `info`, or notes something there, should check the type.
#
# Seen (Python 3.11):
#   mode L, a text with the keyword transparency: str, convert("RGBA"): TypeError
#   mode RGB, a text with the keyword transparency: str, convert("RGBA"): TypeError
#   mode L, a text with the keyword Title: str, convert("RGBA"): RGBA
#
# Met in infer and serve: such a picture ended the run, or the worker, with a traceback.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0
"$folder/venv/bin/python" - <<'END'
import io
from PIL import Image
from PIL.PngImagePlugin import PngInfo

for mode, keyword, expected in (
    ("L", "transparency", "TypeError"),
    ("RGB", "transparency", "TypeError"),
    ("L", "Title", "RGBA"),
):
    texts, file = PngInfo(), io.BytesIO()
    texts.add_text(keyword, "a text")
    Image.new(mode, (8, 8)).save(file, "PNG", pnginfo=texts)
    image = Image.open(file)
    image.load()
    try:
        seen = image.convert("RGBA").mode
    except Exception as error:
        seen = type(error).__name__
    kind = type(image.info[keyword]).__name__
    print(f'mode {mode}, a text with the keyword {keyword}: {kind}, convert("RGBA"): {seen}')
    assert (kind, seen) == ("str", expected)
END
