//! How many samples go through the U-Net together.

use crate::nn::device_memory::DeviceMemory;
use crate::sdxl::plan::{Item, MemoryPlan, Phase};

/// Latent positions that one model call takes at most on the CPU, guidance not counted.
const CPU_POSITIONS: usize = 1 << 12;
/// The same on a GPU, with both samples of a guided pair counted: two of 1024 x 1024 px or eight
/// of 512 x 512 px. Beyond it a larger batch takes longer and is hardly faster.
const GPU_POSITIONS: usize = 1 << 15;
/// Of what is free on a GPU, what is planned with: 7 parts of 8. The rest is for what no plan
/// has, the libraries' workspaces and fragments.
const PLANNED_PARTS: (u64, u64) = (7, 8);

/// What limits a batch.
#[derive(Clone, Copy, Debug)]
pub enum Device {
    Cpu,
    /// What is free, where it is known.
    Gpu(Option<DeviceMemory>),
}

/// The images that a model call takes at most. `plan`: of one image, where there is one;
/// `positions`: of its latent; `forwards`: samples for each image, 2 with guidance.
pub fn micro_batch(
    device: Device,
    plan: Option<&MemoryPlan>,
    positions: usize,
    forwards: usize,
) -> usize {
    let Device::Gpu(memory) = device else {
        return (CPU_POSITIONS / positions).clamp(1, 32);
    };
    let most = (GPU_POSITIONS / (positions * forwards)).max(1);
    let (Some(memory), Some(plan)) = (memory, plan) else { return most };
    let (parts, of) = PLANNED_PARTS;
    let fitting = memory.free / of * parts / each(plan).max(1);
    usize::try_from(fitting).unwrap_or(most).clamp(1, most)
}

/// Bytes that one more image takes in the U-Net: all of a forward's values grow with the batch.
fn each(plan: &MemoryPlan) -> u64 {
    let lines = plan.lines.iter().filter(|line| line.phase == Phase::Rollout);
    let bytes: u64 = lines.map(|line| line.bytes).sum();
    bytes + plan.bytes(Item::RolloutStates)
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::Result;
    use crate::sdxl::plan::{H100, Networks, Schedule, Setting};

    fn plan(side: usize) -> Result<MemoryPlan> {
        let setting = Setting::one_image(side, side, DType::BF16, true);
        let one = Schedule { micro_batch: 1, recompute: false };
        MemoryPlan::new(&Networks::sdxl()?, &setting, one, H100)
    }

    fn gpu(gib: f64) -> Device {
        let bytes = (gib * f64::from(1 << 30)) as u64;
        Device::Gpu(Some(DeviceMemory { free: bytes, total: 80 << 30 }))
    }

    #[test]
    fn a_gpu_takes_what_its_arithmetic_needs_and_its_memory_holds() -> Result<()> {
        for (side, forwards, expected) in
            [(512, 2, 4), (512, 1, 8), (1024, 2, 1), (1024, 1, 2), (768, 2, 1), (2048, 2, 1)]
        {
            let positions = (side / 8) * (side / 8);
            let roomy = micro_batch(gpu(60.0), Some(&plan(side)?), positions, forwards);
            assert_eq!(roomy, expected, "{side} px, {forwards} forwards");
            assert_eq!(micro_batch(Device::Gpu(None), None, positions, forwards), expected);
        }
        // 0.116 GiB for each guided image of 512 px, of 7/8 of what is free.
        for (free, expected) in [(0.6, 4), (0.4, 3), (0.3, 2), (0.15, 1), (0.0, 1)] {
            let small = micro_batch(gpu(free), Some(&plan(512)?), 64 * 64, 2);
            assert_eq!(small, expected, "{free} GiB free");
        }
        Ok(())
    }

    #[test]
    fn the_cpu_has_its_own_rule() {
        for (positions, expected) in [(64, 32), (256, 16), (4096, 1), (16384, 1)] {
            for forwards in [1, 2] {
                assert_eq!(micro_batch(Device::Cpu, None, positions, forwards), expected);
            }
        }
    }
}
