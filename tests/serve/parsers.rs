//! Whatever bytes others send: an answer or an error that says what is wrong, and never a panic.

use diffusion_sharpening::engine::bundle::Bundle;
use diffusion_sharpening::engine::request::GenerateRequest;
use diffusion_sharpening::sdxl::tensor_file::TensorFile;
use diffusion_sharpening::serve::{Overrides, Settings};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::TestRunner;
use serde_json::{Map, Value, json};

use crate::harness::server;

/// A tensor in a header: type, shape, and where it lies.
type Described = (&'static str, Vec<u64>, (u64, u64));

fn runner(cases: u32) -> TestRunner {
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config)
}

fn number() -> impl Strategy<Value = Value> {
    prop_oneof![
        (0_u64..40).prop_map(|n| json!(n)),
        any::<u64>().prop_map(|n| json!(n)),
        any::<i64>().prop_map(|n| json!(n)),
        any::<f64>().prop_map(|x| json!(x)),
        select(vec![json!(0.0), json!(1e308), json!(u64::MAX), json!(1e19)]),
    ]
}

fn anything() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        number(),
        "[a-z]{0,6}|\\PC{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        let known = select(vec!["name", "f", "v", "y"]).prop_map(str::to_owned);
        let key = prop_oneof![known, "[a-z]{1,3}"];
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            btree_map(key, inner, 0..4)
                .prop_map(|all| Value::Object(all.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

const FIELDS: [&str; 18] = [
    "prompt",
    "negative_prompt",
    "model",
    "adapter",
    "method",
    "seed",
    "width",
    "height",
    "steps",
    "guidance_scale",
    "guidance_rescale",
    "solver",
    "n",
    "reward",
    "budget",
    "output_format",
    "previews",
    "other",
];

#[test]
fn every_body_is_answered() {
    let server = server();
    let body = (
        btree_map(select(FIELDS.to_vec()), anything(), 0..4),
        prop_oneof![3 => Just(Some("a")), 1 => Just(None)],
    );
    runner(300)
        .run(&body, |(fields, prompt)| {
            let mut body: Map<String, Value> =
                fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            if let Some(prompt) = prompt {
                body.insert("prompt".to_owned(), prompt.into());
            }
            for (path, body) in [
                ("/generate", json!(body)),
                ("/compare", json!({"base": body, "arms": [{"steps": 1}]})),
                ("/v1/images/generations", json!(body)),
            ] {
                let answer = server.send("POST", path, &[], &body);
                prop_assert!(
                    matches!(answer.status, 200 | 400 | 422),
                    "{path} {body}: {} {}",
                    answer.status,
                    answer.text()
                );
            }
            if let Ok(request) = serde_json::from_value::<GenerateRequest>(json!(body)) {
                let again = serde_json::to_value(&request).unwrap();
                prop_assert_eq!(serde_json::from_value::<GenerateRequest>(again).unwrap(), request);
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_bundle_is_whole_or_refused() {
    let server = server();
    let made = server.post(json!({"prompt": "a", "steps": 1, "previews": 1})).json();
    let path = format!("/generations/{}/bundle", made["id"].as_str().unwrap());
    let whole = server.get(&path).bytes;
    let bundle = Bundle::read(&whole[..]).unwrap();
    let change = (any::<prop::sample::Index>(), any::<u8>());
    runner(300)
        .run(&(vec(change, 1..6), any::<prop::sample::Index>()), |(changes, end)| {
            let mut bytes = whole.clone();
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            // What does not matter may differ: times, owners, what is behind the files.
            if let Ok(read) = Bundle::read(&bytes[..]) {
                prop_assert_eq!(&read.answer, &bundle.answer);
                prop_assert_eq!(&read.images, &bundle.images);
            }
            let _ = Bundle::read(&bytes[..end.index(bytes.len())]);
            Ok(())
        })
        .unwrap();
    // The two blocks of zeros at the end say nothing.
    for end in 0..whole.len() / 512 - 2 {
        assert!(Bundle::read(&whole[..end * 512]).is_err(), "{end} blocks");
    }
}

#[test]
fn a_weights_file_is_as_long_as_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let size = prop_oneof![0_u64..9, any::<u64>(), Just(u64::MAX), Just(1 << 61)];
    let tensor = (
        select(vec!["F32", "BF16", "U8", "F4", "F64", "X"]),
        vec(size.clone(), 0..3),
        (size.clone(), size.clone()),
    );
    let file = (
        btree_map("[a-c]", tensor, 0..3),
        prop_oneof![Just(None), size.prop_map(Some)],
        0..40_usize,
    );
    runner(400)
        .run(&file, |(tensors, length, behind)| {
            let entry = |(name, (dtype, shape, (from, to))): (String, Described)| {
                (name, json!({"dtype": dtype, "shape": shape, "data_offsets": [from, to]}))
            };
            let header = Value::Object(tensors.into_iter().map(entry).collect()).to_string();
            let length = length.unwrap_or(header.len() as u64).to_le_bytes();
            let bytes = [&length[..], header.as_bytes(), &vec![0; behind]].concat();
            std::fs::write(&path, bytes).unwrap();
            if let Ok(file) = TensorFile::open(&path) {
                for name in file.names() {
                    let _ = file.read(&name, &candle_core::Device::Cpu);
                }
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_configuration_is_read_or_its_key_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serve.toml");
    let defaults: toml::Table = toml::from_str(&Settings::default().to_toml().unwrap()).unwrap();
    let names: Vec<String> = defaults.keys().cloned().collect();
    let value = prop_oneof![
        any::<i64>().prop_map(|n| n.to_string()),
        any::<bool>().prop_map(|b| b.to_string()),
        "[a-z0-9:]{0,9}".prop_map(|text| format!("{text:?}")),
        Just("[\"a\"]".to_owned()),
        "\\PC{0,6}",
    ];
    runner(300)
        .run(&(select(names), value), |(name, value)| {
            std::fs::write(&path, format!("{name} = {value}\n")).unwrap();
            match Settings::resolve(Some(&path), Overrides::default()) {
                Ok(settings) => {
                    std::fs::write(&path, settings.to_toml().unwrap()).unwrap();
                    let again = Settings::resolve(Some(&path), Overrides::default()).unwrap();
                    prop_assert_eq!(again, settings);
                }
                Err(error) => {
                    let error = error.to_string();
                    prop_assert!(error.contains(&name) || error.contains("line 1"), "{}", error);
                }
            }
            Ok(())
        })
        .unwrap();
}

/// What `resolved` says repeats the request: not nearly.
#[test]
fn numbers_come_back_to_the_bit() {
    let test = |scale: f64| {
        let request = json!({"prompt": "a", "guidance_scale": scale}).to_string();
        let read: GenerateRequest = serde_json::from_str(&request).unwrap();
        prop_assert_eq!(read.guidance_scale.map(f64::to_bits), Some(scale.to_bits()));
        Ok(())
    };
    runner(20_000).run(&(0.0..100.0_f64), test).unwrap();
    runner(20_000)
        .run(&any::<f64>().prop_filter("JSON has no others", |x| x.is_finite()), test)
        .unwrap();
}
