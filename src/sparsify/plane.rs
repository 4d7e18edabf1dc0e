//! Planes of a label map: connected components, their masks, and the shapes that scribbles are made of.

use std::ops::Range;

use ndarray::{Array2, ArrayView2};

/// Connected parts of one label in a plane.
#[derive(Debug, Clone)]
pub(super) struct Component {
    pub label: i16,
    /// Pixels.
    pub area: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    id: u32,
}

/// All components of a plane, in the order of their first pixels.
pub(super) struct Components {
    ids: Array2<u32>,
    pub list: Vec<Component>,
}

impl Components {
    /// Finds the components of every label; pixels that touch at a corner are connected (skimage's full connectivity).
    pub(super) fn find(plane: ArrayView2<i16>) -> Self {
        let (rows, columns) = plane.dim();
        let mut ids = Array2::from_elem((rows, columns), 0_u32);
        // Union-find: a set's root is its smallest provisional id.
        let mut parent: Vec<u32> = Vec::new();
        for y in 0..rows {
            for x in 0..columns {
                let label = plane[[y, x]];
                let same = |up: usize, column: usize| column < columns && plane[[y - up, column]] == label;
                // Neighbours that touch each other have been joined: of those above and to the left, two at most are apart.
                let left = x > 0 && same(0, x - 1);
                let (above, above_left, above_right) = match y {
                    0 => (false, false, false),
                    _ => (same(1, x), x > 0 && same(1, x - 1), same(1, x + 1)),
                };
                ids[[y, x]] = match (above, above_right, left, above_left) {
                    (true, ..) => ids[[y - 1, x]],
                    (_, true, true, _) => join(&mut parent, ids[[y - 1, x + 1]], ids[[y, x - 1]]),
                    (_, true, _, true) => join(&mut parent, ids[[y - 1, x + 1]], ids[[y - 1, x - 1]]),
                    (_, true, ..) => ids[[y - 1, x + 1]],
                    (_, _, true, _) => ids[[y, x - 1]],
                    (_, _, _, true) => ids[[y - 1, x - 1]],
                    _ => {
                        parent.push(parent.len() as u32);
                        parent.len() as u32 - 1
                    }
                };
            }
        }
        let mut number: Vec<Option<u32>> = vec![None; parent.len()];
        let mut list: Vec<Component> = Vec::new();
        for ((y, x), id) in ids.indexed_iter_mut() {
            let set = root(&mut parent, *id) as usize;
            *id = *number[set].get_or_insert_with(|| {
                let id = list.len() as u32;
                list.push(Component { label: plane[[y, x]], area: 0, rows: y..y + 1, columns: x..x + 1, id });
                id
            });
            let component = &mut list[*id as usize];
            component.area += 1;
            component.rows = component.rows.start..y + 1;
            component.columns = component.columns.start.min(x)..component.columns.end.max(x + 1);
        }
        Components { ids, list }
    }

    /// The pixels of a component.
    pub(super) fn mask(&self, component: &Component) -> Mask {
        let (height, width) = self.ids.dim();
        // One pixel around the component, where the plane has one: what is not a component's pixel is then nearest there.
        let rows = component.rows.start.saturating_sub(1)..(component.rows.end + 1).min(height);
        let columns = component.columns.start.saturating_sub(1)..(component.columns.end + 1).min(width);
        let inside = self.ids.slice(ndarray::s![rows.clone(), columns.clone()]).mapv(|id| id == component.id);
        Mask { origin: [rows.start, columns.start], inside }
    }
}

/// Makes one set of two; returns its root.
fn join(parent: &mut [u32], one: u32, other: u32) -> u32 {
    let (one, other) = (root(parent, one), root(parent, other));
    parent[one.max(other) as usize] = one.min(other);
    one.min(other)
}

fn root(parent: &mut [u32], mut id: u32) -> u32 {
    while parent[id as usize] != id {
        parent[id as usize] = parent[parent[id as usize] as usize];
        id = parent[id as usize];
    }
    id
}

