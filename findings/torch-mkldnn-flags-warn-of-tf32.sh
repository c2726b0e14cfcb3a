#!/usr/bin/env bash
# torch 2.13.0: `with torch.backends.mkldnn.flags(enabled=False)` warns of TF32 on Intel GPUs, which nobody asked for.
#
# The context saves and restores all flags of oneDNN, and setting the one for TF32, even to the value that it has, warns
# where the build has no support for Intel GPUs, as the builds for the CPU. `torch.backends.mkldnn.enabled = False` sets
# the one flag, without a warning. Where warnings are errors, the context cannot be entered.
#
# Seen (Python 3.11, Linux, a build for the CPU):
#   flags(enabled=False): 1 warning, TF32 acceleration on top of oneDNN is available for Intel GPUs.
#   enabled = False: 0 warnings
#
# Met where single images are predicted without oneDNN, which has more overhead than it saves there.
#
# The wheel is that of pip's own index settings.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cat >"$folder/warn.py" <<'END'
import sys, warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch looks for numpy, which is not needed here
    import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    if sys.argv[1] == "context":
        with torch.backends.mkldnn.flags(enabled=False):
            pass
    else:
        torch.backends.mkldnn.enabled = False
        assert not torch.backends.mkldnn.enabled
first = f", {str(caught[0].message).partition('. ')[0]}." if caught else ""
print(f"{len(caught)} warning{'' if len(caught) == 1 else 's'}{first}")
END
context=$("$folder/venv/bin/python" "$folder/warn.py" context)
attribute=$("$folder/venv/bin/python" "$folder/warn.py" attribute)
echo "flags(enabled=False): $context"
echo "enabled = False: $attribute"
[ "$context" = "1 warning, TF32 acceleration on top of oneDNN is available for Intel GPUs." ]
[ "$attribute" = "0 warnings" ]
