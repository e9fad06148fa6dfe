//! The schedule that a memory budget allows.

use super::cost::Peak;
use super::memory::{Item, Line, MemoryPlan, Mode, Phase, Schedule, Setting};
use super::network::Networks;
use crate::util::gib;
use crate::{Error, Result};

impl MemoryPlan {
    /// The plan with the largest micro-batch that takes at most `budget` bytes; blocks are
    /// computed anew only where nothing else fits.
    ///
    /// # Errors
    /// When nothing fits: what takes most, and what would help. And as for
    /// [`MemoryPlan::new`].
    pub fn fit(networks: &Networks, setting: &Setting, budget: u64, peak: Peak) -> Result<Self> {
        let plan = |micro_batch, recompute| {
            Self::new(networks, setting, Schedule { micro_batch, recompute }, peak)
        };
        let mut smallest = plan(1, false)?;
        if smallest.peak_bytes > budget && setting.mode.trains() {
            smallest = plan(1, true)?;
        }
        smallest.ensure_fits(budget)?;
        let recompute = smallest.schedule.recompute;
        // More samples never take less.
        let (mut fits, mut limit) = (smallest, setting.samples() + 1);
        while fits.schedule.micro_batch + 1 < limit {
            let middle = fits.schedule.micro_batch.midpoint(limit);
            let tried = plan(middle, recompute)?;
            if tried.peak_bytes <= budget {
                fits = tried;
            } else {
                limit = middle;
            }
        }
        Ok(fits)
    }

    /// # Errors
    /// `Error::InsufficientMemory` when this plan takes more than `budget` bytes: what takes
    /// most, and what would help.
    pub fn ensure_fits(&self, budget: u64) -> Result<()> {
        if self.peak_bytes <= budget {
            return Ok(());
        }
        let then = |line: &&Line| [Phase::Always, self.peak_phase].contains(&line.phase);
        let largest = self.lines.iter().filter(then).max_by_key(|line| line.bytes);
        let (item, bytes) = largest.map_or((Item::UnetWeights, 0), |line| (line.item, line.bytes));
        Err(Error::InsufficientMemory(format!(
            "{} x {} px take at least {}, there is {}; most of it is {} ({}): {}",
            self.setting.width,
            self.setting.height,
            gib(self.peak_bytes),
            gib(budget),
            item.name(),
            gib(bytes),
            self.help(item)
        )))
    }

    /// What would make an item smaller.
    fn help(&self, item: Item) -> &'static str {
        let full = matches!(self.setting.mode, Mode::Full { .. });
        let wide = self.setting.dtype.size_in_bytes() == 4;
        match item {
            Item::Masters | Item::Gradients | Item::Moments if full => {
                "train a LoRA, whose share is a hundredth"
            }
            Item::Masters | Item::Gradients | Item::Moments | Item::AdapterWeights => {
                "lower the rank, or adapt fewer modules"
            }
            Item::UnetWeights if full => "train a LoRA, or load bf16 weights with f32 masters",
            Item::UnetWeights | Item::Text1Weights | Item::Text2Weights if wide => {
                "load the weights in bf16"
            }
            Item::ReferenceWeights => "train a LoRA, whose reference is the model without it",
            Item::VaeDecode => "decode fewer images at once, or make smaller ones",
            Item::RolloutStates => "lower the batch, n or m",
            _ => "make smaller images, or use a larger card",
        }
    }
}
