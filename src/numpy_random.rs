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
    /// The state's words as they are handed out.
    output: Box<[u32; WORDS]>,
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
        NumpyRandom { state, output: Box::new([0; WORDS]), next: WORDS }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.next == WORDS {
            self.regenerate();
        }
        self.next += 1;
        self.output[self.next - 1]
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
        for (word, &state) in self.output.iter_mut().zip(s.iter()) {
            let mut y = state;
            y ^= y >> 11;
            y ^= (y << 7) & 0x9d2c_5680;
            y ^= (y << 15) & 0xefc6_0000;
            *word = y ^ (y >> 18);
        }
        self.next = 0;
    }

    /// A uniform integer in `0..=max`, by masked rejection as the legacy functions do.
    pub fn up_to(&mut self, max: u32) -> u32 {
        let mask = mask(max);
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

    /// Draws as many integers as [`up_to`](Self::up_to) would, one for each index of `counts`, and counts them.
    ///
    /// A hundred million draws are normal here, and half of the words may be rejected at random: no branch depends on it.
    pub fn tally(&mut self, mut draws: usize, counts: &mut [u32]) {
        let Some(max) = counts.len().checked_sub(1) else {
            return;
        };
        let mask = mask(max as u32);
        if mask == 0 {
            counts[0] += draws as u32;
            return;
        }
        while draws > 0 {
            if self.next == WORDS {
                self.regenerate();
            }
            // A word gives one draw at most, so these are not too many.
            let end = WORDS.min(self.next + draws);
            for &word in &self.output[self.next..end] {
                let value = (word & mask) as usize;
                let accepted = usize::from(value <= max);
                counts[value.min(max)] += accepted as u32;
                draws -= accepted;
            }
            self.next = end;
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

/// The smallest run of ones that covers `max`.
fn mask(max: u32) -> u32 {
    u32::MAX.checked_shr(max.leading_zeros()).unwrap_or(0)
}
