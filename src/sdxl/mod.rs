//! sdxl
