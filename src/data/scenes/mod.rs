//! The scene world: captions about flat shapes, a renderer that draws them, and
//! a judge that reads an image and says which of a caption's claims hold.

pub mod detect;
pub mod evaluate;
pub mod export;
pub mod grammar;
pub mod judge;
pub mod layout;
mod matching;
pub mod render;
pub mod splits;
pub mod vocabulary;

pub use detect::{Detection, detect};
pub use grammar::{Caption, ObjectSpec};
pub use judge::{Claim, ClaimKind, Judgement, Verdict, judge};
pub use layout::{Placed, Scene};
pub use splits::Split;
pub use vocabulary::{Category, Colour, Relation, Shape, Texture};
