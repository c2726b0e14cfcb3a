#!/usr/bin/env bash
# Pillow 13.0.0: Image.open() reports the format MPO, but a list of formats that has MPO ends in a KeyError.
#
# Many phones and cameras save MPO: a JPEG with a second picture behind it. No reader is registered under that name: the
# one for JPEG hands over to it. So a check for image.format == "JPEG" refuses such photos, formats=["JPEG"] lets them
# in, and formats=["JPEG", "MPO"] works until there comes a picture of another format: then it raises KeyError where
# a program expects UnidentifiedImageError.
#
# Seen (Python 3.11):
#   an MPO, formats=["JPEG"]: opened as MPO
#   an MPO, formats=["MPO"]: KeyError
#   an MPO, formats=["JPEG", "MPO"]: opened as MPO
#   a PNG, formats=["JPEG"]: UnidentifiedImageError
#   a PNG, formats=["JPEG", "MPO"]: KeyError
#
# Met in serve: one table has the formats that it takes and the memory for each, MPO included. It must not ask for that.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0
"$folder/venv/bin/python" - <<'END'
import io, json
from PIL import Image

def outcome(content, formats):
    try:
        with Image.open(content, formats=formats) as image:
            return f"opened as {image.format}"
    except Exception as error:
        return type(error).__name__

picture, mpo, png = Image.new("L", (64, 48), 200), io.BytesIO(), io.BytesIO()
picture.save(mpo, "MPO", save_all=True, append_images=[picture])
picture.save(png, "PNG")
for name, content, formats, expected in (
    ("an MPO", mpo, ["JPEG"], "opened as MPO"),
    ("an MPO", mpo, ["MPO"], "KeyError"),
    ("an MPO", mpo, ["JPEG", "MPO"], "opened as MPO"),
    ("a PNG", png, ["JPEG"], "UnidentifiedImageError"),
    ("a PNG", png, ["JPEG", "MPO"], "KeyError"),
):
    seen = outcome(content, formats)
    print(f"{name}, formats={json.dumps(formats)}: {seen}")
    assert seen == expected
END
