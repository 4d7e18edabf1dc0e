//! Segmentations of 3D Slicer: names, layers, places, encodings, and every field that can be wrong. Files and places are
//! SimpleITK's (`tests/data/make/seg_nrrd.py`).

use crate::common::sparse::{LABELS, Place, labels};
use ndarray::Array3;
use std::fs;
use std::path::{Path, PathBuf};
use voxgrad::Error;
use voxgrad::error::FileError;
use voxgrad::io::{read_labels, read_nrrd};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/seg_nrrd").join(name)
}

/// A dataset of the one image, and a folder `drawn` for segmentations.
fn place() -> (Place, Array3<i16>) {
    let place = Place::new();
    for folder in ["images/imagesTr", "drawn"] {
        fs::create_dir_all(place.path(folder)).unwrap();
    }
    fs::copy(data("image.nii.gz"), place.path("images/imagesTr/a_0000.nii.gz")).unwrap();
    let json = format!(
        r#"{{"channel_names": {{"0": "MRI"}}, "labels": {LABELS}, "numTraining": 1, "file_ending": ".nii.gz"}}"#
    );
    fs::write(place.path("images/dataset.json"), json).unwrap();
    (place, read_labels(&data("labels.nii.gz")).unwrap().data)
}

fn import<'a>(options: &[&'a str]) -> Vec<&'a str> {
    [&["import", "images", "-o", "sparse", "--overwrite", "--labels", "drawn"], options].concat()
}

/// The bytes of a file with a text in its header replaced.
fn replaced(name: &str, from: &str, to: &str) -> Vec<u8> {
    let bytes = fs::read(data(name)).unwrap();
    let end = bytes.windows(2).position(|pair| pair == b"\n\n").unwrap() + 2;
    let header = String::from_utf8(bytes[..end].to_vec()).unwrap();
    assert!(header.contains(from), "no {from} in {header}");
    [header.replacen(from, to, 1).as_bytes(), &bytes[end..]].concat()
}

#[test]
fn a_cropped_and_turned_segmentation_comes_to_lie_where_it_was_drawn() {
    let (place, whole) = place();
    fs::copy(data("cropped.seg.nrrd"), place.path("drawn/a.seg.nrrd")).unwrap();
    let said = place.succeeds(&import(&["--map", "lesion=Posterior"]));
    assert_eq!(labels(&place.path("sparse"), "a"), whole);
    let count = |label: i16| whole.iter().filter(|&&found| found == label).count();
    assert!(said.contains(&format!("{} voxels of segment lesion were turned into Posterior", count(2))), "{said}");

    // What was not drawn is unlabelled, and a segment that is no label is named.
    let said = place.succeeds(&import(&["--unlabelled", "0"]));
    let expected = whole.mapv(|label| if label == 1 { 1 } else { 3 });
    assert_eq!(labels(&place.path("sparse"), "a"), expected);
    assert!(said.contains("not used: {\"lesion\"}") && said.contains("background is annotated nowhere"), "{said}");

    // A mapping of 0 says the same.
    place.succeeds(&import(&["--map", "0=ignore"]));
    assert_eq!(labels(&place.path("sparse"), "a"), expected);

    // The same in the other world's signs: RAS negates the first two components of LPS.
    let text = String::from_utf8_lossy(&fs::read(data("cropped.seg.nrrd")).unwrap()).into_owned();
    let turned = |line: &str| -> String {
        let numbers = |vector: &str| -> Vec<f64> { vector.split(',').map(|number| number.parse().unwrap()).collect() };
        let vectors = line.split(['(', ')']).filter(|part| part.contains(',')).map(numbers);
        vectors.map(|v| format!("({},{},{}) ", -v[0], -v[1], v[2])).collect()
    };
    let mut bytes = replaced("cropped.seg.nrrd", "left-posterior-superior", "RAS");
    for field in ["space directions: ", "space origin: "] {
        let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        let at = bytes.windows(line.len()).position(|window| window == line.as_bytes()).unwrap();
        bytes.splice(at..at + line.len(), turned(line).into_bytes());
    }
    fs::write(place.path("drawn/a.seg.nrrd"), bytes).unwrap();
    place.succeeds(&import(&["--map", "lesion=Posterior"]));
    assert_eq!(labels(&place.path("sparse"), "a"), whole);
}

