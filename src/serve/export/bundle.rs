//! The bundle of a generation of the history.

use serde_json::Value;

use crate::engine::bundle::{Bundle, Contents};
use crate::serve::answer;
use crate::serve::problem::{Kind, Problem};
use crate::serve::server::Shared;
use crate::serve::store::Record;

/// A tar archive with which it can be run again. Blocks.
///
/// # Errors
/// It has not completed, or a file of it cannot be read.
pub fn bundle(shared: &Shared, record: Record) -> Result<Vec<u8>, Problem> {
    let Some(text) = record.answer.as_deref() else {
        let detail = format!("{} is {}; only completed work has a bundle", record.id, record.state);
        return Err(Problem::new(Kind::Conflict, detail));
    };
    let answer: Value = serde_json::from_str(text).map_err(Problem::internal)?;
    let images = shared.store.images(&answer::images(&answer)?)?;
    let previews = shared.store.images(&answer::previews(&answer)?)?;
    let settings = &shared.settings;
    let environment = [
        ("program", format!("diffusion-sharpening {}", env!("CARGO_PKG_VERSION"))),
        ("system", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)),
        ("device", settings.device.to_string()),
        ("dtype", settings.dtype.to_string()),
        ("vae_dtype", settings.vae_dtype.to_string()),
    ];
    let bundle = Bundle::new(Contents {
        id: record.id,
        created_ms: record.created_ms,
        request: record.request,
        resolved: record.resolved,
        environment: environment.map(|(name, value)| (name.to_owned(), value)).into(),
        answer,
        images,
        previews,
    })?;
    let mut bytes = Vec::new();
    bundle.write(&mut bytes)?;
    Ok(bytes)
}