/// Part of a plane.
#[derive(Debug, Clone)]
pub(super) struct Mask {
    /// Row and column of the first pixel in the plane.
    pub origin: [usize; 2],
    pub inside: Array2<bool>,
}

impl Mask {
    /// Nothing, on the same part of the plane.
    pub(super) fn empty(&self) -> Self {
        Mask { origin: self.origin, inside: Array2::from_elem(self.inside.dim(), false) }
    }

    /// Rows and columns of the pixels inside, relative to the origin.
    pub(super) fn pixels(&self) -> Vec<[usize; 2]> {
        self.inside.indexed_iter().filter(|(_, inside)| **inside).map(|((y, x), _)| [y, x]).collect()
    }

    /// What is left of a component when everything within `radius` of a pixel that does not belong to it is taken away:
    /// erosion with a disk. The edge of the plane takes nothing away.
    pub(super) fn eroded(&self, radius: usize) -> Self {
        let (rows, columns) = self.inside.dim();
        let far = radius + 1;
        // Distance to the nearest pixel outside in the same column, up to `far`.
        let mut distance = Array2::from_elem((rows, columns), far);
        for x in 0..columns {
            let mut above = far;
            for y in 0..rows {
                above = if self.inside[[y, x]] { (above + 1).min(far) } else { 0 };
                distance[[y, x]] = above;
            }
            let mut below = far;
            for y in (0..rows).rev() {
                below = if self.inside[[y, x]] { (below + 1).min(far) } else { 0 };
                distance[[y, x]] = distance[[y, x]].min(below);
            }
        }
        let inside = Array2::from_shape_fn((rows, columns), |(y, x)| {
            self.inside[[y, x]]
                && (x.saturating_sub(radius)..(x + radius + 1).min(columns)).all(|other| {
                    let (dy, dx) = (distance[[y, other]], x.abs_diff(other));
                    dy * dy + dx * dx > radius * radius
                })
        });
        Mask { origin: self.origin, inside }
    }

    /// Paints a disk around a pixel onto `self`, as far as `within` goes.
    pub(super) fn paint(&mut self, [y, x]: [usize; 2], radius: usize, within: &Mask) {
        let (rows, columns) = self.inside.dim();
        for row in y.saturating_sub(radius)..(y + radius + 1).min(rows) {
            for column in x.saturating_sub(radius)..(x + radius + 1).min(columns) {
                let (dy, dx) = (row.abs_diff(y), column.abs_diff(x));
                if dy * dy + dx * dx <= radius * radius && within.inside[[row, column]] {
                    self.inside[[row, column]] = true;
                }
            }
        }
    }

    /// Number of connected pieces.
    pub(super) fn pieces(&self) -> u64 {
        let (rows, columns) = self.inside.dim();
        let mut rest = self.inside.clone();
        let mut pieces = 0;
        for start in self.pixels() {
            if !rest[start] {
                continue;
            }
            pieces += 1;
            rest[start] = false;
            let mut open = vec![start];
            while let Some([y, x]) = open.pop() {
                for row in y.saturating_sub(1)..(y + 2).min(rows) {
                    for column in x.saturating_sub(1)..(x + 2).min(columns) {
                        if std::mem::take(&mut rest[[row, column]]) {
                            open.push([row, column]);
                        }
                    }
                }
            }
        }
        pieces
    }

