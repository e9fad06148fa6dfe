//! Blind votes: a ballot with two images that cost the same, a choice, and the table.

use std::collections::BTreeSet;
use std::sync::Arc;

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};
use rand::SeedableRng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::generate::read;
use super::openapi::{Refusals, WorkRefusals};
use super::{Data, apart, caller};
use crate::serve::auth::Caller;
use crate::serve::body;
use crate::serve::problem::{Body, Kind, Problem};
use crate::serve::server::Shared;
use crate::serve::store::{Ballot, Name, Voted, now};
use crate::serve::vote::Choice;
use crate::serve::vote::leaderboard::leaderboard;
use crate::serve::vote::pairs::{Pool, Side};
use crate::serve::vote::token;

/// Pairs that are found to be alike before no more are looked for.
const MOST_ALIKE: usize = 64;
/// How long a ballot can be used.
const VALID_MS: i64 = 3_600_000;
const DAY_MS: i64 = 86_400_000;

/// `POST /ballots`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Ask {
    /// Who votes, where the server has no keys: 1 to 64 letters, digits, `.`, `_` and `-`; default: the
    /// address.
    #[serde(default)]
    #[schema(min_length = 1, max_length = 64, pattern = "^[A-Za-z0-9._-]+$")]
    voter: Option<String>,
}

/// Two images by different methods, or so it seems.
#[derive(Serialize, ToSchema)]
pub struct BallotBody {
    token: String,
    prompt: String,
    /// What both were allowed to spend.
    contract: String,
    /// Where the images are.
    left: String,
    right: String,
    /// Milliseconds since 1970.
    expires_ms: i64,
}

/// `POST /votes`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Cast {
    token: String,
    choice: Choice,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Query {
    #[serde(default)]
    contract: Option<String>,
}

/// A ballot for a voter.
#[utoipa::path(
    post,
    path = "/ballots",
    tag = "votes",
    request_body = Ask,
    responses(
        (status = 201, body = BallotBody),
        (status = 204, description = "There is no pair that this voter has not seen"),
        Refusals,
        WorkRefusals,
    )
)]
pub async fn give(
    shared: Data,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let bytes = read(&shared, &request, payload).await?;
    let asked: Ask = body::decode_bytes(&bytes)?;
    let caller = caller(&request);
    let voter = voter(&shared, &caller, asked.voter)?;
    let ballot = apart(&shared, move |s| make(s, &caller, voter)).await??;
    Ok(match ballot {
        Some(ballot) => fresh(HttpResponse::Created()).json(ballot),
        None => fresh(HttpResponse::NoContent()).finish(),
    })
}

/// Not kept by anybody: a ballot is used once.
fn fresh(mut response: actix_web::HttpResponseBuilder) -> actix_web::HttpResponseBuilder {
    response.insert_header((header::CACHE_CONTROL, "no-store"));
    response
}

fn voter(shared: &Shared, caller: &Caller, asked: Option<String>) -> Result<String, Problem> {
    let wrong = |message: &str| Err(Problem::field(Kind::InvalidValue, "voter", message));
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    match asked {
        Some(_) if shared.keys.is_some() => wrong("votes count for the API key that sends them"),
        Some(name) if !(1..=64).contains(&name.len()) || !name.chars().all(plain) => {
            wrong("must have 1 to 64 letters, digits, '.', '_' or '-'")
        }
        Some(name) => Ok(format!("name:{name}")),
        None if shared.keys.is_some() => Ok(format!("key:{}", caller.name)),
        None => Ok(format!("address:{}", caller.name)),
    }
}

