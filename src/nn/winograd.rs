//! 3×3 convolutions by Winograd's minimal filtering F(2×2, 3×3) (Lavin and Gray 2015, arXiv
//! 1509.09308, sec. 4.1): 16 products of a quarter of the rows instead of one with a nine-fold
//! inner size, so 4/9 of the multiplications. Its transforms add, subtract and halve, and
//! cost next to no accuracy; larger tiles would.

use std::ops::Range;

use super::gemm::{
    Columns, Finish, KC, LEFT_STRIDE, Left, MR, NR, Plain, Tile, inner_block, product, with_scratch,
};
use super::kernel::{Real, uninitialised};
use super::simd::{Level, vectorised};
use super::threads;
use super::window::Window;

/// Values of a transformed tile.
const F: usize = 16;
/// Tiles that one task takes at once.
const TILES: usize = 4 * MR;
/// Tiles whose weight gradients are summed by one product.
const GRADIENT_TILES: usize = KC;
/// Values of [`MR`] rows of a left operand.
const BLOCK: usize = MR * LEFT_STRIDE;
/// Channels in and out, and tiles of an image, from which the transforms are worth it.
const LEAST_CHANNELS: usize = 32;
const LEAST_TILES: usize = 4;

/// Whether a convolution to `outer` channels is one of these. It depends on a single image,
/// never on the batch.
pub fn applies(window: &Window, outer: usize) -> bool {
    window.kernel == (3, 3)
        && window.stride == 1
        && window.padding == 1
        && window.out == window.enlarged
        && window.out.0.div_ceil(2) * window.out.1.div_ceil(2) >= LEAST_TILES
        && window.channels.min(outer) >= LEAST_CHANNELS
}

/// Transformed weights [channels, outer] of every value of a tile, in panels.
#[derive(Clone, Debug)]
pub struct Filters<T> {
    data: Vec<T>,
    inner: usize,
}

impl<T: Real> Filters<T> {
    /// `load(panel, inner, to)` writes the taps of some inner indices of one panel of columns,
    /// [inner, 9, NR]; `flipped` takes the taps backwards.
    pub fn new(
        inner: usize,
        columns: usize,
        flipped: bool,
        load: impl Fn(usize, Range<usize>, &mut [T]) + Sync + Send,
    ) -> Self {
        const ROWS: usize = 64;
        let level = Level::current();
        let mut data = uninitialised(columns.div_ceil(NR) * F * inner * NR);
        threads::chunks(&mut data, F * inner * NR, true, |panel, to| {
            with_scratch::<T, _>(ROWS * 9 * NR, |taps| {
                for start in (0..inner).step_by(ROWS) {
                    let range = start..(start + ROWS).min(inner);
                    let taps = &mut taps[..range.len() * 9 * NR];
                    load(panel, range, taps);
                    transform_filters(level, taps, flipped, inner * NR, &mut to[start * NR..]);
                }
            });
        });
        Self { data, inner }
    }

    /// Bytes of filters of this size.
    pub fn bytes(inner: usize, columns: usize) -> usize {
        columns.next_multiple_of(NR) * F * inner * size_of::<T>()
    }

    fn rows(&self, value: usize, panel: usize, inner: &Range<usize>) -> *const T {
        let from = ((panel * F + value) * self.inner + inner.start) * NR;
        self.data[from..from + inner.len() * NR].as_ptr()
    }
}

/// Runs the body for the channels of a range, 16 at a time and then one.
macro_rules! over_channels {
    ($range:expr, $channel:ident, $lanes:ident => $body:block) => {{
        let range = $range;
        let mut $channel = range.start;
        while $channel + 16 <= range.end {
            const $lanes: usize = 16;
            $body
            $channel += 16;
        }
        while $channel < range.end {
            const $lanes: usize = 1;
            $body
            $channel += 1;
        }
    }};
}

