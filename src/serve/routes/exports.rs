//! Comparisons and generations to take away: folders that open from a disk.

use std::fs::File;
use std::io::Read;

use actix_web::body::SizedStream;
use actix_web::web::Bytes;
use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::Stream;
use futures_util::stream;
use serde_json::{Map, Value, json};

use super::comparisons::{describe, find};
use super::generations::id_of;
use super::openapi::Refusals;
use super::{Data, apart, archive, caller};
use crate::serve::auth::Caller;
use crate::serve::compare::{Arm, CompareRequest, name_of};
use crate::serve::export::{self, Export};
use crate::serve::jobs;
use crate::serve::problem::{Body, Kind, Problem};
use crate::serve::server::Shared;
use crate::serve::store::{Comparison, Record};

/// Bytes that are read and sent at a time.
const PIECE: usize = 1 << 18;

/// A comparison that has ended, as a tar archive of a folder that opens from a disk: `index.html`,
/// the images, the bundles of its arms, `data.json` and `SHA256SUMS`.
#[utoipa::path(
    get,
    path = "/compare/{id}/export",
    tag = "comparisons",
    params(
        ("id" = String, Path, min_length = 1, max_length = 64,
            pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    ),
    responses(
        (status = 200, description = "The archive", content_type = "application/x-tar",
            body = Vec<u8>),
        (status = 409, description = "It has not ended", body = Body,
            content_type = "application/problem+json"),
        Refusals,
    )
)]
pub async fn comparison(shared: Data, request: HttpRequest) -> Result<HttpResponse, Problem> {
    respond(shared, &request, "comparison", find).await
}

/// A generation that has ended, as a comparison of one arm is exported.
#[utoipa::path(
    get,
    path = "/generations/{id}/export",
    tag = "generations",
    params(
        ("id" = String, Path, min_length = 1, max_length = 64,
            pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    ),
    responses(
        (status = 200, description = "The archive", content_type = "application/x-tar",
            body = Vec<u8>),
        (status = 409, description = "It has not ended", body = Body,
            content_type = "application/problem+json"),
        Refusals,
    )
)]
pub async fn generation(shared: Data, request: HttpRequest) -> Result<HttpResponse, Problem> {
    respond(shared, &request, "generation", of_one).await
}

async fn respond(
    shared: Data,
    request: &HttpRequest,
    what: &'static str,
    find: fn(&Shared, &Caller, &str) -> Result<Comparison, Problem>,
) -> Result<HttpResponse, Problem> {
    let (id, caller) = (id_of(request)?, caller(request));
    let spool = move |s: &Shared| -> Result<(String, File, u64), Problem> {
        let comparison = find(s, &caller, &id)?;
        let (name, arms) = (format!("{what}-{id}"), collect(s, &caller, &comparison)?);
        let file = Export { name: name.clone(), comparison, arms }.spool(s)?;
        let length = file.metadata().map_err(Problem::internal)?.len();
        Ok((name, file, length))
    };
    let (name, file, length) = apart(&shared, spool).await??;
    Ok(archive(&name).body(SizedStream::new(length, pieces(file))))
}

/// A generation as a comparison of one arm.
fn of_one(shared: &Shared, caller: &Caller, id: &str) -> Result<Comparison, Problem> {
    let Some(record) = jobs::record(shared, caller, id)? else {
        return Err(match jobs::live(shared, caller, id) {
            Some(live) if !live.state().is_final() => unfinished(id),
            _ => jobs::unknown(id),
        });
    };
    let Record { id, created_ms, client, request, planned, .. } = record;
    let (label, prompt) = (name_of(&request), request.prompt.clone());
    let asked = serde_json::to_value(&request).map_err(Problem::internal)?;
    let given = |(name, value): (String, Value)| (!value.is_null()).then_some((name, value));
    let base = match asked {
        Value::Object(fields) => fields.into_iter().filter_map(given).collect(),
        _ => Map::new(),
    };
    let request = CompareRequest { base, arms: vec![Map::new()], contract: None };
    let arm = Arm {
        label,
        id: Some(id.clone()),
        unmet: None,
        planned: Some(planned),
        planned_seconds: None,
    };
    Ok(Comparison { id, created_ms, client, prompt, request, arms: vec![arm] })
}

fn unfinished(id: &str) -> Problem {
    Problem::new(Kind::Conflict, format!("{id} has not ended; only what has is exported"))
}

/// The arms of a comparison that has ended.
fn collect(
    shared: &Shared,
    caller: &Caller,
    comparison: &Comparison,
) -> Result<Vec<export::Arm>, Problem> {
    let mut described = describe(shared, caller, comparison)?;
    if described["state"] == json!("running") {
        return Err(unfinished(&comparison.id));
    }
    let shown = described["arms"].as_array_mut().map(std::mem::take).unwrap_or_default();
    let each = shown.into_iter().map(|shown| {
        let record = match shown["id"].as_str() {
            Some(id) => jobs::record(shared, caller, id)?,
            None => None,
        };
        export::Arm::new(shown, record)
    });
    each.collect()
}

/// The bytes of a file, read away from the HTTP threads.
fn pieces(file: File) -> impl Stream<Item = std::io::Result<Bytes>> {
    let read = |mut file: File| {
        let mut piece = Vec::with_capacity(PIECE);
        file.by_ref().take(PIECE as u64).read_to_end(&mut piece)?;
        std::io::Result::Ok((piece, file))
    };
    stream::unfold(Some(file), move |file| async move {
        let file = file?;
        match web::block(move || read(file)).await {
            Ok(Ok((piece, _))) if piece.is_empty() => None,
            Ok(Ok((piece, file))) => Some((Ok(piece.into()), Some(file))),
            Ok(Err(error)) => Some((Err(error), None)),
            Err(error) => Some((Err(std::io::Error::other(error)), None)),
        }
    })
}
