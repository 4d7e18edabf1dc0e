"""Makes tests/data/loss/finest_gradient.safetensors: of the `loss.0.grad` of real nnU-Net runs, every 23rd voxel.

Usage: python3 extract_loss_gradient.py OUTPUT NAME=reference.safetensors...

Each entry `NAME` is `[voxels, channels]` in float32, voxels counted over the batch: 0, 23, 46, ... The whole gradients
are megabytes of incompressible digits. No dependency beyond Python.
"""

import json
import struct
import sys

STRIDE = 23


def main():
    header, body = {}, b""
    for argument in sys.argv[2:]:
        name, path = argument.split("=", 1)
        with open(path, "rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            entry = json.loads(source.read(length))["loss.0.grad"]
            start, end = entry["data_offsets"]
            source.seek(8 + length + start)
            values = source.read(end - start)
        batch, channels, depth, height, width = entry["shape"]
        voxels = depth * height * width
        rows = range(0, batch * voxels, STRIDE)
        part = b"".join(
            values[4 * at : 4 * at + 4]
            for row in rows
            for at in ((row // voxels * channels + c) * voxels + row % voxels for c in range(channels))
        )
        header[name] = {"dtype": "F32", "shape": [len(rows), channels], "data_offsets": [len(body), len(body) + len(part)]}
        body += part
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(sys.argv[1], "wb") as target:
        target.write(struct.pack("<Q", len(text)) + text + body)


main()