#[test]
fn layers_overlap_by_the_stated_rule() {
    let (place, whole) = place();
    fs::copy(data("layers.seg.nrrd"), place.path("drawn/a.seg.nrrd")).unwrap();
    // Where `layers.seg.nrrd` has more of the first segment than `labels.nii.gz`: [3:6, 6:8, 7:9].
    let more = |(z, y, x): (usize, usize, usize)| (3..6).contains(&z) && (6..8).contains(&y) && (7..9).contains(&x);
    for (rule, both) in [("ignore", 3), ("first", 1), ("last", 2)] {
        let said = place.succeeds(&import(&["--overlap", rule]));
        let found = labels(&place.path("sparse"), "a");
        let mut overlapping = 0;
        for (at, &label) in whole.indexed_iter() {
            overlapping += usize::from(more(at) && label == 2);
            let expected = match (more(at), label) {
                (true, 2) => both,
                (true, _) => 1,
                (false, label) => label,
            };
            assert_eq!(found[at], expected, "{rule} {at:?}");
        }
        assert!(said.contains(&format!("{overlapping} voxels in masks or segments of several")), "{said}");
    }
}

#[test]
fn two_annotators_two_formats() {
    let (place, whole) = place();
    fs::copy(data("cropped.seg.nrrd"), place.path("drawn/a.seg.nrrd")).unwrap();
    fs::create_dir(place.path("other")).unwrap();
    fs::copy(data("labels.nii.gz"), place.path("other/a.nii.gz")).unwrap();
    // The one calls the lesion Anterior, the other Posterior.
    let options = ["--labels", "other", "--unlabelled", "0", "--map", "lesion=Anterior"];
    let said = place.succeeds(&import(&options));
    assert_eq!(labels(&place.path("sparse"), "a"), whole.mapv(|label| if label == 1 { 1 } else { 3 }));
    let disputed = whole.iter().filter(|&&label| label == 2).count();
    assert!(said.contains(&format!("{disputed} voxels on which annotators disagree")), "{said}");
    fs::copy(data("labels.nii.gz"), place.path("drawn/a.nii.gz")).unwrap();
    place.refuses(&import(&[]), &["case a", "two annotations", "drawn"]);
}

#[test]
fn nothing_drawn_is_nothing_labelled() {
    let (place, _) = place();
    let header = "NRRD0004\ntype: unsigned char\ndimension: 3\nspace: left-posterior-superior\nsizes: 1 1 1\n\
                  space directions: (1,0,0) (0,1,0) (0,0,1)\nkinds: domain domain domain\nencoding: raw\n\
                  space origin: (900,0,0)\n\n\0";
    fs::write(place.path("drawn/a.seg.nrrd"), header).unwrap();
    let said = place.succeeds(&import(&["--unlabelled", "0"]));
    assert!(labels(&place.path("sparse"), "a").iter().all(|&label| label == 3));
    assert!(said.contains("without any annotation"), "{said}");
}