fn make(shared: &Shared, caller: &Caller, voter: String) -> Result<Option<BallotBody>, Problem> {
    let created_ms = now();
    let client = (!caller.votes_on_all).then_some(caller.name.as_str());
    let (found, met, past) = shared.store.pool(client, &voter, created_ms - VALID_MS)?;
    let since = past.iter().filter(|(at, _)| *at > created_ms - DAY_MS);
    let most = shared.settings.votes_per_day;
    if since.clone().count() as u64 >= most {
        return Err(too_many(most, since.map(|(at, _)| *at).min().unwrap_or(created_ms)));
    }
    let pool = Pool::new(&found, met, past.into_iter().map(|(_, past)| past).collect());
    let mut random = rand_chacha::ChaCha8Rng::from_os_rng();
    let mut aside = BTreeSet::new();
    let shown = loop {
        let Some(shown) = pool.choose(&aside, &mut random) else {
            return Ok(None);
        };
        // Files differ by what they say of themselves; a search often returns the plain image.
        if pixels(shared, &shown.left)? != pixels(shared, &shown.right)? {
            break shown;
        }
        if aside.len() == MOST_ALIKE || !aside.insert(shown.images()) {
            return Ok(None);
        }
    };
    let (id, token) = token::make(shared.store.secret())?;
    let url = |side: &str| format!("/ballots/{token}/{side}.png");
    let body = BallotBody {
        prompt: shown.prompt.clone(),
        contract: shown.contract.clone(),
        left: url("left"),
        right: url("right"),
        expires_ms: created_ms + VALID_MS,
        token,
    };
    shared.store.give(&Ballot { id, created_ms, voter, shown, choice: None })?;
    Ok(Some(body))
}

/// `first`: when the first ballot of those that count was given.
fn too_many(most: u64, first: i64) -> Problem {
    let wait = u64::try_from((first + DAY_MS - now()) / 1000).unwrap_or(0) + 1;
    let detail = format!("{most} votes a day are counted; this voter has them");
    Problem::new(Kind::VoteLimit, detail).retry_after(wait)
}

/// The ballot that a token is for.
fn find(shared: &Shared, text: &str) -> Result<Ballot, Problem> {
    let Some(id) = token::read(shared.store.secret(), text) else {
        return Err(Problem::field(Kind::InvalidValue, "token", "is not of a ballot"));
    };
    let found = shared.store.ballot(id)?;
    let open = found.filter(|b| b.choice.is_some() || b.created_ms > now() - VALID_MS);
    open.ok_or_else(|| Problem::new(Kind::Expired, "the ballot was not used in time"))
}

/// The image, if it is still there.
fn pixels(shared: &Shared, side: &Side) -> Result<Option<image::RgbImage>, Problem> {
    let name = Name::parse(&side.file);
    let file = name.map(|name| shared.store.image(&name)).transpose()?.flatten();
    let decoded = file.map(|file| image::load_from_memory(&file)).transpose();
    Ok(decoded.map_err(Problem::internal)?.map(|image| image.to_rgb8()))
}

/// An image of a ballot, as pixels alone: nothing in it says how it was made.
#[utoipa::path(
    get,
    path = "/ballots/{token}/{side}.png",
    tag = "votes",
    params(
        ("token" = String, Path, description = "Of the ballot"),
        ("side" = String, Path, pattern = "^(left|right)$"),
    ),
    responses(
        (status = 200, content_type = "image/png", body = Vec<u8>),
        (status = 410, description = "The ballot has expired", body = Body,
            content_type = "application/problem+json"),
        Refusals,
    )
)]
pub async fn image(
    shared: Data,
    path: web::Path<(String, String)>,
) -> Result<HttpResponse, Problem> {
    let (token, side) = path.into_inner();
    let bytes = apart(&shared, move |s| -> Result<Vec<u8>, Problem> {
        let missing = |detail: String| Problem::new(Kind::NotFound, detail);
        let ballot = find(s, &token)?;
        let shown = match side.as_str() {
            "left" => ballot.shown.left,
            "right" => ballot.shown.right,
            _ => return Err(missing(format!("a ballot has a left and a right image, no {side}"))),
        };
        let pixels = pixels(s, &shown)?;
        let pixels = pixels.ok_or_else(|| missing("the image was removed".to_owned()))?;
        let mut png = std::io::Cursor::new(Vec::new());
        pixels.write_to(&mut png, image::ImageFormat::Png).map_err(Problem::internal)?;
        Ok(png.into_inner())
    })
    .await??;
    Ok(fresh(HttpResponse::Ok())
        .insert_header((header::CONTENT_TYPE, "image/png"))
        .insert_header((header::CONTENT_SECURITY_POLICY, "default-src 'none'; sandbox"))
        .body(bytes))
}

