//! Where a voxel grid lies in the world: a NIfTI header, which stored cases keep too. Another format's geometry becomes one.

use nifti::NiftiHeader;

use super::nifti_header::{millimetres, shear};

/// Spacing of a grid, and the header of the file it came from, so that results can be written onto the same grid.
#[derive(Debug, Clone, PartialEq)]
pub struct Geometry {
    /// Distance of voxel centres in millimetres along (z, y, x); positive.
    pub spacing: [f64; 3],
    header: NiftiHeader,
}

impl Geometry {
    /// A grid with axes along the world's, its first voxel at the origin.
    pub fn new(spacing: [f64; 3]) -> Self {
        let [z, y, x] = spacing.map(|s| s as f32);
        let header = NiftiHeader {
            pixdim: [1.0, x, y, z, 1.0, 1.0, 1.0, 1.0],
            qform_code: 0,
            sform_code: 1,
            srow_x: [x, 0.0, 0.0, 0.0],
            srow_y: [0.0, y, 0.0, 0.0],
            srow_z: [0.0, 0.0, z, 0.0],
            xyzt_units: 2, // millimetres
            endianness: nifti::Endianness::Little,
            ..NiftiHeader::default()
        };
        Geometry { spacing, header }
    }

    pub(super) fn from_header(spacing: [f64; 3], header: NiftiHeader) -> Self {
        Geometry { spacing, header }
    }

    pub(super) fn header(&self) -> &NiftiHeader {
        &self.header
    }

    /// The header's placing fields as 29 words, bit for bit (a header may hold NaN): the codes of qform and sform, units,
    /// pixdim, quaternion and offset, the three rows of the sform.
    pub(crate) fn to_words(&self) -> Vec<u32> {
        let h = &self.header;
        let quaternion = [h.quatern_b, h.quatern_c, h.quatern_d, h.quatern_x, h.quatern_y, h.quatern_z];
        let floats = [&h.pixdim[..], &quaternion, &h.srow_x, &h.srow_y, &h.srow_z].concat();
        let codes = [h.qform_code as u16, h.sform_code as u16, u16::from(h.xyzt_units)];
        codes.map(u32::from).into_iter().chain(floats.into_iter().map(f32::to_bits)).collect()
    }

    /// Inverse of [`to_words`](Self::to_words); `None` for another number of words.
    pub(crate) fn from_words(spacing: [f64; 3], words: &[u32]) -> Option<Self> {
        let words: &[u32; 29] = words.try_into().ok()?;
        let float = |at: usize| f32::from_bits(words[at]);
        let row = |at: usize| std::array::from_fn(|i| float(at + i));
        let mut geometry = Geometry::new(spacing);
        let h = &mut geometry.header;
        (h.qform_code, h.sform_code) = (words[0] as u16 as i16, words[1] as u16 as i16);
        h.xyzt_units = words[2] as u8;
        h.pixdim = std::array::from_fn(|i| float(3 + i));
        [h.quatern_b, h.quatern_c, h.quatern_d] = std::array::from_fn(|i| float(11 + i));
        [h.quatern_x, h.quatern_y, h.quatern_z] = std::array::from_fn(|i| float(14 + i));
        (h.srow_x, h.srow_y, h.srow_z) = (row(17), row(21), row(25));
        Some(geometry)
    }

    /// Rows of the affine map from voxel index (x, y, z, 1) to world millimetres, by the standard's order of
    /// preference: sform, qform, then the spacing alone. A sheared sform gives way to a qform.
    pub fn affine(&self) -> [[f64; 4]; 3] {
        let [z, y, x] = self.spacing;
        if self.uses_sform() {
            self.sform()
        } else if self.header.qform_code > 0 {
            self.qform()
        } else {
            [[x, 0.0, 0.0, 0.0], [0.0, y, 0.0, 0.0], [0.0, 0.0, z, 0.0]]
        }
    }

    fn uses_sform(&self) -> bool {
        let h = &self.header;
        h.sform_code > 0 && (h.qform_code <= 0 || shear(h).is_none())
    }

    fn sform(&self) -> [[f64; 4]; 3] {
        let h = &self.header;
        [h.srow_x, h.srow_y, h.srow_z].map(|row| row.map(|value| f64::from(value) * millimetres(h)))
    }

