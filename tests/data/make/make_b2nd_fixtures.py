"""Writes the small Blosc2 arrays of tests/data/b2nd, as nnU-Net stores preprocessed cases.

    sh benches/peers/run.sh tests/data/make/make_b2nd_fixtures.py

Values are a formula of the place, which the tests know too. `nnunet` is written by nnU-Net's own function; the others vary
what its versions have varied: compressor, filter, chunks and blocks that do not divide the array.
"""

import warnings
from pathlib import Path

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

FOLDER = Path(__file__).resolve().parents[1] / "b2nd"
SHAPE = (2, 13, 22, 17)
CHUNKS, BLOCKS = (1, 8, 16, 10), (1, 4, 6, 10)

CODECS = {
    "lz4": (blosc2.Codec.LZ4, blosc2.Filter.SHUFFLE),
    "lz4hc_plain": (blosc2.Codec.LZ4HC, blosc2.Filter.NOFILTER),
    "zstd": (blosc2.Codec.ZSTD, blosc2.Filter.SHUFFLE),
    "zlib": (blosc2.Codec.ZLIB, blosc2.Filter.SHUFFLE),
    "blosclz": (blosc2.Codec.BLOSCLZ, blosc2.Filter.SHUFFLE),
    "bitshuffle": (blosc2.Codec.LZ4, blosc2.Filter.BITSHUFFLE),
}


def main():
    c, z, y, x = np.indices(SHAPE)
    # Even planes are smooth in their bytes, odd ones are not; the second channel begins with zeros.
    data = np.where(z % 2 == 0, (c + 1) * (z + 2 * y), ((z * 31 + y * 17 + x * 7) % 101) / 8 - 6).astype(np.float32)
    data[1, :8] = 0
    z, y, x = np.indices((1, *SHAPE[1:]))[1:]
    seg = ((z // 3 + y // 4) % 4 - 1).astype(np.int16)
    FOLDER.mkdir(exist_ok=True)
    warnings.simplefilter("ignore")
    for file in FOLDER.glob("*.b2nd"):
        file.unlink()
    nnUNetDatasetBlosc2.save_case(data, seg, {}, str(FOLDER / "nnunet"))
    (FOLDER / "nnunet.pkl").unlink()
    # For a network of one channel and labels 0, 1, ignore 2.
    nnUNetDatasetBlosc2.save_case(data[:1], np.clip(seg, 0, 2), {}, str(FOLDER / "one_channel"))
    (FOLDER / "one_channel.pkl").unlink()
    for name, (codec, filter) in CODECS.items():
        cparams = {"codec": codec, "clevel": 8, "filters": [filter], "filters_meta": [0]}
        for array, file in ((data, name), (seg, f"{name}_seg")):
            blosc2.asarray(
                np.ascontiguousarray(array), chunks=CHUNKS, blocks=BLOCKS, cparams=cparams, urlpath=str(FOLDER / f"{file}.b2nd")
            )
    # So many chunks that their offsets are compressed.
    many = {"codec": blosc2.Codec.LZ4, "filters": [blosc2.Filter.NOFILTER], "filters_meta": [0]}
    for array, file in ((data, "many_chunks"), (seg, "many_chunks_seg")):
        blosc2.asarray(
            np.ascontiguousarray(array), chunks=(1, 2, 4, 17), blocks=(1, 2, 4, 17), cparams=many, urlpath=str(FOLDER / f"{file}.b2nd")
        )


if __name__ == "__main__":
    main()
