//! The words of the scene world and what they look like.

use serde::{Deserialize, Serialize};

/// Declares a word list: an enum with `ALL`, `word()` and `from_word()`.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum $name { $(#[serde(rename = $word)] $variant),+ }

        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            /// The word as it stands in a caption.
            pub fn word(self) -> &'static str {
                match self { $($name::$variant => $word),+ }
            }

            pub fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some($name::$variant),)+ _ => None }
            }
        }
    };
}

words!(
    /// The six categories of T2I-CompBench (arXiv 2307.06350).
    Category {
        Color = "color",
        Shape = "shape",
        Texture = "texture",
        Spatial = "spatial",
        Numeracy = "numeracy",
        Complex = "complex",
    }
);

words!(Shape {
    Circle = "circle",
    Square = "square",
    Triangle = "triangle",
    Star = "star",
    Heart = "heart",
    Ring = "ring",
});

words!(Colour {
    Red = "red",
    Green = "green",
    Blue = "blue",
    Yellow = "yellow",
    Purple = "purple",
    Orange = "orange",
    White = "white",
    Black = "black",
});

words!(Texture { Plain = "plain", Striped = "striped", Dotted = "dotted" });

words!(
    /// Of the first object to the second.
    Relation {
        LeftOf = "left of",
        RightOf = "right of",
        Above = "above",
        Below = "below",
    }
);

/// Counts as words; index 0 is "one".
pub const COUNTS: [&str; 4] = ["one", "two", "three", "four"];

/// Texture cells across the image: one cell is 4 px at 64 px, so that a cell
/// falls on one latent position of a VAE with factor 4.
pub const TEXTURE_CELLS: f64 = 16.0;
/// Radius of a dot, in cells.
pub const DOT_RADIUS: f64 = 0.34;

impl Colour {
    /// The fill, sRGB 0–255.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Colour::Red => [214, 39, 46],
            Colour::Green => [38, 150, 62],
            Colour::Blue => [42, 82, 214],
            Colour::Yellow => [247, 214, 36],
            Colour::Purple => [146, 58, 186],
            Colour::Orange => [247, 128, 20],
            Colour::White => [250, 250, 250],
            Colour::Black => [22, 22, 26],
        }
    }

    /// The second tone of stripes and dots: a clearly darker shade, for black a lighter one.
    pub fn second_tone(self) -> [u8; 3] {
        match self {
            Colour::Black => [88, 88, 94],
            Colour::White => [196, 198, 204],
            _ => self.rgb().map(|c| (f64::from(c) * 0.52) as u8),
        }
    }
}

impl Relation {
    /// The relation of the second object to the first.
    pub fn inverse(self) -> Self {
        match self {
            Relation::LeftOf => Relation::RightOf,
            Relation::RightOf => Relation::LeftOf,
            Relation::Above => Relation::Below,
            Relation::Below => Relation::Above,
        }
    }

    /// How far the offset `(dx, dy)` = first − second centre (y down) goes in
    /// this relation's direction, and how far across it.
    pub fn along_across(self, dx: f64, dy: f64) -> (f64, f64) {
        match self {
            Relation::LeftOf => (-dx, dy.abs()),
            Relation::RightOf => (dx, dy.abs()),
            Relation::Above => (-dy, dx.abs()),
            Relation::Below => (dy, dx.abs()),
        }
    }
}

impl Shape {
    /// Whether the point (x, y), in units of the object's radius from its
    /// centre with y down, lies inside the shape.
    pub fn contains(self, x: f64, y: f64) -> bool {
        match self {
            Shape::Circle => x * x + y * y <= 0.95,
            Shape::Ring => {
                let r2 = x * x + y * y;
                (0.27..=1.0).contains(&r2)
            }
            Shape::Square => x.abs() <= 0.84 && y.abs() <= 0.84,
            Shape::Triangle => {
                // Apex up, base at y = 0.78.
                let t = (y + 1.0) / 1.78;
                (0.0..=1.0).contains(&t) && x.abs() <= t
            }
            Shape::Star => inside_star(x, y),
            Shape::Heart => inside_heart(x, y),
        }
    }
}

/// Five points, one up; inner radius 0.46 of the outer.
fn inside_star(x: f64, y: f64) -> bool {
    use std::f64::consts::PI;
    let r = (x * x + y * y).sqrt();
    if r > 1.0 {
        return false;
    }
    // Fold into one half-point: angle from the nearest tip in [0, pi/5].
    let angle = x.atan2(-y).rem_euclid(2.0 * PI / 5.0);
    let a = angle.min(2.0 * PI / 5.0 - angle);
    // The edge runs from the tip (1, 0) to the notch at angle pi/5, radius 0.46.
    let (nx, ny) = (0.46 * (PI / 5.0).cos(), 0.46 * (PI / 5.0).sin());
    let (px, py) = (r * a.cos(), r * a.sin());
    (nx - 1.0) * py - ny * (px - 1.0) >= 0.0
}

/// The classical heart curve (x² + y² − 1)³ ≤ x² y³, scaled to the unit disc.
fn inside_heart(x: f64, y: f64) -> bool {
    let (x, y) = (x * 1.16, -y * 1.16 + 0.12);
    let q = x * x + y * y - 1.0;
    q * q * q <= x * x * y * y * y
}
