//! Pieces of the surface between voxels, and their areas: those of the triangles that marching cubes (Lorensen and Cline,
//! 1987) lay through a cube of eight voxels. There are 13 kinds of such cubes, told apart by how the voxels of one side
//! touch each other; the area is the same whichever side is the object.

use ndarray::Array3;

/// Areas of the surface at every corner of the voxels in the part that surrounds a mask: one more along each axis than the
/// part has voxels. 0 where the surface does not pass, and beside ignored voxels.
pub(super) fn areas(
    mask: &Array3<bool>,
    is_ignored: &impl Fn([usize; 3]) -> bool,
    surrounding: [[usize; 2]; 3],
    spacing: [f64; 3],
) -> Array3<f64> {
    let table = Table::new(spacing);
    let shape: [usize; 3] = mask.dim().into();
    let [depth, height, width] = surrounding.map(|[start, end]| end - start + 1);
    Array3::from_shape_fn((depth, height, width), |(z, y, x)| {
        let corner = [z, y, x];
        let mut code = 0;
        for place in 0..8 {
            // The voxels before and after the corner along each axis; beyond the image nothing is inside.
            let voxel: [Option<usize>; 3] = std::array::from_fn(|axis| {
                let at = surrounding[axis][0] + corner[axis] + ((place >> axis) & 1);
                at.checked_sub(1).filter(|at| *at < shape[axis])
            });
            if let [Some(z), Some(y), Some(x)] = voxel {
                if is_ignored([z, y, x]) {
                    return 0.0;
                }
                code |= usize::from(mask[[z, y, x]]) << place;
            }
        }
        table.areas[code]
    })
}

/// The first distance up to which lies a share of the area, of pieces (distance, area) sorted by distance; at least one.
pub(super) fn percentile_by_area(sorted: &[(f64, f64)], share: f64) -> f64 {
    let all: f64 = sorted.iter().map(|(_, area)| area).sum();
    let mut sum = 0.0;
    let reached = sorted.iter().find(|(_, area)| {
        sum += area;
        sum / all >= share
    });
    reached.or(sorted.last()).map_or(f64::NAN, |(distance, _)| *distance)
}

/// Areas in square millimetres by which of the eight voxels are inside: bit `4 x + 2 y + z`.
struct Table {
    areas: [f64; 256],
}

impl Table {
    fn new(spacing: [f64; 3]) -> Self {
        Table { areas: std::array::from_fn(|code| area(code as u8, spacing)) }
    }
}

/// The area of the surface through a cube whose corners are the centres of eight voxels. Triangles have their corners in
/// the middle of the cube's edges; they are named by the components of their normals in eighths of the cube's faces.
fn area(code: u8, [z, y, x]: [f64; 3]) -> f64 {
    // The smaller side, of four voxels that with bit 0.
    let inside = match code.count_ones() {
        0..=3 => code,
        4 if code & 1 == 1 => code,
        _ => !code,
    };
    let faces = [y * x / 8.0, z * x / 8.0, z * y / 8.0];
    let norm = |components: [f64; 3]| (0..3).map(|axis| (components[axis] * faces[axis]).powi(2)).sum::<f64>().sqrt();
    // A triangle that cuts off one corner; one along an edge, of which two cut off two corners; half a face.
    let corner = norm([1.0; 3]);
    let along = |axis: usize| norm(std::array::from_fn(|other| if other == axis { 0.0 } else { 2.0 }));
    let across = |axis: usize| 4.0 * faces[axis];

    let members: Vec<u8> = (0..8).filter(|place| (inside >> place) & 1 == 1).collect();
    let neighbours =
        |place: u8| (0..3).filter(|axis| (inside >> (place ^ (1 << axis))) & 1 == 1).collect::<Vec<usize>>();
    // Edges of the cube with both ends inside, along each axis.
    let edges: [usize; 3] =
        std::array::from_fn(|axis| members.iter().filter(|place| neighbours(**place).contains(&axis)).count() / 2);
    let axis_with = |count: usize| edges.iter().position(|&edges| edges == count).unwrap_or(0);
    match (members.len(), edges.iter().sum::<usize>()) {
        (0, _) => 0.0,
        // Corners that touch nobody.
        (count, 0) => count as f64 * corner,
        (2, 1) => 2.0 * along(axis_with(1)),
        (3, 1) => 2.0 * along(axis_with(1)) + corner,
        // Three in one face, with the fourth opposite or without.
        (3, 2) => across(axis_with(0)) + 3.0 * corner,
        (4, 2) if edges.contains(&2) => 4.0 * along(axis_with(2)),
        (4, 2) => across(axis_with(0)) + 4.0 * corner,
        // One with its three neighbours.
        (4, 3) if members.iter().any(|place| neighbours(*place).len() == 3) => 6.0 * corner,
        // A chain, which turns twice: its first and its last edge.
        (4, 3) => {
            let ends = members.iter().map(|place| neighbours(*place)).filter(|axes| axes.len() == 1);
            ends.map(|axes| along(axes[0])).sum::<f64>() + 4.0 * corner
        }
        // A whole face.
        _ => 2.0 * across(axis_with(0)),
    }
}