#[test]
fn voxels_outside_the_image_are_counted() {
    let (place, whole) = place();
    // Two voxels further along x: what was last lies beyond.
    let text = String::from_utf8_lossy(&fs::read(data("layers.seg.nrrd")).unwrap()).into_owned();
    let numbers = |text: &str| -> Vec<f64> { text.split(',').map(|number| number.parse().unwrap()).collect() };
    let vectors = |field: &str| -> Vec<Vec<f64>> {
        let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.split(['(', ')']).filter(|part| part.contains(',')).map(numbers).collect()
    };
    let (origin, along) = (vectors("space origin: ")[0].clone(), vectors("space directions: ")[0].clone());
    let moved: Vec<String> = origin.iter().zip(&along).map(|(o, a)| (o + 2.0 * a).to_string()).collect();
    let line = text.lines().find(|line| line.starts_with("space origin")).unwrap();
    let bytes = replaced("layers.seg.nrrd", line, &format!("space origin: ({})", moved.join(",")));
    fs::write(place.path("drawn/a.seg.nrrd"), bytes).unwrap();
    let said = place.succeeds(&import(&["--overlap", "last"]));
    let found = labels(&place.path("sparse"), "a");
    let columns = whole.dim().2;
    let lost = whole.indexed_iter().filter(|((_, _, x), label)| **label != 0 && x + 2 >= columns).count();
    assert!(lost > 0 && said.contains(&format!("{lost} voxels of segments lie outside")), "{lost}: {said}");
    assert!(
        whole
            .indexed_iter()
            .filter(|((_, _, x), l)| **l == 2 && x + 2 < columns)
            .all(|((z, y, x), _)| found[[z, y, x + 2]] == 2)
    );
}

/// Every field in turn is wrong: refused by its name.
#[test]
fn wrong_fields_are_named() {
    let (place, _) = place();
    let cases: [(&str, &str, &str, &[&str]); 25] = [
        ("cropped", "NRRD0004", "NRRX0004", &["not an NRRD file"]),
        ("cropped", "type: unsigned char", "type: float", &["`type`", "float"]),
        ("cropped", "type: unsigned char\n", "", &["`type`", "missing"]),
        ("cropped", "type: unsigned char", "type: short", &["`endian`", "missing"]),
        ("cropped", "type: unsigned char", "endian: middle\ntype: short", &["`endian`", "middle"]),
        ("cropped", "type: unsigned char", "type: uchar\ntype: uchar", &["`type`", "twice"]),
        ("cropped", "dimension: 3", "dimension: 2", &["`dimension`", "2"]),
        ("cropped", "sizes: 9 9 7", "sizes: 9 9 0", &["`sizes`"]),
        ("cropped", "sizes: 9 9 7", "sizes: 9 9", &["`sizes`"]),
        ("cropped", "sizes: 9 9 7", "sizes: 9 9 8", &["`sizes`", "648", "567"]),
        ("cropped", "sizes: 9 9 7", "sizes: 9 9 6", &["`sizes`", "longer"]),
        ("cropped", "sizes: 9 9 7", "sizes: 99999999 99999999 99999999", &["`sizes`", "memory"]),
        ("layers", "sizes: 2 13", "sizes: 2 1300000", &["`sizes`", "cannot hold"]),
        ("cropped", "encoding: raw", "encoding: bzip2", &["`encoding`", "bzip2", "gzip"]),
        ("cropped", "encoding: raw", "encoding: raw\ndata file: a.raw", &["`data file`", "one file"]),
        ("cropped", "encoding: raw", "encoding: raw\nbyte skip: 4", &["`byte skip`"]),
        ("cropped", "encoding: raw", "encoding: raw\ncolour: red", &["`colour`", "no field"]),
        ("cropped", "left-posterior-superior", "scanner-xyz", &["`space`", "LPS"]),
        ("cropped", "space: left-posterior-superior\n", "", &["`space`", "missing"]),
        ("cropped", ",0.0) (0.0,0.0,-3.0)", ") (0.0,0.0,-3.0)", &["`space directions`"]),
        ("cropped", "kinds: domain domain domain", "kinds: domain domain list", &["`kinds`"]),
        ("layers", "kinds: list", "kinds: RGB-color", &["`kinds`"]),
        ("layers", "Segment1_Layer:=1", "Segment1_Layer:=2", &["`Segment1_Layer`", "2 layers"]),
        ("cropped", "Segment1_LabelValue:=2", "Segment1_LabelValue:=3", &["`SegmentN_LabelValue`", "value 2"]),
        ("cropped", "Segment0_Extent:=1", "Segment0_Extent:=2", &["`Segment0_Extent`", "Anterior"]),
    ];
    for (name, from, to, words) in cases {
        fs::write(place.path("drawn/a.seg.nrrd"), replaced(&format!("{name}.seg.nrrd"), from, to)).unwrap();
        place.refuses(&import(&[]), &[&["a.seg.nrrd"], words].concat());
    }
    let unknown = replaced("cropped.seg.nrrd", "Segment0_Name:=Anterior", "Segment0_Name:=front");
    fs::write(place.path("drawn/a.seg.nrrd"), unknown).unwrap();
    place.refuses(&import(&[]), &["front", "lesion", "Anterior", "Posterior", "--map SEGMENT=LABEL"]);
    place.refuses(&import(&["--map", "front=hind"]), &["hind", "Anterior"]);

    let elsewhere = replaced("cropped.seg.nrrd", "(0.0,0.0,-3.0)", "(0.0,0.0,-2.0)");
    fs::write(place.path("drawn/a.seg.nrrd"), elsewhere).unwrap();
    place.refuses(&import(&["--map", "lesion=Posterior"]), &["case a", "does not lie"]);
    fs::remove_file(place.path("drawn/a.seg.nrrd")).unwrap();
    fs::copy(data("labels.nii.gz"), place.path("drawn/a.nii.gz")).unwrap();
    place.refuses(&import(&["--overlap", "first"]), &["--overlap", ".seg.nrrd"]);
    let said = place.succeeds(&import(&["--map", "front=Anterior"]));
    assert!(said.contains("no segmentation has a segment front"), "{said}");
}