vectorised! {
    /// G · tap · Gᵀ of `taps` [rows, 9, NR]: value v of row r to `to[v · stride + r · NR ..]`.
    fn transform_filters<T: Real>(taps: &[T], flipped: bool, stride: usize, to: &mut [T]) {
        let half = T::from_f64(0.5);
        for (r, taps) in taps.chunks_exact(9 * NR).enumerate() {
            for at in (0..NR).step_by(16) {
                let mut rows = [[[T::ZERO; 16]; 3]; 4];
                #[allow(clippy::needless_range_loop)]
                for j in 0..3 {
                    let tap = |i: usize| if flipped { 8 - (3 * i + j) } else { 3 * i + j };
                    let a = &taps[tap(0) * NR + at..][..16];
                    let b = &taps[tap(1) * NR + at..][..16];
                    let c = &taps[tap(2) * NR + at..][..16];
                    for l in 0..16 {
                        rows[0][j][l] = a[l];
                        rows[1][j][l] = (a[l] + c[l]) * half + b[l] * half;
                        rows[2][j][l] = (a[l] + c[l]) * half - b[l] * half;
                        rows[3][j][l] = c[l];
                    }
                }
                for (i, [a, b, c]) in rows.iter().enumerate() {
                    let first = 4 * i * stride + r * NR + at;
                    to[first..first + 16].copy_from_slice(a);
                    for l in 0..16 {
                        to[first + stride + l] = (a[l] + c[l]) * half + b[l] * half;
                    }
                    for l in 0..16 {
                        to[first + 2 * stride + l] = (a[l] + c[l]) * half - b[l] * half;
                    }
                    to[first + 3 * stride..][..16].copy_from_slice(c);
                }
            }
        }
    }
}

vectorised! {
    /// `to` [9, n] = Gᵀ · `filters` [16, n] · G: the gradient of the taps. Rows of the filters
    /// are `stride` apart.
    fn transform_filter_gradients<T: Real>(filters: &[T], stride: usize, n: usize, to: &mut [T]) {
        let half = T::from_f64(0.5);
        over_channels!(0..n, at, N => {
            let mut rows = [[[T::ZERO; N]; 4]; 3];
            for j in 0..4 {
                let a = &filters[j * stride + at..][..N];
                let b = &filters[(4 + j) * stride + at..][..N];
                let c = &filters[(8 + j) * stride + at..][..N];
                let d = &filters[(12 + j) * stride + at..][..N];
                for l in 0..N {
                    rows[0][j][l] = a[l] + (b[l] + c[l]) * half;
                    rows[1][j][l] = (b[l] - c[l]) * half;
                    rows[2][j][l] = d[l] + (b[l] + c[l]) * half;
                }
            }
            for (r, [a, b, c, d]) in rows.iter().enumerate() {
                let first = 3 * r * n + at;
                for l in 0..N {
                    to[first + l] = a[l] + (b[l] + c[l]) * half;
                }
                for l in 0..N {
                    to[first + n + l] = (b[l] - c[l]) * half;
                }
                for l in 0..N {
                    to[first + 2 * n + l] = d[l] + (b[l] + c[l]) * half;
                }
            }
        });
    }
}

/// Where a tile's pixels lie: offsets in the images, or none outside.
type Pixels<const N: usize> = [[Option<usize>; N]; N];

/// The tiles of a batch.
#[derive(Clone, Copy)]
struct Grid {
    batch: usize,
    /// Of the output.
    height: usize,
    width: usize,
    down: usize,
    across: usize,
}

impl Grid {
    fn of(window: &Window) -> Self {
        let (height, width) = window.out;
        let (down, across) = (height.div_ceil(2), width.div_ceil(2));
        Self { batch: window.batch, height, width, down, across }
    }

    fn tiles(&self) -> usize {
        self.batch * self.down * self.across
    }

    /// Image, and the first row and column of the output.
    fn place(&self, tile: usize) -> (usize, usize, usize) {
        let (image, rest) = (tile / (self.down * self.across), tile % (self.down * self.across));
        (image, rest / self.across * 2, rest % self.across * 2)
    }

