//! `ds-bench replay`: makes the images of a bundle again and says whether they are the same.

use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use image::RgbImage;
use serde_json::Value;

use super::remote::RemoteBackend;
use super::wiring;
use crate::engine::bundle::Bundle;
use crate::engine::encode::encode;
use crate::engine::request::{GeneratedImage, ImageFormat};
use crate::engine::{Backend, CancelToken, request_of};
use crate::nn::device::{DeviceChoice, NumberChoice, Placement};
use crate::progress::{Every, Progress};
use crate::{Error, Result};

/// Make the images of a bundle again (a file that ds-serve gives for each of its generations) and
/// say whether they are bit-equal, within a tolerance, or from which prediction on they differ.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// File from `GET /generations/{id}/bundle`.
    #[arg(value_name = "FILE.tar")]
    pub bundle: PathBuf,
    /// Folder with one checkpoint folder per model.
    #[arg(long, value_name = "DIR", default_value = "models")]
    pub models: PathBuf,
    /// A ds-serve to ask instead of models in this process; the variable DS_API_KEY has the
    /// key for it, if it wants one.
    #[arg(long, value_name = "URL", conflicts_with_all = ["device", "dtype"])]
    pub url: Option<String>,
    /// Where models run: auto, cpu or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// Numbers of U-Net and text towers: auto, f32, bf16 or f16.
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    pub dtype: NumberChoice,
    /// Most that a channel of a pixel may differ by, of 255, to be within tolerance.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub tolerance: u8,
}

/// How an image compares with the one in the bundle.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Likeness {
    Equal,
    /// Every channel is within the tolerance; the largest difference.
    Close(u8),
    /// The largest difference, and the peak signal-to-noise ratio in dB.
    Different(u8, f64),
    OtherSize,
}

impl fmt::Display for Likeness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Equal => write!(f, "bit-equal"),
            Self::Close(most) => write!(f, "within tolerance: at most {most} of 255 apart"),
            Self::Different(most, psnr) => {
                write!(f, "different: up to {most} of 255 apart, PSNR {psnr:.1} dB")
            }
            Self::OtherSize => write!(f, "different: another size"),
        }
    }
}

/// What a replay found.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    pub images: Vec<Likeness>,
    /// Of each image whose predictions were recorded: the first that differs, of how many.
    pub parted: Vec<Option<(usize, usize)>>,
}

impl Report {
    /// Whether every image is equal or within tolerance.
    #[must_use]
    pub fn is_same(&self) -> bool {
        self.images.iter().all(|i| matches!(i, Likeness::Equal | Likeness::Close(_)))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, image) in self.images.iter().enumerate() {
            writeln!(f, "image {index}: {image}")?;
        }
        for (index, parted) in self.parted.iter().enumerate() {
            match parted {
                Some((at, of)) => {
                    writeln!(
                        f,
                        "image {index}: prediction {} of {of} is the first that differs",
                        at + 1
                    )?;
                }
                None => writeln!(f, "image {index}: every recorded prediction is the same")?,
            }
        }
        if self.parted.is_empty() && self.images.iter().any(|i| *i != Likeness::Equal) {
            writeln!(f, "the bundle has no digests: ask for them with \"digests\": true")?;
        }
        Ok(())
    }
}

/// Runs the command; whether the images are the same.
///
/// # Errors
/// When the bundle, the models or the server are unusable, or the weights are other ones.
pub fn run(args: &Args, cancel: &CancelToken) -> Result<bool> {
    let file = File::open(&args.bundle).map_err(|e| Error::file(&args.bundle, e))?;
    let bundle =
        Bundle::read(std::io::BufReader::new(file)).map_err(|e| Error::file(&args.bundle, e))?;
    let backend: Box<dyn Backend> = match &args.url {
        Some(url) => Box::new(RemoteBackend::from_env(url)?),
        None => {
            let placement = Placement::new(args.device, args.dtype, NumberChoice::Auto)?;
            wiring::open_engine(&args.models, &placement)?
        }
    };
    let report = replay(&bundle, backend.as_ref(), args.tolerance, cancel)?;
    print!("{report}");
    Ok(report.is_same())
}

