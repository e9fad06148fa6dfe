//! Prompts, images with captions, and the scene world.

pub mod scenes;
