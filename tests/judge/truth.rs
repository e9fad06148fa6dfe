//! Accuracy on scenes whose truth is known.

use diffusion_sharpening::data::scenes::evaluate::Summary;
use diffusion_sharpening::data::scenes::judge::judge_detections;
use diffusion_sharpening::data::scenes::render::render;
use diffusion_sharpening::data::scenes::{
    Caption, Category, ClaimKind, Colour, Judgement, Relation, Scene, Shape, Texture, detect, judge,
};
use image::{Rgb, RgbImage};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::images::*;

fn scene(seed: u64, index: u64) -> (Caption, Scene, ChaCha8Rng) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index);
    let category = Category::ALL[(index % Category::ALL.len() as u64) as usize];
    let caption = Caption::sample(category, &mut rng);
    let scene = Scene::sample(&caption, &mut rng);
    (caption, scene, rng)
}

/// `n` scenes, or `JUDGE_SCALE` times as many for finer numbers.
fn scaled(n: u64) -> u64 {
    let scale = std::env::var("JUDGE_SCALE").ok().and_then(|s| s.parse().ok());
    n * scale.unwrap_or(1)
}

/// Judges `scaled(n)` scenes as `draw` draws them.
fn measure(
    seed: u64,
    n: u64,
    draw: impl Fn(&Scene, &mut ChaCha8Rng) -> RgbImage + Sync,
) -> Summary {
    let judged: Vec<_> = (0..scaled(n))
        .into_par_iter()
        .map(|i| {
            let (caption, scene, mut rng) = scene(seed, i);
            let judgement = judge(&draw(&scene, &mut rng), &caption);
            if std::env::var_os("JUDGE_SHOW").is_some() {
                for v in judgement.verdicts.iter().filter(|v| !v.holds) {
                    println!("  {seed}/{i} '{caption}': {} {:.2}", v.claim, v.score);
                }
            }
            (caption.category(), judgement)
        })
        .collect();
    let mut summary = Summary::default();
    judged.iter().for_each(|(category, judgement)| summary.add(*category, judgement));
    summary
}

fn row(name: &str, s: &Summary) {
    print!("{name:<26}");
    for &kind in ClaimKind::ALL {
        print!(" {:>8.4}", s.kind_accuracy(kind));
    }
    println!(" {:>8.4}  score {:.4}", s.claim_accuracy(), s.mean_score());
}

fn header(title: &str) {
    print!("\n{title:<26}");
    ClaimKind::ALL.iter().for_each(|k| print!(" {:>8}", k.word()));
    println!(" {:>8}", "all");
}

#[test]
fn true_claims_hold() {
    header("true claims hold");
    for (w, h, n) in
        [(64, 64, 900), (48, 48, 240), (96, 96, 180), (128, 128, 90), (96, 64, 180), (64, 96, 180)]
    {
        let summary = measure(1, n, |s, _| render(s, w, h));
        row(&format!("{w}x{h}"), &summary);
        assert!(summary.claim_accuracy() >= 0.998, "{w}x{h}: {summary}");
        assert!(summary.mean_score() >= 0.97, "{w}x{h}: {summary}");
    }
}

#[test]
fn large_images_are_judged_too() {
    let summary = measure(2, 12, |s, _| render(s, 512, 384));
    assert!(summary.claim_accuracy() >= 0.99, "{summary}");
}

#[test]
fn small_images_keep_shape_colour_and_place() {
    header("small images");
    for size in [16, 24, 32, 40] {
        row(&format!("{size}x{size}"), &measure(3, 150, |s, _| render(s, size, size)));
    }
    let summary = measure(3, 150, |s, _| render(s, 32, 32));
    for kind in [ClaimKind::Colour, ClaimKind::Relation, ClaimKind::Count, ClaimKind::Shape] {
        assert!(summary.kind_accuracy(kind) >= 0.97, "{kind:?}: {summary}");
    }
}

