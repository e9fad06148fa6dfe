//! A model whose device runs out of memory.

use std::sync::Mutex;
use std::sync::atomic::Ordering;

use candle_core::{DType, Device, Tensor};
use diffusion_sharpening::diffusion::denoiser::{Decoder, Denoiser};
use diffusion_sharpening::diffusion::packed::{PackedDecoder, unpack};
use diffusion_sharpening::diffusion::sparing::{RowLimit, SparingDecoder, SparingDenoiser};
use diffusion_sharpening::{Error, Result};
use image::RgbImage;
use serde_json::json;

use crate::bed::{Bed, full, reward, sum};

fn bed(most: usize) -> Bed {
    let mut bed = Bed::new(reward(sum)).guided(2.0);
    bed.micro_batch = 8;
    bed.counter.most.store(most, Ordering::Relaxed);
    bed
}

/// Guidance doubles the rows of a candidate.
#[test]
fn less_memory_changes_nothing_but_the_batches() -> Result<()> {
    for kernel in ["ode", "sde"] {
        let run = |most| {
            let bed = bed(most);
            let run = bed.run("best-of-n", json!({"candidates": 8, "kernel": kernel}), 3)?;
            let calls = bed.counter.calls.lock().unwrap().clone();
            Ok::<_, Error>((run, bed.rows_run(), calls))
        };
        let (roomy, rows, calls) = run(usize::MAX)?;
        assert_eq!((roomy.retries, calls), (0, vec![16; 5]));
        for (most, retries, batch, first) in
            [(15, 1, 8, vec![16]), (6, 2, 4, vec![16, 8]), (3, 3, 2, vec![16, 8, 4])]
        {
            let (tight, tight_rows, calls) = run(most)?;
            assert_eq!(tight.retries, retries, "{most} rows");
            // The limit is found once, in the first step.
            let (refused, done) = calls.split_at(retries);
            assert_eq!(refused, first, "{most} rows");
            assert_eq!(done, vec![batch; 5 * 16 / batch], "{most} rows");
            assert_eq!(tight.latents(), roomy.latents(), "{most} rows");
            assert_eq!(tight.outcome.score, roomy.outcome.score);
            // Work is charged once, however often it was tried.
            assert_eq!((tight.spent, tight_rows), (roomy.spent, rows), "{most} rows");
        }
    }
    Ok(())
}

#[test]
fn uneven_batches_are_covered_once() -> Result<()> {
    let mut bed = bed(6);
    bed.micro_batch = 7;
    let roomy = Bed::new(reward(sum)).guided(2.0).run("best-of-n", json!({"candidates": 7}), 5)?;
    let tight = bed.run("best-of-n", json!({"candidates": 7}), 5)?;
    assert_eq!(tight.latents(), roomy.latents());
    assert_eq!(bed.counter.calls.lock().unwrap()[..4], [14, 6, 6, 2]);
    Ok(())
}

#[test]
fn one_sample_that_does_not_fit_is_a_clear_error() {
    let bed = bed(1);
    let Err(error) = bed.run("best-of-n", json!({"candidates": 8}), 3) else {
        panic!("ran without memory")
    };
    assert!(error.is_out_of_memory());
    assert_eq!(
        error.to_string(),
        "out of memory in the U-Net, for one sample of 2 x 3 latent positions: make smaller \
         images, or free memory of the device"
    );
    assert_eq!(*bed.counter.calls.lock().unwrap(), [16, 8, 4, 2]);
    // Nothing is left behind.
    bed.counter.most.store(usize::MAX, Ordering::Relaxed);
    assert!(bed.run("best-of-n", json!({"candidates": 8}), 3).is_ok());
}

#[test]
fn other_errors_are_not_tried_again() -> Result<()> {
    let (bed, limit) = (bed(usize::MAX), RowLimit::default());
    let x = Tensor::zeros((2, 2, 2, 3), DType::F32, &Device::Cpu)?;
    let denoiser = SparingDenoiser::new(&bed.model, &limit);
    let t = Tensor::zeros(2, DType::F32, &Device::Cpu)?;
    let error = denoiser.predict(&x, &t, &[&bed.cond]).unwrap_err().to_string();
    assert!(error.starts_with("conditioning: 1 conditionings for a batch of 2"), "{error}");
    // A timestep too few.
    assert!(denoiser.predict(&x, &t.narrow(0, 0, 1)?, &[&bed.cond; 2]).is_err());
    assert_eq!(limit.retries(), 0);
    Ok(())
}

/// Has memory for so many images at a time.
struct Small {
    most: usize,
    calls: Mutex<Vec<usize>>,
}

impl Decoder for Small {
    fn decode(&self, latents: &Tensor) -> Result<Vec<RgbImage>> {
        let rows = latents.dim(0)?;
        self.calls.lock().unwrap().push(rows);
        if rows > self.most { Err(full()) } else { PackedDecoder.decode(latents) }
    }
}

#[test]
fn decoding_takes_fewer_images_at_a_time() -> Result<()> {
    let latents = Tensor::arange(0f32, 60.0, &Device::Cpu)?.reshape((5, 2, 2, 3))?;
    let (limit, small) = (RowLimit::default(), Small { most: 2, calls: Mutex::default() });
    let decoder = SparingDecoder::new(&small, &limit);
    let images = decoder.decode(&latents)?;
    let values: Vec<f32> = images.iter().flat_map(unpack).collect();
    assert_eq!(values, latents.flatten_all()?.to_vec1::<f32>()?);
    // The next images of the request begin with what is known.
    assert_eq!(decoder.decode(&latents)?.len(), 5);
    assert_eq!(*small.calls.lock().unwrap(), [5, 2, 2, 1, 2, 2, 1]);
    assert_eq!(limit.retries(), 1);
    let none = Small { most: 0, calls: Mutex::default() };
    let limit = RowLimit::default();
    let error = SparingDecoder::new(&none, &limit).decode(&latents).unwrap_err().to_string();
    assert!(error.starts_with("out of memory in the VAE, for one image of 2 x 3 "), "{error}");
    assert_eq!(*none.calls.lock().unwrap(), [5, 2, 1]);
    Ok(())
}
