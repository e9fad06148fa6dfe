//! The page at `/` and its files, compiled into the binary.

use std::sync::LazyLock;

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse};
use sha2::{Digest, Sha256};

/// Nothing from elsewhere, nothing inline; images are made from answers.
const CSP: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// One embedded file.
pub struct Asset {
    pub path: &'static str,
    content_type: &'static str,
    bytes: &'static [u8],
}

macro_rules! asset {
    ($path:literal, $file:literal, $content_type:literal) => {
        Asset {
            path: $path,
            content_type: $content_type,
            bytes: include_bytes!(concat!("../../static/", $file)),
        }
    };
}

pub const ASSETS: [Asset; 15] = [
    asset!("/", "index.html", "text/html; charset=utf-8"),
    asset!("/api.js", "api.js", "text/javascript; charset=utf-8"),
    asset!("/app.js", "app.js", "text/javascript; charset=utf-8"),
    asset!("/arms.js", "arms.js", "text/javascript; charset=utf-8"),
    asset!("/docs", "docs.html", "text/html; charset=utf-8"),
    asset!("/docs.js", "docs.js", "text/javascript; charset=utf-8"),
    asset!("/history.js", "history.js", "text/javascript; charset=utf-8"),
    asset!("/leaderboard.js", "leaderboard.js", "text/javascript; charset=utf-8"),
    asset!("/quality.js", "quality.js", "text/javascript; charset=utf-8"),
    asset!("/scrub.js", "scrub.js", "text/javascript; charset=utf-8"),
    asset!("/vote.js", "vote.js", "text/javascript; charset=utf-8"),
    asset!("/zoom.js", "zoom.js", "text/javascript; charset=utf-8"),
    asset!("/results.js", "results.js", "text/javascript; charset=utf-8"),
    asset!("/style.css", "style.css", "text/css; charset=utf-8"),
    asset!("/favicon.svg", "favicon.svg", "image/svg+xml"),
];

static TAGS: LazyLock<[String; ASSETS.len()]> = LazyLock::new(|| {
    ASSETS.map(|asset| {
        let digest = Sha256::digest(asset.bytes);
        let hex: String = digest.iter().take(12).map(|byte| format!("{byte:02x}")).collect();
        format!("\"{hex}\"")
    })
});

/// Answers with the file at the request's path, or 304 where the browser has it.
pub fn respond(request: &HttpRequest, index: usize) -> HttpResponse {
    let (asset, tag) = (&ASSETS[index], TAGS[index].as_str());
    let known = request
        .headers()
        .get(header::IF_NONE_MATCH)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| {
            value.split(',').any(|t| t.trim().trim_start_matches("W/") == tag || t.trim() == "*")
        });
    let mut response = if known { HttpResponse::NotModified() } else { HttpResponse::Ok() };
    response
        .insert_header((header::ETAG, tag))
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        .insert_header((header::CONTENT_SECURITY_POLICY, CSP))
        .insert_header((header::REFERRER_POLICY, "no-referrer"))
        .insert_header(("Cross-Origin-Opener-Policy", "same-origin"));
    if known {
        return response.finish();
    }
    response.insert_header((header::CONTENT_TYPE, asset.content_type)).body(asset.bytes)
}