    /// The 4 × 4 input pixels of a tile.
    fn inputs(&self, window: &Window, tile: usize) -> Pixels<4> {
        let (image, y, x) = self.place(tile);
        std::array::from_fn(|i| {
            std::array::from_fn(|j| {
                window.pixel(image, (y + i).checked_sub(1)?, (x + j).checked_sub(1)?)
            })
        })
    }

    /// The 2 × 2 output pixels of a tile.
    fn outputs(&self, tile: usize) -> Pixels<2> {
        let (image, y, x) = self.place(tile);
        std::array::from_fn(|i| {
            std::array::from_fn(|j| {
                let inside = y + i < self.height && x + j < self.width;
                inside.then(|| (image * self.height + y + i) * self.width + x + j)
            })
        })
    }
}

/// Neighbouring channels of the pixels of a tile.
type Lanes<T, const N: usize, const SIDE: usize> = [[[T; N]; SIDE]; SIDE];

/// Channels `channel ..` of a tile's pixels, zeros outside.
#[inline(always)]
fn load<T: Real, const N: usize, const SIDE: usize>(
    from: &[T],
    pixels: &Pixels<SIDE>,
    channels: usize,
    channel: usize,
) -> Lanes<T, N, SIDE> {
    let mut tile = [[[T::ZERO; N]; SIDE]; SIDE];
    for (row, pixels) in tile.iter_mut().zip(pixels) {
        for (lanes, pixel) in row.iter_mut().zip(pixels) {
            if let Some(pixel) = pixel {
                let from = &from[pixel * channels + channel..][..N];
                lanes.copy_from_slice(from);
            }
        }
    }
    tile
}

vectorised! {
    /// Bᵀ · tile · B of some channels of one tile, value v to `to[v · stride ..]`.
    fn transform_input<T: Real>(
        images: &[T], pixels: &Pixels<4>, channels: usize, range: Range<usize>, stride: usize,
        to: &mut [T],
    ) {
        over_channels!(range.clone(), channel, N => {
            let d: Lanes<T, N, 4> = load(images, pixels, channels, channel);
            let mut half = [[[T::ZERO; N]; 4]; 4];
            for j in 0..4 {
                for l in 0..N {
                    half[0][j][l] = d[0][j][l] - d[2][j][l];
                    half[1][j][l] = d[1][j][l] + d[2][j][l];
                    half[2][j][l] = d[2][j][l] - d[1][j][l];
                    half[3][j][l] = d[1][j][l] - d[3][j][l];
                }
            }
            for (i, [a, b, c, d]) in half.iter().enumerate() {
                let at = 4 * i * stride + channel - range.start;
                for l in 0..N {
                    to[at + l] = a[l] - c[l];
                }
                for l in 0..N {
                    to[at + stride + l] = b[l] + c[l];
                }
                for l in 0..N {
                    to[at + 2 * stride + l] = c[l] - b[l];
                }
                for l in 0..N {
                    to[at + 3 * stride + l] = b[l] - d[l];
                }
            }
        });
    }
}

vectorised! {
    /// Aᵀ · tile · A of every channel of one tile, from values `stride` apart, into the rows
    /// of its pixels.
    fn transform_output<T: Real>(
        values: &[T], stride: usize, pixels: &Pixels<2>, channels: usize, accumulate: bool,
        y: &Rows<T>,
    ) {
        over_channels!(0..channels, channel, N => {
            let mut half = [[[T::ZERO; N]; 4]; 2];
            for j in 0..4 {
                let [a, b, c, d] =
                    [0, 1, 2, 3].map(|i| &values[(4 * i + j) * stride + channel..][..N]);
                for l in 0..N {
                    half[0][j][l] = a[l] + b[l] + c[l];
                    half[1][j][l] = b[l] - c[l] - d[l];
                }
            }
            for ([a, b, c, d], pixels) in half.iter().zip(pixels) {
                let mut row = [[T::ZERO; N]; 2];
                for l in 0..N {
                    row[0][l] = a[l] + b[l] + c[l];
                    row[1][l] = b[l] - c[l] - d[l];
                }
                for (value, pixel) in row.iter().zip(pixels) {
                    if let Some(pixel) = pixel {
                        y.write(pixel * channels + channel, value, accumulate);
                    }
                }
            }
        });
    }
}

