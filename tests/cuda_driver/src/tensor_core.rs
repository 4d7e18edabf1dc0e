//! Matrix products of a warp, and how their operands get into registers.
//!
//! Where an element of a `wmma` fragment is, PTX leaves open: here element `e` of lane `l` is number `32 e + l` of the
//! matrix by rows, and where a fragment has more places than elements, they come again. Products are exact; they are
//! summed in f32 one after the other, which is the least that PTX promises.

use crate::arithmetic as numbers;
use crate::cube::{Cube, Stop};
use crate::opcode_memory::tile_registers;
use crate::program::{Fragment, Product, Slot, Space, Tile, Type};
use crate::report::Fault;
use crate::warp::{FULL, LANES, Warp};
use half::{bf16, f16};

impl Tile {
    /// Rows and columns.
    fn size(&self) -> (usize, usize) {
        let [m, n, k] = self.shape;
        match self.fragment {
            Fragment::A => (m, k),
            Fragment::B => (k, n),
            Fragment::Sum => (m, n),
        }
    }
}

/// Bits of an element as f32.
fn single(bits: u32, ty: Type) -> f32 {
    match ty {
        Type::F16 => f16::from_bits(bits as u16).to_f32(),
        Type::Bf16 => bf16::from_bits(bits as u16).to_f32(),
        _ => f32::from_bits(bits),
    }
}

fn bits(value: f32, ty: Type) -> u32 {
    match ty {
        Type::F16 => u32::from(numbers::to_f16(value).to_bits()),
        Type::Bf16 => u32::from(numbers::to_bf16(value).to_bits()),
        _ if value.is_nan() => numbers::NAN_F32,
        _ => value.to_bits(),
    }
}

/// Elements of lanes to registers and back: two of 16 bits share one.
fn element(registers: &[[u32; LANES]], lane: usize, e: usize, ty: Type) -> u32 {
    match ty {
        Type::F32 => registers[e][lane],
        _ => registers[e / 2][lane] >> (16 * (e % 2)) & 0xffff,
    }
}

fn set_element(registers: &mut [[u32; LANES]], lane: usize, e: usize, ty: Type, bits: u32) {
    match ty {
        Type::F32 => registers[e][lane] = bits,
        _ => {
            let shift = 16 * (e % 2);
            let register = &mut registers[e / 2][lane];
            *register = *register & !(0xffff << shift) | bits << shift;
        }
    }
}

/// Row and column of element `e` of a lane in `mma`'s fragments.
fn documented_place(fragment: Fragment, lane: usize, e: usize) -> (usize, usize) {
    let (group, in_group) = (lane / 4, lane % 4);
    match fragment {
        Fragment::A => (group + 8 * (e / 2 % 2), in_group * 2 + e % 2 + 8 * (e / 4)),
        Fragment::B => (in_group * 2 + e % 2 + 8 * (e / 2), group),
        Fragment::Sum => (group + 8 * (e / 2), in_group * 2 + e % 2),
    }
}

/// A whole matrix by rows, from a fragment.
fn gather(
    registers: &[[u32; LANES]],
    fragment: Fragment,
    size: (usize, usize),
    ty: Type,
    documented: bool,
) -> Vec<f32> {
    let (rows, columns) = size;
    let mut matrix = vec![0.0; rows * columns];
    for e in 0..rows * columns / LANES {
        for lane in 0..LANES {
            let at = match documented {
                true => {
                    let (row, column) = documented_place(fragment, lane, e);
                    row * columns + column
                }
                false => e * LANES + lane,
            };
            matrix[at] = single(element(registers, lane, e, ty), ty);
        }
    }
    matrix
}

