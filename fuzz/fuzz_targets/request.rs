//! A generation request as JSON, planned by the engine: what can be planned, asked for again as it
//! was resolved, is planned the same.

#![no_main]

use diffusion_sharpening::engine::request::GenerateRequest;
use diffusion_sharpening::engine::{Backend, request_of};
use diffusion_sharpening_fuzz::engine;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(request) = serde_json::from_slice::<GenerateRequest>(data) else { return };
    let text = serde_json::to_string(&request).expect("a request is JSON");
    let again: GenerateRequest = serde_json::from_str(&text).expect("it reads back");
    assert_eq!(again, request);
    let Ok(planned) = engine().plan(&request) else { return };
    let again = engine().plan(&request_of(&planned.resolved));
    let again = again.unwrap_or_else(|e| panic!("{e}: {:?}", planned.resolved));
    assert_eq!((again.cost, again.resolved), (planned.cost, planned.resolved));
});
