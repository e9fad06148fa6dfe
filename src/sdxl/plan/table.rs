//! A plan as text.

use std::fmt;

use super::memory::{MemoryPlan, Mode};
use crate::util::gib;

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.head(f)?;
        writeln!(f, "\n{:<26}{:>12}  while", "memory", "")?;
        for line in &self.lines {
            writeln!(f, "{:<26}{:>12}  {}", line.item.name(), gib(line.bytes), line.phase.name())?;
        }
        let (bytes, phase) = (self.peak_bytes, self.peak_phase.name());
        writeln!(f, "{:<26}{:>12}  {phase}", "most at a time", gib(bytes))?;
        writeln!(
            f,
            "\n{:<16}{:>14}{:>12}{:>12}{:>10}{:>14}",
            "one sample", "parameters", "TFLOP", "GB moved", "kernels", "at least ms"
        )?;
        for pass in &self.passes {
            writeln!(
                f,
                "{:<16}{:>14}{:>12.4}{:>12.3}{:>10}{:>14.3}",
                pass.name,
                pass.cost.parameters,
                pass.cost.flops as f64 / 1e12,
                pass.cost.bytes as f64 / 1e9,
                pass.cost.launches,
                pass.least_seconds * 1e3
            )?;
        }
        if self.setting.mode.trains() {
            let flops = self.backward_flops as f64 / 1e12;
            writeln!(f, "{:<16}{:>14}{flops:>12.4}", "U-Net backward", self.trained_parameters)?;
        }
        Ok(())
    }
}

impl MemoryPlan {
    fn head(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = &self.setting;
        match &s.mode {
            Mode::Infer { guided: true } => write!(f, "inference with guidance")?,
            Mode::Infer { guided: false } => write!(f, "inference without guidance")?,
            Mode::Lora { rank, targets } => {
                write!(f, "LoRA of rank {rank} on {}", targets.join(", "))?;
            }
            Mode::Full { .. } => write!(f, "full fine-tuning")?,
        }
        let dtype = s.dtype.as_str();
        writeln!(
            f,
            ", {} x {} px, {dtype}, batch {}, n={}, m={}",
            s.width, s.height, s.batch, s.trajectories, s.steps
        )?;
        let (micro, all) = (self.schedule.micro_batch, s.samples());
        if !s.mode.trains() {
            return writeln!(f, "{micro} of {all} images at a time in the U-Net");
        }
        let graphs =
            if micro == all { "kept while trajectories are scored" } else { "in a second pass" };
        let blocks =
            if self.schedule.recompute { "blocks computed anew" } else { "nothing computed anew" };
        writeln!(f, "graphs of {micro} of {all} states at a time, {graphs}; {blocks}")
    }
}