    /// The outlines: the midpoints between neighbouring pixels inside and outside, joined (marching squares). Where two
    /// pixels inside touch at a corner only, they are apart.
    pub(super) fn outlines(&self) -> Vec<Outline> {
        let (rows, columns) = self.inside.dim();
        let mut links = Links { columns, of: vec![[NONE; 2]; 2 * rows * columns] };
        for y in 0..rows.saturating_sub(1) {
            for x in 0..columns.saturating_sub(1) {
                let [a, b] = [self.inside[[y, x]], self.inside[[y, x + 1]]];
                let [d, c] = [self.inside[[y + 1, x]], self.inside[[y + 1, x + 1]]];
                let (top, bottom) = (links.beside(y, x), links.beside(y + 1, x));
                let (left, right) = (links.below(y, x), links.below(y, x + 1));
                let crossed = [(top, a != b), (right, b != c), (bottom, c != d), (left, d != a)];
                let crossed: Vec<u32> = crossed.into_iter().filter(|(_, yes)| *yes).map(|(edge, _)| edge).collect();
                match crossed[..] {
                    [one, other] => links.join(one, other),
                    [..] if crossed.len() == 4 && a => {
                        links.join(top, left);
                        links.join(right, bottom);
                    }
                    [..] if crossed.len() == 4 => {
                        links.join(top, right);
                        links.join(left, bottom);
                    }
                    _ => {}
                }
            }
        }
        links.trace(&self.inside)
    }
}

const NONE: u32 = u32::MAX;

/// An outline, open where the plane ends.
pub(super) struct Outline {
    pub closed: bool,
    /// Points in order, one for every pair of neighbouring pixels inside and outside.
    pub points: Vec<OutlinePoint>,
}

/// A point halfway between a pixel inside and one outside.
#[derive(Debug, Clone, Copy)]
pub(super) struct OutlinePoint {
    /// Row and column.
    pub at: [f64; 2],
    /// The pixel inside.
    pub pixel: [usize; 2],
}

/// For every edge between neighbouring pixels the two edges that follow it on an outline.
struct Links {
    columns: usize,
    of: Vec<[u32; 2]>,
}

impl Links {
    /// The edge between a pixel and the next one in its row.
    fn beside(&self, y: usize, x: usize) -> u32 {
        2 * (y * self.columns + x) as u32
    }

    /// The edge between a pixel and the next one in its column.
    fn below(&self, y: usize, x: usize) -> u32 {
        2 * (y * self.columns + x) as u32 + 1
    }

    fn join(&mut self, one: u32, other: u32) {
        for (from, to) in [(one, other), (other, one)] {
            let slots = &mut self.of[from as usize];
            let free = usize::from(slots[0] != NONE);
            slots[free] = to;
        }
    }

    fn trace(mut self, inside: &Array2<bool>) -> Vec<Outline> {
        let edges = self.of.len() as u32;
        let ends: Vec<u32> =
            (0..edges).filter(|&e| self.of[e as usize][0] != NONE && self.of[e as usize][1] == NONE).collect();
        let mut outlines = Vec::new();
        for (closed, starts) in [(false, ends), (true, (0..edges).collect())] {
            for start in starts {
                let mut points = Vec::new();
                let mut edge = start;
                // A link is taken out on both sides as it is followed, so that every edge is visited once.
                loop {
                    let next = self.of[edge as usize].into_iter().find(|&next| next != NONE);
                    let Some(next) = next else { break };
                    points.push(self.point(edge, inside));
                    self.part(edge, next);
                    edge = next;
                }
                if !closed && !points.is_empty() {
                    points.push(self.point(edge, inside));
                }
                if !points.is_empty() {
                    outlines.push(Outline { closed, points });
                }
            }
        }
        outlines
    }

    fn part(&mut self, one: u32, other: u32) {
        for (from, to) in [(one, other), (other, one)] {
            if let Some(slot) = self.of[from as usize].iter_mut().find(|slot| **slot == to) {
                *slot = NONE;
            }
        }
    }

    fn point(&self, edge: u32, inside: &Array2<bool>) -> OutlinePoint {
        let (pixel, vertical) = ((edge / 2) as usize, edge % 2 == 1);
        let (y, x) = (pixel / self.columns, pixel % self.columns);
        let other = if vertical { [y + 1, x] } else { [y, x + 1] };
        let pixel = if inside[[y, x]] { [y, x] } else { other };
        OutlinePoint { at: [(y + other[0]) as f64 / 2.0, (x + other[1]) as f64 / 2.0], pixel }
    }
}