/// Makes a bundle's images again.
///
/// # Errors
/// The backend has other weights, or cannot run the request.
pub fn replay(
    bundle: &Bundle,
    backend: &dyn Backend,
    tolerance: u8,
    cancel: &CancelToken,
) -> Result<Report> {
    let model = &bundle.manifest.model;
    if let Some(here) = backend.models().iter().find(|m| m.id == model.id)
        && here.sha256 != model.sha256
    {
        let message =
            format!("{} has other weights: {} here, {} there", model.id, here.sha256, model.sha256);
        return Err(Error::invalid("model", message));
    }
    let planned = backend.plan(&request_of(&bundle.manifest.resolved))?;
    let every = Every::Time(Duration::from_secs(10));
    let mut shown = Progress::new("forward", 0, planned.cost.f, every, false);
    let generation = backend.generate(&planned, cancel, &mut |p| shown.show(p.spent.f, &model.id));
    shown.finish();
    let generation = generation?;
    let format = bundle.manifest.resolved.output_format;
    let images = bundle
        .images
        .iter()
        .zip(&generation.images)
        .map(|(there, here)| compare(there, here, format, tolerance))
        .collect::<Result<Vec<_>>>()?;
    if generation.images.len() != bundle.images.len() {
        let (n, m) = (generation.images.len(), bundle.images.len());
        return Err(Error::invalid("bundle", format!("{m} images, and {n} were made")));
    }
    let (there, here) = (digests(&bundle.answer["trace"]), generation.trace.into());
    let parted = there.iter().zip(digests(&here)).map(|(a, b)| parted(a, &b)).collect();
    Ok(Report { images, parted })
}

/// The recorded digests, image by image.
fn digests(trace: &Value) -> Vec<Vec<String>> {
    let entries = trace.as_array().map(Vec::as_slice).unwrap_or_default().iter();
    let recorded = entries.filter_map(|entry| entry["digests"].as_array());
    recorded
        .map(|list| list.iter().filter_map(|d| d.as_str().map(str::to_owned)).collect())
        .collect()
}

fn parted(there: &[String], here: &[String]) -> Option<(usize, usize)> {
    let most = there.len().max(here.len());
    (0..most).find(|&i| there.get(i) != here.get(i)).map(|at| (at, most))
}

fn compare(
    there: &[u8],
    here: &GeneratedImage,
    format: ImageFormat,
    tolerance: u8,
) -> Result<Likeness> {
    let decoded = image::load_from_memory(there)
        .map_err(|e| Error::invalid("bundle", format!("an image: {e}")))?
        .to_rgb8();
    // JPEG loses: two equal images are equal after it, too.
    let mut pixels = here.pixels.clone();
    if format == ImageFormat::Jpeg {
        let bytes =
            encode(&pixels, format, "").map_err(|e| Error::invalid("image", e.to_string()))?;
        pixels = image::load_from_memory(&bytes)
            .map_err(|e| Error::invalid("image", e.to_string()))?
            .to_rgb8();
    }
    Ok(likeness(&decoded, &pixels, tolerance))
}

fn likeness(a: &RgbImage, b: &RgbImage, tolerance: u8) -> Likeness {
    if a.dimensions() != b.dimensions() {
        return Likeness::OtherSize;
    }
    let (mut most, mut squares) = (0, 0.0);
    for (a, b) in a.as_raw().iter().zip(b.as_raw()) {
        let apart = a.abs_diff(*b);
        most = most.max(apart);
        squares += f64::from(apart).powi(2);
    }
    match most {
        0 => Likeness::Equal,
        most if most <= tolerance => Likeness::Close(most),
        most => {
            let mean = squares / a.as_raw().len() as f64;
            Likeness::Different(most, 10.0 * (255.0 * 255.0 / mean).log10())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likeness_has_three_degrees() {
        let a = RgbImage::from_pixel(4, 4, image::Rgb([10, 20, 30]));
        let mut b = a.clone();
        assert_eq!(likeness(&a, &b, 2), Likeness::Equal);
        b.put_pixel(1, 1, image::Rgb([12, 20, 30]));
        assert_eq!(likeness(&a, &b, 2), Likeness::Close(2));
        b.put_pixel(1, 1, image::Rgb([13, 20, 30]));
        // Mean square 9 / 48.
        let psnr = 10.0 * (255.0_f64.powi(2) * 48.0 / 9.0).log10();
        assert_eq!(likeness(&a, &b, 2), Likeness::Different(3, psnr));
        assert_eq!(likeness(&a, &RgbImage::new(4, 5), 2), Likeness::OtherSize);
    }

    #[test]
    fn the_first_difference_is_found() {
        let list = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(parted(&list("a b c"), &list("a b c")), None);
        assert_eq!(parted(&list("a b c"), &list("a x c")), Some((1, 3)));
        assert_eq!(parted(&list("a b"), &list("a b c")), Some((2, 3)));
    }
}
