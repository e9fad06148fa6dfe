//! Laws of the captions and their splits.

use std::collections::HashSet;

use diffusion_sharpening::data::scenes::{Caption, Category, Split};
use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

fn caption() -> impl Strategy<Value = (Category, Caption)> {
    (0..6_usize, any::<u64>()).prop_map(|(k, seed)| {
        let category = Category::ALL[k];
        (category, Caption::sample(category, &mut ChaCha8Rng::seed_from_u64(seed)))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn text_reads_back((category, caption) in caption()) {
        prop_assert_eq!(Caption::parse(&caption.to_string()).unwrap(), caption.clone());
        let shouted = format!("  {} ", caption.to_string().to_uppercase().replace(' ', "  "));
        prop_assert_eq!(Caption::parse(&shouted).unwrap(), caption.clone());
        prop_assert_eq!(caption.category(), category);
    }

    #[test]
    fn an_unknown_word_is_named((_, caption) in caption(), at in any::<prop::sample::Index>()) {
        let text = caption.to_string();
        let mut words: Vec<&str> = text.split(' ').collect();
        let at = at.index(words.len());
        // Without its "of" it is "left" that cannot be read.
        prop_assume!(words[at] != "of");
        words[at] = "zebra";
        let error = Caption::parse(&words.join(" ")).unwrap_err().to_string();
        prop_assert!(error.contains(if words.get(at + 1) == Some(&"of") { "zebra" } else { "'zebra'" }), "{}", error);
    }

    #[test]
    fn combination_ignores_order((_, caption) in caption()) {
        let mut turned = caption.clone();
        turned.objects.reverse();
        turned.relation = caption.relation.map(|r| r.inverse());
        prop_assert_eq!(turned.combination(), caption.combination());
        prop_assert_eq!(Split::of(&turned), Split::of(&caption));
        let read = Caption::parse(&caption.combination()).unwrap();
        prop_assert_eq!(read.combination(), caption.combination());
    }

    #[test]
    fn never_panics_on_any_text(text in ".{0,60}", words in prop::collection::vec("(a|an|two|left|of|red|and|star|stars|dotted|above)", 0..9)) {
        let _ = Caption::parse(&text);
        let _ = Caption::parse(&words.join(" "));
    }
}

#[test]
fn splits_share_no_combination() {
    let of = |split: Split| -> HashSet<String> {
        split.prompts(1200).iter().map(Caption::combination).collect()
    };
    let (train, validation, test) = (of(Split::Train), of(Split::Validation), of(Split::Test));
    assert!(train.is_disjoint(&validation) && train.is_disjoint(&test));
    assert!(validation.is_disjoint(&test));
}

#[test]
fn prompts_are_stable() {
    let texts: Vec<String> = Split::Test.prompts(12).iter().map(Caption::to_string).collect();
    assert_eq!(texts, GOLDEN);
    // A longer list begins with the shorter one.
    assert_eq!(Split::Test.prompts(60)[..12], Split::Test.prompts(12)[..]);
}

const GOLDEN: [&str; 12] = [
    "a purple star and a green ring",
    "a star and a circle and a triangle",
    "a dotted ring and a dotted circle",
    "a purple ring above a blue square",
    "three purple triangles",
    "a white ring below a plain green triangle",
    "a black heart and a black square",
    "a square",
    "a plain blue ring",
    "a black heart right of a yellow circle",
    "four white hearts",
    "a dotted black square above a purple circle",
];