vectorised! {
    /// A · tile · Aᵀ of every channel of one tile of output gradients: the adjoint of
    /// [`transform_output`].
    fn transform_gradient<T: Real>(
        dy: &[T], pixels: &Pixels<2>, channels: usize, stride: usize, to: &mut [T],
    ) {
        over_channels!(0..channels, channel, N => {
            let d: Lanes<T, N, 2> = load(dy, pixels, channels, channel);
            let mut half = [[[T::ZERO; N]; 2]; 4];
            for j in 0..2 {
                for l in 0..N {
                    half[0][j][l] = d[0][j][l];
                    half[1][j][l] = d[0][j][l] + d[1][j][l];
                    half[2][j][l] = d[0][j][l] - d[1][j][l];
                    half[3][j][l] = -d[1][j][l];
                }
            }
            for (i, [a, b]) in half.iter().enumerate() {
                let at = 4 * i * stride + channel;
                to[at..at + N].copy_from_slice(a);
                for l in 0..N {
                    to[at + stride + l] = a[l] + b[l];
                }
                for l in 0..N {
                    to[at + 2 * stride + l] = a[l] - b[l];
                }
                for l in 0..N {
                    to[at + 3 * stride + l] = -b[l];
                }
            }
        });
    }
}

/// An output of which every task writes its own pixels.
struct Rows<T>(*mut T, usize);
// SAFETY: tiles do not share output pixels, and tasks do not share tiles.
unsafe impl<T: Send> Sync for Rows<T> {}

impl<T: Real> Rows<T> {
    #[inline(always)]
    fn write<const N: usize>(&self, at: usize, value: &[T; N], accumulate: bool) {
        assert!(at + N <= self.1);
        // SAFETY: inside the output, and this task's own.
        let to = unsafe { &mut *self.0.add(at).cast::<[T; N]>() };
        if accumulate {
            for l in 0..N {
                to[l] += value[l];
            }
        } else {
            *to = *value;
        }
    }

    /// One pixel's channels.
    #[expect(clippy::mut_from_ref, reason = "tasks have pixels of their own")]
    fn pixel(&self, pixel: usize, channels: usize) -> &mut [T] {
        assert!((pixel + 1) * channels <= self.1);
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(pixel * channels), channels) }
    }
}

/// `y` [B, H, W, outer] = or += the convolution of `images`, then `finish`.
pub fn convolve<T: Real>(
    window: &Window,
    outer: usize,
    images: &[T],
    filters: &Filters<T>,
    y: &mut [T],
    accumulate: bool,
    finish: &Finish<T>,
) {
    let (level, grid) = (Level::current(), Grid::of(window));
    let tiles = grid.tiles();
    // Tasks of equal size; more than one a thread for balance.
    let parts = tiles.div_ceil(TILES).max((2 * threads::count()).min(tiles.div_ceil(MR)));
    let rows = Rows(y.as_mut_ptr(), y.len());
    let task = |i: usize| {
        let range = tiles * i / parts..tiles * (i + 1) / parts;
        some_tiles(level, window, &grid, outer, images, filters, &rows, range, accumulate, finish);
    };
    threads::each(parts, tiles * window.channels * outer > 1 << 14, task);
}

