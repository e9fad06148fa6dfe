//! The scene world: captions about flat shapes, a renderer that draws them, and
//! a judge that reads an image and says which of a caption's claims hold.

pub mod export;
pub mod grammar;
pub mod layout;
pub mod render;
pub mod splits;
pub mod vocabulary;

pub use grammar::{Caption, ObjectSpec};
pub use layout::{Placed, Scene};
pub use splits::Split;
pub use vocabulary::{Category, Colour, Relation, Shape, Texture};