    fn qform(&self) -> [[f64; 4]; 3] {
        let (h, [z, y, x]) = (&self.header, self.spacing);
        // The fourth quaternion component is implied; rounding may push the others slightly beyond length one.
        let [b, c, d] = [h.quatern_b, h.quatern_c, h.quatern_d].map(f64::from);
        let a = (1.0 - (b * b + c * c + d * d)).max(0.0).sqrt();
        let z = if h.pixdim[0] < 0.0 { -z } else { z };
        let scale =
            |row: [f64; 3], offset: f32| [row[0] * x, row[1] * y, row[2] * z, f64::from(offset) * millimetres(h)];
        [
            scale([a * a + b * b - c * c - d * d, 2.0 * (b * c - a * d), 2.0 * (b * d + a * c)], h.quatern_x),
            scale([2.0 * (b * c + a * d), a * a + c * c - b * b - d * d, 2.0 * (c * d - a * b)], h.quatern_y),
            scale([2.0 * (b * d - a * c), 2.0 * (c * d + a * b), a * a + d * d - c * c - b * b], h.quatern_z),
        ]
    }

    /// Whether two grids of this shape (z, y, x) put every voxel at the same place, to a tenth of a voxel.
    ///
    /// An affine map is extreme at the corners, so the eight corners decide. Rounding noise in a header passes; a
    /// flipped or shifted axis does not.
    pub fn same_placement(&self, other: &Geometry, shape: [usize; 3]) -> bool {
        let smallest = self.spacing.iter().copied().fold(f64::INFINITY, f64::min);
        distance(self.affine(), other.affine(), shape) <= 0.1 * smallest
    }

    /// What is contradictory in the header of a grid of this shape (z, y, x), and which of the statements is used.
    pub fn contradictions(&self, shape: [usize; 3]) -> Vec<String> {
        let h = &self.header;
        if h.sform_code <= 0 {
            return Vec::new();
        }
        let mut found = Vec::new();
        if let Some((axes, angle)) = shear(h).filter(|_| h.qform_code > 0) {
            found.push(format!("the axes {axes} of the sform stand at {angle:.2} degrees; the qform is used"));
        }
        let rows = self.sform();
        let lengths = [2, 1, 0].map(|axis| rows.iter().map(|row| row[axis] * row[axis]).sum::<f64>().sqrt());
        // Along an axis of one voxel no distance exists.
        let differ = |axis: usize| {
            shape[axis] > 1 && (lengths[axis] - self.spacing[axis]).abs() > SPACING_TOLERANCE * self.spacing[axis]
        };
        if (0..3).any(differ) {
            found.push(format!(
                "the sform says spacing {} mm (z, y, x), pixdim says {}; pixdim is used",
                rounded(lengths),
                rounded(self.spacing)
            ));
        } else if h.qform_code > 0 && self.uses_sform() {
            let apart = distance(rows, self.qform(), shape);
            let smallest = self.spacing.iter().copied().fold(f64::INFINITY, f64::min);
            if apart > 0.1 * smallest {
                found.push(format!("sform and qform place voxels up to {apart:.2} mm apart; the sform is used"));
            }
        }
        found
    }
}

/// Relative difference of spacings that rounding does not explain.
pub(super) const SPACING_TOLERANCE: f64 = 1e-3;

fn rounded(spacing: [f64; 3]) -> String {
    format!("{:?}", spacing.map(|s| (s * 1e4).round() / 1e4))
}

/// Largest distance in millimetres between the places that two maps give to a voxel of a grid.
fn distance(ours: [[f64; 4]; 3], theirs: [[f64; 4]; 3], shape: [usize; 3]) -> f64 {
    (0..8)
        .map(|corner| {
            let far = |axis: usize| shape[axis].saturating_sub(1) as f64;
            let index = [
                if corner & 1 == 0 { 0.0 } else { far(2) },
                if corner & 2 == 0 { 0.0 } else { far(1) },
                if corner & 4 == 0 { 0.0 } else { far(0) },
                1.0,
            ];
            let apart = ours.iter().zip(&theirs).map(|(a, b)| {
                let along: f64 = (0..4).map(|i| (a[i] - b[i]) * index[i]).sum();
                along * along
            });
            apart.sum::<f64>().sqrt()
        })
        // A header may hold NaN: such a grid lies nowhere.
        .fold(0.0, |most, apart| if apart.is_nan() { f64::INFINITY } else { f64::max(most, apart) })
}
