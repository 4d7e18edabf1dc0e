//! The parts of numpy's legacy random generator that nnU-Net's files depend on, bit for bit.
//!
//! Splits, class locations, intensity samples and the sparse integration dataset are all drawn from MT19937 with a fixed
//! seed; reproducing the draws makes them comparable case by case with upstream. Everything that nnU-Net leaves unseeded
//! uses ChaCha8 elsewhere in this crate.

const WORDS: usize = 624;
const SHIFT: usize = 397;

/// `numpy.random.RandomState(seed)`.
#[derive(Clone)]
pub struct NumpyRandom {
    state: Box<[u32; WORDS]>,
    next: usize,
}

impl NumpyRandom {
    /// Seeds the generator as `RandomState(seed)` does for an integer.
    pub fn new(seed: u32) -> Self {
        let mut state = Box::new([0; WORDS]);
        let mut word = seed;
        for (position, slot) in state.iter_mut().enumerate() {
            *slot = word;
            word = 1_812_433_253_u32.wrapping_mul(word ^ (word >> 30)).wrapping_add(position as u32 + 1);
        }
        NumpyRandom { state, next: WORDS }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.next == WORDS {
            self.regenerate();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn regenerate(&mut self) {
        let twisted = |high: u32, low: u32, far: u32| {
            let y = (high & 0x8000_0000) | (low & 0x7fff_ffff);
            far ^ (y >> 1) ^ ((y & 1) * 0x9908_b0df)
        };
        let s = &mut self.state;
        for i in 0..WORDS - SHIFT {
            s[i] = twisted(s[i], s[i + 1], s[i + SHIFT]);
        }
        for i in WORDS - SHIFT..WORDS - 1 {
            s[i] = twisted(s[i], s[i + 1], s[i + SHIFT - WORDS]);
        }
        s[WORDS - 1] = twisted(s[WORDS - 1], s[0], s[SHIFT - 1]);
        self.next = 0;
    }

    /// A uniform integer in `0..=max`, by masked rejection as the legacy functions do.
    pub fn up_to(&mut self, max: u32) -> u32 {
        let mask = u32::MAX.checked_shr(max.leading_zeros()).unwrap_or(0);
        if mask == 0 {
            return 0; // numpy draws nothing for an empty interval
        }
        loop {
            let value = self.next_u32() & mask;
            if value <= max {
                return value;
            }
        }
    }

    /// Shuffles in place, from the back (`RandomState.shuffle`).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.up_to(last as u32) as usize;
            items.swap(last, other);
        }
    }

    /// A random order of `0..n` (`RandomState.permutation`).
    pub fn permutation(&mut self, n: u32) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n).collect();
        self.shuffle(&mut order);
        order
    }

    /// `k` different integers of `0..n` (`RandomState.choice(n, k, replace=False)`): the head of a permutation.
    pub fn choice(&mut self, n: u32, k: usize) -> Vec<u32> {
        let mut order = self.permutation(n);
        order.truncate(k);
        order
    }
}