#[test]
fn damage_of_a_small_autoencoder_flips_no_claims() {
    header("damaged (64x64)");
    let size = 64;
    type Damage = fn(&Scene, &mut ChaCha8Rng) -> RgbImage;
    let kinds: [(&str, Damage); 8] = [
        ("blur 0.7 px", |s, _| blur(&render(s, 64, 64), 0.7)),
        ("noise 8", |s, r| uniform_noise(&render(s, 64, 64), 8.0, r)),
        ("shift of the image 20", |s, r| colour_shift(&render(s, 64, 64), 20.0, r)),
        ("shift of each object 20", |s, r| object_shift(s, 64, 20.0, r)),
        ("half texture", |s, _| faint_texture(s, 64)),
        ("half texture, noise 8", |s, r| uniform_noise(&faint_texture(s, 64), 8.0, r)),
        ("blur 0.7, noise 8", |s, r| uniform_noise(&blur(&render(s, 64, 64), 0.7), 8.0, r)),
        ("all, blur 0.5", |s, r| {
            let image = colour_shift(&blur(&faint_texture(s, 64), 0.5), 15.0, r);
            uniform_noise(&image, 8.0, r)
        }),
    ];
    for (name, damage) in kinds {
        let summary = measure(4, 150, damage);
        row(name, &summary);
        assert!(summary.claim_accuracy() >= 0.98, "{name}: {summary}");
    }
    for wide in [48, 96] {
        let summary =
            measure(5, 60, |s, r| uniform_noise(&blur(&render(s, wide, size), 0.7), 8.0, r));
        row(&format!("blur, noise at {wide}x{size}"), &summary);
        assert!(summary.claim_accuracy() >= 0.98, "{wide}: {summary}");
    }
}

fn others<T: Copy>(all: &[T], allowed: impl Fn(T) -> bool, rng: &mut ChaCha8Rng) -> Option<T> {
    let rest: Vec<T> = all.iter().copied().filter(|&v| allowed(v)).collect();
    (!rest.is_empty()).then(|| rest[rng.random_range(0..rest.len())])
}

/// The caption with one claim changed so that it is false for `scene`.
fn falsify(
    caption: &Caption,
    scene: &Scene,
    kind: ClaimKind,
    object: usize,
    rng: &mut ChaCha8Rng,
) -> Option<Caption> {
    let mut changed = caption.clone();
    let o = &mut changed.objects[object];
    let drawn = &scene.objects;
    match kind {
        ClaimKind::Shape => {
            o.shape = others(Shape::ALL, |s| drawn.iter().all(|d| d.shape != s), rng)?;
        }
        ClaimKind::Colour => {
            o.colour?;
            let free = |c| drawn.iter().all(|d| d.shape != o.shape || d.colour != c);
            o.colour = Some(others(Colour::ALL, free, rng)?);
        }
        ClaimKind::Texture => {
            o.texture?;
            let free = |t| drawn.iter().all(|d| d.shape != o.shape || d.texture != t);
            o.texture = Some(others(Texture::ALL, free, rng)?);
        }
        ClaimKind::Relation => {
            if object > 0 {
                return None;
            }
            // The layout keeps the offset across well below the one along, so
            // that the two relations at right angles are false too.
            let drawn = caption.relation?;
            changed.relation = Some(others(Relation::ALL, |r| r != drawn, rng)?);
        }
        ClaimKind::Count => {
            let n = o.count?;
            let near = [n.wrapping_sub(1), n + 1];
            o.count = Some(others(&near, |m| (1..=4).contains(&m), rng)?);
        }
    }
    Some(changed)
}