/// A vote; the answer says what was shown.
#[utoipa::path(
    post,
    path = "/votes",
    tag = "votes",
    request_body = Cast,
    responses(
        (status = 201, description = "Counted", body = Object),
        (status = 410, description = "The ballot has expired", body = Body,
            content_type = "application/problem+json"),
        Refusals,
        WorkRefusals,
    )
)]
pub async fn cast(
    shared: Data,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let bytes = read(&shared, &request, payload).await?;
    let Cast { token, choice } = body::decode_bytes(&bytes)?;
    let caller = caller(&request);
    let revealed = apart(&shared, move |s| -> Result<Value, Problem> {
        let ballot = find(s, &token)?;
        if s.keys.is_some() && ballot.voter != voter(s, &caller, None)? {
            let message = "is of a ballot of another key";
            return Err(Problem::field(Kind::InvalidValue, "token", message));
        }
        let (since, most) = (now() - DAY_MS, s.settings.votes_per_day);
        let conflict = |detail: &str| Err(Problem::new(Kind::Conflict, detail));
        match s.store.vote(&ballot.id, choice, since, most)? {
            Voted::Counted => {}
            Voted::Used => return conflict("the ballot was used already"),
            Voted::Again => return conflict("this voter has voted on these images already"),
            Voted::TooMany(first) => return Err(too_many(most, first)),
        }
        Ok(json!({
            "choice": choice,
            "contract": ballot.shown.contract,
            "left": reveal(s, &ballot.shown.left)?,
            "right": reveal(s, &ballot.shown.right)?,
        }))
    })
    .await??;
    shared.metrics.voted(choice);
    Ok(fresh(HttpResponse::Created()).json(revealed))
}

/// Who made an image, and what for.
fn reveal(shared: &Shared, side: &Side) -> Result<Value, Problem> {
    let record = shared.store.get(&side.generation)?;
    let answer = record.and_then(|record| record.answer);
    let answer: Value =
        answer.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    Ok(json!({
        "player": side.player,
        "generation": side.generation,
        "image": side.position,
        "scores": answer["images"][side.position]["scores"],
        // Of all images of its generation.
        "images": answer["images"].as_array().map(Vec::len),
        "cost": answer["cost"]["actual"],
    }))
}

/// What all votes say, or those under one contract.
#[utoipa::path(
    get,
    path = "/leaderboard",
    tag = "votes",
    params(("contract" = Option<String>, Query, description = "As a ballot names it")),
    responses((status = 200, body = Object), Refusals)
)]
pub async fn table(shared: Data, request: HttpRequest) -> Result<HttpResponse, Problem> {
    let Query { contract } = body::decode_pairs(request.query_string())?;
    let body = apart(&shared, move |s| -> Result<Arc<Value>, Problem> {
        let votes = s.store.vote_count()?;
        let contract = contract.as_deref();
        s.tables.get(contract, votes, || evaluate(s, contract))
    })
    .await??;
    Ok(fresh(HttpResponse::Ok()).json(body.as_ref()))
}

fn evaluate(shared: &Shared, contract: Option<&str>) -> Result<Value, Problem> {
    let (votes, contracts) = shared.store.votes(contract)?;
    let mut body = serde_json::to_value(leaderboard(&votes)).map_err(Problem::internal)?;
    body["contract"] = json!(contract);
    body["contracts"] = json!(contracts);
    Ok(body)
}