impl Cube<'_> {
    fn registers(warp: &Warp, slots: &[Slot]) -> Vec<[u32; LANES]> {
        slots.iter().map(|slot| warp.get(*slot)).collect()
    }

    /// Base address and stride in bytes, the same in all lanes, and as aligned as a lane's part is large.
    fn tile_address(
        &self,
        warp: &Warp,
        base: Slot,
        stride: Slot,
        offset: i64,
        tile: Tile,
    ) -> Result<(u64, usize), Stop> {
        let (bases, strides) = (Self::addresses(warp, base, offset), warp.get::<u32>(stride));
        let (base, stride) = (bases[0], strides[0]);
        if let Some(lane) = (1..LANES).find(|lane| bases[*lane] != base || strides[*lane] != stride) {
            let detail = "its lanes give different addresses or strides".to_string();
            return Err(self.fatal(Fault::MissingLanes, warp.number, lane, Some(bases[lane]), detail));
        }
        let step = stride as usize * tile.ty.bytes();
        let part = 4 * tile_registers(tile.shape, tile.fragment, tile.ty);
        if base % part as u64 != 0 || step % part.min(16) != 0 {
            let detail = format!(
                "a tile needs an address that {part} divides, and a stride that {} divides: it is {step} bytes",
                part.min(16)
            );
            return Err(self.fatal(Fault::Misaligned, warp.number, 0, Some(base), detail));
        }
        Ok((base, step))
    }

    /// The shared memory's part of an access of rows of bytes: eight pieces of 16 bytes at a time.
    fn count_rows(&mut self, rows: &[u64], bytes: usize) {
        for column in (0..bytes).step_by(16) {
            for eight in rows.chunks(8) {
                let words = |row: &u64| (*row as usize + column) / 4..(*row as usize + (column + 16).min(bytes)) / 4;
                self.count_wavefronts(eight.iter().flat_map(words), 4);
            }
        }
    }

    /// `wmma.load`
    pub fn load_tile(
        &mut self,
        warp: &mut Warp,
        tile: Tile,
        space: Space,
        offset: i64,
        o: &[Slot],
    ) -> Result<(), Stop> {
        let (slots, rest) = o.split_at(o.len() - 2);
        let (base, step) = self.tile_address(warp, rest[0], rest[1], offset, tile)?;
        let (rows, columns) = tile.size();
        let (lines, length) = if tile.row_major { (rows, columns) } else { (columns, rows) };
        let width = tile.ty.bytes();
        let mut matrix = vec![0; rows * columns];
        let starts: Vec<u64> = (0..lines).map(|line| base + (line * step) as u64).collect();
        for (line, start) in starts.iter().enumerate() {
            let p = self.read_range(warp, line % LANES, space, *start, length * width)?;
            for i in 0..length {
                // SAFETY: `read_range` checked that there are so many bytes.
                let value = unsafe {
                    match width {
                        2 => u32::from(p.add(2 * i).cast::<u16>().read_unaligned()),
                        _ => p.add(4 * i).cast::<u32>().read_unaligned(),
                    }
                };
                let at = if tile.row_major { line * columns + i } else { i * columns + line };
                matrix[at] = value;
            }
        }
        if Self::is_shared(space, base) {
            self.count_rows(&starts, length * width);
        }
        let mut registers = vec![[0; LANES]; slots.len()];
        let elements = slots.len() * 4 / width;
        for e in 0..elements {
            for lane in 0..LANES {
                set_element(&mut registers, lane, e, tile.ty, matrix[(e * LANES + lane) % matrix.len()]);
            }
        }
        for (slot, register) in slots.iter().zip(&registers) {
            warp.put(*slot, register, FULL);
        }
        Ok(())
    }

    /// `wmma.store`
    pub fn store_tile(
        &mut self,
        warp: &mut Warp,
        tile: Tile,
        space: Space,
        offset: i64,
        o: &[Slot],
    ) -> Result<(), Stop> {
        let (base, step) = self.tile_address(warp, o[0], o[1], offset, tile)?;
        let registers = Self::registers(warp, &o[2..]);
        let (rows, columns) = tile.size();
        let (lines, length) = if tile.row_major { (rows, columns) } else { (columns, rows) };
        let width = tile.ty.bytes();
        let starts: Vec<u64> = (0..lines).map(|line| base + (line * step) as u64).collect();
        for (line, start) in starts.iter().enumerate() {
            let mut data = Vec::with_capacity(length * width);
            for i in 0..length {
                let at = if tile.row_major { line * columns + i } else { i * columns + line };
                let value = element(&registers, at % LANES, at / LANES, tile.ty);
                data.extend_from_slice(&value.to_le_bytes()[..width]);
            }
            self.write_range(warp, line % LANES, space, *start, &data)?;
        }
        if Self::is_shared(space, base) {
            self.count_rows(&starts, length * width);
        }
        Ok(())
    }

    /// `wmma.mma`, `mma`
    pub fn multiply(&mut self, warp: &mut Warp, product: Product, o: &[Slot]) {
        let Product { shape: [m, n, k], ty, c: c_type, d: d_type, documented } = product;
        let sums = |ty| if ty == Type::F32 { m * n / LANES } else { m * n / LANES / 2 };
        let (results, sources) = o.split_at(sums(d_type));
        let (factors, c) = sources.split_at(sources.len() - sums(c_type));
        let a_registers = match (documented, ty) {
            (false, Type::F16) => factors.len() / 2,
            _ => m * k / LANES / 2,
        };
        let (a, b) = factors.split_at(a_registers);
        let of =
            |slots: &[Slot], fragment, size, ty| gather(&Self::registers(warp, slots), fragment, size, ty, documented);
        let (a, b) = (of(a, Fragment::A, (m, k), ty), of(b, Fragment::B, (k, n), ty));
        let mut d = of(c, Fragment::Sum, (m, n), c_type);
        for row in 0..m {
            for inner in 0..k {
                let factor = a[row * k + inner];
                for (sum, other) in d[row * n..][..n].iter_mut().zip(&b[inner * n..][..n]) {
                    *sum = factor.mul_add(*other, *sum);
                }
            }
        }
        let mut registers = vec![[0; LANES]; results.len()];
        for e in 0..m * n / LANES {
            for lane in 0..LANES {
                let at = match documented {
                    true => {
                        let (row, column) = documented_place(Fragment::Sum, lane, e);
                        row * n + column
                    }
                    false => e * LANES + lane,
                };
                set_element(&mut registers, lane, e, d_type, bits(d[at], d_type));
            }
        }
        for (slot, register) in results.iter().zip(&registers) {
            warp.put(*slot, register, FULL);
        }
        self.counters.tensor_multiply_adds += (m * n * k) as u64;
    }

    /// `ldmatrix`: lane `8 i + r` has the address of row `r` of matrix `i`.
    pub fn load_matrices(
        &mut self,
        warp: &mut Warp,
        count: usize,
        transpose: bool,
        space: Space,
        offset: i64,
        o: &[Slot],
    ) -> Result<(), Stop> {
        let (slots, base) = o.split_at(count);
        let addresses = Self::addresses(warp, base[0], offset);
        for (i, slot) in slots.iter().enumerate() {
            let mut matrix = [[0u16; 8]; 8];
            for (row, values) in matrix.iter_mut().enumerate() {
                let lane = 8 * i + row;
                self.check_row(warp, lane, addresses[lane])?;
                let p = self.read_range(warp, lane, space, addresses[lane], 16)?;
                for (column, value) in values.iter_mut().enumerate() {
                    // SAFETY: `read_range` checked that there are 16 bytes.
                    *value = unsafe { p.add(2 * column).cast::<u16>().read_unaligned() };
                }
            }
            self.count_rows(&addresses[8 * i..8 * i + 8], 16);
            let at = |row: usize, column: usize| {
                u32::from(if transpose { matrix[column][row] } else { matrix[row][column] })
            };
            let pair = |lane: usize| at(lane / 4, lane % 4 * 2) | at(lane / 4, lane % 4 * 2 + 1) << 16;
            warp.put(*slot, &std::array::from_fn(pair), FULL);
        }
        Ok(())
    }

    /// `stmatrix`
    pub fn store_matrices(
        &mut self,
        warp: &mut Warp,
        count: usize,
        transpose: bool,
        space: Space,
        offset: i64,
        o: &[Slot],
    ) -> Result<(), Stop> {
        let addresses = Self::addresses(warp, o[0], offset);
        for i in 0..count {
            let pairs = warp.get::<u32>(o[1 + i]);
            let mut matrix = [[0u16; 8]; 8];
            for (lane, pair) in pairs.iter().enumerate() {
                for half in 0..2 {
                    let (row, column) = (lane / 4, lane % 4 * 2 + half);
                    let value = (pair >> (16 * half)) as u16;
                    if transpose {
                        matrix[column][row] = value;
                    } else {
                        matrix[row][column] = value;
                    }
                }
            }
            for (row, values) in matrix.iter().enumerate() {
                let lane = 8 * i + row;
                self.check_row(warp, lane, addresses[lane])?;
                let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                self.write_range(warp, lane, space, addresses[lane], &data)?;
            }
            self.count_rows(&addresses[8 * i..8 * i + 8], 16);
        }
        Ok(())
    }

    fn check_row(&self, warp: &Warp, lane: usize, address: u64) -> Result<(), Stop> {
        if address % 16 == 0 {
            return Ok(());
        }
        let detail = "a row of 16 bytes needs an address that they divide".to_string();
        Err(self.fatal(Fault::Misaligned, warp.number, lane, Some(address), detail))
    }
}
