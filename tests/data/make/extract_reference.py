"""Makes tests/data/NAME/step.safetensors.gz out of a `reference.safetensors` of a real nnU-Net run.

Usage: python3 extract_reference.py reference.safetensors step.safetensors.gz

Kept: the input, the full-resolution target, logits, losses, the gradients of every parameter and the weights before and
after three steps, all float32 as PyTorch computed them. Left out: what the tests compute themselves (coarser targets) or
do not need. No dependency beyond Python.
"""

import gzip
import json
import struct
import sys

KEEP = ("step.input", "step.target.", "step.logits.", "step.loss.", "step.gradnorm.", "step.grad.",
        "step.weights0.", "step.weights3.", "loss.")
# Megabytes of incompressible digits: the gradient of the finest level is checked through the parameters' gradients.
DROP = ("loss.0.grad",)


def main():
    with open(sys.argv[1], "rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        header = json.loads(source.read(length))
        body = source.read()
    kept, parts, offset = {}, [], 0
    for name, entry in header.items():
        if not name.startswith(KEEP) or name in DROP:
            continue
        start, end = entry["data_offsets"]
        kept[name] = {**entry, "data_offsets": [offset, offset + end - start]}
        parts.append(body[start:end])
        offset += end - start
    text = json.dumps(kept, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Level and time are fixed so that the file is reproducible.
    with gzip.GzipFile(sys.argv[2], "wb", 9, mtime=0) as target:
        target.write(struct.pack("<Q", len(text)) + text + b"".join(parts))


main()