#[test]
fn false_claims_are_rejected() {
    header("false claims rejected");
    for (w, h, n) in [(64, 64, 600), (48, 48, 180), (96, 96, 120), (128, 128, 90), (96, 64, 120)] {
        let results: Vec<(ClaimKind, bool, String)> = (0..scaled(n))
            .into_par_iter()
            .flat_map_iter(|i| {
                let (caption, scene, mut rng) = scene(6, i);
                let image = render(&scene, w, h);
                let detections = detect(&image);
                let mut out = Vec::new();
                for &kind in ClaimKind::ALL {
                    for object in 0..caption.objects.len() {
                        let Some(changed) = falsify(&caption, &scene, kind, object, &mut rng)
                        else {
                            continue;
                        };
                        let judgement = judge_detections(&detections, &changed);
                        let verdict = judgement
                            .verdicts
                            .iter()
                            .find(|v| v.claim.kind == kind && v.claim.object == object)
                            .unwrap();
                        let text = format!("'{caption}' said '{changed}' {:.2}", verdict.score);
                        out.push((kind, !verdict.holds && !judgement.all_hold, text));
                    }
                }
                out
            })
            .collect();
        print!("{:<26}", format!("{w}x{h}"));
        for &kind in ClaimKind::ALL {
            let of: Vec<_> = results.iter().filter(|r| r.0 == kind).collect();
            let rejected = of.iter().filter(|r| r.1).count();
            let share = rejected as f64 / of.len() as f64;
            print!(" {share:>8.4}");
            let missed: Vec<&String> = of.iter().filter(|r| !r.1).map(|r| &r.2).collect();
            assert!(of.len() > 10 && share >= 0.99, "{kind:?} at {w}x{h}: {missed:#?}");
        }
        println!(" {:>8.4}", results.iter().filter(|r| r.1).count() as f64 / results.len() as f64);
    }
}

#[test]
fn scores_fall_with_damage() {
    let fall = |name: &str,
                levels: &[f64],
                damage: &(dyn Fn(&Scene, f64, &mut ChaCha8Rng) -> RgbImage + Sync)| {
        let means: Vec<f64> =
            levels.iter().map(|&l| measure(7, 36, |s, r| damage(s, l, r)).mean_score()).collect();
        println!("{name}: {levels:?} -> {means:.3?}");
        for pair in means.windows(2) {
            assert!(pair[1] <= pair[0] + 0.01, "{name}: {means:?}");
        }
        assert!(means[0] - means[means.len() - 1] > 0.5, "{name}: {means:?}");
    };
    println!();
    fall("gaussian noise", &[0.0, 10.0, 20.0, 35.0, 50.0, 80.0, 120.0], &|s, level, r| {
        gaussian_noise(&render(s, 64, 64), level, r)
    });
    fall("blur", &[0.0, 0.7, 1.2, 2.0, 3.0, 5.0, 8.0], &|s, level, _| {
        blur(&render(s, 64, 64), level)
    });
    fall("fading", &[0.0, 0.25, 0.5, 0.7, 0.85, 0.95], &|s, level, _| {
        let mut out = render(s, 64, 64);
        let bare = render(&Scene { objects: vec![], ..s.clone() }, 64, 64);
        for (a, b) in out.iter_mut().zip(bare.iter()) {
            *a = (f64::from(*a) * (1.0 - level) + f64::from(*b) * level).round() as u8;
        }
        out
    });
}

#[test]
fn order_around_and_does_not_matter() {
    for i in 0..120 {
        let (caption, scene, _) = scene(8, i);
        let image = render(&scene, 64, 64);
        let said = judge(&image, &caption);
        let mut swapped = caption.clone();
        swapped.objects.reverse();
        swapped.relation = caption.relation.map(|r| r.inverse());
        let again = judge(&image, &swapped);
        assert!((said.score - again.score).abs() < 1e-9, "{caption}");
        assert_eq!(said.all_hold, again.all_hold, "{caption}");
        let sorted = |j: &Judgement| {
            let mut scores: Vec<i64> =
                j.verdicts.iter().map(|v| (v.score * 1e9).round() as i64).collect();
            scores.sort_unstable();
            scores
        };
        assert_eq!(sorted(&said), sorted(&again), "{caption}");
    }
}

#[test]
fn an_article_allows_more_and_a_number_does_not() {
    let said = |text: &str| Caption::parse(text).unwrap();
    let scene = Scene::sample(&said("three red stars"), &mut ChaCha8Rng::seed_from_u64(12));
    let image = render(&scene, 64, 64);
    for text in ["a red star", "three red stars", "three stars", "a star and a red star"] {
        assert!(judge(&image, &said(text)).all_hold, "{text}");
    }
    for text in ["two red stars", "four red stars", "one star", "a star and a circle"] {
        assert!(!judge(&image, &said(text)).all_hold, "{text}");
    }
}

