//! Where models run, and in which numbers: the one place that decides.
//!
//! | | CPU | GPU |
//! |---|---|---|
//! | U-Net and text towers, stored | f32 (bf16, f16) | bf16 (f16, f32) |
//! | U-Net and text towers, computed | f32 | as stored, sums f32 |
//! | VAE | f32 | f32 (bf16, f16) |
//! | timesteps, sizes, schedules, noise, latents, losses | f32 or better | f32 or better |
//! | trained weights, gradient sums, moments | f32 | f32 |

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device};

use crate::{Error, Result};

/// The device that a user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU of a build with the feature `cuda`, the CPU otherwise.
    #[default]
    Auto,
    Cpu,
    /// The GPU of this number, from 0.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(Ok(ordinal))) => Ok(Self::Cuda(ordinal)),
            _ => Err(format!("expected auto, cpu, cuda or cuda:N, got '{text}'")),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl DeviceChoice {
    /// # Errors
    /// When the GPU is not there, or the program was built without the feature `cuda`.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(ordinal) => gpu(ordinal),
            Self::Auto if cfg!(feature = "cuda") => gpu(0),
            Self::Auto => Ok(Device::Cpu),
        }
    }
}

#[cfg(feature = "cuda")]
fn gpu(ordinal: usize) -> Result<Device> {
    super::cuda::open(ordinal)
        .map_err(|e| Error::invalid("device", format!("cuda:{ordinal} cannot be used: {e}")))
}

#[cfg(not(feature = "cuda"))]
fn gpu(ordinal: usize) -> Result<Device> {
    let message = format!(
        "cuda:{ordinal} needs a program built with the feature cuda (docs/gpu.md); this one has \
         only the CPU"
    );
    Err(Error::invalid("device", message))
}

/// The type of number that a user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NumberChoice {
    /// What suits the device.
    #[default]
    Auto,
    F32,
    F16,
    Bf16,
}

impl FromStr for NumberChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            _ => Err(format!("expected auto, f32, f16 or bf16, got '{text}'")),
        }
    }
}

impl fmt::Display for NumberChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

impl NumberChoice {
    fn or(self, automatic: DType) -> DType {
        match self {
            Self::Auto => automatic,
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

macro_rules! as_text {
    ($type:ty) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(
                &self,
                s: S,
            ) -> std::result::Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(
                d: D,
            ) -> std::result::Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
as_text!(DeviceChoice);
as_text!(NumberChoice);

/// Where a checkpoint's networks go and in which numbers.
#[derive(Clone, Debug)]
pub struct Placement {
    pub device: Device,
    /// Of the U-Net's and the text towers' weights.
    pub weights: DType,
    /// Of the VAE's weights and activations.
    pub vae: DType,
}

impl Placement {
    /// # Errors
    /// Names the choice that the device does not offer.
    pub fn new(device: DeviceChoice, weights: NumberChoice, vae: NumberChoice) -> Result<Self> {
        let device = device.open()?;
        let weights = weights.or(if device.is_cpu() { DType::F32 } else { DType::BF16 });
        let vae = vae.or(DType::F32);
        if device.is_cpu() && vae != DType::F32 {
            return Err(Error::invalid(
                "vae_dtype",
                "the CPU decodes in f32; expected f32 or auto",
            ));
        }
        Ok(Self { device, weights, vae })
    }

    /// On the CPU with weights stored as `weights`. f64, for gradient checks, is for the VAE too.
    pub fn cpu(weights: DType) -> Self {
        let vae = if weights == DType::F64 { weights } else { DType::F32 };
        Self { device: Device::Cpu, weights, vae }
    }
}

/// The type in which weights stored as `stored` are computed with on `device`.
pub fn computed(stored: DType, device: &Device) -> DType {
    match (stored, device) {
        (DType::F16 | DType::BF16, Device::Cpu) => DType::F32,
        _ => stored,
    }
}

/// What a stretch of work asked of a GPU.
#[derive(Debug)]
pub struct Usage {
    device: Device,
    launches: u64,
}

impl Usage {
    /// Begins to count. Peaks are one to a device: of two at a time the later one counts.
    ///
    /// # Errors
    /// The driver's.
    pub fn start(device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = device {
            super::cuda::forget_peak(device)?;
        }
        Ok(Self { device: device.clone(), launches: launches() })
    }

    /// Most bytes that tensors took on the GPU, those of the weights among them; none on the CPU.
    ///
    /// # Errors
    /// The driver's.
    pub fn peak(&self) -> Result<Option<u64>> {
        match &self.device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Some(super::cuda::peak_memory(device)?)),
            _ => Ok(None),
        }
    }

    /// Launches of this crate's kernels, not of the libraries'; none on the CPU.
    pub fn launches(&self) -> Option<u64> {
        self.device.is_cuda().then(|| launches() - self.launches)
    }
}

/// Of this process so far.
fn launches() -> u64 {
    #[cfg(feature = "cuda")]
    return super::cuda::launches();
    #[cfg(not(feature = "cuda"))]
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_read_as_they_are_written() {
        for text in ["auto", "cpu", "cuda:0", "cuda:3"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        for text in ["auto", "f32", "f16", "bf16"] {
            assert_eq!(text.parse::<NumberChoice>().unwrap().to_string(), text);
        }
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "CPU"] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
        assert!("float32".parse::<NumberChoice>().is_err());
    }

    #[test]
    fn the_cpu_computes_in_f32() {
        let placed = |weights, vae| Placement::new(DeviceChoice::Cpu, weights, vae);
        let automatic = placed(NumberChoice::Auto, NumberChoice::Auto).unwrap();
        assert_eq!((automatic.weights, automatic.vae), (DType::F32, DType::F32));
        let small = placed(NumberChoice::Bf16, NumberChoice::F32).unwrap();
        assert_eq!(computed(small.weights, &small.device), DType::F32);
        let error = placed(NumberChoice::Auto, NumberChoice::Bf16).unwrap_err();
        assert!(error.to_string().contains("vae_dtype"), "{error}");
    }

    #[test]
    fn the_cpu_has_no_use_of_a_gpu() {
        let usage = Usage::start(&Device::Cpu).unwrap();
        assert_eq!((usage.peak().unwrap(), usage.launches()), (None, None));
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_gpus_says_so() {
        let error = DeviceChoice::Cuda(1).open().unwrap_err().to_string();
        assert!(error.contains("feature cuda"), "{error}");
    }
}
