//! Sweeps, statistics, tables and plots, run on any [`crate::engine::Backend`].
//!
//! One file or folder per `ds-bench` subcommand ([`ablation`], [`nfe_sweep`], [`sweep_merge`],
//! [`parity_cmd`], [`plan_cmd`], [`scene_report`], [`sharpen_step`], [`speed`],
//! [`training_curves`]), over the parts
//! they share: the grid and its resumable cells ([`sweep`], [`arm`], [`contract`], [`cell`],
//! [`manifest`]), what is read off them ([`stats`], [`summary`], [`report`], [`plot`]), where
//! images come from ([`remote`], [`wiring`]), and the work that is timed
//! ([`workload`], [`train_workload`], [`sharpen_workload`] and [`op_workload`]).

pub mod ablation;
mod adapter;
pub mod arm;
pub mod cell;
pub mod contract;
pub mod manifest;
pub mod nfe_sweep;
pub mod op_workload;
pub mod options;
pub mod parity;
pub mod parity_cmd;
mod placement;
pub mod plan_cmd;
pub mod plot;
mod process;
pub mod progress;
pub mod remote;
mod replay;
pub mod report;
pub mod reproduce;
pub mod scene_report;
pub mod sharpen_step;
pub mod sharpen_workload;
pub mod speed;
pub mod stats;
pub mod summary;
pub mod sweep;
pub mod sweep_merge;
mod thinning;
mod thumbnail;
pub mod train_workload;
pub mod training_curves;
mod validations;
pub mod wiring;
pub mod workload;
