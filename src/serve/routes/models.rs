//! Loading and unloading models and adapters, for admins. Ids are those of the models' folder,
//! never paths.

use actix_web::{HttpResponse, web};

use super::openapi::Refusals;
use super::{Data, apart};
use crate::engine::Backend;
use crate::engine::request::ModelInfo;
use crate::serve::problem::{Kind, Problem};
use crate::serve::server::{Shared, warm_up};
use crate::{Error, Result};

/// Loads a model, or loads it anew; answers when it has made a first image.
#[utoipa::path(
    put,
    path = "/models/{id}",
    tag = "server",
    params(("id" = String, Path, description = "Name in the folder of models")),
    responses((status = 200, description = "Loaded", body = ModelInfo), Refusals)
)]
pub async fn load(shared: Data, id: web::Path<String>) -> Result<HttpResponse, Problem> {
    let info = with(&shared, move |shared, backend| {
        let old = backend.models().into_iter().find(|model| model.id == *id);
        let info = backend.load(&id, &mut |alone, model| warm_up(shared, alone, model))?;
        if let Some(old) = old {
            shared.metrics.unloaded(&old);
        }
        shared.metrics.model(&info, true);
        Ok(info)
    })
    .await?;
    Ok(HttpResponse::Ok().json(info))
}

/// Unloads a model; work that has begun with it goes on.
#[utoipa::path(
    delete,
    path = "/models/{id}",
    tag = "server",
    params(("id" = String, Path, description = "A loaded model")),
    responses((status = 204, description = "Unloaded"), Refusals)
)]
pub async fn unload(shared: Data, id: web::Path<String>) -> Result<HttpResponse, Problem> {
    with(&shared, move |shared, backend| {
        let old = backend.models().into_iter().find(|model| model.id == *id);
        backend.unload(&id)?;
        if let Some(old) = old {
            shared.metrics.unloaded(&old);
        }
        Ok(())
    })
    .await?;
    Ok(HttpResponse::NoContent().finish())
}

/// Reads an adapter from the model's folder of adapters, or reads it anew.
#[utoipa::path(
    put,
    path = "/models/{id}/adapters/{name}",
    tag = "server",
    params(
        ("id" = String, Path, description = "A loaded model"),
        ("name" = String, Path, description = "Name in its folder of adapters")
    ),
    responses((status = 204, description = "Loaded"), Refusals)
)]
pub async fn load_adapter(
    shared: Data,
    path: web::Path<(String, String)>,
) -> Result<HttpResponse, Problem> {
    with(&shared, move |_, backend| backend.load_adapter(&path.0, &path.1)).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// Unloads an adapter; work that has begun with it goes on.
#[utoipa::path(
    delete,
    path = "/models/{id}/adapters/{name}",
    tag = "server",
    params(
        ("id" = String, Path, description = "A loaded model"),
        ("name" = String, Path, description = "A loaded adapter")
    ),
    responses((status = 204, description = "Unloaded"), Refusals)
)]
pub async fn unload_adapter(
    shared: Data,
    path: web::Path<(String, String)>,
) -> Result<HttpResponse, Problem> {
    with(&shared, move |_, backend| backend.unload_adapter(&path.0, &path.1)).await?;
    Ok(HttpResponse::NoContent().finish())
}

async fn with<T: Send + 'static>(
    shared: &Data,
    change: impl FnOnce(&Shared, &dyn Backend) -> Result<T> + Send + 'static,
) -> Result<T, Problem> {
    let backend = shared.backend()?;
    let changed = apart(shared, move |shared| change(shared, backend.as_ref())).await?;
    changed.map_err(|error| match error {
        Error::Unknown { .. } => Problem::new(Kind::NotFound, error.to_string()),
        // Who may load models may read what is wrong with their files.
        Error::File { .. } | Error::Weights(_) => {
            Problem::new(Kind::InvalidValue, error.to_string())
        }
        error => error.into(),
    })
}
