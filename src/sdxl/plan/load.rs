//! What is told and checked before weights are read.

use std::path::Path;

use candle_core::{DType, Device};

use super::cost::H100;
use super::memory::{MemoryPlan, Phase, Schedule, Setting};
use super::network::{Networks, default_size};
use crate::nn::device_memory::DeviceMemory;
use crate::util::gib;
use crate::{Error, Result};

impl Networks {
    /// Logs what one guided image of the default size will take, weights stored as `dtype`.
    ///
    /// # Errors
    /// `Error::InsufficientMemory` when a GPU's memory in all is less than the weights. On the CPU
    /// there is only a warning.
    pub fn announce(&self, path: &Path, dtype: DType, device: &Device) -> Result<()> {
        // f64 is for gradient checks of small networks.
        if dtype == DType::F64 {
            return Ok(());
        }
        let (width, height) = default_size(&self.unet, &self.vae);
        let setting = Setting::one_image(width, height, dtype, true);
        let whole = Schedule { micro_batch: 1, recompute: false };
        let plan = match MemoryPlan::new(self, &setting, whole, H100) {
            Ok(plan) => plan,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "no memory plan");
                return Ok(());
            }
        };
        for line in &plan.lines {
            let (item, phase) = (line.item.name(), line.phase.name());
            tracing::info!(item, phase, memory = gib(line.bytes), "planned");
        }
        tracing::info!(phase = plan.peak_phase.name(), memory = gib(plan.peak_bytes), "at most");
        match DeviceMemory::of(device) {
            Some(memory) => plan.check_device(path, memory, device.is_cpu()),
            None => Ok(()),
        }
    }
}

impl MemoryPlan {
    fn check_device(&self, path: &Path, memory: DeviceMemory, is_cpu: bool) -> Result<()> {
        let always = self.lines.iter().filter(|line| line.phase == Phase::Always);
        let weights: u64 = always.map(|line| line.bytes).sum();
        if weights > memory.total && !is_cpu {
            return Err(Error::InsufficientMemory(format!(
                "{}: the weights take {}, the device has {}; {}",
                path.display(),
                gib(weights),
                gib(memory.total),
                if self.setting.dtype == DType::F32 {
                    "load them in bf16, or use a device with more memory"
                } else {
                    "use a device with more memory"
                }
            )));
        }
        if self.peak_bytes > memory.free {
            tracing::warn!(
                path = %path.display(),
                planned = gib(self.peak_bytes),
                free = gib(memory.free),
                in_all = gib(memory.total),
                "more memory is planned than is free"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_that_no_memory_holds_are_refused_on_a_gpu() -> Result<()> {
        let setting = Setting::one_image(1024, 1024, DType::F32, true);
        let one = Schedule { micro_batch: 1, recompute: false };
        let plan = MemoryPlan::new(&Networks::sdxl()?, &setting, one, H100)?;
        let memory = |gib: u64| DeviceMemory { free: 0, total: gib << 30 };
        let check = |gib, is_cpu| plan.check_device(Path::new("model"), memory(gib), is_cpu);
        let error = check(8, false).unwrap_err();
        assert_eq!(
            error.to_string(),
            "insufficient memory: model: the weights take 12.923 GiB, the device has 8.000 GiB; \
             load them in bf16, or use a device with more memory"
        );
        check(13, false)?;
        check(8, true)
    }
}