/// Objects that touch are parted where their colours meet, or by their outlines.
#[test]
fn touching_objects_are_parted() {
    let caption = Caption::parse("a red circle left of a blue square").unwrap();
    let two = Caption::parse("two green circles").unwrap();
    for gap in [0.0, -0.01] {
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let mut scene = Scene::sample(&caption, &mut rng);
        (scene.objects[0].x, scene.objects[0].y, scene.objects[0].radius) = (0.3, 0.5, 0.18);
        (scene.objects[1].x, scene.objects[1].y, scene.objects[1].radius) =
            (0.3 + 0.18 * (0.975 + 0.84) + gap, 0.5, 0.18);
        let judgement = judge(&render(&scene, 64, 64), &caption);
        assert!(judgement.all_hold, "{gap}: {judgement:#?}");
        for (object, x) in scene.objects.iter_mut().zip([0.3, 0.3 + 0.36 * 0.97 + gap]) {
            (object.shape, object.colour, object.x) = (Shape::Circle, Colour::Green, x);
        }
        let judgement = judge(&render(&scene, 64, 64), &two);
        assert!(judgement.all_hold, "{gap}: {judgement:#?}");
    }
}

#[test]
fn an_empty_image_shows_nothing() {
    let flat = RgbImage::from_pixel(64, 64, Rgb([150, 150, 150]));
    let gradient = RgbImage::from_fn(64, 64, |x, y| Rgb([x as u8 * 4, y as u8 * 4, 128]));
    for image in [flat, gradient] {
        for i in 0..60 {
            let (caption, ..) = scene(10, i);
            let judgement = judge(&image, &caption);
            assert!(judgement.verdicts.iter().all(|v| !v.holds), "{caption}: {judgement:#?}");
            assert!(judgement.score < 0.1, "{caption}: {}", judgement.score);
        }
    }
}

#[test]
fn claims_read_as_sentences() {
    let image = RgbImage::new(64, 64);
    let texts = |text: &str| -> Vec<String> {
        let caption = Caption::parse(text).unwrap();
        judge(&image, &caption).verdicts.into_iter().map(|v| v.claim.text).collect()
    };
    assert_eq!(
        texts("a striped red circle left of an orange square"),
        [
            "there is a circle",
            "the circle is red",
            "the circle is striped",
            "there is a square",
            "the square is orange",
            "the red circle is left of the orange square",
        ]
    );
    assert_eq!(
        texts("three red stars and one blue heart"),
        [
            "there are stars",
            "the stars are red",
            "three red stars",
            "there is a heart",
            "the heart is blue",
            "one blue heart",
        ]
    );
}

fn any_image() -> impl Strategy<Value = RgbImage> {
    let side = prop_oneof![Just(1_u32), Just(3), 1_u32..40, Just(64), Just(500)];
    (side.clone(), side, 0..4, any::<u64>()).prop_map(|(w, h, kind, seed)| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (a, b): ([u8; 3], [u8; 3]) = (rng.random(), rng.random());
        RgbImage::from_fn(w, h, |x, y| match kind {
            0 => Rgb(a),
            1 => Rgb(rng.random()),
            2 => {
                let t = f64::from(x + y) / f64::from(w + h);
                Rgb(std::array::from_fn(|c| {
                    (f64::from(a[c]) * (1.0 - t) + f64::from(b[c]) * t) as u8
                }))
            }
            _ => Rgb(if rng.random_bool(0.1) || (x / 7 + y / 5) % 2 == 0 { a } else { b }),
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn never_panics_and_stays_in_range(image in any_image(), index in 0_u64..600) {
        let (caption, ..) = scene(11, index);
        let judgement = judge(&image, &caption);
        prop_assert!(!judgement.verdicts.is_empty());
        for v in &judgement.verdicts {
            prop_assert!(v.score.is_finite() && (0.0..=1.0).contains(&v.score), "{v:?}");
            prop_assert_eq!(v.holds, v.score >= 0.5);
        }
        prop_assert!((0.0..=1.0).contains(&judgement.score));
        prop_assert_eq!(judgement.all_hold, judgement.verdicts.iter().all(|v| v.holds));
    }
}
