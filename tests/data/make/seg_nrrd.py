"""Segmentations as 3D Slicer writes them, for tests/data/seg_nrrd: SimpleITK writes image and label maps, and crops and turns
them, so that the places in the headers are its own; the segments' fields are added as text.

    python tests/data/make/seg_nrrd.py tests/data/seg_nrrd
"""

import gzip
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk

out = Path(sys.argv[1])
rng = np.random.default_rng(5)

# An oblique grid, so that no axis of it is one of the world's.
image = sitk.GetImageFromArray(rng.integers(0, 200, (9, 11, 13)).astype(np.uint8))
image.SetSpacing((0.5, 1.25, 3.0))
image.SetOrigin((-31.5, 12.25, 7.0))
angle = np.deg2rad(20)
c, s = np.cos(angle), np.sin(angle)
image.SetDirection((c, -s, 0, s, c, 0, 0, 0, 1))
sitk.WriteImage(image, str(out / "image.nii.gz"))

labels = np.zeros((9, 11, 13), np.uint8)
labels[2:6, 3:8, 4:9] = 1
labels[3:7, 6:10, 7:12] = 2
map_ = sitk.GetImageFromArray(labels)
map_.CopyInformation(image)
sitk.WriteImage(map_, str(out / "labels.nii.gz"))


def header(volume, sizes, directions, kinds, encoding, segments):
    lines = ["NRRD0004", "# as 3D Slicer writes it", "type: unsigned char", f"dimension: {len(sizes)}"]
    lines += ["space: left-posterior-superior", "sizes: " + " ".join(map(str, sizes))]
    lines += ["space directions: " + " ".join(directions), "kinds: " + kinds, f"encoding: {encoding}"]
    lines += ["space origin: " + vector(volume.GetOrigin())]
    for number, (name, value, layer, extent) in enumerate(segments):
        lines += [f"Segment{number}_ID:=Segment_{number}", f"Segment{number}_Name:={name}"]
        lines += [f"Segment{number}_LabelValue:={value}", f"Segment{number}_Layer:={layer}"]
        lines += [f"Segment{number}_Extent:=" + " ".join(map(str, extent))]
        lines += [f"Segment{number}_Tags:=Segmentation.Status:inprogress|"]
    lines += ["Segmentation_ReferenceImageExtentOffset:=0 0 0", "Segmentation_SourceRepresentation:=Binary labelmap"]
    return ("\n".join(lines) + "\n\n").encode()


def vector(values):
    return "(" + ",".join(repr(float(v)) for v in values) + ")"


def axes(volume):
    d, spacing = np.array(volume.GetDirection()).reshape(3, 3), volume.GetSpacing()
    return [vector(d[:, axis] * spacing[axis]) for axis in range(3)]


def extent(mask):
    where = np.argwhere(mask)
    (z, y, x), (Z, Y, X) = where.min(0), where.max(0)
    return x, X, y, Y, z, Z


# One layer, cropped to what was drawn, with two axes turned round and two exchanged, raw.
part = map_[3:12, 2:11, 1:8]
part = sitk.PermuteAxes(sitk.Flip(part, (True, False, True)), (1, 0, 2))
array = sitk.GetArrayFromImage(part)
segments = [("Anterior", 1, 0, extent(array == 1)), ("lesion", 2, 0, extent(array == 2))]
text = header(part, part.GetSize(), axes(part), "domain domain domain", "raw", segments)
(out / "cropped.seg.nrrd").write_bytes(text + array.tobytes())

# Two layers that overlap, both of value 1, gzipped; the list is the fastest axis.
first, second = labels == 1, labels == 2
first[3:6, 6:8, 7:9] = True
layers = np.stack([first, second], axis=-1).astype(np.uint8)
segments = [("Anterior", 1, 0, extent(first)), ("Posterior", 1, 1, extent(second))]
text = header(map_, (2, *map_.GetSize()), ["none"] + axes(map_), "list domain domain domain", "gzip", segments)
(out / "layers.seg.nrrd").write_bytes(text + gzip.compress(layers.tobytes(), mtime=0))
