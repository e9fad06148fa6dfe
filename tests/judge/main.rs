//! The judge against scenes whose truth is known, and the grammar's laws.

mod grammar;
mod images;
mod truth;