#[allow(clippy::too_many_arguments)]
fn some_tiles<T: Real>(
    level: Level,
    window: &Window,
    grid: &Grid,
    outer: usize,
    images: &[T],
    filters: &Filters<T>,
    y: &Rows<T>,
    tiles: Range<usize>,
    accumulate: bool,
    finish: &Finish<T>,
) {
    let blocks = tiles.len().div_ceil(MR);
    let width = outer.next_multiple_of(NR);
    let (inputs, outputs) = (F * blocks * BLOCK, tiles.len() * width);
    with_scratch::<T, _>(inputs + F * outputs, |scratch| {
        let (v, m) = scratch.split_at_mut(inputs);
        let depth = inner_block(window.channels);
        for start in (0..window.channels).step_by(depth) {
            let inner = start..(start + depth).min(window.channels);
            for (i, tile) in tiles.clone().enumerate() {
                let pixels = grid.inputs(window, tile);
                let to = &mut v[i / MR * BLOCK + i % MR * LEFT_STRIDE..];
                let stride = blocks * BLOCK;
                transform_input(level, images, &pixels, window.channels, inner.clone(), stride, to);
            }
            for panel in 0..width / NR {
                for value in 0..F {
                    let right = filters.rows(value, panel, &inner);
                    for block in 0..blocks {
                        let first = block * MR;
                        let tile = Tile {
                            rows: MR.min(tiles.len() - first),
                            columns: NR,
                            depth: inner.len(),
                            left: v[(value * blocks + block) * BLOCK..].as_ptr(),
                            panel: right,
                            c: m[value * outputs + first * width + panel * NR..].as_mut_ptr(),
                            c_stride: width,
                            accumulate: start > 0,
                        };
                        // SAFETY: `v` was filled for these rows and channels, `rows` gives depth ·
                        // NR values, and `m` has `width` columns a tile.
                        unsafe { T::tile(level, &tile, Left::Rows) };
                    }
                }
            }
        }
        for (i, tile) in tiles.enumerate() {
            let pixels = grid.outputs(tile);
            transform_output(level, &m[i * width..], outputs, &pixels, outer, accumulate, y);
            for pixel in pixels.into_iter().flatten().flatten() {
                finish.row(level, pixel, 0, outer, y.pixel(pixel, outer));
            }
        }
    });
}

/// The gradient of the weight, [outer, taps, channels].
pub fn weight_gradient<T: Real>(window: &Window, outer: usize, images: &[T], dy: &[T]) -> Vec<T> {
    let (level, grid, channels) = (Level::current(), Grid::of(window), window.channels);
    let size = outer * channels;
    if grid.tiles() == 0 {
        return vec![T::ZERO; 9 * size];
    }
    let mut filters = uninitialised::<T>(F * size);
    for start in (0..grid.tiles()).step_by(GRADIENT_TILES) {
        let tiles = start..(start + GRADIENT_TILES).min(grid.tiles());
        let count = tiles.len();
        // [tile, value, channel], so that tasks write neighbouring memory.
        let mut v = uninitialised::<T>(count * F * channels);
        threads::chunks(&mut v, F * channels, true, |i, to| {
            let pixels = grid.inputs(window, start + i);
            transform_input(level, images, &pixels, channels, 0..channels, channels, to);
        });
        let mut m = uninitialised::<T>(count * F * outer);
        threads::chunks(&mut m, F * outer, true, |i, to| {
            transform_gradient(level, dy, &grid.outputs(start + i), outer, outer, to);
        });
        for (value, filters) in filters.chunks_exact_mut(size).enumerate() {
            let left = Columns { data: &m[value * outer..], stride: F * outer };
            let data = &v[value * channels..];
            let right = Plain { data, stride: F * channels, columns: channels };
            let sizes = (outer, channels, count);
            product(sizes, &left, &right, filters, start > 0, &Finish::default());
        }
    }
    let mut dw = uninitialised(9 * size);
    threads::chunks(&mut dw, 9 * channels, true, |o, to| {
        transform_filter_gradients(level, &filters[o * channels..], size, channels, to);
    });
    dw
}