#[test]
fn types_and_byte_orders_hold_the_same_values() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.nrrd");
    let header = |kind: &str, endian: &str| {
        format!(
            "NRRD0005\ntype: {kind}\n{endian}dimension: 3\nspace: RAS\nsizes: 3 2 1\nencoding: raw\n\
             space directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (5,6,7)\na key:=with\\nlines \\\\ and := signs\n\n"
        )
    };
    let values = [0i32, 1, 2, 3, 100, 127];
    let big = |width: usize| -> Vec<u8> { values.iter().flat_map(|v| v.to_be_bytes()[4 - width..].to_vec()).collect() };
    let little = |width: usize| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()[..width].to_vec()).collect() };
    for (kind, width) in
        [("int8", 1), ("uchar", 1), ("short", 2), ("uint16_t", 2), ("signed int", 4), ("unsigned int", 4)]
    {
        for (endian, bytes) in [("endian: big\n", big(width)), ("endian: little\n", little(width))] {
            fs::write(&path, [header(kind, endian).as_bytes(), &bytes].concat()).unwrap();
            let found = read_nrrd(&path).unwrap();
            assert_eq!(found.layers, [Array3::from_shape_vec((1, 2, 3), values.to_vec()).unwrap()], "{kind} {endian}");
            assert_eq!(found.affine, [[2.0, 0.0, 0.0, 5.0], [0.0, 3.0, 0.0, 6.0], [0.0, 0.0, 4.0, 7.0]]);
            assert_eq!(found.pairs["a key"], "with\nlines \\ and := signs");
        }
    }
    // Damage to a gzip stream is seen, behind the last voxel too.
    let whole = fs::read(data("layers.seg.nrrd")).unwrap();
    for at in [whole.len() - 2, whole.len() - 6] {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        fs::write(&path, damaged).unwrap();
        assert!(matches!(read_nrrd(&path), Err(Error::File(FileError::Gzip { .. }))), "byte {at}");
    }
    // However a header is cut, nothing panics.
    for end in 0..400.min(whole.len()) {
        fs::write(&path, &whole[..end]).unwrap();
        assert!(read_nrrd(&path).is_err(), "{end} bytes");
    }
}
