//! The CLIP dual encoder against transformers (fixture: `tools/clip_fixture.py`).

mod common;

use common::{fixtures, read, relative_error};
use diffusion_sharpening::rewards::Reward;
use diffusion_sharpening::rewards::scene_clip::SceneClip;
use diffusion_sharpening::sdxl::Clip;
use image::RgbImage;

fn images() -> Vec<RgbImage> {
    let stored = &read(&fixtures().join("clip/reference.safetensors"))["images"];
    let (count, height, width, _) = stored.dims4().unwrap();
    let bytes = stored.flatten_all().unwrap().to_vec1::<u8>().unwrap();
    bytes
        .chunks(bytes.len() / count)
        .map(|b| RgbImage::from_raw(width as u32, height as u32, b.to_vec()).unwrap())
        .collect()
}

#[test]
fn embeddings_agree_with_transformers() {
    let folder = fixtures().join("clip");
    let clip = Clip::from_folder(&folder).unwrap();
    let reference = read(&folder.join("reference.safetensors"));
    let texts: Vec<String> =
        serde_json::from_str(&std::fs::read_to_string(folder.join("texts.json")).unwrap()).unwrap();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let error = relative_error(&clip.embed_texts(&texts).unwrap(), &reference["text_embeds"]);
    assert!(error < 1e-4, "texts differ by {error:.2e}");
    let error = relative_error(&clip.embed_images(&images()).unwrap(), &reference["image_embeds"]);
    assert!(error < 1e-4, "images differ by {error:.2e}");
}

/// A score depends on its own image and prompt only, and is their cosine.
#[test]
fn the_reward_is_the_cosine_of_each_pair() {
    let folder = fixtures().join("clip");
    let reward = SceneClip::from_folder(&folder).unwrap();
    let images = images();
    let prompts = ["a red circle", "three striped blue hearts", "a red circle"];
    let together = reward.score(&images, &prompts).unwrap();
    let reference = read(&folder.join("reference.safetensors"));
    let rows = |key: &str| reference[key].to_vec2::<f32>().unwrap();
    let (image, text) = (rows("image_embeds"), rows("text_embeds"));
    for (i, t) in [(0, 0), (1, 1), (2, 0)] {
        let cosine: f32 = image[i].iter().zip(&text[t]).map(|(a, b)| a * b).sum();
        assert!((together[i] - f64::from(cosine)).abs() < 1e-5);
        let alone = reward.score(&images[i..=i], &prompts[i..=i]).unwrap();
        assert!((alone[0] - together[i]).abs() < 1e-6);
    }
    assert!(reward.score(&[], &[]).unwrap().is_empty());
    // Any size is scaled to the encoder's square.
    let large = image::imageops::resize(&images[0], 40, 24, image::imageops::FilterType::Nearest);
    assert!(reward.score(&[large], &["a ring"]).unwrap()[0].is_finite());
}

#[test]
fn a_broken_folder_names_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let missing = |_: &str| Clip::from_folder(folder.path()).unwrap_err().to_string();
    assert!(missing("").contains("config.json"));
    for name in ["config.json", "preprocessor_config.json"] {
        std::fs::copy(fixtures().join("clip").join(name), folder.path().join(name)).unwrap();
    }
    assert!(missing("").contains("no weights here"), "{}", missing(""));
}
